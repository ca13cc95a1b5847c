"""Drawing with a model: noise of the shared stream in slices, batches, and what to keep of them."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lab.pictures import grid
from spec.config import Config
from spec.noise import normals

DDIM_STEPS = 50
BATCH = 256  # images drawn at once, at most
BATCH_BYTES = 2**29  # that the noise and the trajectory of a batch may take, about
PROGRESS_IMAGES = 16  # of a config without classes; with classes, two of each, up to ten


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to draw; images are numbered, and image i is the same however many there are."""

    count: int
    labels: np.ndarray | None  # [count]
    method: str
    steps: int
    eta: float = 0.0
    guidance_scale: float | None = None
    seed: int = 0

    @property
    def noisy(self) -> bool:
        """Whether noise is drawn at every step."""
        return self.method == "ddpm" or bool(self.eta)


def parse_labels(text: str | None, config: Config) -> list[int]:
    """Labels from a list such as `0,1,2`; every class where there is none; [] without classes."""
    if text is None:
        return list(range(config.num_classes))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--labels {text!r} is not a list such as 0,1,2") from error


def batch_noise(
    config: Config, plan: Plan, first: int, rows: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """x_T [rows, H, W, C] and z [steps, rows, H, W, C] or None, float32, of images first, ..."""
    size, shape = math.prod(config.image_shape), (rows, *config.image_shape)
    x = normals(plan.seed, "x_T", 0, shape, first * size).astype(np.float32)
    if not plan.noisy:
        return x, None
    z = np.empty((plan.steps, *shape), np.float32)
    for i in range(plan.steps):
        z[i] = normals(plan.seed, "z", i, shape, first * size)
    return x, z


def batch_size(config: Config, plan: Plan) -> int:
    """Images drawn at once: all where they are few, else equal parts that fit into memory."""
    # noise, and the trajectory twice: as it is made, and as it is handed out
    image = 4 * math.prod(config.image_shape) * plan.steps * (3 if plan.noisy else 2)
    most = max(1, min(BATCH, BATCH_BYTES // image))
    return math.ceil(plan.count / math.ceil(plan.count / most))


def draw(model, config: Config, plan: Plan, moments: list[int]) -> Iterator[np.ndarray]:
    """Batches [len(moments), rows, H, W, C] of the images, in order, at these moments.

    Moment 0 is x_T, moment `steps` is the sample. The noise is that of the whole count, so that
    the split into batches shows in rounding alone.
    """
    size = batch_size(config, plan)
    for first in range(0, plan.count, size):
        x, z = batch_noise(config, plan, first, size)
        labels = plan.labels
        if labels is not None:  # of the last batch, repeated: one shape is compiled once
            labels = labels[np.arange(first, first + size) % plan.count]
        trajectory = model.sample(
            x,
            z,
            labels,
            method=plan.method,
            steps=plan.steps,
            eta=plan.eta,
            guidance_scale=plan.guidance_scale,
        )
        kept = np.stack([x if at == 0 else trajectory[at - 1] for at in moments])
        yield kept[:, : plan.count - first]


def even_moments(steps: int, count: int) -> list[int]:
    """At most `count` moments, evenly from 0 (noise) to `steps` (the sample), both included."""
    return [int(at) for at in np.unique(np.linspace(0, steps, min(count, steps + 1)).round())]


def progress_picture(model, config: Config, seed: int) -> np.ndarray:
    """What the model draws, as a picture [H', W', 3]: the same noise and labels every time."""
    classes = config.num_classes
    count = 2 * min(classes, 10) if classes else PROGRESS_IMAGES
    labels = np.arange(count) % min(classes, 10) if classes else None
    steps = min(DDIM_STEPS, config.timesteps)
    x = normals(seed, "x_T", 0, (count, *config.image_shape)).astype(np.float32)
    images = model.sample(x, None, labels, method="ddim", steps=steps)[-1]
    return grid(images, min(classes, 10) if classes > 1 else 4)
