"""How cost grows: the points, the slope and its interval, and what is left out."""

import sys

import numpy as np
import pytest

from conformance.bench import results, scaling, workloads
from conformance.bench.count import count
from conformance.bench.rounds import Contender, Plan, Run
from conformance.process import Impl
from spec.config import ConfigError, load_config

S = workloads.find("S")
PLAN = Plan([S], "cpu", 1, 5, 0.1, 1, 0, 60.0)


def contender(name: str, mode: str = "eager") -> Contender:
    return Contender(Impl(name, sys.executable), mode, "float32")


def test_points_change_one_thing_each():
    found = scaling.points(S, scaling.AXES)
    assert [point.value for point in found if point.axis == "batch"][-1] == 256
    for point in found:
        config, work = point.workload.config, point.workload
        assert work.batch == config.batch_size
        same = config.replace(
            batch_size=S.config.batch_size,
            image_size=S.config.image_size,
            channels=S.config.channels,
        )
        assert same == S.config
        changed = {
            "batch": work.batch,
            "image_size": config.image_size[0],
            "width": config.channels[0],
        }
        assert changed[point.axis] == point.value
        if point.axis != "batch":
            assert work.batch == scaling.BATCH
    assert len({point.workload.key for point in found}) == len(found)
    wide = [point.workload.config.channels for point in found if point.axis == "width"]
    assert wide == [(16, 32, 32), (32, 64, 64), (64, 128, 128), (128, 256, 256)]


def test_work_grows_as_it_must():
    """Convolutions grow with the pixels and with the square of the width."""
    flops = {}
    for point in scaling.points(S, scaling.AXES):
        work = count(point.workload.config, point.workload.batch)
        flops[point.axis, point.value] = work.flops
    assert flops["batch", 256] == 256 * flops["batch", 1]
    assert flops["image_size", 64] / flops["image_size", 32] == pytest.approx(4, rel=0.1)
    assert flops["width", 128] / flops["width", 64] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"depth": (1, 2)}, scaling.ScalingError, "axis 'depth' is unknown; choose of batch, im"),
        ({"batch": (4,)}, scaling.ScalingError, "a slope needs two different values"),
        ({"batch": (4, 4)}, scaling.ScalingError, "a slope needs two different values"),
        ({"batch": (0, 4)}, scaling.ScalingError, "all above 0"),
        ({"image_size": (6, 8)}, ConfigError, "image_size"),
        ({"width": (12, 16)}, ConfigError, "channels"),
    ],
)
def test_values_that_make_no_sense_are_refused(axes, error, message):
    with pytest.raises(error, match=message):
        scaling.points(S, axes)


def test_the_slope_of_a_power_is_its_exponent():
    rounds = [[[0.5 * value**1.5] * 4] * 5 for value in (1, 2, 8, 64)]
    slope, (low, high) = scaling.slope_of((1, 2, 8, 64), rounds)
    assert slope == pytest.approx(1.5)
    assert low == pytest.approx(high)
    assert scaling.slope_of((4,), rounds[:1]) == (None, None)


def test_the_interval_holds_the_slope_and_grows_with_the_noise():
    random = np.random.default_rng(0)
    values, widths = (1, 4, 16, 64), []
    for noise in (0.01, 0.2):
        rounds = [
            (value * np.exp(noise * random.standard_normal((7, 1)) + np.zeros((7, 5)))).tolist()
            for value in values
        ]
        slope, (low, high) = scaling.slope_of(values, rounds)
        assert low < slope < high
        assert low < 1 < high
        widths.append(high - low)
    assert widths[1] > 5 * widths[0]


def test_entries_hold_what_was_measured_and_fit_the_schema():
    found = scaling.points(S, {"batch": (1, 2, 4), "width": (16, 32)})
    plan = scaling.plan_of(PLAN, found)
    assert [w.key for w in plan.workloads] == [
        "S batch=1",
        "S batch=2",
        "S batch=4",
        "S width=16",
        "S width=32",
    ]
    runs = []
    for name, power in (("impl_numpy", 1.0), ("impl_torch", 0.5)):
        for point in found:
            run = Run(point.workload, contender(name))
            run.rounds = [[0.1 * point.value**power] * 3] * 5
            run.processes, run.peak_memory = [0] * 5, 10**8 * point.value
            runs.append(run)
    runs[1].fail("crashed", "gone")  # NumPy, two images
    runs.append(Run(found[0].workload, contender("impl_jax"), "cannot start", "it is not here"))
    lines = scaling.entries(found, runs[::-1])
    by_name = {(line["backend"], line["axis"]): line for line in lines}
    numpy = by_name["impl_numpy", "batch"]
    assert [point["value"] for point in numpy["points"]] == [1, 4]
    assert numpy["points"][1] == {"value": 4, "seconds": [0.4] * 5, "peak_memory": 4 * 10**8}
    assert numpy["slope"] == pytest.approx(1.0)
    assert by_name["impl_torch", "width"]["slope"] == pytest.approx(0.5)
    missing = by_name["impl_jax", "batch"]
    assert (missing["points"], missing["slope"], missing["slope_interval"]) == ([], None, None)
    machine = {"cpu": "", "cores": 1, "threads": 1, "memory": None, "os": "", "gpu": None}
    clocks = {"cpu_mhz": [], "load": None}
    machine |= {"driver": None, "before": clocks, "after": clocks}
    values = results.empty(plan, ["float32"], machine)
    results.check(results.plain({**values, "kind": "scaling", "scaling": lines}), "these")


def test_the_base_may_be_any_train_step():
    base = workloads.find("tiny")
    (one, two) = scaling.points(base, {"width": (8, 16)})
    assert one.workload.config.channels == load_config("tiny").channels
    assert two.workload.config.channels == (16, 32, 24)
