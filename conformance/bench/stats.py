"""Medians, intervals over rounds, ranks, and what differs beyond noise."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CELLS = 2_000_000  # of a table at a time: resampled runs times samples
LEVEL = 95.0  # percent of an interval
Rounds = Sequence[Sequence[float]]  # seconds, by round


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is said of the samples of several rounds, in seconds."""

    median: float
    q1: float
    q3: float
    interval: tuple[float, float]


def summarise(rounds: Rounds, processes: Sequence[int] = ()) -> Summary:
    """Median and quartiles of all samples, and the interval of the median over rounds."""
    q1, median, q3 = np.percentile(np.concatenate([np.asarray(r) for r in rounds]), (25, 50, 75))
    drawn = medians(rounds, resampled(len(rounds), processes))
    return Summary(float(median), float(q1), float(q3), interval(drawn))


def resampled(count: int, processes: Sequence[int] = ()) -> np.ndarray:
    """Which rounds each of RESAMPLES runs would have had, [RESAMPLES, count], the same each time.

    `processes` names the process of each round. Where there are several, processes are drawn
    first, then rounds of each: what all rounds of a process share is part of the noise too.
    """
    draw = np.random.Generator(np.random.Philox(key=0))
    places = np.asarray(processes if len(processes) else [0] * count)
    groups = [np.flatnonzero(places == process) for process in dict.fromkeys(places.tolist())]
    if len(groups) == 1:
        return draw.integers(count, size=(RESAMPLES, count))
    runs = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(len(groups), size=len(groups))
        rounds = [draw.choice(groups[i], len(groups[i])) for i in chosen]
        runs.append(np.resize(np.concatenate(rounds), count))
    return np.array(runs)


def medians(rounds: Rounds, runs: np.ndarray) -> np.ndarray:
    """The median of all samples of each resampled run, [RESAMPLES]."""
    samples = np.concatenate([np.asarray(r, float) for r in rounds])
    of_round = np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])
    order = np.argsort(samples)
    samples, of_round = samples[order], of_round[order]
    found = []
    for some in np.array_split(runs, max(1, len(runs) * len(samples) // CELLS)):
        times = np.stack([(some == i).sum(axis=1) for i in range(len(rounds))], axis=1)
        below = np.cumsum(times[:, of_round], axis=1)  # how many there are up to each sample
        total = below[:, -1:]
        middle = [samples[(below > at).argmax(axis=1)] for at in ((total - 1) // 2, total // 2)]
        found.append((middle[0] + middle[1]) / 2)
    return np.concatenate(found)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of what was drawn."""
    low, high = np.percentile(drawn, (50 - LEVEL / 2, 50 + LEVEL / 2))
    return float(low), float(high)


def paired_ratio(
    first: Rounds, second: Rounds, processes: Sequence[int] = ()
) -> tuple[float, tuple[float, float]]:
    """median(first) / median(second) and its interval, where both took turns in each round.

    The same rounds are drawn for both, so that what slows a whole round down cancels.
    """
    count = min(len(first), len(second))
    first, second = first[:count], second[:count]
    runs = resampled(count, list(processes)[:count])
    ratios = medians(first, runs) / medians(second, runs)
    middle = summarise(first).median / summarise(second).median
    return middle, interval(ratios)


def ratio(
    first: Rounds,
    second: Rounds,
    first_processes: Sequence[int] = (),
    second_processes: Sequence[int] = (),
) -> tuple[float, tuple[float, float]]:
    """median(first) / median(second) and its interval, of two runs that have nothing in common."""
    above = medians(first, resampled(len(first), first_processes))
    below = medians(second, resampled(len(second), second_processes))
    shuffled = np.random.Generator(np.random.Philox(key=1)).permutation(below)
    middle = summarise(first).median / summarise(second).median
    return middle, interval(above / shuffled)


def ranks(intervals: Sequence[tuple[float, float]]) -> list[int]:
    """The rank of each, 1 for the least; those whose intervals overlap share one.

    So do two that do not overlap, where a third overlaps both: nothing there tells the three apart.
    """
    found = [0] * len(intervals)
    rank, reach = 0, -math.inf
    for place, i in enumerate(sorted(range(len(intervals)), key=lambda i: intervals[i])):
        if intervals[i][0] > reach:
            rank = place + 1
        found[i] = rank
        reach = max(reach, intervals[i][1])
    return found


def changed(bounds: tuple[float, float]) -> bool:
    """Whether a ratio of this interval differs from 1 beyond noise."""
    return not bounds[0] <= 1 <= bounds[1]
