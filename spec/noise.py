"""S10: the shared random stream. Counter-based, keyed by (seed, purpose, step)."""

import math
from typing import NamedTuple

import numpy as np

from spec.config import Config

PURPOSES = ("init", "rows", "t", "noise", "label_dropout", "x_T", "z", "split", "golden")


class Draws(NamedTuple):
    """The random quantities of one training step."""

    rows: np.ndarray  # [B] int64, which images
    t: np.ndarray  # [B] int64, 0..T-1
    noise: np.ndarray  # [B, H, W, C] float64
    drop: np.ndarray  # [B] bool, where the label becomes null


def words(seed: int, purpose: str, step: int, count: int, first: int = 0) -> np.ndarray:
    """`count` raw 64-bit words of Philox4x64-10: key (seed, purpose), counter (0, 0, step, 0).

    They begin with word `first`: a counter, which gives four words, starts anywhere.

    Raises ValueError for an unknown purpose, or a seed or step outside 0..2^64-1.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}; allowed are {', '.join(PURPOSES)}")
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} = {value} is outside 0..2^64-1; choose one inside")
    key = np.array([seed, PURPOSES.index(purpose)], np.uint64)
    counter, skipped = np.array([first // 4, 0, step, 0], np.uint64), first % 4
    return np.random.Philox(counter=counter, key=key).random_raw(skipped + count)[skipped:]


def uniforms(
    seed: int, purpose: str, step: int, shape: tuple[int, ...], first: int = 0
) -> np.ndarray:
    """Uniforms in (0, 1], float64, in C order of `shape`: ((word >> 11) + 0.5) * 2^-53.

    Never 0, so that a logarithm is safe; 1 where the sum rounds up, once in 2^53 words.
    """
    raw = words(seed, purpose, step, math.prod(shape), first)
    return (((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)


def normals(
    seed: int, purpose: str, step: int, shape: tuple[int, ...], first: int = 0
) -> np.ndarray:
    """Standard normals, float64, in C order of `shape`, by Box-Muller: cosine, sine, cosine, ...

    They begin with normal `first` of the stream; none before it is drawn but its pair's cosine.

    Source: Box & Muller 1958. Values may differ in the last bit between mathematics libraries.
    """
    count, skipped = math.prod(shape), first % 2
    pairs = uniforms(seed, purpose, step, ((skipped + count + 1) // 2, 2), first - skipped)
    radius, angle = np.sqrt(-2.0 * np.log(pairs[:, 0])), 2.0 * np.pi * pairs[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)[skipped : skipped + count].reshape(shape)


def integers(seed: int, purpose: str, step: int, shape: tuple[int, ...], high: int) -> np.ndarray:
    """Integers 0..high-1, int64: floor(uniform * high)."""
    scaled = (uniforms(seed, purpose, step, shape) * high).astype(np.int64)
    return np.minimum(scaled, high - 1)


def training_draws(config: Config, count: int, seed: int, step: int) -> Draws:
    """What step `step` of a shared-noise run draws from `count` training images."""
    batch = (config.batch_size,)
    return Draws(
        rows=integers(seed, "rows", step, batch, count),
        t=integers(seed, "t", step, batch, config.timesteps),
        noise=normals(seed, "noise", step, (*batch, *config.image_shape)),
        drop=uniforms(seed, "label_dropout", step, batch) < config.label_dropout,
    )


def sampling_noise(
    config: Config, count: int, seed: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """x_T [B, H, W, C] and z [steps, B, H, W, C] of a shared-noise trajectory, float64.

    Step i draws z keyed by i, for the last step too, where it has no effect (S4).
    """
    shape = (count, *config.image_shape)
    return normals(seed, "x_T", 0, shape), np.stack(
        [normals(seed, "z", i, shape) for i in range(steps)]
    )
