"""S1: the noise schedule, from betas to the tables that every step reads."""

import jax.numpy as jnp
import numpy as np  # JAX computes in float32 unless told otherwise; the tables are constants


def make_betas(config):
    """betas [T] in float64."""
    if config.schedule == "linear":  # S1
        return np.linspace(config.beta_start, config.beta_end, config.timesteps)
    u = np.arange(config.timesteps + 1) / config.timesteps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def make_schedule(config):
    """The eleven tables by name, each [T] in float64; they are cast where they are read."""
    betas = make_betas(config)  # S1
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.concatenate([np.ones(1), alphas_cumprod[:-1]])
    noise_part = 1 - alphas_cumprod
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(noise_part),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(noise_part / alphas_cumprod),
        "posterior_variance": betas * (1 - alphas_cumprod_prev) / noise_part,
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / noise_part,
        "posterior_mean_coef2": np.sqrt(alphas) * (1 - alphas_cumprod_prev) / noise_part,
    }


def per_image(values, x):
    """One value an image, [B] -> [B, 1, 1, 1], cast to the dtype of x."""
    return jnp.asarray(values, x.dtype).reshape(-1, 1, 1, 1)


def gather(table, t, x):
    """The entries of a table [T] at times t [B], as [B, 1, 1, 1] in the dtype of x."""
    return per_image(jnp.asarray(table, x.dtype)[t], x)
