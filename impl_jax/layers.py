"""The layers with every default of the framework written out.

The framework wants a source of initial values; S10 gives other ones, so Rngs(0) is never seen.
A layer computes in its dtype; in bfloat16 its parameters stay float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPS = 1e-6  # of every GroupNorm (S7)


def time_table(timesteps, width):
    """[T, width] in float64: the sines of every time, then the cosines."""
    half = width // 2  # S7
    frequencies = np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
    angles = np.arange(timesteps)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def kept(dtype):
    """The dtype of parameters whose layer computes in `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(fan_in, fan_out, dtype):
    """x [..., I] -> [..., O]."""
    return nnx.Linear(
        fan_in, fan_out, use_bias=True, dtype=dtype, param_dtype=kept(dtype), rngs=nnx.Rngs(0)
    )


def embedding(rows, width, dtype):
    """Row numbers [B] -> [B, O]."""
    return nnx.Embed(rows, width, dtype=dtype, param_dtype=kept(dtype), rngs=nnx.Rngs(0))


def conv(fan_in, fan_out, dtype, size=3, stride=1, pad=(1, 1)):
    """x [B, H, W, I] -> [B, H', W', O]; pad is (above, below), and the same left and right."""
    padding = (pad, pad)  # the framework's default, "SAME", would pad a stride of 2 by (0, 1)
    return nnx.Conv(
        fan_in,
        fan_out,
        (size, size),
        stride,
        padding=padding,
        dtype=dtype,
        param_dtype=kept(dtype),
        rngs=nnx.Rngs(0),
    )


def group_norm(groups, width, dtype):
    """x [B, H, W, C], normalised over H, W and neighbouring channels, a group each, then scaled.

    The framework's default variance, E[x^2] - E[x]^2 in one pass, loses all digits where the mean
    is far above the deviation; two passes do not.
    """
    return nnx.GroupNorm(
        width,
        groups,
        epsilon=EPS,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=kept(dtype),
        rngs=nnx.Rngs(0),
    )


def silu(x):
    """x * sigmoid(x)."""
    return jax.nn.silu(x)


def attend(q, k, v):
    """q, k, v [B, N, C] -> [B, N, C]: softmax over keys of q.k / sqrt(C), applied to v."""
    scores = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5  # [B, queries, keys]
    return jax.nn.softmax(scores, axis=-1) @ v


def nearest(x):
    """x [B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
