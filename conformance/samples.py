"""Samples ten digits in every backend from one checkpoint and one noise; draws and compares them"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spec.config import Config, load_config
from spec.goldens import SPEC, Case, GoldenError, Goldens
from spec.noise import sampling_noise

DTYPE = "float32"
CHECKPOINT = SPEC / "checkpoints" / "digits.safetensors"
COUNT, SEED, STEPS, GUIDANCE_SCALE = 10, 1, 50, 1.5
BETWEEN_TWO = 2  # each of two backends may be off by one tolerance


class SamplesError(Exception):
    """Samples that cannot be made; the message says what is missing."""


@dataclasses.dataclass
class Samples:
    """The digits of every backend, and how far they are from those of the first."""

    images: dict[str, np.ndarray]  # backend -> [10, H, W, C]
    problems: dict[str, str]  # backend -> why there are none
    limit: float  # of a difference, as a share of the largest value
    source: str  # the case that the limit comes from

    @property
    def differences(self) -> dict[str, float]:
        """Backend -> max|difference from the first| / max|first|."""
        if not self.images:
            return {}
        first, *others = self.images
        size = float(np.abs(self.images[first]).max())
        return {
            name: float(np.abs(self.images[name] - self.images[first]).max()) / size
            for name in others
        }

    @property
    def ok(self) -> bool:
        within = all(difference <= self.limit for difference in self.differences.values())
        return bool(self.images) and not self.problems and within

    def report(self) -> dict[str, Any]:
        """The entry of the JSON report."""
        return {
            "ok": self.ok,
            "backends": list(self.images),
            "differences": self.differences,
            "limit": self.limit,
            "limit_from": self.source,
            "problems": self.problems,
        }


def sample_case(config: Config) -> Case:
    """The call that makes the digits: DDIM, guided, one digit of each class."""
    return Case(
        id="samples/digits",
        level=6,
        clause="S6",
        config=config,
        call="sample",
        params="checkpoint:digits",
        inputs={"x": "given:x", "noise": "given:noise", "labels": "given:labels"},
        options={"method": "ddim", "steps": STEPS, "eta": 0.0, "guidance_scale": GUIDANCE_SCALE},
        outputs=(),
        causes=(),
        oracle="",
    )


def limit_between(goldens: Goldens) -> tuple[float, str]:
    """How far two backends may differ: twice the float32 tolerance of the guided golden on digits.

    Raises SamplesError where the manifest has no such case.
    """
    for case in goldens.cases:
        guided = case.options.get("guidance_scale") is not None
        if case.call == "sample" and case.config.name == "digits" and guided:
            for output in case.outputs:
                limit = output.tolerance.get(DTYPE, {}).get("max")
                if limit is not None:
                    return BETWEEN_TWO * float(limit), case.id
    raise SamplesError(
        "the manifest has no guided sample of digits with a float32 max tolerance, which the "
        "comparison of samples takes its limit from; restore spec/goldens from the repository"
    )


def make_samples(suite: Any, seen: Callable[[str], None]) -> Samples:
    """Sample in every backend's float32 worker. Raises SamplesError where the checkpoint lacks."""
    if not CHECKPOINT.is_file():
        raise SamplesError(
            f"checkpoint spec/checkpoints/{CHECKPOINT.name} is missing, so no digits can be "
            "sampled; restore it from the repository, or use --no-samples"
        )
    goldens = suite.plan.goldens
    try:
        goldens.tree("checkpoint:digits")
    except GoldenError as error:
        raise SamplesError(str(error)) from error
    limit, source = limit_between(goldens)
    config = load_config("digits")
    x, noise = sampling_noise(config, COUNT, SEED, STEPS)
    given = {"x": x, "noise": noise, "labels": np.arange(COUNT, dtype=np.int64)}
    samples = Samples({}, {}, limit, source)
    shape = (STEPS, COUNT, *config.image_shape)
    for impl in suite.plan.impls:
        seen(f"sampling ten digits in {impl.name}")
        outcome, _ = suite.ask_case(impl, DTYPE, sample_case(config), given)
        trajectory = outcome.results.get("trajectory")
        if outcome.status != "done" or trajectory is None:
            samples.problems[impl.name] = f"{outcome.status}: {outcome.message}"
        elif trajectory.shape != shape or not np.isfinite(trajectory).all():
            samples.problems[impl.name] = (
                f"gave {list(trajectory.shape)} with "
                f"{int(np.sum(~np.isfinite(trajectory)))} values not finite; "
                f"expected {list(shape)}, all finite"
            )
        else:
            samples.images[impl.name] = trajectory[-1].astype(np.float64)
    return samples


def draw(samples: Samples, path: Path) -> None:
    """Write the picture: a row of digits for each backend, then each one's differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(samples.images)
    first = samples.images[names[0]]
    rows: list[tuple[str, np.ndarray, float | None]]
    rows = [(name, samples.images[name][..., 0], None) for name in names]
    for name, difference in samples.differences.items():
        rows.append((name, np.abs(samples.images[name] - first)[..., 0], difference))
    figure = Figure(figsize=(13, 1.16 * len(rows) + 0.75), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(rows),
        COUNT,
        squeeze=False,
        gridspec_kw={
            "left": 0.155,
            "right": 0.995,
            "top": 1 - 0.62 / figure.get_figheight(),
            "bottom": 0.08 / figure.get_figheight(),
            "wspace": 0.06,
            "hspace": 0.08,
        },
    )
    figure.suptitle(
        f"One digit of each class: guidance {GUIDANCE_SCALE}, DDIM {STEPS} steps, float32, "
        "the same weights and noise",
        fontsize=11,
        y=1 - 0.12 / figure.get_figheight(),
        va="top",
    )
    for label, axis in enumerate(axes[0]):
        axis.set_title(str(label), fontsize=11, pad=4)
    for row, (name, images, share) in zip(axes, rows, strict=True):
        largest = float(images.max())
        for axis, image in zip(row, images, strict=True):
            if share is None:
                axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            else:
                top = largest or 1.0
                axis.imshow(image, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(linewidth=0.5, color="0.6")
        text = name
        if share is not None:
            verdict = "of" if share <= samples.limit else "OVER"
            text = f"{name}\nminus {names[0]}\nmax {share:.1e}\n{verdict} {samples.limit:.1e}"
        row[0].text(
            -0.12,
            0.5,
            text,
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=10 if share is None else 8.5,
            family="monospace",
            color="black" if share is None else "0.3",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)
