"""How near fast samplers come to the path that they follow: DDIM and DPM-Solver++(2M) (S5, S13).

Without noise, x_T alone decides what a network's sample is, and steps only cut the path short. So
the sample of as many steps as there are timesteps, by DDIM, is what a sample of fewer steps is held
against: from the same x_T, the root of the mean squared difference of all pixels. The same is asked
of the state before the last step, since that step lands on x0 whatever the sampler.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from lab.pictures import grid
from spec.backend import Model
from spec.config import Config
from spec.noise import normals

NAMES = {"ddim": "DDIM", "dpmpp": "DPM-Solver++(2M)"}
STEPS = (5, 10, 20, 50)
SCALE = 1.5  # of guidance
BATCH = 50  # images drawn at a time, at most
SHOWN = 5  # images in each cell of the picture
COLOURS = {"ddim": "#4269d0", "dpmpp": "#ff725c"}


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far the samples of fewer steps are from those of all steps, at one guidance scale."""

    guidance_scale: float | None  # None: not guided
    rms: dict[str, list[float]]  # of each method, at STEPS
    before: dict[str, list[float]]  # the same before the last step, against the same time
    apart: float  # of the two methods, both with all steps
    size: float  # root mean square of the samples that the others are held against
    images: dict[str, list[np.ndarray]]  # the first few of each method at STEPS
    exact: np.ndarray  # and of all steps


def check_config(config: Config) -> None:
    """Raise ValueError for a schedule too short to be cut short."""
    if config.timesteps <= max(STEPS):
        raise ValueError(
            f"config {config.name!r} has {config.timesteps} timesteps; samples of "
            f"{', '.join(map(str, STEPS))} steps are held against all of them, so choose a run of "
            f"more than {max(STEPS)}"
        )


def scales_of(config: Config) -> tuple[float | None, ...]:
    """Not guided, and guided where the config has classes."""
    return (None, SCALE) if config.num_classes else (None,)


def work(config: Config) -> int:
    """How many steps `measure` takes at each guidance scale."""
    return 2 * (config.timesteps + sum(STEPS))


def measure(
    model: Model,
    config: Config,
    guidance_scale: float | None,
    count: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> Errors:
    """The errors of both methods over `count` images, from the shared stream's x_T (S10).

    advance is told of every number of steps that is done. Raises ArithmeticError where a sample is
    not finite.
    """
    x = normals(seed, "x_T", 0, (count, *config.image_shape)).astype(np.float32)
    labels = np.arange(count) % config.num_classes if config.num_classes else None
    parts = -(-count // BATCH)
    size = -(-count // parts)

    def draw(method: str, steps: int, states: list[int]) -> np.ndarray:
        """These states of a trajectory, [len(states), N, H, W, C] in float64."""
        images = []
        for start in range(0, count, size):
            # the last batch is filled up from the first: compiled code wants one size
            rows = np.arange(start, start + size) % count
            found = model.sample(
                x[rows],
                None,
                None if labels is None else labels[rows],
                method=method,
                steps=steps,
                guidance_scale=guidance_scale,
            )
            images.append(found[states, : count - start].astype(np.float64))
        advance(steps)
        whole = np.concatenate(images, axis=1)
        if not np.isfinite(whole).all():
            raise ArithmeticError(
                f"{NAMES[method]} in {steps} steps gave NaN or infinity: the weights are unfit, or "
                "not those of this config; nothing was written"
            )
        return whole

    total = config.timesteps
    # S steps come last to T-1 - floor((S-1) T/S) (S5), where all steps come as their state:
    states = [(steps - 1) * total // steps - 1 for steps in STEPS]
    *passed, exact = draw("ddim", total, [*states, -1])
    (other,) = draw("dpmpp", total, [-1])
    found = {method: [draw(method, steps, [-2, -1]) for steps in STEPS] for method in NAMES}
    return Errors(
        guidance_scale,
        {method: [rms(last - exact) for _, last in drawn] for method, drawn in found.items()},
        {
            method: [rms(before - at) for (before, _), at in zip(drawn, passed, strict=True)]
            for method, drawn in found.items()
        },
        rms(other - exact),
        rms(exact),
        {method: [last[:SHOWN] for _, last in drawn] for method, drawn in found.items()},
        exact[:SHOWN],
    )


def rms(values: np.ndarray) -> float:
    """The root of the mean square of all elements."""
    return float(np.sqrt(np.mean(values * values)))


def report(measured: list[Errors], about: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, and with what, as plain values."""
    errors = [
        {
            "guidance_scale": found.guidance_scale,
            "rms": found.rms,
            "rms_before_the_last_step": found.before,
            "apart_in_all_steps": found.apart,
            "size": found.size,
        }
        for found in measured
    ]
    return {**about, "steps": list(STEPS), "errors": errors}


def guided(scale: float | None) -> str:
    """A guidance scale in words."""
    return "not guided" if scale is None else f"guidance {scale:g}"


def table(measured: list[Errors], timesteps: int) -> Table:
    """A row for each method at each guidance scale."""
    result = Table(title=f"RMS difference from DDIM in {timesteps} steps, by the number of steps")
    result.add_column("", no_wrap=True)
    result.add_column("sampler", no_wrap=True)
    for steps in (*STEPS, timesteps):
        result.add_column(str(steps), justify="right")
    for found in measured:
        for method, errors in found.rms.items():
            whole = "0" if method == "ddim" else f"{found.apart:.2g}"
            cells = [f"{value:.2g}" for value in errors]
            result.add_row(guided(found.guidance_scale), NAMES[method], *cells, whole)
    return result


def picture(measured: list[Errors], timesteps: int) -> bytes:
    """The bytes of a PNG file: the errors over the steps, and below a few of the samples."""
    figure = Figure(figsize=(10, 6.2), dpi=90, facecolor="white", layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.3, 1.9])
    upper, lower = parts
    axes = upper.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axis, found in zip(axes, measured, strict=True):
        for method, errors in found.rms.items():
            colour, above = COLOURS[method], method == "ddim"
            axis.plot(STEPS, errors, "o-", color=colour, label=NAMES[method])
            axis.plot(
                STEPS,
                found.before[method],
                ".--",
                color=colour,
                linewidth=1,
                alpha=0.7,
                label=f"{NAMES[method]}, before its last step",
            )
            for steps, value in zip(STEPS, errors, strict=True):
                axis.annotate(
                    f"{value:.2g}",
                    (steps, value),
                    xytext=(3, 6) if above else (-3, -13),
                    textcoords="offset points",
                    ha="left" if above else "right",
                    fontsize=8.5,
                    color=colour,
                )
        axis.axhline(found.apart, color="black", linewidth=1, linestyle=":")
        axis.annotate(
            f"the two samplers, both in {timesteps} steps: {found.apart:.2g} apart",
            (STEPS[0], found.apart),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
        axis.set(xscale="log", yscale="log", xlabel="steps", title=guided(found.guidance_scale))
        axis.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(0.12, 0.1)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"RMS difference from DDIM\nin {timesteps} steps")
    lines = axes[0].get_legend_handles_labels()
    upper.legend(*lines, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    _draw_samples(lower, measured[-1], timesteps)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_samples(figure: Any, found: Errors, timesteps: int) -> None:
    """A row for each method: a few images at every number of steps, and in all of them."""
    cells = figure.subplots(len(found.images), len(STEPS) + 1)
    titles = [*(f"{steps} steps" for steps in STEPS), f"DDIM, {timesteps} steps"]
    for number, (method, drawn) in enumerate(found.images.items()):
        for axis, images, title in zip(cells[number], [*drawn, found.exact], titles, strict=True):
            axis.imshow(grid(images, SHOWN), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if number == 0:
                axis.set_title(title, fontsize=9)
        cells[number, 0].set_ylabel(
            NAMES[method].replace("++", "++\n"),
            fontsize=8.5,
            color=COLOURS[method],
            rotation="horizontal",
            ha="right",
            va="center",
        )
    figure.suptitle(f"Samples from the same noise, {guided(found.guidance_scale)}", fontsize=10)
