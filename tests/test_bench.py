"""The benchmark: what is checked before a figure counts, rounds, statistics, results, tables."""

import argparse
import copy
import importlib
import io
import itertools
import json
import mmap
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from conformance import worker
from conformance.bench import (
    command,
    compare,
    device,
    gate,
    results,
    rounds,
    shares,
    stats,
    steps,
    subject,
    table,
    workloads,
)
from conformance.bench import machine as machine_of
from conformance.bench.subject import Subject, starting_params
from conformance.execute import Session
from conformance.process import MODE_ENVIRONMENT, CannotStart, Impl, Setup, environment
from spec.config import ConfigError, load_config
from spec.goldens import GOLDENS, Goldens
from spec.params import parameter_count

HERE = Path(__file__).resolve().parent
TINY = load_config("tiny")


# --- workloads -------------------------------------------------------------------------------


def test_the_workloads_are_of_the_sizes_that_they_claim():
    found = workloads.shipped()
    sizes = {key: (parameter_count(w.config), w.batch) for key, w in found.items()}
    assert sizes["S"] == (1_112_801, 64)
    assert sizes["M"] == (8_952_067, 16)
    assert sizes["L"] == (35_746_307, 128)
    assert all(w.config.max_grad_norm == 0 for w in found.values() if w.kind == "train")
    assert all(w.config.batch_size == w.batch for w in found.values())
    samplings = [w for w in found.values() if w.kind == "sample"]
    assert [w.key for w in samplings] == ["sample-digits", "sample-L"]
    assert all(w.steps == 50 and w.guidance_scale and w.config.num_classes for w in samplings)
    for key in ("s", "m"):
        text = (workloads.FOLDER / f"{key}.toml").read_text()
        assert f"{parameter_count(found[key.upper()].config):,} parameters" in text


def test_a_workload_may_be_a_config_and_have_another_batch():
    assert workloads.find("s") == workloads.find("S")
    tiny = workloads.find("tiny", 5)
    assert (tiny.key, tiny.batch, tiny.config.batch_size) == ("tiny@5", 5, 5)
    assert tiny.config.max_grad_norm == 0
    with pytest.raises(
        ConfigError, match="unknown workload 'XL'; there are S, M, L, sample-digits"
    ):
        workloads.find("XL")
    with pytest.raises(ConfigError, match=r"--batch 0 is outside 1\.\.65536"):
        workloads.find("S", 0)


# --- statistics ------------------------------------------------------------------------------


def test_median_quartiles_and_interval():
    steady = [[2.0, 2.0], [2.0], [2.0, 2.0, 2.0]]
    assert stats.summarise(steady) == stats.Summary(2.0, 2.0, 2.0, (2.0, 2.0))
    spread = stats.summarise([[1.0], [2.0], [3.0], [4.0], [5.0]])
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert spread.interval == (1.0, 5.0)  # five rounds say no more than that
    assert spread == stats.summarise([[1.0], [2.0], [3.0], [4.0], [5.0]])


def test_the_interval_holds_the_true_median_about_as_often_as_it_says():
    draw = np.random.Generator(np.random.Philox(key=3))
    held = 0
    for _ in range(100):
        low, high = stats.summarise(draw.normal(10, 1, (12, 3)).tolist()).interval
        held += low <= 10 <= high
    assert 86 <= held <= 100


def test_the_medians_of_resampled_runs_are_those_of_their_samples(monkeypatch):
    taken = [[3.0, 1.0], [2.0], [5.0, 4.0, 9.0], [2.0, 2.5]]
    runs = stats.resampled(4)[:50]
    expected = [np.median(np.concatenate([taken[i] for i in run])) for run in runs]
    assert stats.medians(taken, runs).tolist() == expected
    monkeypatch.setattr(stats, "CELLS", 40)  # several tables
    assert stats.medians(taken, runs).tolist() == expected


def test_what_rounds_of_a_process_share_widens_the_interval():
    by_process = [[1.0]] * 5 + [[2.0]] * 5 + [[3.0]] * 5
    apart = stats.summarise(by_process, [0] * 5 + [1] * 5 + [2] * 5)
    assert apart.interval == (1.0, 3.0)
    low, high = stats.summarise(by_process).interval
    assert high - low <= 2.0
    runs = stats.resampled(6, [0, 0, 1, 1, 2, 2])
    assert runs.shape == (stats.RESAMPLES, 6)
    assert all(len({i // 2 for i in run}) <= 3 for run in runs[:20])
    with pytest.raises(AssertionError):  # a run draws whole processes: never five of one and one
        assert any(sorted(i // 2 for i in run) == [0, 0, 0, 0, 0, 1] for run in runs)


def test_overlapping_intervals_share_a_rank():
    assert stats.ranks([(1, 2), (3, 4), (5, 6)]) == [1, 2, 3]
    assert stats.ranks([(5, 6), (1, 2), (1.5, 3)]) == [3, 1, 1]
    assert stats.ranks([(1, 2), (1.9, 3), (2.5, 4), (5, 6)]) == [1, 1, 1, 4]
    assert stats.ranks([(1, 9), (2, 3), (4, 5)]) == [1, 1, 1]
    assert stats.ranks([]) == []


def test_a_ratio_of_turns_in_the_same_rounds_loses_what_they_share():
    slow = [1.0, 1.0, 3.0, 1.0, 5.0, 1.0, 2.0]  # how much slower the machine was in each round
    first, second = ([[base * factor] for factor in slow] for base in (1.0, 2.0))
    value, bounds = stats.paired_ratio(first, second)
    assert value == bounds[0] == bounds[1] == 0.5
    _, apart = stats.ratio(first, second)
    assert apart[1] > 2 * apart[0]
    assert stats.changed((0.4, 0.6))
    assert not stats.changed((0.9, 1.1))


# --- the check -------------------------------------------------------------------------------


def subject_of(module, workload, folder, dtype="float32", mode=None):
    backend = importlib.import_module(module)
    session = Session(backend, Goldens.__new__(Goldens), dtype, "cpu", mode)
    entry = {**vars(workload), "config": vars(workload.config)}
    return Subject(session, {"workload": entry, "folder": str(folder)})


def found_step(subject, when):
    from safetensors.numpy import load_file

    reply = subject.part({"part": "check", "when": when})
    tensors = load_file(subject.folder / reply["file"])
    names = list(subject.began)
    sides = [rounds._trees(tensors, side, names) for side in ("before", "after")]
    counts = (reply["step"], reply["expected_step"])
    return gate.FoundStep(*counts, *sides, reply["after_step"], reply["loss"])


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """NumPy's first step on tiny, and one after some more, as a worker reports them."""
    workload = workloads.find("tiny")
    subject = subject_of("impl_numpy", workload, tmp_path_factory.mktemp("honest"))
    first = found_step(subject, "before")
    subject.part({"part": "warm", "calls": 5})
    return workload, {gate.BEFORE: first, gate.AFTER: found_step(subject, "after")}


@pytest.fixture(scope="module")
def answers(honest):
    with ThreadPoolExecutor(2) as pool:
        yield gate.Reference(honest[0], starting_params(honest[0]), pool)


@pytest.mark.parametrize("when", [gate.BEFORE, gate.AFTER])
def test_an_honest_step_passes_with_room(honest, answers, when):
    verdict = answers.step("float32", when, honest[1][when])
    assert verdict.passed, verdict
    assert verdict.share < 0.5
    assert verdict.full
    assert "loss, gradient along one direction" in verdict.how


def scaled(found, side, part, factor, names=""):
    state = copy.deepcopy(getattr(found, side))
    start = found.before[part]
    for name, value in state[part].items():
        if name.startswith(names):
            moves = part in ("params", "ema")
            base = start[name] if moves else 0 * value
            state[part][name] = (base + (value - base) * np.float32(factor)).astype(np.float32)
    return state


@pytest.mark.parametrize("when", [gate.BEFORE, gate.AFTER])
@pytest.mark.parametrize(
    ("part", "factor", "names", "what"),
    [
        ("m", 1.001, "", "gradient along one direction"),
        ("m", 0.0, "mid_block.resnets.0", "gradient along one direction"),
        ("m", -1.0, "conv_out", "gradient along one direction"),
        ("v", 1.001, "", "v"),
        ("params", 1.01, "", "update"),
        ("params", 0.0, "up_blocks", "update"),
        ("ema", 1.01, "", "EMA"),
    ],
)
def test_a_wrong_step_is_refused(honest, answers, when, part, factor, names, what):
    found = honest[1][when]
    wrong = {**vars(found), "after": scaled(found, "after", part, factor, names)}
    verdict = answers.step("float32", when, gate.FoundStep(**wrong))
    assert not verdict.passed
    assert what in verdict.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": 1.0}, "loss"),
        ({"loss": float("nan")}, "loss"),
        ({"after_step": 9}, "had been asked for"),
        ({"expected_step": 3}, "3 had been asked for"),
    ],
)
def test_a_wrong_loss_or_count_is_refused(honest, answers, change, words):
    found = gate.FoundStep(**{**vars(honest[1][gate.AFTER]), **change})
    verdict = answers.step("float32", gate.AFTER, found)
    assert not verdict.passed
    assert words in verdict.message


def test_parameters_that_are_not_sound_are_refused(honest, answers):
    first, later = honest[1][gate.BEFORE], honest[1][gate.AFTER]

    def with_params(found, params):
        return gate.FoundStep(**{**vars(found), "before": {**found.before, "params": params}})

    start = first.before["params"]
    still = answers.step("float32", gate.AFTER, with_params(later, start))
    assert "still the initial ones after 6 steps" in still.message
    nan = {name: value * np.float32("nan") for name, value in later.before["params"].items()}
    assert "is not finite" in answers.step("float32", gate.AFTER, with_params(later, nan)).message
    fewer = dict(list(start.items())[1:])
    missing = answers.step("float32", gate.BEFORE, with_params(first, fewer))
    assert "does not have the names and shapes of tiny" in missing.message
    other = {name: value + 1 for name, value in start.items()}
    changed = answers.step("float32", gate.BEFORE, with_params(first, other))
    assert "is not what the model was opened with" in changed.message


def test_rows_of_a_check_are_few_and_all_there():
    which = gate.rows_of(64, gate.BEFORE)
    assert len(which) == 64
    assert set(which) == {0, 1, 2, 3}
    assert not np.array_equal(which, np.resize(np.arange(4), 64))
    batch = gate.checked_batch(TINY.replace(batch_size=16), gate.AFTER)
    assert len(batch["x0"]) == 16
    assert len(np.unique(batch["x0"], axis=0)) == 2


def test_the_limits_of_lower_precision_are_no_tighter_than_the_goldens():
    by_column = {dtype: [] for dtype in ("tf32", "bf16")}
    for case in Goldens().cases:
        if case.config.name == "digits" and case.call in ("train_steps", "loss_and_grads"):
            for output in case.outputs:
                for dtype, found in by_column.items():
                    limit = output.tolerance.get(dtype) or {}
                    if output.name.startswith("1/m/") and "l2" in limit:
                        found.append(limit["l2"])
    for dtype, found in by_column.items():
        assert gate.LIMITS[dtype].gradient >= np.median(found)
        assert gate.LIMITS[dtype].gradient <= 3 * np.median(found)


def short_sampling():
    sampling = workloads.shipped()["sample-digits"]
    config = sampling.config.replace(batch_size=3)
    return workloads.dataclasses.replace(sampling, config=config, batch=3, steps=4)


def test_a_sampling_is_checked_step_by_step(tmp_path):
    from safetensors.numpy import load_file

    workload = short_sampling()
    subject = subject_of("impl_numpy", workload, tmp_path)
    reply = subject.part({"part": "check", "when": "before"})
    assert reply["changed"] == []
    trajectory = load_file(tmp_path / reply["file"])["trajectory"]
    with ThreadPoolExecutor(1) as pool:
        answers = gate.Reference(workload, starting_params(workload), pool)
        honest = answers.sampling("float32", trajectory)
        assert honest.passed, honest
        assert honest.share < 0.5
        for step in (0, 2, 3):
            wrong = trajectory.copy()
            wrong[step, -1] *= np.float32(1.001)
            assert not answers.sampling("float32", wrong).passed
        unguided = subject.model.sample(**subject.given, method="ddim", steps=4)
        assert not answers.sampling("float32", unguided).passed
        assert "expected [4, 3, 8, 8, 1]" in answers.sampling("float32", trajectory[:3]).message


# --- rounds ----------------------------------------------------------------------------------

BROKEN = """
import impl_numpy
from impl_numpy import dtypes

name, modes = "broken", ("eager", "quick")


class Model:
    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    {method}


def open(config, params=None, *, mode, **more):
    return Model(impl_numpy.open(config, params, mode="eager", **more))
"""
METHODS = {
    "lazy": "def train_step(self, x0, **more): return self.model.train_step(x0 * 0, **more)",
    "weary": """
    steps = 0

    def train_step(self, *batch, **more):
        self.steps += 1
        loss = self.model.train_step(*batch, **more)
        if self.steps > 6:  # from here on nothing is learned, and little done
            self.train_step = lambda *batch, **more: loss
        return loss""",
    "mute": "def state(self): raise NotImplementedError",
    "rude": """
    def synchronize(self):
        import os
        os._exit(3)""",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE}{os.pathsep}{HERE.parent}")
    monkeypatch.chdir(tmp_path)
    for name, method in METHODS.items():
        (tmp_path / f"{name}.py").write_text(BROKEN.format(method=method))
    return tmp_path


def bench(*arguments, expect=0, name="run"):
    options = ["--threads=1", "--seconds=0.02", "--out=out.json", "--ceiling-seconds=0"]
    with pytest.raises(SystemExit) as ended:
        command.main([name, *options, *arguments])
    assert ended.value.code == expect
    return json.loads(Path("out.json").read_text()) if Path("out.json").exists() else None


def test_a_run_of_two_backends(place, capsys):
    values = bench("--impl=impl_numpy", "--impl=impl_torch", "--workload=tiny", "--mode=parallel")
    jsonschema.validate(values, json.loads(results.SCHEMA.read_text()))
    assert values["complete"]
    assert [entry["backend"] for entry in values["runs"]] == ["impl_numpy", "impl_torch"]
    for entry in values["runs"]:
        assert entry["status"] == "ok", entry["message"]
        assert entry["gate"]["before"]["passed"]
        assert entry["gate"]["after"]["passed"]
        assert len(entry["rounds"]) == len(entry["round_processes"]) == 5
        assert entry["interval"][0] <= entry["median"] <= entry["interval"][1]
        assert entry["q1"] <= entry["median"] <= entry["q3"]
        assert entry["images_per_second"] == pytest.approx(entry["batch"] / entry["median"])
        assert entry["rank"] in (1, 2)
        assert all(entry[f"{what}_s"] > 0 for what in ("import", "build", "first", "copy"))
        assert entry["peak_memory"] > 2**20
        assert entry["memory_of"] == "host"
        assert entry["describe"]["dtype"] == "float32"
        assert entry["versions"]["numpy"] == np.__version__
    assert values["settings"]["threads"] == 1
    assert values["machine"]["after"]["load"] is not None or sys.platform == "win32"
    said = capsys.readouterr()
    assert "images/s" in said.out
    assert "peak memory" in said.out
    assert "checked before and after the rounds" in said.out
    assert "round 5 of 5; about" in said.err
    assert "checking numpy parallel float32 again" in said.err


def test_a_step_that_is_wrong_or_does_less_has_no_figure(place, capsys):
    values = bench("--impl=lazy", "--impl=weary", "--workload=tiny", expect=1)
    lazy, weary = values["runs"]
    assert (lazy["status"], weary["status"]) == ("failed check", "failed check")
    assert lazy["message"].startswith("before the rounds: against spec/reference.py")
    assert lazy["rounds"] == []
    assert weary["gate"]["before"]["passed"]
    assert "after the rounds: " in weary["message"]
    assert "had been asked for" in weary["message"]
    assert lazy["median"] is weary["median"] is weary["rank"] is None
    assert "failed check" in capsys.readouterr().out


def test_a_model_that_shows_no_state_is_marked(place, capsys):
    (mute,) = bench("--impl=mute", "--workload=tiny", "--mode=quick")["runs"]
    assert mute["status"] == "ok"
    assert mute["mode"] == "quick"
    assert not mute["gate"]["before"]["full"]
    assert "mute *" in capsys.readouterr().out


def test_a_worker_that_ends_is_out_and_the_others_go_on(place):
    rude, fine = bench("--impl=rude", "--impl=impl_numpy", "--workload=tiny", expect=1)["runs"]
    assert rude["status"] == "crashed"
    assert "exit code 3" in rude["message"]
    assert fine["status"] == "ok"


def test_a_thorough_run_has_five_processes_of_each(place):
    (run,) = bench("--impl=impl_numpy", "--workload=tiny", "--thorough")["runs"]
    assert run["status"] == "ok"
    assert run["processes"] == len(run["starts"]) == 5
    assert run["round_processes"] == [i for i in range(5) for _ in range(5)]
    assert run["import_s"] == np.median([start["import"] for start in run["starts"]])


def test_processes_that_start_beside_each_other_tell_nothing_of_their_start(place, capsys):
    chosen = ("--impl=impl_numpy", "--impl=lazy", "--impl=rude", "--mode=eager", "--mode=quick")
    values = bench(*chosen, "--workload=tiny", "--at-once=3", expect=1)
    jsonschema.validate(values, json.loads(results.SCHEMA.read_text()))
    found = {run["backend"]: run for run in values["runs"]}
    numpy = found["impl_numpy"]
    assert numpy["status"] == "ok", numpy["message"]
    assert len(numpy["rounds"]) == 5
    assert numpy["gate"]["before"]["full"]
    assert numpy["gate"]["after"]["full"]
    assert [numpy[f"{what}_s"] for what in ("import", "build", "first", "copy")] == [None] * 4
    assert found["lazy"]["status"] == "failed check"
    assert found["rude"]["status"] == "crashed"
    assert values["settings"]["at_once"] == 3


def test_a_whole_run_with_a_peer_a_ceiling_and_charts(place, capsys):
    values = bench(
        *("--impl=impl_torch", f"--peer=diffusers={sys.executable}", "--workload=tiny_v"),
        *("--ceiling-seconds=0.3", "--charts=charts"),
    )
    jsonschema.validate(values, json.loads(results.SCHEMA.read_text()))
    assert values["complete"]
    assert [ceiling["library"] for ceiling in values["ceilings"]] == ["torch"]
    kinds = [(rounds.short(run["backend"]), run["mode"]) for run in values["runs"]]
    ours = [("torch", "parallel"), ("torch", "eager")]
    assert kinds == [*ours, ("diffusers", "eager"), ("diffusers", "tuned")]
    for run in values["runs"]:
        assert run["status"] == "ok", run["message"]
        assert run["gate"]["before"]["full"]
        assert run["gate"]["after"]["full"]
        assert run["peer"] == ("diffusers" in run["backend"])
        assert 0 < run["share_large"] < 1
    assert (place / "charts/tiny_v.svg").read_text().startswith("<?xml")
    assert (place / "charts/shares.svg").exists()
    assert "charts: charts/" in capsys.readouterr().out


def test_a_run_of_a_sampling(place, capsys):
    (run,) = bench("--impl=impl_numpy", "--workload=sample-digits", "--batch=1")["runs"]
    assert run["status"] == "ok", run["message"]
    assert run["kind"] == "sample"
    assert run["images_per_second"] == pytest.approx(1 / run["median"])
    said = capsys.readouterr().out
    assert "guided DDIM, 50 steps, 1 images of 8x8x1" in said


def test_a_run_of_growing_sizes(place, capsys):
    chosen = ("--impl=impl_numpy", "--mode=eager", "--workload=tiny", "--axis=batch=1,4")
    values = bench(*chosen, name="scaling")
    jsonschema.validate(values, json.loads(results.SCHEMA.read_text()))
    assert values["kind"] == "scaling"
    (line,) = values["scaling"]
    assert (line["backend"], line["mode"], line["axis"]) == ("impl_numpy", "eager", "batch")
    assert [point["value"] for point in line["points"]] == [1, 4]
    assert all(point["peak_memory"] > 2**20 for point in line["points"])
    low, high = line["slope_interval"]
    assert low <= line["slope"] <= high
    assert [run["batch"] for run in values["runs"]] == [1, 4]
    said = capsys.readouterr().out
    assert "How cost grows" in said
    assert f"{line['slope']:.2f}" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--axis=depth"], "axis 'depth' is unknown"),
        (["--axis=batch=1,b"], "give whole numbers"),
        (["--axis=batch=1"], "two different values"),
        (["--workload=sample-digits"], "is no train step"),
    ],
)
def test_what_cannot_grow_is_said(place, arguments, words, capsys):
    assert bench("--impl=impl_numpy", *arguments, expect=2, name="scaling") is None
    assert words in capsys.readouterr().err


def test_a_stopped_command_writes_what_it_has(place, monkeypatch, capsys):
    ask = rounds.Turn.round

    def stopping(turn, process, needed):
        if len(turn.run.rounds) == 2:
            raise KeyboardInterrupt
        ask(turn, process, needed)

    monkeypatch.setattr(rounds.Turn, "round", stopping)
    values = bench("--impl=impl_numpy", "--workload=tiny", "--workload=tiny_v", expect=1)
    assert not values["complete"]
    assert [(run["workload"], run["status"]) for run in values["runs"]] == [("tiny", "incomplete")]
    assert len(values["runs"][0]["rounds"]) == 2
    assert "INCOMPLETE" in capsys.readouterr().out


def test_a_run_of_which_nothing_is_done_leaves_no_file(place, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "find_contenders", stopped)
    assert bench("--impl=impl_numpy", "--workload=tiny", expect=130) is None
    assert "nothing was finished" in capsys.readouterr().err


def test_each_finished_workload_is_written_at_once(place, monkeypatch):
    seen = []
    judge = rounds.Turn.begin

    def begin(turn):
        path = Path("out.json")
        seen.append(results.read(path) if path.exists() else None)
        judge(turn)

    monkeypatch.setattr(rounds.Turn, "begin", begin)
    values = bench("--impl=impl_numpy", "--workload=tiny", "--workload=tiny_v")
    assert seen[0] is None
    assert not seen[1]["complete"]
    assert [run["status"] for run in seen[1]["runs"]] == ["ok"]
    assert values["complete"]
    assert [run["workload"] for run in values["runs"]] == ["tiny", "tiny_v"]


def plan_of(found, **more):
    fields = {"device": "cpu", "threads": 1, "rounds": 6, "seconds": 0.01, "processes": 1}
    return rounds.Plan(found, **{**fields, "seed": 0, "timeout": 60.0, **more})


def test_what_was_finished_is_kept_when_a_run_is_stopped(place):
    plan = plan_of([workloads.find("tiny")])
    contender = rounds.Contender(Impl("impl_numpy", sys.executable), "eager", "float32")

    def seen(text, left):
        if "round 4" in text:
            raise KeyboardInterrupt

    stopped = rounds.Bench(plan, [contender], {}, seen)
    stopped.run()
    values = results.empty(plan, ["float32"], machine())
    results.fill(values, stopped)
    results.write(place / "stopped.json", values)
    kept = results.read(place / "stopped.json")
    assert not kept["complete"]
    (run,) = kept["runs"]
    assert run["status"] == "incomplete"
    assert len(run["rounds"]) == 3
    assert run["median"] > 0
    assert run["gate"]["after"] is None
    shown = io.StringIO()
    table.show(kept, shown)
    assert "INCOMPLETE" in shown.getvalue()


def machine():
    clocks = {"cpu_mhz": [], "load": 0.1}
    return {
        **{"cpu": "a processor", "cores": 2, "threads": 2, "memory": None, "os": "an os"},
        **{"gpu": None, "driver": None, "before": clocks, "after": clocks},
    }


class FakeTurn:
    """Stands for a process; writes down what it is asked."""

    log: list
    needs: list

    def __init__(self, run, plan, folder, answers):
        self.run, self.worker = run, self

    def begin(self):
        self.log.append(("begin", self.run.contender.mode))

    def round(self, process, needed):
        self.log.append(("round", self.run.contender.mode))
        self.needs.append(needed)
        self.run.peak_memory = 300 if self.run.contender.mode == "a" else 100
        self.run.rounds.append([1.0])
        self.run.processes.append(process)

    def ask(self, request):
        self.log.append((request["when"], self.run.contender.mode))
        return {}

    def close(self):
        pass


def test_turns_come_in_an_order_that_changes_with_each_round(monkeypatch):
    monkeypatch.setattr(rounds, "Turn", FakeTurn)
    orders = {}
    for seed in (0, 0, 1):
        FakeTurn.log, FakeTurn.needs = [], []
        plan = plan_of([workloads.find("tiny")], rounds=20, processes=2, seed=seed)
        impl = Impl("impl_numpy", sys.executable)
        found = [rounds.Contender(impl, mode, "float32") for mode in "abcd"]
        rounds.Bench(plan, found, {}, lambda text, left: None).run()
        turns = [mode for what, mode in FakeTurn.log if what == "round"]
        assert len(turns) == 160
        taken = [tuple(turns[i : i + 4]) for i in range(0, 160, 4)]
        assert all(sorted(order) == list("abcd") for order in taken)
        assert len(set(taken)) > 10
        assert orders.setdefault(seed, taken) == taken
    assert orders[0] != orders[1]
    first, other = [None] * 4 + [300] * 72 + [None] * 4, [300] * 76 + [None] * 4
    assert FakeTurn.needs == first + other  # the check after the last round needs more
    kinds = [what for what, _ in FakeTurn.log]
    assert kinds == (["begin"] * 4 + ["round"] * 80 + ["after"] * 4) * 2


def test_the_time_left_is_what_is_to_be_done_times_what_it_took():
    plan = plan_of([workloads.find("tiny"), workloads.find("tiny_v")], rounds=5)
    clock = rounds.Clock(plan, {"tiny": 1.0, "tiny_v": 9.0}, contenders=2)
    assert clock.seconds_left() is None
    clock.spent = {("tiny", what): [10.0] for what in ("check", "round", "after")}
    assert clock.seconds_left() == 140 + 3 * 140
    clock.left = dict.fromkeys(clock.left, 0)
    assert clock.seconds_left() == 0
    assert table.duration(100) == "; about 2 min left"
    assert table.duration(None) == ""


def test_a_peer_may_be_named_beside_all_of_them():
    names = sorted(command.PEERS)
    for named in ([], ["diffusers"], ["keras=python"], [*command.PEERS]):
        chosen = argparse.Namespace(peer=named, peers=True, device="cpu")
        found = command.chosen_peers(chosen)
        assert sorted(impl.name for impl in found) == names
        assert command.peers_by_name(chosen) == {impl.name for impl in found[: len(named)]}


def test_which_modes_are_timed():
    jax = ("compiled", "eager", "parallel")
    assert rounds.choose_modes("impl_jax", jax, [], "cpu") == ["parallel"]
    assert rounds.choose_modes("impl_jax", jax, [], "cuda") == ["compiled"]
    assert rounds.choose_modes("impl_jax", ("compiled", "eager"), [], "cpu") == ["compiled"]
    assert rounds.choose_modes("impl_jax", jax, ["all"], "cpu") == ["compiled", "parallel"]
    assert rounds.choose_modes("impl_jax", jax, ["all", "eager"], "cpu") == list(jax)
    assert rounds.choose_modes("impl_numpy", ("eager",), [], "cpu") == ["eager"]
    torch = ("eager", "compiled", "parallel")
    assert rounds.choose_modes("impl_torch", torch, [], "cpu") == ["parallel", "eager"]
    assert rounds.choose_modes("impl_torch", torch, ["compiled"], "cpu") == ["compiled"]
    assert rounds.choose_modes("impl_torch", torch, [], "cuda") == ["compiled"]
    assert rounds.choose_modes("impl_torch", (*torch, "graph"), [], "cuda") == ["graph", "compiled"]
    peer = ("eager", "tuned", "compiled", "max-autotune")
    assert rounds.choose_modes("diffusers", peer, [], "cpu", peer=True) == ["eager", "tuned"]
    assert rounds.choose_modes("diffusers", peer, [], "cuda", peer=True) == list(peer[:3])
    assert rounds.choose_modes("impl_tf", ("compiled", "eager"), ["xla"], "cpu") == []


def test_a_mode_may_need_something_in_its_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    setup = Setup(GOLDENS, "cpu", "parallel", 3, 60.0, TINY)
    jax = environment("float32", setup, "impl_jax")
    assert jax["XLA_FLAGS"] == "--mine --xla_force_host_platform_device_count=3"
    assert jax["OMP_NUM_THREADS"] == "3"
    numpy = environment("float32", setup, "impl_numpy")
    # its slices have as many threads as this says; it keeps each product to one by itself
    assert (numpy["OPENBLAS_NUM_THREADS"], numpy["XLA_FLAGS"]) == ("3", "--mine")
    assert environment("float32", setup, "impl_torch")["OPENBLAS_NUM_THREADS"] == "3"
    modes = {name for name, _ in MODE_ENVIRONMENT}
    assert modes <= {path.parent.name for path in HERE.parent.glob("impl_*/__init__.py")}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_worker_asks_for_huge_pages_unless_its_user_chose(given, found, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    setup = Setup(GOLDENS, "cpu", None, 1, 60.0, TINY)
    assert environment("float32", setup, "impl_jax")["GLIBC_TUNABLES"] == found
    library = Setup(GOLDENS, "cpu", "eager", 1, 60.0, TINY, as_it_comes=True)
    assert environment("float32", library, "a.peer").get("GLIBC_TUNABLES") == given


def test_a_peer_is_as_it_comes_in_its_first_mode(monkeypatch):
    class FakeWorker:
        def __init__(self, impl, dtype, setup, folder):
            self.setup = setup

        def start(self):
            return {"modes": ("eager", "tuned")}

        def close(self):
            pass

    monkeypatch.setattr(rounds, "WorkerProcess", FakeWorker)
    ours, other = Impl("impl_torch", "python"), Impl("conformance.bench.peers.diffusers", "python")
    plan = plan_of([workloads.find("tiny")])
    found, lacking = rounds.find_contenders(
        [ours], [other], [], ["float32"], plan, lambda text, left: None
    )
    assert not lacking
    runs = [rounds.Run(plan.workloads[0], contender) for contender in found]
    setups = [rounds.Turn(run, plan, Path(), None).worker.setup for run in runs]
    texts = [contender.text for contender in found]
    assert dict(zip(texts, [setup.as_it_comes for setup in setups], strict=True)) == {
        "torch eager float32": False,
        "diffusers eager float32": True,
        "diffusers tuned float32": False,
    }


@pytest.mark.parametrize("held", [{}, {"OPENBLAS_CORETYPE": "Haswell"}])
def test_a_variable_that_holds_a_library_back_is_told(held, monkeypatch, tmp_path):
    for name in machine_of.HELD_BY:
        monkeypatch.delenv(name, raising=False)
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    values = values_of(entry_of("S", "impl_numpy"))
    values["machine"]["held_by"] = machine_of.describe(2)["held_by"]
    results.write(tmp_path / "a.json", values)  # by the schema
    out = io.StringIO()
    table.show(results.read(tmp_path / "a.json"), out)
    told = "OPENBLAS_CORETYPE=Haswell is set" in out.getvalue()
    assert told == bool(held)
    assert ("(env -u OPENBLAS_CORETYPE ...)" in out.getvalue()) == bool(held)


def test_the_kernels_of_products_are_among_the_versions():
    assert re.search(r"\w+ \d[\d.]* \w+", worker.versions()["blas"])


# --- results and tables ----------------------------------------------------------------------


def entry_of(workload, backend, mode="eager", seconds=1.0, peer=False, **more):
    taken = [[seconds, seconds * 1.01], [seconds * 0.99], [seconds], [seconds], [seconds]]
    run = rounds.Run(
        workloads.find(workload),
        rounds.Contender(Impl(backend, "python"), mode, "float32", peer),
        starts=[dict.fromkeys(("import", "build", "first", "copy"), 0.5)],
        rounds=taken,
        processes=[0] * 5,
        before=gate.Verdict(True, "held against it", "", "loss", 0.1),
        after=gate.Verdict(True, "held against it", "", "loss", 0.2),
        describe={"device": "cpu"},
    )
    return {**results.run_entry(run), **more}


def values_of(*entries):
    values = results.empty(plan_of([workloads.find("S")]), ["float32"], machine())
    values["runs"] = list(entries)
    values["complete"] = True
    results.rank(values["runs"])
    return values


def test_both_checks_of_results_find_the_same(tmp_path):
    good = results.plain(values_of(entry_of("S", "impl_numpy")))
    schema = json.loads(results.SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert validator.is_valid(good)
    assert results.problem(good, schema) == ""
    changes = [
        lambda v: v.pop("runs"),
        lambda v: v.update(schema=2),
        lambda v: v.update(more=1),
        lambda v: v["settings"].update(rounds=0),
        lambda v: v["settings"].update(rounds=True),
        lambda v: v["settings"].update(device="tpu"),
        lambda v: v["machine"].pop("cpu"),
        lambda v: v["runs"][0].update(median="1"),
        lambda v: v["runs"][0].update(interval=[1.0]),
        lambda v: v["runs"][0].update(rank=0),
        lambda v: v["runs"][0]["rounds"].append([]),
        lambda v: v["runs"][0]["gate"]["before"].pop("how"),
        lambda v: v["runs"][0].update(extra=1),
        lambda v: v["versions"].update(impl_numpy={"numpy": 2}),
    ]
    for change in changes:
        bad = copy.deepcopy(good)
        change(bad)
        assert not validator.is_valid(bad)
        assert results.problem(bad, schema)
        with pytest.raises(results.ResultsError, match=r"schema\.json describes"):
            results.check(bad, "it")


def test_results_are_written_and_read_as_they_are(tmp_path):
    good = values_of(entry_of("S", "impl_numpy"))
    results.write(tmp_path / "good.json", good)
    assert results.read(tmp_path / "good.json") == results.plain(good)
    with pytest.raises(results.ResultsError, match=r"\$: 'work' is missing"):
        results.write(tmp_path / "bad.json", {k: v for k, v in good.items() if k != "work"})
    assert not (tmp_path / "bad.json").exists()


def test_messages_that_are_published_hold_no_path_of_the_machine(tmp_path):
    here = Path(results.__file__)
    text = f'File "{here}" of {sys.executable}, in {tmp_path}, {Path.home()}/x, {os.getcwd()}/y'
    told = results.without_paths(text, sys.executable)
    assert 'File "conformance/bench/results.py" of PYTHON' in told
    for path in (str(HERE.parent), sys.prefix, str(Path.home()), str(tmp_path)):
        assert f"{path}{os.sep}" not in told


@pytest.mark.parametrize("path", sorted((HERE.parent / "results").glob("bench-*.json")), ids=str)
def test_published_results_are_whole_and_by_the_schema(path):
    values = results.read(path)
    jsonschema.validate(values, json.loads(results.SCHEMA.read_text()))
    assert values["complete"]
    for entry in values["runs"]:
        if entry["rank"] is not None:
            assert entry["gate"]["before"]["passed"]
            assert entry["gate"]["after"]["passed"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no results"),
        ('{"a": 1}', "holds no results"),
        ('{"schema": 2}', "is of schema 2; this program reads 1"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, words, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        command.main(["show", str(path)])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds=4"], "--rounds 4 is outside 5..1000"),
        (["--rounds=1001"], "--rounds 1001 is outside"),
        (["--seconds=0"], "--seconds 0 is outside"),
        (["--workload=XXL"], "unknown workload 'XXL'"),
        (["--workload=S", "--batch=70000"], "--batch 70000 is outside"),
        (["--threads=0"], "--threads 0 is outside"),
        (["--seed=-1"], "--seed -1 is negative"),
        (["--at-once=0"], "--at-once 0 is outside 1..64"),
        (["--timeout=0"], "--timeout 0 is outside"),
        (["--out=."], "--out . cannot be written"),
        (["--ceiling-seconds=-1"], "--ceiling-seconds -1 is outside"),
        (["--peer=keras", "--peer=keras"], "--peer keras is given twice"),
        (["--impl=impl_numpy", "--peer=no_peer"], "'no_peer' is not a module"),
        (["--impl=impl_numpy", "--impl=impl_numpy"], "given twice"),
        (["--impl=no_such_backend"], "'no_such_backend' is not a module"),
        (["--impl=impl_numpy", "--mode=xla"], "--mode 'xla' is none of any backend here"),
        (["--impl=impl_numpy", "--dtype=bf16"], "has no bf16"),
    ],
)
def test_what_cannot_be_carried_out_is_said_and_nothing_is_done(place, arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "--out=new/out.json", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_mode_that_nobody_has_is_a_usage_error(place):
    plan = plan_of([workloads.find("tiny")])
    impls = [Impl("impl_numpy", sys.executable)]
    with pytest.raises(CannotStart, match="they have eager") as refused:
        rounds.find_contenders(impls, [], ["swift"], ["float32"], plan, lambda text, left: None)
    assert refused.value.usage


def test_the_goals_stand_beside_what_was_measured():
    ours = entry_of("S", "impl_torch", seconds=0.7, share_large=0.6)
    slower = entry_of("S", "impl_torch", "contiguous", seconds=0.9, share_large=0.4)
    peer = entry_of("S", "conformance.bench.peers.diffusers", seconds=1.0, peer=True)
    found = table.goals(values_of(ours, slower, peer))
    ratio, share = found
    assert ratio["value"] == pytest.approx(0.7)
    assert ratio["interval"][0] <= 0.7 <= ratio["interval"][1]
    assert (ratio["met"], ratio["goal"], ratio["mode"]) == (True, 0.78, "eager")
    assert (share["value"], share["met"]) == (0.6, True)
    assert share["interval"][0] <= 0.6 <= share["interval"][1]
    missed = table.goals(values_of(slower, peer))
    assert [goal["met"] for goal in missed] == [False, False]
    alone = table.goals(values_of(entry_of("S", "impl_torch")))
    assert [goal["met"] for goal in alone] == [None, None]
    text = table.plain_table("Goals", table.goal_rows([*missed, *alone]))
    assert "at most 0.78" in text
    assert "NO" in text
    assert "not measured" in text


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables_are_shown_with_and_without_rich(monkeypatch, with_rich):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    fast, slow = (entry_of("S", "impl_torch", seconds=0.1), entry_of("S", "impl_jax", seconds=0.2))
    broken = entry_of("S", "impl_tf", status="failed check", message="it is wrong\nmore")
    broken |= dict.fromkeys(("median", "interval", "rank"))
    out = io.StringIO()
    table.show(values_of(slow, fast, broken), out)
    text = out.getvalue()
    assert text.index("torch") < text.index("jax")
    assert "640" in text  # images a second
    assert "S, tf eager float32: failed check: it is wrong" in text
    assert ("┃" in text) == with_rich


def test_a_reader_that_has_seen_enough_is_no_failure():
    file = HERE.parent / "results" / "bench-epyc-2.json"
    shown = [sys.executable, "-m", "conformance.bench", "show", str(file)]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            shown, cwd=HERE.parent, stdout=closed, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.5, "1.5 s"), (0.0123, "12.3 ms"), (0.123, "123 ms"), (4.56e-6, "4.56 us")],
)
def test_times_have_a_fitting_unit(value, text):
    assert table.seconds(value) == text


def test_a_peer_whose_package_is_missing_says_how_to_get_it(place, capsys):
    (place / "lonely.py").write_text("import package_that_nobody_has\n")
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "--impl=impl_numpy", f"--peer=lonely={sys.executable}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "lonely needs package_that_nobody_has" in said
    assert "nox -s bench -- --peers" in said


def test_a_peer_that_nobody_named_holds_nobody_up(place, monkeypatch, capsys):
    (place / "lonely.py").write_text("import package_that_nobody_has\n")
    monkeypatch.setattr(command, "PEERS", {"lonely": "lonely", "mute": "mute"})
    values = bench("--impl=impl_numpy", "--peers", "--workload=tiny", "--mode=all")
    status = {entry["backend"]: entry["status"] for entry in values["runs"]}
    assert (status["lonely"], status["mute"]) == ("cannot start", "ok")
    monkeypatch.setattr(command, "PEERS", {"lonely": "lonely"})
    with pytest.raises(SystemExit) as ended:  # none of the peers that were asked for
        command.main(["run", "--impl=impl_numpy", "--peers"])
    assert ended.value.code == 2
    assert "nox -s bench -- --peers" in capsys.readouterr().err


# --- ceilings and shares ---------------------------------------------------------------------


def ceiling_of(flops, shapes=(), dtype="float32", device="cpu"):
    return {
        "library": "numpy",
        "dtype": dtype,
        "device": device,
        "large": {"n": 512, "flops_per_second": flops},
        "shapes": [{"m": m, "n": n, "k": k, "flops_per_second": flops} for m, n, k in shapes],
        "copy_bytes_per_second": 1e10,
    }


def test_the_work_of_the_workloads_is_what_they_claim():
    flops = {key: shares.work_of(w).flops for key, w in workloads.shipped().items()}
    assert flops["S"] == pytest.approx(23.7e9, rel=0.005)
    assert flops["M"] == pytest.approx(153.5e9, rel=0.005)
    assert flops["L"] == pytest.approx(4.78e12, rel=0.005)
    digits = workloads.shipped()["sample-digits"]
    half = workloads.find("sample-digits", digits.batch // 2)
    assert shares.work_of(half).flops == flops["sample-digits"] / 2
    assert shares.work_of(digits).flops == sum(g.flops for g in shares.work_of(digits).gemms)


def test_a_figure_is_a_share_of_the_best_ceiling():
    work = shares.work_of(workloads.find("tiny"))
    shapes = {(g.m, g.n, g.k) for g in work.gemms}
    slow, fast = ceiling_of(1e9), ceiling_of(4e9)
    large, own = shares.shares(work, [slow, fast], work.flops / 2e9)
    assert large == pytest.approx(0.5)
    assert own is None  # no rates of the shapes
    large, own = shares.shares(
        work, [ceiling_of(1e9, shapes), ceiling_of(2e9, shapes), fast], work.flops / 1e9
    )
    assert large == pytest.approx(0.25)
    assert own == pytest.approx(0.5)
    assert shares.shares(work, [], 1.0) == (None, None)


def test_a_share_above_one_is_an_error():
    workload = workloads.find("S")
    work = shares.work_of(workload)
    values = values_of(entry_of("S", "impl_torch"), entry_of("S", "impl_jax"))
    values["ceilings"] = [
        ceiling_of(work.flops * 0.8),  # a call takes 1 s
        ceiling_of(work.flops * 9, dtype="bf16"),
        ceiling_of(work.flops * 9, device="cuda"),
    ]
    shares.fill(values, [workload])
    entry = values["runs"][0]
    assert entry["share_large"] == pytest.approx(1.25, rel=0.01)
    assert entry["status"] == "error"
    assert entry["rank"] is None
    assert "more than the machine can do" in entry["message"]
    values = values_of(entry_of("S", "impl_torch"), entry_of("S", "peer", peer_network=True))
    values["ceilings"] = [ceiling_of(work.flops * 2)]
    shares.fill(values, [workload])
    ours, other = values["runs"]
    assert ours["status"] == "ok"
    assert ours["share_large"] == pytest.approx(0.5, rel=0.01)
    assert other["flops"] is other["share_large"] is None  # its network may be another
    results.check(results.plain(values), "it")


def test_a_run_measures_its_own_ceiling(place, capsys):
    values = bench("--impl=impl_numpy", "--workload=tiny", "--ceiling-seconds=0.5")
    (ceiling,) = values["ceilings"]
    assert (ceiling["library"], ceiling["dtype"], ceiling["device"]) == ("numpy", "float32", "cpu")
    assert ceiling["large"]["flops_per_second"] > 1e8
    (run,) = values["runs"]
    assert run["flops"] == values["work"][0]["flops"] > 1e6
    assert 0 < run["share_large"] < 1
    assert 0 < run["share_shapes"] < 1
    assert "ceiling of numpy float32 on cpu: " in capsys.readouterr().out


# --- comparing -------------------------------------------------------------------------------


def test_comparing_says_what_changed_beyond_noise(tmp_path, capsys):
    same, moved = (entry_of("S", "impl_numpy"), entry_of("S", "impl_torch"))
    first = values_of(same, moved, entry_of("M", "impl_tf"))
    faster = entry_of("S", "impl_torch", seconds=0.8, peak_memory=2**31)
    moved["peak_memory"] = 2**30
    second = values_of(entry_of("S", "impl_numpy", seconds=1.001), faster)
    second["machine"] = {**second["machine"], "cpu": "another", "huge_pages": "never"}
    first["ceilings"], second["ceilings"] = [ceiling_of(1e9)], [ceiling_of(2e9)]
    for name, values in (("a", first), ("b", second)):
        results.write(tmp_path / f"{name}.json", values)
    with pytest.raises(SystemExit) as ended:
        command.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert ended.value.code == 0
    entries = {entry["backend"]: entry for entry in compare.compare(first, second)}
    assert list(entries) == ["impl_numpy", "impl_torch"]
    assert entries["impl_numpy"]["verdict"] == "the same, within noise"
    assert entries["impl_torch"]["verdict"] == "faster"
    assert entries["impl_torch"]["ratio"] == pytest.approx(0.8)
    back = {entry["backend"]: entry for entry in compare.compare(second, first)}
    assert back["impl_torch"]["verdict"] == "slower"
    said = capsys.readouterr().out
    assert "1 of 2 changed beyond noise" in said
    assert "another machine: cpu was a processor, is another" in said
    assert "another machine: huge_pages was None, is never" in said  # older files have none
    assert "timed in the first alone: M, tf eager float32" in said
    assert "peak memory was 1,024 MiB, is 2,048 MiB" in said
    assert "ceiling on cpu is 2.00 times what it was" in said
    assert "--thorough measures it" in said


def test_two_files_with_nothing_in_common_are_compared_too(capsys):
    compare.show(values_of(entry_of("S", "impl_tf")), values_of(entry_of("M", "impl_tf")))
    assert "nothing was timed in both" in capsys.readouterr().out


def test_the_command_needs_nothing_but_numpy_and_safetensors():
    script = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'jsonschema', 'torch', 'jax', 'tensorflow'):\n"
        "    sys.modules[name] = None\n"
        "from conformance.bench import command\n"
        "command.main(['run', '--help'])\n"
    )
    python = [sys.executable, "-c", script]
    done = subprocess.run(python, cwd=HERE.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--workload" in done.stdout


# --- devices ---------------------------------------------------------------------------------


class FakeCuda:
    """As much of torch.cuda as is asked for; writes down what is called."""

    def __init__(self, there):
        self.there, self.calls = there, []

    def is_available(self):
        return self.there

    def synchronize(self):
        self.calls.append("synchronize")

    def max_memory_allocated(self):
        return 7 * 2**20

    def reset_peak_memory_stats(self):
        self.calls.append("reset")

    def empty_cache(self):
        self.calls.append("empty")


class FakeTorch:
    def __init__(self, there):
        self.cuda = FakeCuda(there)
        self.made = []

    def device(self, name):
        return f"device {name}"

    def tensor(self, array, device):
        self.made.append((array.shape, device))
        return array


@pytest.mark.parametrize("there", [True, False])
def test_a_gpus_memory_and_copies_are_measured_where_there_is_one(monkeypatch, there):
    torch = FakeTorch(there)
    monkeypatch.setitem(sys.modules, "torch", torch)
    framework = device.framework_of({"framework": "torch 2.0, diffusers 1.0"})
    assert framework == "torch"
    device.copier(framework, "cuda")([np.zeros((2, 3))])
    assert torch.made == [((2, 3), "device cuda" if there else "device cpu")]
    device.reset_peak(framework, "cuda")
    device.release(framework, "cuda")
    assert device.peak(framework, "cuda") == (7 * 2**20 if there else None)
    assert torch.cuda.calls == (["synchronize", "reset", "empty"] if there else [])
    assert device.peak(framework, "cpu") is None  # a GPU that is not asked for does not count


def test_a_waiting_worker_gives_the_memory_that_it_keeps_back_to_the_system():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("other C libraries have no such call")
    code = (
        "import os, numpy as np\n"
        "from conformance.bench import device\n"
        "from spec.backend import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "pages = lambda: int(open('/proc/self/statm').read().split()[1])\n"
        "arrays = [np.ones(2**17) for _ in range(200)]\n"
        "del arrays\n"
        "kept = pages()\n"
        "device.release('numpy', 'cpu')\n"
        "print((kept - pages()) * os.sysconf('SC_PAGE_SIZE'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0.9 * 200 * 2**20


@pytest.mark.parametrize("short", [True, False])
def test_memory_is_given_back_where_it_is_short_and_before_the_peak_begins(
    monkeypatch, tmp_path, short
):
    heard = []
    monkeypatch.setattr(device, "is_short", lambda *of: short)
    monkeypatch.setattr(device, "release", lambda *of: heard.append("release"))
    monkeypatch.setattr(subject, "reset_peak_memory", lambda: heard.append("reset"))
    monkeypatch.setattr(subject, "peak_memory", lambda: heard.append("peak"))
    one = subject_of("impl_numpy", workloads.find("tiny"), tmp_path)
    one.part({"part": "warm", "calls": 1})
    assert heard == ["release", "reset", *["release"] * short]
    heard.clear()
    one.part({"part": "round", "seconds": 0.0, "needed": 1000})
    assert heard == ["peak", *["release"] * short]
    assert one.released == short


def test_the_largest_peak_is_what_the_next_turn_may_need():
    workload = workloads.find("tiny")
    one = rounds.Contender(Impl("impl_numpy", sys.executable), "eager", "float32")
    runs = [rounds.Run(workload, one) for _ in range(2)]
    assert rounds.most_needed(runs) is None
    runs[0].peak_memory = 300
    assert rounds.most_needed(runs) is None  # the other's is not known yet
    runs[1].peak_memory = 700
    assert rounds.most_needed(runs) == 700
    runs[1].memory_of = "device"
    assert rounds.most_needed(runs) is None
    assert rounds.most_needed([]) is None


def test_after_memory_was_given_away_calls_count_once_it_is_back(monkeypatch, tmp_path):
    one = subject_of("impl_numpy", workloads.find("tiny"), tmp_path)
    monkeypatch.setattr(device, "is_short", lambda *of: False)
    memory = iter([100, 200, 201, 200, 300, 302, 299, 301, *[301] * 9])
    monkeypatch.setattr(subject, "resident_memory", lambda: next(memory))
    one.part({"part": "warm", "calls": 1})
    assert one.released
    reply = one.part({"part": "round", "seconds": 0.0})
    assert next(memory) == 301  # the last growth was the fifth call's
    assert one.steps == 1 + 8 + len(reply["samples"])
    one.part({"part": "round", "seconds": 0.0})
    assert one.steps == 1 + 8 + 1 + 1 + 1


def test_a_heap_that_grows_for_ever_is_not_waited_for(monkeypatch, tmp_path):
    one = subject_of("impl_numpy", workloads.find("tiny"), tmp_path)
    memory = itertools.count(100, 100)
    monkeypatch.setattr(subject, "resident_memory", lambda: next(memory))
    monkeypatch.setattr(subject, "SETTLE_SECONDS", 0.05)
    one.released = True
    one.part({"part": "round", "seconds": 0.0})
    assert 2 <= one.steps < 1000


def test_resident_memory_is_what_an_array_adds():
    before = steps.resident_memory()
    if before is None:
        pytest.skip("only Linux tells")
    array = np.frombuffer(mmap.mmap(-1, 2**25), np.uint8)  # pages that were nobody's before
    array[:] = 1
    assert 0.9 * array.nbytes < steps.resident_memory() - before < 2 * array.nbytes
    assert steps.peak_memory() >= steps.resident_memory()


@pytest.mark.parametrize(
    ("available", "most", "now", "needed", "short"),
    [
        (600, None, None, None, False),
        (400, None, None, None, True),
        (600, "max", 900, None, False),
        (600, 1000, 400, None, False),
        (600, 1000, 600, None, True),
        (400, None, None, 400 * 1024, False),
        (400, None, None, 400 * 1024 + 1, True),
        (600, None, None, 700 * 1024, True),
        (600, 1000, 600, 400, False),
        (600, 1000, 601, 400, True),
        (None, None, None, None, True),  # nobody can tell
        (None, None, None, 1, True),
    ],
)
def test_when_memory_is_short(monkeypatch, tmp_path, available, most, now, needed, short):
    monkeypatch.setattr(device, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(device, "GROUP", tmp_path)
    if available is not None:
        text = f"MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  {available} kB\n"
        (tmp_path / "meminfo").write_text(text)
    if most is not None:
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{now}\n")
    assert device.is_short("numpy", "cpu", needed) == short


@pytest.mark.parametrize(("free", "short"), [(30, True), (60, False)])
def test_when_a_gpus_memory_is_short(monkeypatch, tmp_path, free, short):
    torch = FakeTorch(there=True)
    torch.cuda.mem_get_info = lambda: (free, 100)
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 90 kB\n")
    monkeypatch.setattr(device, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(device, "GROUP", tmp_path)
    assert device.is_short("torch", "cuda") == short
    assert not device.is_short("torch", "cpu")


def test_a_framework_that_is_not_known_is_not_asked():
    assert device.framework_of({"framework": "tinygrad 0.9"}) == ""
    assert device.framework_of({}) == ""
    assert device.copier("", "cpu") is None
    assert device.peak("", "cuda") is None


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "tensorflow"])
def test_arrays_are_copied_by_each_framework(name):
    importlib.import_module(name)
    copy = device.copier(device.framework_of({"framework": f"{name} 1.0"}), "cpu")
    copy([np.zeros((2, 3), np.float32), np.arange(4)])
    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
        copy([object()])
