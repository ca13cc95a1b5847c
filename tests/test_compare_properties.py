"""The comparator on arrays of any kind: what is wrong fails in every norm, and nothing else does.

Whether a result is within its limit is worked out a second time here, in exact fractions.
"""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conformance import compare as comparator
from conformance.compare import compare, compare_case
from conformance.runner import UsageError, check_backend, in_column
from spec.config import load_config
from spec.goldens import NORMS, RELATIVE, Case, GoldenError, Output

CONFIG = load_config("tiny")
SIZES = [norm for norm in NORMS if norm != "finite"]  # those that the goldens use and that measure
COLUMNS = ("float64", "float32", "tf32", "bf16")
ORDINARY = st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3)
ANY = st.floats(allow_nan=False, allow_infinity=False)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=5)
LIMITS = st.floats(1e-12, 0.9)
at_leisure = settings(deadline=None)  # other work on the machine must fail no test
norms = pytest.mark.parametrize("norm", SIZES)


@st.composite
def rows(draw):
    """A golden [B, H, W, C] whose numbers all differ by more than 1e-3 of the largest."""
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=4))
    order = draw(st.permutations(range(1, math.prod(shape) + 1)))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(order), max_size=len(order)))
    scale = draw(st.floats(1e-6, 1e6))
    return (np.array(order) * np.array(signs) * scale).reshape(shape)


def wanted(expected, limits, column="float64", stride=1):
    tolerance = {column: {**limits, "reason": "r"}}
    return Output("out", "f:x", expected.shape, str(expected.dtype), "", stride, tolerance)


def case_of(*outputs):
    return Case("L3/tiny/x", 3, "S7", CONFIG, "predict", None, {}, {}, outputs, ("cause",), "two")


def found(got, expected, column="float64", stride=1, **limits):
    output = wanted(expected, limits, column, stride)
    stored = expected.reshape(-1)[::stride] if stride > 1 else expected
    return compare(case_of(output), output, column, stored, got)


def exact(norm, got, expected, limit):
    """Whether the error is within the limit, in fractions; None where it is too near to tell."""
    golden = [Fraction(float(x)) for x in expected.reshape(-1)]
    apart = [abs(Fraction(float(x)) - y) for x, y in zip(got.reshape(-1), golden, strict=True)]
    limit = Fraction(limit)
    if norm == "each":
        pairs = list(zip(apart, [limit * abs(y) for y in golden], strict=True))
    elif norm == "abs":
        pairs = [(max(apart), limit)]
    elif norm == "max":
        pairs = [(max(apart), limit * (max(map(abs, golden)) or 1))]
    else:
        size = sum(y * y for y in golden) or 1
        pairs = [(sum(d * d for d in apart), limit**2 * size)]
    near = Fraction(1, 10**9)
    if any(most and abs(error - most) <= near * most for error, most in pairs):
        return None
    return all(error <= most for error, most in pairs)


@norms
@at_leisure
@given(st.data(), LIMITS)
def test_the_verdict_is_that_of_exact_arithmetic(norm, data, limit):
    shape = data.draw(SHAPES)
    numbers = data.draw(st.sampled_from([ORDINARY, ANY]))
    expected = data.draw(arrays.arrays(np.float64, shape, elements=numbers))
    got = data.draw(arrays.arrays(np.float64, shape, elements=numbers))
    if data.draw(st.booleans()):  # near enough for the limit to decide
        with np.errstate(over="ignore"):
            got = np.clip(expected * (1 + 2 * limit * np.tanh(got)), -1.7e308, 1.7e308)
        got = np.asarray(got)
    verdict = exact(norm, got, expected, limit)
    assume(verdict is not None)
    smallest = np.abs(np.concatenate([expected.ravel(), got.ravel()]))
    assume(not ((smallest > 0) & (smallest < 1e-290)).any())  # whose shares have no digits left
    finding = found(got, expected, **{norm: limit})
    assert finding.ok is verdict
    assert (finding.ratio > 1) is not verdict


@norms
@at_leisure
@given(arrays.arrays(np.float64, SHAPES, elements=ANY), st.sampled_from(COLUMNS), LIMITS)
def test_equal_passes(norm, expected, column, limit):
    if column != "float64":
        expected = np.asarray(np.clip(expected, -1e38, 1e38), np.float32)
    finding = found(expected.copy(), expected, column, **{norm: limit})
    assert finding.ok
    assert finding.ratio == 0
    assert found(expected.copy(), expected, column, **{norm: 0.0}).ok


@norms
@at_leisure
@given(st.data(), st.sampled_from([np.nan, np.inf, -np.inf]), LIMITS)
def test_a_single_nan_or_infinity_fails_wherever_it_is(norm, data, bad, limit):
    got = data.draw(arrays.arrays(np.float64, SHAPES, elements=ANY))
    expected, at = got.copy(), data.draw(st.integers(0, got.size - 1))
    got.reshape(-1)[at] = bad
    stride = data.draw(st.integers(1, got.size))  # what is not compared must be finite too
    for limits in ({norm: limit}, {"finite": 0.0}):
        finding = found(got, expected, stride=stride, **limits)
        assert finding.problem == "not finite"
        assert finding.ratio == math.inf


@norms
@at_leisure
@given(st.data())
def test_what_would_broadcast_fails(norm, data):
    """Shapes that NumPy would stretch to the golden's, of values that would then all agree."""
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4))
    smaller = data.draw(
        arrays.broadcastable_shapes(shape, max_dims=len(shape), max_side=4).filter(
            lambda other: other != shape and np.broadcast_shapes(shape, other) == shape
        )
    )
    got = data.draw(arrays.arrays(np.float64, smaller, elements=ORDINARY))
    expected = np.array(np.broadcast_to(got, shape))
    for limits in ({norm: 0.9}, {"finite": 0.0}):
        for other in (got, expected[None], expected[:0], expected.reshape(-1, 1), np.empty(0)):
            if other.shape != shape:
                assert found(other, expected, **limits).problem == "shape"


@norms
@at_leisure
@given(rows(), st.data())
def test_rearranged_rescaled_and_flipped_results_fail(norm, expected, data):
    axis = data.draw(st.integers(0, expected.ndim - 1))
    size = expected.shape[axis]
    order = data.draw(st.permutations(range(size)).filter(lambda found: found != sorted(found)))
    axes = data.draw(st.permutations(range(expected.ndim)).filter(lambda a: a != sorted(a)))
    factor = data.draw(st.sampled_from([0.0, 0.5, 1 - 1e-5, 1 + 1e-5, 2.0, -1.0, 1e6]))
    wrong = {
        "permuted": np.take(expected, order, axis),
        "rolled": np.roll(expected, data.draw(st.integers(1, size - 1)), axis),
        "reversed": np.flip(expected, axis),
        "transposed": expected.transpose(axes),
        "scaled": expected * factor,
        "sign flipped": -expected,
        "one row for all": np.array(np.broadcast_to(expected[:1], expected.shape)),
        "one element": expected + 1e-5 * np.abs(expected).max() * (expected == expected.flat[-1]),
    }
    # abs asks for the size itself, the others for a share
    limit = 1e-6 * (np.abs(expected).max() if norm == "abs" else 1.0)
    for what, got in wrong.items():
        finding = found(got, expected, **{norm: min(limit, 0.9)})
        assert finding.problem in ("tolerance", "shape"), what
        assert finding.ratio > 1, what


@norms
@pytest.mark.parametrize("column", COLUMNS)
@settings(deadline=None, max_examples=30)
@given(rows(), st.data(), LIMITS)
def test_the_edge_of_the_tolerance(norm, column, expected, data, limit):
    """0.99 of it passes and 1.01 fails, for an error of one element, and one of all."""
    expected = expected / np.abs(expected).max() if norm == "abs" else expected
    if column != "float64":
        expected = expected.astype(np.float32)
        limit = max(limit, 1e-3)  # float32 must be able to hold the two sides
    wide = expected.astype(np.float64)
    everywhere = data.draw(st.booleans())
    at = np.ones(wide.shape) if everywhere else np.zeros(wide.shape)
    at.flat[data.draw(st.integers(0, wide.size - 1))] = 1.0
    size = {
        "each": np.abs(wide),
        "max": np.abs(wide).max(),
        "l2": np.linalg.norm(wide) / np.linalg.norm(at),
        "abs": 1.0,
    }[norm]
    for share, passes in ((0.99, True), (1.01, False)):
        got = (wide + share * limit * size * at).astype(expected.dtype)
        finding = found(got, expected, column, **{norm: limit})
        assert finding.ok is passes
        assert finding.ratio == pytest.approx(share, rel=5e-3)


@at_leisure
@given(rows(), st.sampled_from(COLUMNS))
def test_another_dtype_fails(expected, column):
    right = comparator.result_dtype("out", column)
    for dtype in (np.float64, np.float32, np.float16, np.int64, np.complex128, bool, object):
        if np.dtype(dtype) == right:
            continue
        with np.errstate(over="ignore"):
            got = expected.astype(dtype)
        for limits in (dict.fromkeys(SIZES, 0.9), {"finite": 0.0}):
            assert found(got, expected, column, **limits).problem == "dtype"


BAD_LIMITS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, None, "1e-10", True, [1e-10], 10**400]),
    st.floats(max_value=-5e-324),
    st.floats(min_value=1.0),
)


@at_leisure
@given(st.sampled_from(SIZES), BAD_LIMITS, st.sampled_from(COLUMNS), rows())
def test_no_limit_that_lets_anything_through_is_taken(norm, limit, column, expected):
    with pytest.raises(GoldenError, match=f"{column} tolerance {norm}"):
        found(expected, expected, column, **{norm: limit})


@at_leisure
@given(st.lists(st.booleans(), max_size=6), st.sampled_from(COLUMNS))
def test_a_case_that_checks_nothing_cannot_be(with_limit, column):
    """Whatever has a limit: each output is compared, or the case left out whole, or refused."""
    golden = np.arange(1.0, 4.0)
    outputs = [
        Output(str(i), f"f:{i}", (3,), "float64", "", 1, {column: {"l2": 1e-10}} if has else {})
        for i, has in enumerate(with_limit)
    ]
    case = case_of(*outputs)
    if not outputs:
        with pytest.raises(GoldenError, match="checks nothing"):
            compare_case(case, column, {}, lambda output: golden)
    elif all(with_limit):
        assert in_column([case], column) == [case]
        findings = compare_case(case, column, {}, lambda output: golden)
        assert [finding.problem for finding in findings] == ["missing"] * len(outputs)
    elif any(with_limit):
        with pytest.raises(GoldenError, match=f"{column} tolerance for some outputs and none"):
            in_column([case], column)
    else:
        assert in_column([case], column) == []
        with pytest.raises(UsageError, match="nothing was checked"):
            check_backend(Idle, [column], [case], goldens=SimpleNamespace())


class Idle:
    """A backend that no case reaches."""

    name, modes = "none", ("eager",)


def test_the_two_lists_of_norms_are_one():
    assert tuple(comparator.NORMS) == NORMS
    assert set(RELATIVE) < set(NORMS)
