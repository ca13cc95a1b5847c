"""Figures as shares of what the machine can do: ceilings measured in the run, work counted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conformance.bench import ceiling
from conformance.bench.count import Gemm, Work, count, count_forward
from conformance.bench.rounds import Contender, Plan, Seen
from conformance.bench.workloads import Workload

LIBRARIES = {
    "impl_numpy": "numpy",
    "impl_torch": "torch",
    "impl_tf": "tensorflow",
    "impl_jax": "jax",
}


def work_of(workload: Workload) -> Work:
    """What one call of a workload has to compute and to move at least."""
    if workload.kind == "train":
        return count(workload.config, workload.batch)
    once = count_forward(workload.config, 2 * workload.batch)  # null and label in one batch (S6)
    gemms = tuple(Gemm(g.m, g.n, g.k, g.times * workload.steps, g.what) for g in once.gemms)
    return Work(once.flops * workload.steps, once.bytes * workload.steps, once.parameters, gemms)


def measure(
    contenders: Sequence[Contender], plan: Plan, seconds: float, seen: Seen
) -> tuple[list[dict[str, Any]], list[str]]:
    """The ceilings of every library and dtype that takes part, and what kept one from being known.

    Peers run on the same libraries, so they are not asked again.
    """
    gemms = [gemm for workload in plan.workloads for gemm in work_of(workload).gemms]
    asked = dict.fromkeys(
        (LIBRARIES[c.impl.name], c.impl.python, c.dtype)
        for c in contenders
        if c.impl.name in LIBRARIES
    )
    found, problems = [], []
    for i, (library, python, dtype) in enumerate(asked):
        seen(f"ceiling of {library} {dtype}", (len(asked) - i) * 1.5 * seconds)
        try:
            found.append(
                ceiling.measure(python, library, dtype, plan.device, plan.threads, gemms, seconds)
            )
        except ceiling.CeilingError as error:
            problems.append(f"no ceiling of {library} {dtype}: {error}")
    return found, problems


def fill(values: dict[str, Any], workloads: Sequence[Workload]) -> None:
    """Put the work and the shares into the runs; a share above 1 makes its run an error."""
    device = values["settings"]["device"]
    for workload in workloads:
        work = work_of(workload)
        for entry in values["runs"]:
            if entry["workload"] != workload.key or entry["peer_network"]:
                continue
            entry["flops"] = work.flops
            if entry["median"] is None:
                continue
            own = [
                c
                for c in values["ceilings"]
                if (c["dtype"], c["device"]) == (entry["dtype"], device)
            ]
            entry["share_large"], entry["share_shapes"] = shares(work, own, entry["median"])
            for what in ("share_large", "share_shapes"):
                if entry[what] is not None and entry[what] > 1 and entry["status"] == "ok":
                    entry["status"], entry["rank"] = "error", None
                    entry["message"] = (
                        f"{what} is {entry[what]:.2f}: more than the machine can do; either the "
                        "work is less than counted, or the ceiling was measured on a busy machine"
                    )


def shares(
    work: Work, ceilings: Sequence[Mapping[str, Any]], seconds: float
) -> tuple[float | None, float | None]:
    """The shares that a call of so many seconds has of both ceilings; None where none is known.

    Of the large one: the best rate of any library. Of the own shapes: the time in which the best
    library for each shape does every product of the call, over the time that the call takes.
    """
    if not ceilings:
        return None, None
    best = max(c["large"]["flops_per_second"] for c in ceilings)
    large = work.flops / seconds / best
    rates: dict[tuple[int, int, int], float] = {}
    for found in ceilings:
        for shape in found["shapes"]:
            key = (shape["m"], shape["n"], shape["k"])
            rates[key] = max(rates.get(key, 0.0), shape["flops_per_second"])
    try:
        least = math.fsum(g.flops / rates[g.m, g.n, g.k] for g in work.gemms)
    except (KeyError, ZeroDivisionError):
        return large, None
    return large, least / seconds
