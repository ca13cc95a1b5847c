"""How the cost of a train step grows: over the batch, the image size and the width of workload S.

Every point is a workload of its own, checked and timed as all others are: its processes are fresh,
so that its peak of memory is its own.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conformance.bench import stats
from conformance.bench.rounds import Plan, Run
from conformance.bench.workloads import Workload

AXES = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "image_size": (8, 16, 32, 64),  # pixels, of both sides
    "width": (16, 32, 64, 128),  # channels of the first level; the others in proportion
}
BATCH = 16  # images, where the batch stays the same
TEXTS = {"batch": "images", "image_size": "pixels a side", "width": "channels at first"}


class ScalingError(ValueError):
    """An axis that is not known, or values that it cannot have."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One workload on one axis."""

    axis: str
    value: int
    workload: Workload


def points(base: Workload, axes: Mapping[str, Sequence[int]]) -> list[Point]:
    """The workloads of all axes; all but the value of the axis stays what the base has.

    Raises ScalingError for an axis that there is not, and ConfigError for a value that no config
    can have.
    """
    found = []
    for axis, values in axes.items():
        if axis not in AXES:
            raise ScalingError(f"axis {axis!r} is unknown; choose of {', '.join(AXES)}")
        if len(set(values)) < 2 or min(values) < 1:
            raise ScalingError(
                f"{axis} = {list(values)}: a slope needs two different values or more, all above 0"
            )
        for value in sorted(set(values)):
            found.append(Point(axis, value, _at(base, axis, value)))
    return found


def _at(base: Workload, axis: str, value: int) -> Workload:
    """The base with one thing changed."""
    changes: dict[str, Any] = {"batch_size": BATCH}
    if axis == "batch":
        changes["batch_size"] = value
    elif axis == "image_size":
        changes["image_size"] = (value, value)
    else:
        first = base.config.channels[0]
        changes["channels"] = tuple(width * value // first for width in base.config.channels)
    config = base.config.replace(**changes)
    key = f"{base.key} {axis}={value}"
    return dataclasses.replace(base, key=key, config=config, batch=config.batch_size)


def plan_of(plan: Plan, found: Iterable[Point]) -> Plan:
    """The plan with these points for its workloads."""
    return dataclasses.replace(plan, workloads=[point.workload for point in found])


def entries(found: Sequence[Point], runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The section `scaling` of the results: a line for each backend, mode, dtype and axis.

    A point whose run has no figure is left out; a slope needs two.
    """
    by_key = {point.workload.key: point for point in found}
    lines: dict[tuple[str, str, str, str], list[tuple[Point, Run]]] = {}
    for run in runs:
        point = by_key[run.workload.key]
        contender = run.contender
        line = (contender.impl.name, contender.mode, contender.dtype, point.axis)
        lines.setdefault(line, [])
        if run.ok and run.rounds:
            lines[line].append((point, run))
    result = []
    for (backend, mode, dtype, axis), measured in lines.items():
        measured.sort(key=lambda pair: pair[0].value)
        slope, bounds = slope_of(
            [point.value for point, _ in measured],
            [run.rounds for _, run in measured],
            [run.processes for _, run in measured],
        )
        result.append(
            {
                "backend": backend,
                "mode": mode,
                "dtype": dtype,
                "axis": axis,
                "points": [
                    {
                        "value": point.value,
                        "seconds": [float(np.median(samples)) for samples in run.rounds],
                        "peak_memory": run.peak_memory,
                    }
                    for point, run in measured
                ],
                "slope": slope,
                "slope_interval": bounds,
            }
        )
    return result


def slope_of(
    values: Sequence[float],
    rounds: Sequence[stats.Rounds],
    processes: Sequence[Sequence[int]] = (),
) -> tuple[float | None, list[float] | None]:
    """The slope of log seconds over log value, by least squares, and its interval over rounds.

    1 says that the cost grows in proportion, 2 that it grows with the square. Rounds of different
    points are drawn apart from each other.
    """
    if len(values) < 2:
        return None, None
    x = np.log(np.asarray(values, float))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = weights @ np.log([stats.summarise(samples).median for samples in rounds])
    drawn = []
    for i, samples in enumerate(rounds):
        runs = stats.resampled(len(samples), processes[i] if processes else ())
        order = np.random.Generator(np.random.Philox(key=i)).permutation(len(runs))
        drawn.append(np.log(stats.medians(samples, runs[order])))
    return float(slope), list(stats.interval(weights @ np.array(drawn)))
