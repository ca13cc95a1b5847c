"""The comparator: what must fail fails, and nothing else."""

import math

import numpy as np
import pytest

from conformance.compare import NORMS, compare, compare_case, result_dtype
from spec.config import load_config
from spec.goldens import Case, GoldenError, Output
from spec.params import parameter_shapes

CONFIG = load_config("tiny")
SIZES = [norm for norm in NORMS if norm != "finite"]  # those that measure one
RNG = np.random.Generator(np.random.Philox(3))
GOLDEN = RNG.normal(size=(3, 4, 4)) + 0.1


def output(expected=GOLDEN, name="out", stride=1, **limits):
    limits = limits or {"l2": 1e-10}
    shape = expected.shape
    return Output(name, "f:x", shape, "float64", "", stride, {"float64": limits | {"reason": "r"}})


def case(*outputs, call="predict"):
    return Case("L3/tiny/x", 3, "S7", CONFIG, call, None, {}, {}, outputs, ("cause",), "oracle")


def one(got, expected=GOLDEN, stride=1, name="out", **limits):
    wanted = output(expected, name, stride, **limits)
    stored = expected.reshape(-1)[::stride] if stride > 1 else expected
    return compare(case(wanted), wanted, "float64", stored, got)


def changed(index, value):
    got = GOLDEN.copy()
    got[index] = value
    return got


def test_equal_passes_in_every_norm():
    finding = one(GOLDEN.copy(), l2=0.0, max=0.0, each=0.0, abs=0.0, finite=0.0)
    assert finding.ok
    assert finding.ratio == 0
    assert {measure.norm for measure in finding.measures} == set(NORMS)


WRONG = {
    "NaN": (changed((1, 2, 3), np.nan), "not finite"),
    "infinity": (changed((1, 2, 3), np.inf), "not finite"),
    "minus infinity": (changed((0, 0, 0), -np.inf), "not finite"),
    "all NaN": (np.full_like(GOLDEN, np.nan), "not finite"),
    "empty": (np.empty((0, 4, 4)), "shape"),
    "broadcast": (GOLDEN[:1], "shape"),
    "0-d": (np.array(GOLDEN[0, 0, 0]), "shape"),
    "one axis more": (GOLDEN[None], "shape"),
    "flat": (GOLDEN.reshape(-1), "shape"),
    "transposed": (GOLDEN.transpose(0, 2, 1), "tolerance"),
    "transposed in shape": (GOLDEN.transpose(2, 1, 0), "shape"),
    "permuted": (GOLDEN[[1, 2, 0]], "tolerance"),
    "scaled": (GOLDEN * 1.001, "tolerance"),
    "sign flipped": (-GOLDEN, "tolerance"),
    "off by one": (np.roll(GOLDEN, 1, axis=1), "tolerance"),
    "one element": (changed((2, 3, 1), GOLDEN[2, 3, 1] + 1e-6), "tolerance"),
    "zero": (np.zeros_like(GOLDEN), "tolerance"),
    "float32": (GOLDEN.astype(np.float32), "dtype"),
    "integers": (GOLDEN.astype(np.int64), "dtype"),
    "complex": (GOLDEN.astype(np.complex128), "dtype"),
    "objects": (GOLDEN.astype(object), "dtype"),
    "a list": (GOLDEN.tolist(), "dtype"),
    "None": (None, "missing"),
}


@pytest.mark.parametrize("limits", [{norm: 1e-8} for norm in SIZES], ids=SIZES)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_results_fail_in_every_norm(what, limits):
    got, problem = WRONG[what]
    finding = one(got, **limits)
    assert finding.problem == problem
    assert not finding.ok
    assert finding.ratio > 1
    assert "out" in finding.text


def test_a_huge_but_finite_result_fails_without_a_warning(recwarn):
    finding = one(changed((0, 1, 2), 1e300), l2=0.99, max=0.99)
    assert finding.problem == "tolerance"
    assert not recwarn.list


def test_finite_asks_for_shape_dtype_and_finiteness_alone():
    assert one(GOLDEN + 1, finite=0.0).ok
    assert one(GOLDEN + 1, finite=0.0).ratio == 0
    for got, problem in (
        (changed((0, 0, 0), np.nan), "not finite"),
        (changed((1, 0, 0), np.inf), "not finite"),
        (GOLDEN[:2], "shape"),
        (GOLDEN.astype(np.float32), "dtype"),
        (None, "missing"),
    ):
        assert one(got, finite=0.0).problem == problem


@pytest.mark.parametrize("norm", SIZES)
def test_the_edge_of_the_tolerance(norm):
    expected = np.array([1.0, -2.0, 4.0])
    direction = np.array([0.0, 0.0, 1e-6])
    size = {"l2": math.sqrt(21), "max": 4.0, "each": 4.0, "abs": 1.0}[norm]
    tolerance = 1e-6 / size
    for share, passes in ((0.99, True), (1.01, False)):
        finding = one(expected + share * direction, expected, **{norm: tolerance})
        assert finding.ok is passes
        assert finding.ratio == pytest.approx(share, rel=1e-6)
        assert finding.index == (2,)
        assert finding.got == expected[2] + share * direction[2]
        assert finding.expected == 4.0


def test_all_norms_must_hold_and_the_worst_is_named():
    got = changed((0, 0, 0), GOLDEN[0, 0, 0] + 1e-3)
    finding = one(got, l2=0.99, max=1e-5)
    assert not finding.ok
    assert finding.worst.norm == "max"
    assert [m.ok for m in finding.measures] == [True, False]


@pytest.mark.parametrize("norm", ["l2", "max", "abs"])
def test_a_zero_golden_is_compared_absolutely(norm):
    zero = np.zeros(4)
    assert one(np.full(4, 1e-12), zero, **{norm: 1e-11}).ok
    assert not one(np.full(4, 1e-10), zero, **{norm: 1e-11}).ok


def test_each_asks_zero_where_the_golden_is_zero():
    expected = np.array([0.0, 1e-9, 5.0])
    assert one(expected.copy(), expected, each=1e-12).ok
    finding = one(np.array([1e-300, 1e-9, 5.0]), expected, each=1e-6)
    assert not finding.ok
    assert finding.index == (0,)
    finding = one(np.array([0.0, 1.1e-9, 5.0]), expected, each=1e-6, max=1e-6)
    assert finding.worst.norm == "each"
    assert finding.index == (1,)


def test_a_strided_golden_is_compared_where_it_is_stored():
    assert one(GOLDEN.copy(), stride=5).ok
    stored, between = np.unravel_index(35, GOLDEN.shape), np.unravel_index(34, GOLDEN.shape)
    finding = one(changed(stored, 9.0), stride=5)
    assert not finding.ok
    assert finding.index == tuple(map(int, stored))
    assert one(changed(between, 9.0), stride=5).ok
    assert one(changed(between, np.nan), stride=5).problem == "not finite"
    assert one(GOLDEN[:2], stride=5).problem == "shape"


def test_a_scalar():
    expected = np.array(0.25)
    assert one(np.array(0.25), expected).ok
    finding = one(np.array(0.5), expected)
    assert finding.index == ()
    assert finding.got == 0.5
    assert one(np.array([0.25]), expected).problem == "shape"


def test_tiny_and_huge_values_neither_vanish_nor_overflow():
    for scale in (1e-200, 1e200):
        assert one(GOLDEN * scale, GOLDEN * scale, l2=1e-10).ok
        finding = one(GOLDEN * scale * 1.01, GOLDEN * scale, l2=1e-10)
        assert finding.worst.error == pytest.approx(0.01)
    largest = np.full((3, 4, 4), 1.7e308)  # whose norm is beyond float64, as half of it is
    assert one(largest.copy(), largest, l2=1e-10).ok
    assert one(largest / 2, largest, l2=1e-10).worst.error == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.empty((0,)), np.array([1.0, np.nan]), np.array([np.inf])])
def test_a_golden_that_can_check_nothing_is_refused(bad):
    with pytest.raises(GoldenError, match="empty or not finite"):
        one(bad.copy(), bad)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"l3": 1.0}, "unknown norm 'l3'"),
        ({"l2": float("nan")}, "not a finite number"),
        ({"l2": float("inf")}, "not a finite number"),
        ({"l2": -1.0}, "at least 0"),
        ({"l2": None}, "not a finite number"),
        ({"l2": True}, "not a finite number"),
        ({"l2": 1.0}, "a result of zeros would be within it"),
        ({"each": 1e300}, "a result of zeros would be within it"),
        ({"abs": 10**400}, "not below 1: it says nothing"),
    ],
)
def test_a_tolerance_that_can_check_nothing_is_refused(limits, message):
    with pytest.raises(GoldenError, match=message):
        one(GOLDEN.copy(), **limits)


def test_a_missing_tolerance_is_refused():
    wanted = Output("out", "f:x", (3,), "float64", "", 1, {"float64": {"reason": "none"}})
    with pytest.raises(GoldenError, match="no float64 tolerance"):
        compare(case(wanted), wanted, "float64", np.ones(3), np.ones(3))


def test_a_case_without_outputs_is_refused():
    with pytest.raises(GoldenError, match="checks nothing"):
        compare_case(case(), "float64", {"out": GOLDEN}, lambda output: GOLDEN)


def test_missing_and_extra_results_are_named():
    wanted = [output(name="grads/a"), output(name="grads/b")]
    results = {"grads/a": GOLDEN, "grads/c": GOLDEN}
    findings = compare_case(case(*wanted), "float64", results, lambda output: GOLDEN)
    found = {finding.output: finding.problem for finding in findings}
    assert found == {"grads/a": None, "grads/b": "missing", "grads/c": "extra"}
    assert "grads/c" in findings[-1].text


def test_parts_of_a_state_that_s8_exempts_may_lack_a_golden_but_must_be_finite():
    name = "mid_block.attentions.0.to_k.bias"
    assert name in parameter_shapes(CONFIG)
    wanted = case(output(name="m/conv_in.bias"), call="apply_gradients")
    results = {"m/conv_in.bias": GOLDEN, f"m/{name}": np.ones(3)}

    def problems(results):
        findings = compare_case(wanted, "float64", results, lambda output: GOLDEN)
        return {finding.output: finding.problem for finding in findings if not finding.ok}

    assert problems(results) == {}
    assert problems(results | {f"m/{name}": np.array([np.nan])}) == {f"m/{name}": "not finite"}
    assert problems(results | {"m/other": np.ones(3)}) == {"m/other": "extra"}


def test_what_the_suite_takes_itself_is_float64():
    assert result_dtype("loss", "float32") == "float64"
    assert result_dtype("10/delta/conv_in.bias", "float32") == "float64"
    assert result_dtype("ema_delta/conv_in.bias", "float32") == "float64"
    assert result_dtype("10/m/conv_in.bias", "float32") == "float32"
    assert result_dtype("grads/conv_in.bias", "float32") == "float32"
    assert result_dtype("out", "float64") == "float64"
