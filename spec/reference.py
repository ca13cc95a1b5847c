"""The clauses in their plainest form: slow float64 NumPy, the second opinion behind the goldens.

Everything here is written to be read beside SPEC.md and to be independent of the implementations.
The network and its loss also work on complex parameters, so that an imaginary step of 1e-30 gives
an exact directional derivative: there is no abs, norm, variance function or comparison of complex
numbers in them. Images are [B, H, W, C]; `p` is the parameters, a dict by canonical name; `s` is
the tables of S1, from `make_schedule` or from the CSV files.
"""

import math

import numpy as np

from spec.config import Config
from spec.params import Block, blocks, find_block

Tree = dict[str, np.ndarray]


# S1


def make_schedule(config: Config) -> Tree:
    """The eleven tables of S1, each [T], float64."""
    steps = config.timesteps
    if config.schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, steps)
    else:

        def f(t: float) -> float:
            return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)])
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.concatenate([[1.0], alphas_cumprod[:-1]])
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }


def per_row(table: np.ndarray, t: np.ndarray) -> np.ndarray:
    """table[t] as [B, 1, 1, 1], to be spread over images."""
    return table[t][:, None, None, None]


# S2


def q_sample(s: Tree, x0: np.ndarray, t: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """x_t [B, H, W, C] from x0 and noise."""
    signal = per_row(s["sqrt_alphas_cumprod"], t)
    return signal * x0 + per_row(s["sqrt_one_minus_alphas_cumprod"], t) * noise


def target(config: Config, s: Tree, x0: np.ndarray, t: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What the network should give, [B, H, W, C]."""
    if config.prediction == "eps":
        return noise
    if config.prediction == "x0":
        return x0
    signal = per_row(s["sqrt_alphas_cumprod"], t)
    return signal * noise - per_row(s["sqrt_one_minus_alphas_cumprod"], t) * x0


# S3


def predict_x0_eps(
    config: Config, s: Tree, x_t: np.ndarray, t: np.ndarray, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x0 and eps, both [B, H, W, C], from x_t and the network's output."""
    signal = per_row(s["sqrt_alphas_cumprod"], t)
    sigma = per_row(s["sqrt_one_minus_alphas_cumprod"], t)
    if config.prediction == "eps":
        x0, eps = (x_t - sigma * out) / signal, out
    elif config.prediction == "x0":
        x0, eps = out, (x_t - signal * out) / sigma
    else:
        x0, eps = signal * x_t - sigma * out, signal * out + sigma * x_t
    if config.clip:
        x0 = np.clip(x0, -1, 1)
        eps = (x_t - signal * x0) / sigma
    return x0, eps


# S4


def ddpm_step(
    config: Config, s: Tree, x_t: np.ndarray, t: np.ndarray, out: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """x_{t-1} [B, H, W, C]; at t = 0 the noise has no effect."""
    x0, _ = predict_x0_eps(config, s, x_t, t, out)
    mean = per_row(s["posterior_mean_coef1"], t) * x0 + per_row(s["posterior_mean_coef2"], t) * x_t
    variance = s["posterior_variance"] if config.variance == "small" else s["betas"]
    later = (t > 0)[:, None, None, None]
    return mean + later * np.sqrt(per_row(variance, t)) * noise


# S5


def ddim_times(timesteps: int, steps: int) -> list[int]:
    """The `steps` times that DDIM and DPM-Solver++ visit, from T-1 down."""
    return [timesteps - 1 - i * timesteps // steps for i in range(steps)]


def ddim_step(
    config: Config,
    s: Tree,
    x_t: np.ndarray,
    t: np.ndarray,
    t_prev: np.ndarray,
    out: np.ndarray,
    noise: np.ndarray,
    eta: float,
) -> np.ndarray:
    """x at t_prev [B], -1 being the end, from x_t at t [B]."""
    x0, eps = predict_x0_eps(config, s, x_t, t, out)
    now = s["alphas_cumprod"][t]
    then = np.array([1.0 if i < 0 else s["alphas_cumprod"][i] for i in t_prev])
    sigma = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
    toward = np.sqrt(np.maximum(1 - then - sigma * sigma, 0))
    rows = (len(t), 1, 1, 1)
    return (
        np.sqrt(then).reshape(rows) * x0 + toward.reshape(rows) * eps + sigma.reshape(rows) * noise
    )


# S13


def dpmpp_step(
    config: Config,
    s: Tree,
    x: np.ndarray,
    times: list[int],
    i: int,
    out: np.ndarray,
    x0_before: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """x [B, H, W, C] at times[i + 1], or at the end after the last, from x at times[i]; and x0."""
    x0, _ = predict_x0_eps(config, s, x, np.full(len(x), times[i]), out)
    if i == len(times) - 1:
        return x0, x0

    def half_log_snr(t: int) -> float:
        return math.log(s["alphas_cumprod"][t] / (1 - s["alphas_cumprod"][t])) / 2

    now, following = times[i], times[i + 1]
    h = half_log_snr(following) - half_log_snr(now)
    data = x0
    if x0_before is not None:
        r = (half_log_snr(now) - half_log_snr(times[i - 1])) / h
        data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    alpha, sigma = s["sqrt_alphas_cumprod"], s["sqrt_one_minus_alphas_cumprod"]
    return sigma[following] / sigma[now] * x - alpha[following] * math.expm1(-h) * data, x0


# S6


def guide(out_null: np.ndarray, out_label: np.ndarray, guidance_scale: float) -> np.ndarray:
    """The guided output [B, H, W, C]."""
    return out_null + guidance_scale * (out_label - out_null)


def drop_labels(config: Config, labels: np.ndarray, drop: np.ndarray | None) -> np.ndarray:
    """Labels [B], null where `drop` says so."""
    return labels if drop is None else np.where(drop, config.num_classes, labels)


# S7


def linear(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    """x [..., I] to [..., O]."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def conv(
    p: Tree, name: str, x: np.ndarray, stride: int = 1, pad: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """Convolution (no kernel flip) with `pad` zeros before and after H and W, as a sum of windows.

    x [B, H, W, I], weight OIHW, to [B, H', W', O].
    """
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    rows, columns = weight.shape[2:]
    high, wide = (x.shape[1] - rows) // stride + 1, (x.shape[2] - columns) // stride + 1
    y = np.zeros((len(x), high, wide, len(bias)), np.result_type(x, weight)) + bias
    for i in range(rows):
        for j in range(columns):
            window = x[:, i : i + stride * (high - 1) + 1 : stride]
            window = window[:, :, j : j + stride * (wide - 1) + 1 : stride]
            y = y + window @ weight[:, :, i, j].T
    return y


def group_norm(config: Config, p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    """GroupNorm of x [B, H, W, C]: neighbouring channels form a group, epsilon 1e-6."""
    b, h, w, c = x.shape
    grouped = x.reshape(b, h, w, config.groups, c // config.groups)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=(1, 2, 4), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return normed * p[f"{name}.weight"] + p[f"{name}.bias"]


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, shifted by the largest real part."""
    e = np.exp(x - x.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def time_proj(config: Config, t: np.ndarray) -> np.ndarray:
    """[sin | cos] of t times the frequencies, [B, channels[0]]."""
    half = config.channels[0] // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - 1))
    angles = t[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def time_embedding(config: Config, p: Tree, t: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """emb [B, 4 * channels[0]] of times and labels."""
    emb = linear(p, "time_embedding.linear_1", time_proj(config, t))
    emb = linear(p, "time_embedding.linear_2", silu(emb))
    if config.num_classes:
        emb = emb + p["class_embedding.weight"][labels]
    return emb


def resnet(config: Config, p: Tree, name: str, x: np.ndarray, emb: np.ndarray) -> np.ndarray:
    """One residual block, x [B, H, W, I] to [B, H, W, O]."""
    h = conv(p, f"{name}.conv1", silu(group_norm(config, p, f"{name}.norm1", x)))
    h = h + linear(p, f"{name}.time_emb_proj", silu(emb))[:, None, None, :]
    h = conv(p, f"{name}.conv2", silu(group_norm(config, p, f"{name}.norm2", h)))
    if f"{name}.conv_shortcut.weight" in p:
        x = conv(p, f"{name}.conv_shortcut", x, pad=(0, 0))
    return x + h


def attention(config: Config, p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    """Self-attention over the pixels in row-major order, one head, x [B, H, W, C]."""
    b, h, w, c = x.shape
    sequence = group_norm(config, p, f"{name}.group_norm", x).reshape(b, h * w, c)
    q = linear(p, f"{name}.to_q", sequence)
    k = linear(p, f"{name}.to_k", sequence)
    v = linear(p, f"{name}.to_v", sequence)
    weights = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(c))  # [B, queries, keys]
    return x + linear(p, f"{name}.to_out.0", weights @ v).reshape(x.shape)


def run_block(
    config: Config,
    p: Tree,
    block: Block | str,
    x: np.ndarray | None = None,
    emb: np.ndarray | None = None,
    t: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The output of one block (by itself or by name) on the inputs that `Block.inputs` names."""
    block = find_block(config, block) if isinstance(block, str) else block
    name = block.name
    if block.kind == "time_proj":
        return time_proj(config, t)
    if block.kind == "emb":
        return time_embedding(config, p, t, labels)
    if block.kind == "conv_in":
        return conv(p, "conv_in", x)
    if block.kind == "resnet":
        return resnet(config, p, name, x, emb)
    if block.kind == "attention":
        return attention(config, p, name, x)
    if block.kind == "downsample":
        return conv(p, f"{name}.conv", x, stride=2, pad=(0, 1))
    if block.kind == "upsample":
        return conv(p, f"{name}.conv", x.repeat(2, axis=1).repeat(2, axis=2))
    return conv(p, "conv_out", silu(group_norm(config, p, "conv_norm_out", x)))


def taps(
    config: Config, p: Tree, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None = None
) -> Tree:
    """The output of every block by name, in the order in which the blocks run."""
    recorded: Tree = {}
    skips: list[np.ndarray] = []
    h, emb = x, None
    for block in blocks(config):
        up = block.name.startswith("up_blocks")
        if block.kind == "time_proj":
            recorded[block.name] = run_block(config, p, block, t=t)
            continue
        if block.kind == "emb":
            emb = recorded[block.name] = run_block(config, p, block, t=t, labels=labels)
            continue
        if up and block.kind == "resnet":
            h = np.concatenate([h, skips.pop()], axis=-1)
        if block.name.startswith("down_blocks") and block.kind == "attention":
            skips.pop()  # the resnet before it: its skip is taken after the attention
        h = recorded[block.name] = run_block(config, p, block, x=h, emb=emb)
        if block.kind == "conv_in" or block.name.startswith("down_blocks"):
            skips.append(h)
    return recorded


def predict(
    config: Config, p: Tree, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None = None
) -> np.ndarray:
    """The network's output [B, H, W, C]."""
    return taps(config, p, x, t, labels)["conv_out"]


# S8


def loss(
    config: Config,
    s: Tree,
    p: Tree,
    x0: np.ndarray,
    t: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray | None = None,
    drop: np.ndarray | None = None,
) -> complex:
    """Mean squared error over all elements; complex where the parameters are."""
    if config.num_classes:
        labels = drop_labels(config, labels, drop)
    out = predict(config, p, q_sample(s, x0, t, noise), t, labels)
    return ((out - target(config, s, x0, t, noise)) ** 2).mean()


def directional_derivative(config: Config, s: Tree, p: Tree, direction: Tree, batch: Tree) -> float:
    """d loss / ds of parameters p + s * direction at s = 0, by one imaginary step.

    Names that `direction` leaves out stay as they are. Source: Squire & Trapp 1998.
    """
    step = 1e-30
    moved = {n: p[n] + 1j * step * direction[n] if n in direction else p[n] for n in p}
    return float(loss(config, s, moved, **batch).imag / step)


# S9


def initial_state(p: Tree, step: int = 0) -> dict:
    """A training state: zero m and v, EMA equal to the parameters."""
    zeros = {name: np.zeros_like(value) for name, value in p.items()}
    return {"step": step, "params": dict(p), "m": zeros, "v": dict(zeros), "ema": dict(p)}


def update(config: Config, state: dict, grads: Tree) -> dict:
    """The state after one update: clip, Adam, EMA, step + 1."""
    k = state["step"]
    if config.max_grad_norm:
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        scale = config.max_grad_norm / max(norm, config.max_grad_norm)
        grads = {name: g * scale for name, g in grads.items()}
    rate = config.learning_rate
    if config.warmup:
        rate = rate * min(1.0, (k + 1) / config.warmup)
    decay = min(config.ema_decay, (1 + k) / (10 + k))
    new: dict = {"step": k + 1, "params": {}, "m": {}, "v": {}, "ema": {}}
    for name, g in grads.items():
        m = 0.9 * state["m"][name] + 0.1 * g
        v = 0.999 * state["v"][name] + 0.001 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (k + 1)), v / (1 - 0.999 ** (k + 1))
        value = state["params"][name] - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
        new["m"][name], new["v"][name], new["params"][name] = m, v, value
        new["ema"][name] = decay * state["ema"][name] + (1 - decay) * value
    return new


# L6


def sample(
    config: Config,
    s: Tree,
    p: Tree,
    x: np.ndarray,
    noise: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    *,
    method: str = "ddpm",
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
) -> np.ndarray:
    """The whole trajectory [S, B, H, W, C] from x = x_T (S4, S5, S6)."""
    steps = config.timesteps if steps is None else steps
    if method == "ddpm":
        times = list(reversed(range(config.timesteps)))
    else:
        times = ddim_times(config.timesteps, steps)
    trajectory, x0 = [], None
    for i, time in enumerate(times):
        t = np.full(len(x), time)
        if guidance_scale is None:
            out = predict(config, p, x, t, labels)
        else:
            out_null = predict(config, p, x, t, np.full(len(x), config.num_classes))
            out = guide(out_null, predict(config, p, x, t, labels), guidance_scale)
        z = np.zeros_like(x) if noise is None else noise[i]
        if method == "ddpm":
            x = ddpm_step(config, s, x, t, out, z)
        elif method == "dpmpp":
            x, x0 = dpmpp_step(config, s, x, times, i, out, x0)
        else:
            following = times[i + 1] if i + 1 < steps else -1
            x = ddim_step(config, s, x, t, np.full(len(x), following), out, z, eta)
        trajectory.append(x)
    return np.stack(trajectory)


# The golden cases


def moved(state: dict, before: Tree) -> Tree:
    """delta, m, v and ema_delta of a state by name, against the parameters before."""
    found = {}
    for name, start in before.items():
        found |= {
            f"delta/{name}": state["params"][name] - start,
            f"m/{name}": state["m"][name],
            f"v/{name}": state["v"][name],
            f"ema_delta/{name}": state["ema"][name] - start,
        }
    return found


def answer(
    config: Config, s: Tree, call: str, options: dict, inputs: dict, p: Tree | None = None
) -> Tree:
    """The results by key of a golden case that needs no gradient. Raises ValueError for others."""
    if call == "schedule":
        return s
    if call == "q_sample":
        return {"out": q_sample(s, **inputs)}
    if call == "target":
        return {"out": target(config, s, **inputs)}
    if call == "predict_x0_eps":
        return dict(zip(("x0", "eps"), predict_x0_eps(config, s, **inputs), strict=True))
    if call == "ddpm_step":
        return {"out": ddpm_step(config, s, **inputs)}
    if call == "ddim_step":
        return {"out": ddim_step(config, s, **inputs, **options)}
    if call == "guide":
        return {"out": guide(**inputs, **options)}
    if call == "run_block":
        return {"out": run_block(config, p, options["name"], **inputs)}
    if call == "predict":
        return {"out": predict(config, p, **inputs)}
    if call == "taps":
        return taps(config, p, **inputs)
    if call == "sample":
        return {"trajectory": sample(config, s, p, **inputs, **options)}
    if call == "apply_gradients":
        state = initial_state(p, options.get("step", 0))
        state |= {part: inputs[part] for part in ("m", "v") if part in inputs}
        for key in options["sequence"]:
            state = update(config, state, inputs[f"grads/{key}"])
        return moved(state, p)
    raise ValueError(f"the reference has no gradients of its own: {call!r}")
