"""S2 to S6, S13: noise an image, read the network's output, step back in three ways, guide."""

import torch

from impl_torch.schedule import gather, per_image

ROOTS = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")  # of image and noise


def q_sample(tables, x0, t, noise):
    """x_t [B, C, H, W] from x0 and noise of that shape, at times t [B]."""
    a, b = (gather(tables[root], t, x0) for root in ROOTS)  # S2
    return a * x0 + b * noise


def target(tables, config, x0, t, noise):
    """What the network learns to give, [B, C, H, W]: the noise, the image, or v."""
    if config.prediction == "eps":  # S2
        return noise
    if config.prediction == "x0":
        return x0
    a, b = (gather(tables[root], t, x0) for root in ROOTS)
    return a * noise - b * x0


def predict_x0_eps(tables, config, x_t, t, out):
    """x0 and eps, both [B, C, H, W], from x_t at times t [B] and the network's output."""
    a, b = (gather(tables[root], t, x_t) for root in ROOTS)  # S3
    if config.prediction == "eps":
        x0, eps = (x_t - b * out) / a, out
    elif config.prediction == "x0":
        x0, eps = out, (x_t - a * out) / b
    else:
        x0, eps = a * x_t - b * out, a * out + b * x_t
    if config.clip:
        x0 = torch.clamp(x0, -1, 1)
        eps = (x_t - a * x0) / b
    return x0, eps


def ddpm_step(tables, config, x_t, t, out, noise):
    """x_{t-1} [B, C, H, W] from x_t at times t [B]; noise has no effect where t = 0."""
    x0, _ = predict_x0_eps(tables, config, x_t, t, out)  # S4
    coef1, coef2 = (gather(tables[f"posterior_mean_coef{i}"], t, x_t) for i in (1, 2))
    variance = tables["posterior_variance" if config.variance == "small" else "betas"]
    sigma = gather(torch.sqrt(variance), t, x_t)
    return coef1 * x0 + coef2 * x_t + torch.where(t.reshape(-1, 1, 1, 1) > 0, sigma * noise, 0)


def ddim_times(timesteps, steps):
    """The times [S] that `steps` of T steps start from: T-1 first, then down."""
    return timesteps - 1 - torch.arange(steps) * timesteps // steps  # S5


def ddim_coefficients(tables, t, t_prev, eta):
    """Factors of x0, eps and noise in a step from t [B] to t_prev [B], as [3, B] in float64."""
    alpha = tables["alphas_cumprod"][t]  # S5
    alpha_prev = tables["alphas_cumprod_prev"][t_prev + 1]  # 1 where t_prev = -1
    sigma = eta * torch.sqrt((1 - alpha_prev) / (1 - alpha)) * torch.sqrt(1 - alpha / alpha_prev)
    radicand = 1 - alpha_prev - sigma**2  # at eta = 1 rounding may take it below 0
    return torch.stack([torch.sqrt(alpha_prev), torch.sqrt(torch.clamp(radicand, min=0)), sigma])


def ddim_step(tables, config, x_t, t, out, noise, coefficients):
    """x [B, C, H, W] at the time that the coefficients [3, B] lead to, from x_t at t [B]."""
    x0, eps = predict_x0_eps(tables, config, x_t, t, out)  # S5
    x0_factor, eps_factor, sigma = (per_image(c, x_t) for c in coefficients)
    return x0_factor * x0 + eps_factor * eps + sigma * noise


def dpmpp_coefficients(tables, times):
    """Factors of x0, eps and x0 - x0_prev in the steps from times [S], as [3, S] in float64.

    Those of x0 - x0_prev are 0 in the first step, which has no x0_prev, and in the last.
    """
    a, b, _ = ddim_coefficients(tables, times, torch.cat([times[1:], torch.tensor([-1])]), 0)
    ratio = tables["sqrt_recipm1_alphas_cumprod"][times]  # S13; b / a before the steps
    h = torch.log(ratio[:-1] / ratio[1:])  # of every step but the last, whose h is infinite
    change = a[1:-1] * (1 - torch.exp(-h[1:])) * h[1:] / (2 * h[:-1])
    return torch.stack([a, b, torch.nn.functional.pad(change, (1, 1))[: len(times)]])


def dpmpp_step(tables, config, x_t, t, out, x0_prev, coefficients):
    """x at the time that the coefficients [3, B] lead to, and x0, both [B, C, H, W].

    It is DDIM's step without noise, moved on by how x0 has changed since the step before.
    """
    x0, eps = predict_x0_eps(tables, config, x_t, t, out)  # S13
    x0_factor, eps_factor, change_factor = (per_image(c, x_t) for c in coefficients)
    return x0_factor * x0 + eps_factor * eps + change_factor * (x0 - x0_prev), x0


def guide(out_null, out_label, guidance_scale):
    """The guided output [B, C, H, W]: 0 is without label, 1 with it, more is beyond."""
    return out_null + guidance_scale * (out_label - out_null)  # S6


def predict(model, config, x, t, labels, guidance_scale):
    """The network's output [B, C, H, W], guided unless guidance_scale is None."""
    if guidance_scale is None:  # S6
        return model(x, t, labels)
    null = torch.full_like(labels, config.num_classes)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, labels]))
    return guide(*both.chunk(2), guidance_scale)


def sample(model, tables, config, x, noise, labels, guidance_scale, method, steps, eta):
    """Every state from x = x_T [B, C, H, W] down, [S, B, C, H, W], in S = steps of T steps.

    method is "ddpm", which needs S = T, "ddim" or "dpmpp"; noise is [S, B, C, H, W] and eta 0 to 1,
    and both have no effect in dpmpp.
    """
    times = ddim_times(config.timesteps, steps)  # S5; in T steps these are all times, as S4 asks
    coefficients = ddim_coefficients(tables, times, torch.cat([times[1:], torch.tensor([-1])]), eta)
    if method == "dpmpp":
        coefficients = dpmpp_coefficients(tables, times)
    states, x0 = [], torch.zeros_like(x)
    for i in range(steps):
        t = torch.full((len(x),), int(times[i]), device=x.device)
        out = predict(model, config, x, t, labels, guidance_scale)
        if method == "ddpm":
            x = ddpm_step(tables, config, x, t, out, noise[i])  # S4
        elif method == "ddim":
            x = ddim_step(tables, config, x, t, out, noise[i], coefficients[:, i : i + 1])  # S5
        else:
            x, x0 = dpmpp_step(tables, config, x, t, out, x0, coefficients[:, i : i + 1])  # S13
        states.append(x)
    return torch.stack(states)
