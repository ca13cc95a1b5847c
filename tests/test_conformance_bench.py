"""The timing of train steps: checked first, interleaved, and refused where the check fails."""

import importlib
import json
import mmap
import os
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conformance_fakes import Backend, Fake, write_goldens
from typer.testing import CliRunner

from conformance.__main__ import app
from conformance.bench import steps as bench
from conformance.execute import Session
from conformance.process import Impl, Setup, WorkerDied
from conformance.reports import SCHEMA
from conformance.runner import Plan, Suite
from spec.config import load_config
from spec.goldens import Goldens
from spec.params import initial_params

HERE = Path(__file__).resolve().parent
TINY = load_config("tiny")
MODULE = """
from conformance_fakes import Fake, opener

name, modes, open = "{name}", ("eager",), opener(Fake)
"""


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    return write_goldens(tmp_path_factory.mktemp("goldens"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.05)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    return tmp_path


def run(goldens, *arguments):
    options = [f"--goldens={goldens}", "--threads=1", "--dtype=float32", "--case=L5/*"]
    return CliRunner().invoke(app, ["run", "--impl=one", "--impl=two", *options, *arguments])


def test_timing_of_checked_steps(goldens, place):
    done = run(
        goldens, "--timing", "--timing-config=tiny", "--rounds=3", "--timing-batch=2", "--level=5"
    )
    assert done.exit_code == 0, done.output
    report = json.loads((place / "reports/conformance.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    entries = report["timing"]["entries"]
    assert [entry["backend"] for entry in entries] == ["one", "two"]
    for entry in entries:
        assert entry["ok"]
        assert entry["verified"] == "L5/tiny/train_steps"
        assert len(entry["rounds"]) == 3
        assert all(len(samples) >= 1 for samples in entry["rounds"])
        assert 0 < entry["q1"] <= entry["median"] <= entry["q3"]
        assert entry["images_per_second"] == pytest.approx(2 / entry["median"])
        assert entry["first"] > 0
        assert entry["threads"] == 1
        assert entry["peak_memory"] > 2**20
        assert entry["versions"]["numpy"] == np.__version__
    assert "images/s" in done.output
    page = (place / "reports/conformance.md").read_text()
    assert "## Train step, float32" in page


def test_a_step_that_fails_its_check_is_not_timed(goldens, place):
    # No golden of train_steps on digits: the made-up gradients are held against the reference.
    done = run(goldens, "--timing", "--timing-config=digits", "--rounds=1", "--timing-batch=2")
    assert done.exit_code == 1
    report = json.loads((place / "reports/conformance.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert all(column["ok"] for column in report["columns"])
    for entry in report["timing"]["entries"]:
        assert not entry["ok"]
        assert "against spec/reference.py, in shares of the float32 limit: " in entry["problem"]
        assert "gradient along one direction" in entry["problem"]
        assert "loss" not in entry["problem"]
    assert "not timed" in done.output


def test_a_backend_that_failed_is_not_timed(goldens, place):
    wrong = "\n\nFake.train_step = lambda self, x0, t, noise, labels=None, drop=None: 0.5\n"
    (place / "two.py").write_text(MODULE.format(name="two") + wrong)
    done = run(goldens, "--timing", "--timing-config=tiny", "--rounds=1", "--timing-batch=2")
    assert done.exit_code == 1
    report = json.loads((place / "reports/conformance.json").read_text())
    one, two = report["timing"]["entries"]
    assert one["ok"]
    assert two["problem"] == "conformance did not pass"
    assert two["rounds"] == []


def test_a_filtered_run_is_not_timed_unless_asked(goldens, place):
    done = run(goldens)
    assert done.exit_code == 0, done.output
    assert json.loads((place / "reports/conformance.json").read_text())["timing"] is None


class Worker:
    """Stands for a WorkerProcess; writes down what it is asked."""

    def __init__(self, name, log, dies_in=None):
        self.name, self.log, self.dies_in = name, log, dies_in
        self.starts, self.hello = 1, {"versions": {}}

    def ask(self, request, timeout):
        self.log.append((self.name, request["part"]))
        if request["part"] == self.dies_in:
            raise WorkerDied("crashed", "gone", "")
        return {"status": "done", "first": 1.0, "samples": [0.1, 0.3], "peak_memory": None}


def plan_of(goldens, names):
    held = Goldens(goldens)
    setup = Setup(goldens, "cpu", None, 1, 60.0, TINY)
    return Plan([Impl(name, sys.executable) for name in names], ["float32"], held, [], setup)


def test_rounds_are_interleaved_in_changing_order(goldens, monkeypatch):
    log = []
    suite = Suite(plan_of(goldens, "abc"))
    workers = {name: Worker(name, log) for name in "abc"}
    monkeypatch.setattr(suite, "worker", lambda impl, dtype: workers[impl.name])
    monkeypatch.setattr(bench, "verify", lambda *args: ("checked", ""))
    with suite:
        timings = bench.run_timing(suite, [TINY], 8, 12, {}, lambda text: None)
    rounds = [name for name, part in log if part == "round"]
    orders = {tuple(rounds[i : i + 3]) for i in range(0, 36, 3)}
    assert len(rounds) == 36
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(orders) > 1
    assert [timing.quartiles for timing in timings] == [pytest.approx((0.1, 0.2, 0.3))] * 3


def test_a_worker_that_dies_while_it_is_timed_drops_out(goldens, monkeypatch):
    suite = Suite(plan_of(goldens, "ab"))
    workers = {"a": Worker("a", [], dies_in="round"), "b": Worker("b", [])}
    monkeypatch.setattr(suite, "worker", lambda impl, dtype: workers[impl.name])
    monkeypatch.setattr(bench, "verify", lambda *args: ("checked", ""))
    with suite:
        a, b = bench.run_timing(suite, [TINY], 8, 2, {}, lambda text: None)
    assert a.problem == "crashed: gone"
    assert b.ok
    assert len(b.rounds) == 2


def test_a_worker_that_was_started_anew_is_not_timed(goldens, monkeypatch):
    class Restarted(Worker):
        def ask(self, request, timeout):
            self.starts += 1
            return super().ask(request, timeout)

    suite = Suite(plan_of(goldens, "a"))
    worker = Restarted("a", [])
    monkeypatch.setattr(suite, "worker", lambda impl, dtype: worker)
    monkeypatch.setattr(bench, "verify", lambda *args: ("checked", ""))
    with suite:
        (timing,) = bench.run_timing(suite, [TINY], 8, 2, {}, lambda text: None)
    assert "started anew" in timing.problem


def test_a_loss_that_is_not_finite_stops_the_timing(goldens):
    class Diverges(Fake):
        def train_step(self, *args, **more):
            super().train_step(*args, **more)
            return float("nan")

    session = Session(Backend(Diverges), Goldens(goldens), "float32", "cpu")
    config = {**vars(TINY)}
    timer = bench.Timer(session, config, 2)
    with pytest.raises(FloatingPointError, match="the loss is nan after 1 steps"):
        timer.part({"part": "first"})


@pytest.fixture(scope="module")
def honest():
    """Results of a float32 backend with true gradients, on two rows of tiny."""
    backend = importlib.import_module("impl_numpy")
    config = TINY.replace(batch_size=2)
    session = Session(backend, Goldens.__new__(Goldens), "float32", "cpu")
    batch = bench.batch_of(config, 0)
    start = {n: p.astype(np.float64) for n, p in initial_params(config, 0).items()}
    given = {f"params/{name}": value for name, value in start.items()}
    once = {name: value[None] for name, value in batch.items()}
    graded = session.attempt(bench._case(config, "loss_and_grads", batch, {}), given | batch)
    case = bench._case(config, "train_steps", once, {"record": [1]})
    stepped = session.attempt(case, given | once)
    assert (graded.status, stepped.status) == ("done", "done")
    return config, start, batch, graded.results, stepped.results


def test_the_reference_accepts_true_gradients_with_room(honest):
    shares = bench.reference_shares(*honest)
    assert max(shares.values()) < 0.5, shares


@pytest.mark.parametrize(
    ("prefix", "change", "what"),
    [
        ("grads/", lambda g: g * 1.001, "gradient along one direction"),
        ("grads/", lambda g: g.astype(np.float16).astype(np.float32), "m"),
        ("loss", lambda loss: loss * 1.0001, "loss"),
        ("1/m/", lambda m: m * 1.001, "m"),
        ("1/v/", lambda v: v * 1.001, "v"),
        ("1/delta/", lambda d: d * 1.01, "update"),
        ("1/ema_delta/", lambda d: d * 1.01, "EMA"),
        ("grads/mid_block.resnets.0", lambda g: np.zeros_like(g), "gradient along one direction"),
        ("1/m/conv_in", lambda m: m * np.nan, "m"),
    ],
)
def test_the_reference_refuses_a_wrong_step(honest, prefix, change, what):
    *known, graded, stepped = honest

    def changed(results):
        return {k: change(v) if k.startswith(prefix) else v for k, v in results.items()}

    shares = bench.reference_shares(*known, changed(graded), changed(stepped))
    assert not shares[what] <= 1


def test_peak_memory_is_read_and_begun_anew():
    peak = bench.peak_memory()
    assert peak > 2**20
    if Path("/proc/self/clear_refs").exists():
        block = mmap.mmap(-1, 2**26)  # goes back to the system, where a freed array may be kept
        block.write(b"1" * 2**26)
        high = bench.peak_memory()
        assert high - peak > 2**24 or high > 2**26
        block.close()
        bench.reset_peak_memory()
        assert bench.peak_memory() < high
