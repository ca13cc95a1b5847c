"""How near a result must come to its golden, derived from floors and stored with the reason.

A generator's module. No number here was fitted to an implementation under test: float64 limits
stand above what perturbed float64 runs of the oracle give, float32 limits are 8 floors.
"""

import statistics
from typing import Any

import numpy as np

from spec.cases import Case
from spec.floor import SEEDS

FACTOR = 8
TABLE_FLOAT64 = 1e-10
TABLE_FLOAT32 = FACTOR * 2.0**-24
FLOAT64 = 1e-10
FLOAT64_DELTA_MAX = 1e-9
FLOAT64_EMA = 1e-9
NORMS = ("l2", "max")


def part_of(name: str) -> str:
    """Which part of the training state a result belongs to: delta, m, v, ema_delta, or ''."""
    parts = name.split("/")
    return next((p for p in parts[:-1] if p in ("delta", "m", "v", "ema_delta")), "")


def vanishes(case: Case, name: str) -> bool:
    """Whether S8 says that the true gradient is zero."""
    return case.call == "loss_and_grads" and name.endswith("to_k.bias")


def is_time_table(case: Case, name: str) -> bool:
    """Whether a result is rows of S7's table of times, alone or as a tap."""
    return name == "time_proj" or case.options.get("name") == "time_proj"


def _group(case: Case, name: str) -> str:
    """Results that share a median floor: a level and config; in L5 a case and part of the state.

    There a parameter's change and its moments differ by orders of magnitude.
    """
    if case.level == 5:
        return f"{case.id}/{name.partition('/' + part_of(name) + '/')[0]}:{part_of(name)}"
    return f"L{case.level}/{case.config}"


def median_floors(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Group -> norm -> median of the floors of its tensors."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        for name, floor in case.floors.items():
            if not vanishes(case, name):
                group = gathered.setdefault(_group(case, name), {norm: [] for norm in NORMS})
                for norm in NORMS:
                    group[norm].append(floor[norm])
    return {
        group: {norm: statistics.median(values) for norm, values in norms.items()}
        for group, norms in gathered.items()
    }


def tolerance(
    case: Case, name: str, medians: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """The `tolerance` entry of one output: dtype -> norms and reason."""
    if case.call == "schedule":
        return {
            "float64": {
                "each": TABLE_FLOAT64,
                "reason": "float64 builds come within 2e-11 at T = 4000",
            },
            "float32": {
                "each": TABLE_FLOAT32,
                "reason": "8 x 2^-24: built in float64 and cast once",
            },
        }
    if vanishes(case, name):
        other = name.replace("to_k.bias", "to_q.bias")
        found, _ = _float32(case, other, medians)
        limit = _rounded(found["max"] * float(np.abs(case.expected[other]).max()))
        return {
            "float64": {"abs": FLOAT64, "reason": "the true gradient is zero (S8)"},
            "float32": {"abs": limit, "reason": "true gradient zero (S8); to_q.bias's limit"},
        }
    if is_time_table(case, name):
        reason = "8 x 2^-24: a table built in float64 and cast once (S7)"
        return {
            "float64": {"l2": FLOAT64, "reason": "S8: float64"},
            "float32": {"max": TABLE_FLOAT32, "reason": reason},
        }
    part = part_of(name)
    exact: dict[str, Any] = {"l2": FLOAT64, "reason": "S8: float64"}
    if part == "delta":
        exact = {"l2": FLOAT64, "max": FLOAT64_DELTA_MAX, "reason": "S8: an Adam step, float64"}
    if part == "ema_delta":
        reason = "S8: the EMA's small part of a step, float64"
        exact = {"l2": FLOAT64_EMA, "max": FLOAT64_EMA, "reason": reason}
    limits, reason = _float32(case, name, medians)
    return {"float64": exact, "float32": {**limits, "reason": reason}}


def _float32(
    case: Case, name: str, medians: dict[str, dict[str, float]]
) -> tuple[dict[str, float], str]:
    """Norm -> limit, and the reason."""
    group = _group(case, name)
    # Where a gradient is near zero, the sign of a whole float32 step is chance: L2 only.
    whole = case.call == "train_steps" and part_of(name) in ("delta", "ema_delta")
    limits, reasons = {}, []
    for norm in ("l2",) if whole else NORMS:
        own, median = case.floors[name][norm], medians[group][norm]
        limits[norm] = _rounded(FACTOR * max(own, median))
        word = f"own {own:.2g}" if own >= median else f"median {median:.2g} of {group}"
        reasons.append(f"{norm} {word}")
    return limits, f"{FACTOR} x floor, {SEEDS} seeds: {', '.join(reasons)}"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
