"""How near a result must come to its golden, derived from floors and stored with the reason.

A generator's module. No number here was fitted to an implementation under test: float64 limits
stand above what perturbed float64 runs of the oracle give, float32 limits are 8 floors. Those of
tf32 and bf16 are 2: nearly all of their error is the rounding of single numbers, which the floors
move by its full bound, while sums, whose orders no set of seeds exhausts, are float32's there.
"""

import statistics
from typing import Any

import numpy as np

from spec.cases import Case
from spec.floor import RESULTS_BY, is_table, norms_of, seeds_of

FACTORS = {"float32": 8, "tf32": 2, "bf16": 2}  # tolerance / floor
# The same where a floor is the largest of 8 errors and not of 32 (`spec.fresh`; tf32 and bf16 never
# have more). Of 16 further seeds in groups of 8, on every float32 golden of the tiny configs, the
# recorded floors stand at 1.1 of the group's in the median, and at 2.1 in one tensor of a hundred.
FEW_SEEDS = 8
FEW_FACTORS = {**FACTORS, "float64": 16, "float32": 16}
SIGNED_STEPS = 2  # in which Adam's step is nearly lr * sign(g); later its means decide
SAYS_NOTHING = 1.0  # relative: a result of zeros is as near
LEVEL_FACTOR = 8  # of a number that is cast once
TABLE_FLOAT64 = 1e-10
TABLE_FLOAT32 = LEVEL_FACTOR * 2.0**-24
FLOAT64 = 1e-10
FLOAT64_DELTA_MAX = 1e-9
FLOAT64_EMA = 1e-9
FLOAT64_CURVE = 1e-11


def part_of(name: str) -> str:
    """Which part of the training state a result belongs to: delta, m, v, ema_delta, or ''."""
    parts = name.split("/")
    return next((p for p in parts[:-1] if p in ("delta", "m", "v", "ema_delta")), "")


def vanishes(case: Case, name: str) -> bool:
    """Whether S8 says that the true gradient is zero."""
    return case.call == "loss_and_grads" and name.endswith("to_k.bias")


def is_time_table(case: Case, name: str) -> bool:
    """Whether a result is rows of S7's table of times, alone or as a tap."""
    return name == "time_proj" or is_table(case)


def _group(case: Case, name: str) -> str:
    """Results that share a median floor: a level and config; in L5 a case and part of the state.

    There a parameter's change and its moments differ by orders of magnitude, as in L7 the curve
    and the samples do. A trajectory of S13 stands alone: what its steps make of a rounding depends
    on their lengths, and short ones must not have the limits of long ones.
    """
    if case.level == 5:
        return f"{case.id}/{name.partition('/' + part_of(name) + '/')[0]}:{part_of(name)}"
    if case.level == 7:
        return f"{case.id}/{name}"
    if case.options.get("method") == "dpmpp":
        return case.id
    return f"L{case.level}/{case.config}"


def median_floors(cases: list[Case]) -> dict[tuple[str, str], dict[str, float]]:
    """(precision, group) -> norm -> median of the floors of its tensors."""
    gathered: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case in cases:
        for precision, by_name in case.floors.items():
            for name, floor in by_name.items():
                if not vanishes(case, name):
                    norms = gathered.setdefault((precision, _group(case, name)), {})
                    for norm, value in floor.items():
                        norms.setdefault(norm, []).append(value)
    return {
        group: {norm: statistics.median(values) for norm, values in norms.items()}
        for group, norms in gathered.items()
    }


def tolerance(
    case: Case, name: str, medians: dict[tuple[str, str], dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """The `tolerance` entry of one output: column -> norms and reason."""
    limits = {"float64": _exact(case, name)}
    for precision in case.columns:
        # Where no product of the network is asked for, every precision is float32's.
        own = precision if precision in case.floors else "float32"
        limits[precision] = _measured(case, name, own, medians)
    if is_time_table(case, name) and "bf16" in case.columns:
        unit = RESULTS_BY["bf16"]
        reason = "8 x 2^-8: the table may be cast to bfloat16 (S7)"
        limits["bf16"] = {"max": LEVEL_FACTOR * unit, "reason": reason}
    return limits


def _exact(case: Case, name: str) -> dict[str, Any]:
    """The limits of float64."""
    if case.call == "schedule":
        return {"each": TABLE_FLOAT64, "reason": "float64 builds come within 2e-11 at T = 4000"}
    if vanishes(case, name):
        return {"abs": FLOAT64, "reason": "the true gradient is zero (S8)"}
    part = part_of(name)
    if part == "delta":
        limits = {"l2": FLOAT64, "max": FLOAT64_DELTA_MAX}
        return _of_a_step(case, name, limits, "float64, of an Adam step")
    if part == "ema_delta":
        limits = {"l2": FLOAT64_EMA, "max": FLOAT64_EMA}
        return _of_a_step(case, name, limits, "float64, of the EMA's small part of a step")
    if norms_of(case, name) == ("each",):
        return {"each": FLOAT64_CURVE, "reason": "every loss of the curve, float64"}
    return {"l2": FLOAT64, "reason": "float64: see Tolerances in SPEC.md"}


def _of_a_step(case: Case, name: str, limits: dict[str, float], reason: str) -> dict[str, Any]:
    """The float64 limits of a change, no tighter than the case's own floor in float64 allows.

    Adam's first step is g / (|g| + 1e-8): it multiplies the rounding of an element of g that is no
    larger than that by up to 1e8. On inputs that a seed draws, such an element may be among them.
    """
    floor = case.floors.get("float64", {}).get(name, {})
    factor = FEW_FACTORS["float64"]
    wide = {norm: _rounded(factor * floor.get(norm, 0.0)) for norm in limits}
    if any(wide[norm] > limit for norm, limit in limits.items()):
        found = ", ".join(f"{norm} {floor[norm]:.2g}" for norm in limits)
        reason += f", or {factor} x floor, {seeds_of(case, 'float64')} seeds: {found}"
    return {**{norm: max(limit, wide[norm]) for norm, limit in limits.items()}, "reason": reason}


def _measured(
    case: Case, name: str, precision: str, medians: dict[tuple[str, str], dict[str, float]]
) -> dict[str, Any]:
    """The limits that follow from the floors of a precision."""
    if case.call == "schedule":
        return {"each": TABLE_FLOAT32, "reason": "8 x 2^-24: built in float64 and cast once"}
    if is_time_table(case, name):
        reason = "8 x 2^-24: a table built in float64 and cast once (S7)"
        return {"max": TABLE_FLOAT32, "reason": reason}
    limits: dict[str, Any]
    if vanishes(case, name):
        other = name.replace("to_k.bias", "to_q.bias")
        found = _measured(case, other, precision, medians)
        size = float(np.abs(case.expected[other]).max())
        limit = _rounded(found.get("max", SAYS_NOTHING) * size)
        limits = {"abs": limit} if limit < SAYS_NOTHING else {"finite": 0.0}
        return limits | {"reason": "true gradient zero (S8); to_q.bias's limit"}
    group = _group(case, name)
    factor = (FEW_FACTORS if case.seeds else FACTORS)[precision]
    # Where a gradient is near zero, the sign of a whole step is chance: L2 only.
    whole = case.call == "train_steps" and part_of(name) in ("delta", "ema_delta")
    limits = {}
    reasons = []
    for norm in ("l2",) if whole else norms_of(case, name):
        own, median = case.floors[precision][name][norm], medians[precision, group][norm]
        limit = factor * max(own, median)
        word = f"own {own:.2g}" if own >= median else f"median {median:.2g} of {group}"
        if whole and precision != "float32" and int(name.partition("/")[0]) <= SIGNED_STEPS:
            flip = _flip(case.expected[name])
            word += f", or one sign {flip:.2g}" if flip > limit else ""
            limit = max(limit, flip)
        limit = _rounded(limit)
        if limit < SAYS_NOTHING:
            limits[norm] = limit
        reasons.append(f"{norm} {word}")
    seeds = seeds_of(case, precision)
    if not limits:
        limits["finite"] = 0.0  # shape, dtype and finiteness are all that can be asked
    limits["reason"] = f"{factor} x floor, {seeds} seeds: {', '.join(reasons)}"
    return limits


def _flip(expected: np.ndarray) -> float:
    """The relative L2 error of a change of parameters whose largest element has the other sign.

    Adam's first steps are nearly as long for a gradient that is nearly zero as for any other.
    TF32 and bfloat16 leave many signs open, which a few seeds of a floor do not all meet.
    """
    return float(2 * np.abs(expected).max() / np.linalg.norm(expected))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
