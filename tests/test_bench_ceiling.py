"""The ceilings: that every library is measured, truly, and that what it lacks is said."""

import sys
import time

import pytest

from conformance.bench import ceiling
from conformance.bench.count import Gemm, count
from spec.config import load_config

GEMMS = (Gemm(64, 48, 32, 2, "one"), Gemm(64, 48, 32, 5, "the same"), Gemm(300, 200, 100, 1, "two"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ceiling, "SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr(ceiling, "COPIED", {"cpu": 2**20})


def request(library: str, dtype: str = "float32", **changes) -> dict:
    given = {"library": library, "dtype": dtype, "device": "cpu", "threads": 1}
    return {**given, "shapes": [[8, 4, 6]], "seconds": 0.05, **changes}


@pytest.mark.parametrize("library", ceiling.LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_each_library_gives_rates_of_its_own(library, dtype, monkeypatch):
    monkeypatch.setattr(ceiling, "limit_cores", lambda count: None)  # this process goes on
    if library == "tensorflow":  # whose threads cannot be set any more where another test used it
        threading = pytest.importorskip("tensorflow").config.threading
        monkeypatch.setattr(threading, "set_intra_op_parallelism_threads", lambda count: None)
        monkeypatch.setattr(threading, "set_inter_op_parallelism_threads", lambda count: None)
    if (library, dtype) == ("numpy", "bf16"):
        with pytest.raises(ValueError, match="NumPy has no bf16; use float32 or float64"):
            ceiling.rates(request(library, dtype))
        return
    found = ceiling.rates(request(library, dtype))
    assert {key: found[key] for key in ("library", "dtype", "device", "threads")} == {
        "library": library,
        "dtype": dtype,
        "device": "cpu",
        "threads": 1,
    }
    assert found["version"] == sys.modules[library].__version__
    assert found["large"]["n"] in (64, 128)
    assert [{**shape, "flops_per_second": 0} for shape in found["shapes"]] == [
        {"m": 8, "n": 4, "k": 6, "flops_per_second": 0}
    ]
    rates = [found["large"]["flops_per_second"], found["shapes"][0]["flops_per_second"]]
    assert all(1e5 < rate < 1e15 for rate in rates)
    assert 1e6 < found["copy_bytes_per_second"] < 1e14


@pytest.mark.parametrize("library", ceiling.LIBRARIES)
def test_a_gpu_that_is_not_there_and_tf32_without_one_are_refused(library, monkeypatch):
    monkeypatch.setattr(ceiling, "limit_cores", lambda count: None)
    with pytest.raises(ValueError, match="use cpu"):
        ceiling.rates(request(library, device="cuda"))
    with pytest.raises(ValueError, match="use float32"):
        ceiling.rates(request(library, "tf32"))


def sleeper(seconds: float) -> ceiling.Library:
    """A library whose products take `seconds` each, whatever their size."""
    return ceiling.Library(
        "1", lambda a, b: lambda: time.sleep(seconds), lambda size: lambda: None, lambda _: None
    )


def test_a_known_time_gives_the_known_rate():
    flops = 2.0 * 300 * 200 * 1000
    rate = ceiling.shape_rate(sleeper(0.01), 300, 200, 1000, 0.1)
    assert flops / 0.03 < rate <= flops / 0.01
    # 2000 operations each, of which as many as make SMALL are done in one call
    assert 4e6 / 0.03 < ceiling.shape_rate(sleeper(0.01), 10, 10, 10, 0.1) <= 4e6 / 0.01


def test_the_best_of_many_samples_counts():
    pauses = iter([0.0, 0.02, 0.004, *[0.02] * 1000])
    best = ceiling.fastest(lambda: time.sleep(next(pauses)), lambda _: None, 0.1)
    assert 0.004 <= best < 0.019


def test_every_result_is_waited_for():
    seen = []
    ceiling.fastest(lambda: len(seen), seen.append, 0.0)
    assert len(seen) == 1 + ceiling.SAMPLES
    assert len(seen[-1]) > 1  # so short a call is done several times before the wait


def test_sides_grow_as_far_as_the_time_goes():
    side, rate = ceiling.large_rate(sleeper(0.001), (10, 20, 40), 2.0)
    assert side == 40  # by far the best, where all take the same time
    assert rate <= 2 * 40**3 / 0.001
    slow = ceiling.Library(
        "1",
        lambda a, b: lambda: time.sleep(2.0 * a[0] ** 3 / 1e9),
        lambda size: lambda: None,
        lambda _: None,
    )
    assert ceiling.large_rate(slow, (100, 4000), 0.1)[0] == 100  # the other would take 128 s


def test_a_side_whose_preparation_leaves_no_time_is_left_out():
    def multiplier(a, b):
        time.sleep(0.3)  # as long as some compile
        return lambda: None

    library = ceiling.Library("1", multiplier, lambda size: lambda: None, lambda _: None)
    assert ceiling.large_rate(library, (10, 20, 4000), 0.5)[0] == 10
    assert ceiling.large_rate(library, (10, 20, 30), 60.0 / 32)[0] == 30


def test_shapes_that_the_time_does_not_reach_are_left_out(monkeypatch):
    monkeypatch.setattr(ceiling, "limit_cores", lambda count: None)
    monkeypatch.setattr(ceiling, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(ceiling, "MOST_FOR_SHAPES", 0.0)
    monkeypatch.setattr(ceiling, "COPIED", {"cpu": 2**20})
    asked = {"library": "numpy", "dtype": "float64", "device": "cpu", "threads": 1}
    shapes = [[40, 30, 20 + i] for i in range(500)]
    found = ceiling.rates({**asked, "seconds": 0.05, "shapes": shapes})["shapes"]
    assert 0 < len(found) < len(shapes)
    assert [[s["m"], s["n"], s["k"]] for s in found] == shapes[: len(found)]


def test_a_process_of_its_own_answers(tmp_path):
    found = ceiling.measure(sys.executable, "numpy", "float64", "cpu", 1, GEMMS, 0.3)
    assert found["library"] == "numpy"
    assert found["threads"] == 1
    assert [(s["m"], s["n"], s["k"]) for s in found["shapes"]] == [(64, 48, 32), (300, 200, 100)]
    with pytest.raises(ceiling.CeilingError, match="NumPy has no bf16"):
        ceiling.measure(sys.executable, "numpy", "bf16", "cpu", 1, GEMMS, 0.3)
    with pytest.raises(ceiling.CeilingError, match=r"nowhere/python cannot be run \(No such file"):
        ceiling.measure(f"{tmp_path}/nowhere/python", "numpy", "float32", "cpu", 1, GEMMS, 0.3)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no library here >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ceiling.CeilingError, match=r"exit code 3: no library here"):
        ceiling.measure(str(broken), "numpy", "float32", "cpu", 1, GEMMS, 0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": "theano"}, "library = 'theano' is unknown; choose one of numpy, torch"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown; choose one of float64"),
        ({"device": "tpu"}, "device = 'tpu' is unknown; choose one of cpu"),
        ({"seconds": 0.0}, r"seconds = 0.0, threads = 1; give more than 0"),
        ({"threads": 0}, r"threads = 0; give more than 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes, message):
    given = {"library": "numpy", "dtype": "float32", "device": "cpu", "threads": 1}
    with pytest.raises(ceiling.CeilingError, match=message):
        ceiling.measure(sys.executable, **{**given, "gemms": GEMMS, "seconds": 0.1, **changes})


def test_the_shapes_of_a_step_are_asked_for_once_each():
    gemms = count(load_config("tiny"), 2).gemms
    found = ceiling.measure(sys.executable, "numpy", "float32", "cpu", 1, gemms, 0.2)
    shapes = [(shape["m"], shape["n"], shape["k"]) for shape in found["shapes"]]
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == {(gemm.m, gemm.n, gemm.k) for gemm in gemms}
