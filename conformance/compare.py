"""Compares results with goldens: shape and dtype first, then every norm that a tolerance names."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from spec.backend import ARRAY_DTYPES
from spec.goldens import Case, GoldenError, Output, tolerance_of
from spec.params import parameter_shapes

# What each norm measures; the error is taken in float64, on the elements that the golden stores.
NORMS = {
    "l2": "||got - expected|| / ||expected||",
    "max": "max|got - expected| / max|expected|",
    "each": "max of |got - expected| / |expected|",
    "abs": "max|got - expected|",
    "finite": "0: nothing but shape, dtype and finiteness is asked",
}
MADE_HERE = ("loss", "delta", "ema_delta")  # taken by the suite in float64 from what a model gives
STATE_CALLS = ("apply_gradients", "train_steps")


@dataclasses.dataclass(frozen=True)
class Measure:
    """One norm's error beside its tolerance."""

    norm: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def ratio(self) -> float:
        """error / tolerance: the share of the tolerance that is used."""
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance else math.inf


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of comparing one output: no problem, or the first one found."""

    output: str
    problem: str | None  # missing, extra, shape, dtype, not finite, tolerance
    text: str  # the problem in words; empty where there is none
    shape: tuple[int, ...] = ()
    measures: tuple[Measure, ...] = ()
    reason: str = ""  # where the tolerance comes from
    index: tuple[int, ...] | None = None  # of the worst element
    got: float | None = None  # that element
    expected: float | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def worst(self) -> Measure | None:
        """The measure that uses the largest share of its tolerance."""
        return max(self.measures, key=lambda m: m.ratio, default=None)

    @property
    def ratio(self) -> float:
        """The largest error / tolerance; infinite for a problem that has no size."""
        if self.worst is None:
            return 0.0 if self.ok else math.inf
        return self.worst.ratio


def result_dtype(key: str, dtype: str) -> str:
    """The dtype that a result must have in this column."""
    made_here = any(part in MADE_HERE for part in key.split("/")[:2])
    return "float64" if made_here else ARRAY_DTYPES[dtype]


def euclidean(x: np.ndarray) -> float:
    """Euclidean norm, scaled so that squares neither overflow nor vanish."""
    largest = float(np.max(np.abs(x)))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.sum((x / largest) ** 2)))


def one_error(norm: str, difference: np.ndarray, expected: np.ndarray) -> float:
    """The error in one norm; l2 and max of a zero golden are taken absolutely.

    "finite" has none here: NaN and infinity were refused before.
    """
    largest = float(np.max(difference))
    if norm == "finite":
        return 0.0
    if norm == "abs":
        return largest
    if norm == "each":
        return float(np.max(relative_error(difference, expected)))
    size = float(np.max(np.abs(expected)))
    error = largest / size if size else largest
    if norm == "max" or not error or not math.isfinite(largest):
        return error
    # l2: the largest elements apart, since a whole norm may overflow where they do not
    shares = euclidean(expected / size) if size else 1.0
    return error * euclidean(difference / largest) / shares


def relative_error(difference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|got - expected| / |expected| by element; infinite where only the golden is 0."""
    zero = expected == 0
    relative = difference / np.where(zero, 1.0, np.abs(expected))
    return np.where(zero, np.where(difference == 0, 0.0, np.inf), relative)


def compare(case: Case, output: Output, dtype: str, expected: np.ndarray, got: object) -> Finding:
    """One result against its golden. `expected` holds every `output.stride`-th element.

    Raises GoldenError for a golden that is empty or not finite, or without a tolerance.
    """
    limits, reason = tolerance_of(case, output, dtype)
    if expected.size == 0 or not np.isfinite(expected).all():
        raise GoldenError(f"golden {output.tensor} of case {case.id} is empty or not finite")

    def problem(kind: str, text: str, **more: object) -> Finding:
        return Finding(output.name, kind, text, output.shape, reason=reason, **more)  # type: ignore[arg-type]

    if got is None:
        return problem("missing", f"{output.name} is missing from the results")
    if not isinstance(got, np.ndarray):
        return problem("dtype", f"{output.name} is a {type(got).__name__}; expected an array")
    if got.shape != output.shape:
        text = f"{output.name} has shape {list(got.shape)}; expected {list(output.shape)}"
        return problem("shape", text)
    want = result_dtype(output.name, dtype)
    if got.dtype != want:
        return problem("dtype", f"{output.name} has dtype {got.dtype}; expected {want}")
    wide = got.astype(np.float64)
    if not np.isfinite(wide).all():
        at = np.unravel_index(int(np.argmin(np.isfinite(wide))), got.shape)
        index = tuple(int(i) for i in at)
        count = int(np.sum(~np.isfinite(wide)))
        return problem(
            "not finite",
            f"{output.name} holds {wide[index]} in {count} of {got.size} elements",
            index=index,
            got=float(wide[index]),
            expected=float(expected.reshape(output.shape)[index]) if output.stride == 1 else None,
        )
    golden = expected.astype(np.float64).reshape(-1)
    kept = wide.reshape(-1)[:: output.stride]
    with np.errstate(all="ignore"):
        difference = np.abs(kept - golden)
        measures = tuple(
            Measure(norm, _no_nan(one_error(norm, difference, golden)), limit)
            for norm, limit in limits.items()
        )
        per_element = relative_error(difference, golden) if "each" in limits else difference
    worst = int(np.argmax(per_element))
    index = tuple(int(i) for i in np.unravel_index(worst * output.stride, output.shape))
    finding = Finding(
        output.name,
        None,
        "",
        output.shape,
        measures,
        reason,
        index,
        float(kept[worst]),
        float(golden[worst]),
    )
    if all(measure.ok for measure in measures):
        return finding
    return dataclasses.replace(finding, problem="tolerance", text=_too_far(finding))


def hidden(finding: Finding) -> Finding:
    """The finding without an element of the golden, or anything that gives one away.

    An error stands in one digit, and no longer beside the element that it is of.
    """
    measures = tuple(
        dataclasses.replace(m, error=_one_digit(m.error, up=not m.ok)) for m in finding.measures
    )
    got = None if finding.got is not None and math.isfinite(finding.got) else finding.got
    bare = dataclasses.replace(finding, measures=measures, got=got, expected=None)
    return dataclasses.replace(bare, text=_too_far(bare)) if bare.problem == "tolerance" else bare


def _one_digit(error: float, up: bool) -> float:
    """The error in one digit, rounded so that what failed still fails, and what passed passes."""
    if error == 0 or not math.isfinite(error):
        return error
    mantissa, _, exponent = f"{error:.16e}".partition("e")
    digit = math.ceil(float(mantissa)) if up else math.floor(float(mantissa))
    return float(f"{digit}e{exponent}")


def _too_far(finding: Finding) -> str:
    return f"{finding.output} is out of tolerance: {finding.ratio:.3g} times what is allowed"


def _no_nan(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _exempt(case: Case, key: str) -> bool:
    """Whether S8 may exempt this part of a training state: a parameter without a golden.

    That the state has every parameter and no other is checked where it is read.
    """
    return case.call in STATE_CALLS and key.rpartition("/")[2] in parameter_shapes(case.config)


def compare_case(
    case: Case,
    dtype: str,
    results: Mapping[str, object],
    expected: Callable[[Output], np.ndarray],
) -> list[Finding]:
    """A Finding for every output of the case, in the manifest's order, and for every extra result.

    Raises GoldenError for a case that checks nothing.
    """
    if not case.outputs:
        raise GoldenError(f"case {case.id} has no outputs and so checks nothing; correct it")
    findings = [compare(case, o, dtype, expected(o), results.get(o.name)) for o in case.outputs]
    known = {output.name for output in case.outputs}
    for key, value in results.items():
        if key in known:
            continue
        if not _exempt(case, key):
            findings.append(Finding(key, "extra", f"{key} is not a result of {case.call}"))
        elif isinstance(value, np.ndarray) and not np.isfinite(value).all():
            findings.append(Finding(key, "not finite", f"{key} holds NaN or infinity"))
    return findings
