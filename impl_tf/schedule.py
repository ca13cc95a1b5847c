"""S1: the noise schedule, from betas to the tables that every step reads."""

import math

import tensorflow as tf


def make_betas(config):
    """betas [T] in float64."""
    if config.schedule == "linear":  # S1
        ends = tf.constant([config.beta_start, config.beta_end], tf.float64)
        return tf.linspace(ends[0], ends[1], config.timesteps)
    u = tf.range(config.timesteps + 1, dtype=tf.float64) / config.timesteps
    f = tf.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return tf.minimum(1 - f[1:] / f[:-1], 0.999)


def make_schedule(config):
    """The eleven tables by name, each [T] in float64; they are cast where they are read."""
    betas = make_betas(config)  # S1
    alphas = 1 - betas
    alphas_cumprod = tf.math.cumprod(alphas)
    alphas_cumprod_prev = tf.concat([tf.ones(1, tf.float64), alphas_cumprod[:-1]], 0)
    noise_part = 1 - alphas_cumprod
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": tf.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": tf.sqrt(noise_part),
        "sqrt_recip_alphas_cumprod": tf.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": tf.sqrt(noise_part / alphas_cumprod),
        "posterior_variance": betas * (1 - alphas_cumprod_prev) / noise_part,
        "posterior_mean_coef1": betas * tf.sqrt(alphas_cumprod_prev) / noise_part,
        "posterior_mean_coef2": tf.sqrt(alphas) * (1 - alphas_cumprod_prev) / noise_part,
    }


def per_image(values, x):
    """One value an image, [B] -> [B, 1, 1, 1], cast to the dtype of x."""
    return tf.reshape(tf.cast(values, x.dtype), [-1, 1, 1, 1])


def gather(table, t, x):
    """The entries of a table [T] at times t [B], as [B, 1, 1, 1] in the dtype of x."""
    return per_image(tf.gather(table, t), x)
