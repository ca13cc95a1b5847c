"""Fresh goldens through the runner: made, checked against, removed; and what is refused."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance import oracle
from conformance.__main__ import app
from conformance.fresh import joined, page, with_modes
from conformance.process import CannotStart, Impl, Setup
from conformance.runner import Plan, Suite
from spec.config import Config, config_from_dict, load_config
from spec.goldens import GoldenError, Goldens

ROOT = Path(__file__).resolve().parent.parent
MINE = Config(
    name="mine",
    image_size=(1, 2),
    in_channels=1,
    channels=(4,),
    layers_per_block=2,
    groups=1,
    timesteps=2,
    prediction="x0",
)
TEXT = """image_size = [1, 2]
in_channels = 1
channels = [4]
layers_per_block = 2
groups = 1
timesteps = 2
prediction = "x0"
"""
# Right on every committed golden but those of two resnets a level.
FAULTY = """
import impl_numpy

name, modes = "faulty", ("eager",)


def open(config, params=None, **more):
    name = "down_blocks.0.resnets.1.time_emb_proj.bias"
    if params and name in params:
        params = {**params, name: params[name] * 1.001}
    return impl_numpy.open(config, params, **more)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that has mine.toml, a faulty backend, and what one run of both backends left."""
    pytest.importorskip("diffusers")
    pytest.importorskip("mpmath")
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "mine.toml").write_text(TEXT, "utf-8")
    (folder / "faulty.py").write_text(FAULTY, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.chdir(folder)
        done = conformance(
            *("--impl=impl_numpy", "--impl=faulty", "--config=mine.toml", "--seed=5"),
            *("--keep-goldens=kept", "--reports=reports", "--score=score.json"),
        )
    (folder / "output").write_text(done.output, "utf-8")
    assert done.exit_code == 1, done.output
    return folder


def conformance(*arguments):
    done = CliRunner().invoke(app, ["run", "--threads=1", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_right_backend_passes_and_a_faulty_one_is_told_the_block(place):
    report = json.loads((place / "reports" / "conformance.json").read_text("utf-8"))
    columns = {(c["backend"], c["dtype"]): c for c in report["columns"]}
    for dtype in ("float64", "float32"):
        right, faulty = columns["impl_numpy", dtype], columns["faulty", dtype]
        assert right["passed"] == right["selected"] > 40
        assert right["reached"] == 6
        assert faulty["reached"] == 1
        assert 1 < faulty["passed"] < faulty["selected"]
    wrong = {r["case"]: r for r in report["results"] if r["status"] != "passed"}
    assert {r["backend"] for r in wrong.values()} == {"faulty"}
    assert wrong["L2/mine/down_blocks.0.resnets.1"]["block"] == "down_blocks.0.resnets.1"
    assert "L2/mine/down_blocks.0.resnets.0" not in wrong
    score = json.loads((place / "score.json").read_text("utf-8"))
    assert [c["points"] < c["of"] for c in score["columns"]] == [False, False, True, True]


def test_the_run_says_what_it_makes_and_keeps_it_where_asked(place):
    output = (place / "output").read_text("utf-8")
    kept = Goldens(place / "kept")
    kept.verify()
    assert kept.configs == {"mine": MINE}
    assert f"goldens of mine, seed 5: {len(kept.cases)} cases" in output
    assert "goldens from two sources: done" in output
    assert "noise floors: done" in output
    assert "faulty float64: levels up to" not in output
    assert "conformance: FAILED" in output
    assert "timing" not in output, "of a config of one's own, nothing is timed unless asked for"


class Recorded:
    """Takes the part of the oracle's process: gives the goldens that were kept, at once."""

    def __init__(self, kept):
        self.kept, self.requests = kept, []

    def __call__(self, python):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def ask(self, request, told=None):
        self.requests.append(request)
        if request["do"] == "make":
            assert not list(Path(request["out"]).iterdir())
            shutil.copytree(self.kept, request["out"], dirs_exist_ok=True)
        return {"cases": [[case.id, case.level] for case in Goldens(self.kept).cases]}


@pytest.fixture
def recorded(place, monkeypatch, tmp_path):
    """Goldens at once, and a folder for temporary ones that is empty."""
    found = Recorded(place / "kept")
    monkeypatch.setattr(oracle, "Oracle", found)
    monkeypatch.setattr(oracle, "find_oracle", lambda named=None: named or "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found.temporary, found.config = tmp_path / "temporary", f"--config={place / 'mine.toml'}"
    return found


def test_fresh_goldens_are_gone_after_the_run(recorded):
    done = conformance("--impl=impl_numpy", recorded.config, "--level=1", "--dtype=float64")
    assert done.exit_code == 0, done.output
    assert "impl_numpy float64: all 11 cases passed" in done.output
    assert os.listdir(recorded.temporary) == []
    plan, make = recorded.requests
    assert (plan["do"], make["do"]) == ("plan", "make")
    assert (make["seed"], make["columns"]) == (0, [])  # float64 needs no noise floors
    assert config_from_dict(make["config"]) == MINE


def test_what_has_no_cases_is_refused_before_goldens_are_made(recorded):
    for option, words in (
        ("--level=7", "--level 7 has no cases; the manifest has levels 0, 1, 2, 3, 4, 5, 6"),
        ("--case=L9/*", "--case 'L9/*' matches none"),
    ):
        done = conformance("--impl=impl_numpy", recorded.config, option)
        assert done.exit_code == 2
        assert words in " ".join(done.output.split())
    assert [request["do"] for request in recorded.requests] == ["plan", "plan"]
    assert os.listdir(recorded.temporary) == []


def test_other_columns_have_their_limits_made(recorded):
    done = conformance(
        "--impl=impl_numpy", recorded.config, "--dtype=bf16", "--dtype=tf32", "--seed=7"
    )
    assert done.exit_code == 2, "what was recorded has no such column"
    assert recorded.requests[-1]["columns"] == ["float32", "bf16", "tf32"]
    assert recorded.requests[-1]["seed"] == 7


def test_a_config_that_no_golden_can_serve_is_refused_with_the_reasons(tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "one.toml"
    file.write_text(TEXT.replace("[1, 2]", "[1, 1]"))
    done = conformance("--impl=impl_numpy", f"--config={file}")
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "no goldens can be made of config 'one'" in said
    assert "attention has a single pixel" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed=3"], "--seed is for fresh goldens; give --config too"),
        (["--oracle=python3"], "--oracle is for fresh goldens; give --config too"),
        (["--keep-goldens=x"], "--keep-goldens is for fresh goldens; give --config too"),
        (["--config=tiny", "--goldens=x"], "--goldens and --config exclude each other"),
        (["--config=tiny", "--samples"], "--samples is for the committed goldens"),
        (["--config=tiny", "--seed=-1"], "--seed -1 is outside 0..2^64-1"),
        (["--config=tiny", f"--seed={2**64}"], "is outside 0..2^64-1"),
        (["--config=tiny", "--keep-goldens=full"], "--keep-goldens full is there and not empty"),
        (["--config=nothing"], "unknown config 'nothing'; shipped are"),
        (["--config=nothing.toml"], "cannot be read"),
        (["--config=tiny", "--oracle=nothing"], "interpreter nothing of the oracle cannot be run"),
        (["--config=tiny", "--dtype=float16"], "--dtype 'float16' is unknown"),
    ],
)
def test_a_command_line_that_cannot_be_carried_out(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = conformance("--impl=impl_numpy", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_an_oracle_without_its_packages_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(oracle, "MODULES", ("torch", "no_such_package"))
    monkeypatch.setattr(oracle, "ROOT", tmp_path)  # which has no environments
    with pytest.raises(CannotStart, match=r"lacks no_such_package.*requirements/goldens\.txt"):
        oracle.find_oracle()
    folder, name = os.path.split(sys.executable)
    with pytest.raises(CannotStart, match=r"--oracle .* lacks .*no_such_package.*goldens\.txt"):
        oracle.find_oracle(os.path.join(folder, ".", name))  # the same, but by another path
    monkeypatch.setattr(oracle, "MODULES", ("json",))
    assert oracle.find_oracle() == sys.executable


def test_an_environment_of_nox_that_has_the_packages_is_found(monkeypatch, tmp_path):
    place = (
        tmp_path / ".nox" / "tests" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    )
    place.parent.mkdir(parents=True)
    place.touch()
    monkeypatch.setattr(oracle, "ROOT", tmp_path)
    found = {sys.executable: ["diffusers"], str(place): []}
    monkeypatch.setattr(oracle, "lacks", found.get)
    assert oracle.find_oracle() == str(place)
    found[str(place)] = ["torch"]
    with pytest.raises(CannotStart, match="nox -s conformance"):
        oracle.find_oracle()


@pytest.mark.skipif(os.name == "nt", reason="the made-up interpreter is a shell script")
def test_an_oracle_that_ends_is_told_with_its_last_words(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no memory left' >&2\nexit 3\n")
    script.chmod(0o755)
    with (
        oracle.Oracle(str(script)) as made,
        pytest.raises(CannotStart, match="exit code 3:\nno memory left"),
    ):
        made.ask({"do": "plan"})


# --- random configs ------------------------------------------------------------------------------

FIRST = 174  # has one resnet a level, and the next number two: there FAULTY is wrong


# Of an earlier run, in a file of results.
COLUMN = {
    "backend": "impl_numpy",
    "dtype": "float64",
    "mode": "eager",
    "first": 0,
    "configs": 9,
    "passed": 8,
    "cases": 99,
    "worst": {"ratio": 0.5, "case": "L1/random-0/x"},
    "failures": [{"number": 7, "case": "L2/random-7/y", "status": "failed", "ratio": 3.0}],
}


def fresh(*arguments):
    done = CliRunner().invoke(app, ["fresh", "--threads=1", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture(scope="module")
def random_place(tmp_path_factory):
    """A folder with a faulty backend, and what a run over two random configs left there."""
    pytest.importorskip("diffusers")
    pytest.importorskip("mpmath")
    folder = tmp_path_factory.mktemp("random")
    (folder / "faulty.py").write_text(FAULTY, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.chdir(folder)
        done = fresh(
            *("--impl=impl_numpy", "--impl=faulty", f"--first={FIRST}", "--count=2"),
            *("--dtype=float64", "--keep-goldens=kept", "--reports=reports"),
        )
    (folder / "output").write_text(done.output, "utf-8")
    assert done.exit_code == 1, done.output
    return folder


def test_random_configs_count_what_passed_and_keep_the_config_that_did_not(random_place):
    report = json.loads((random_place / "reports" / "fresh.json").read_text("utf-8"))
    assert (report["first"], report["count"], report["ok"]) == (FIRST, 2, False)
    right, faulty = report["columns"]
    assert (right["backend"], right["configs"], right["passed"]) == ("impl_numpy", 2, 2)
    assert right["cases"] >= 18
    assert 0 < right["worst"]["ratio"] < 1
    assert list(right["worst_by_level"]) == ["L0", "L1", "L3", "L4", "L5", "L6"]
    assert (faulty["backend"], faulty["configs"], faulty["passed"]) == ("faulty", 2, 1)
    (failure,) = faulty["failures"]
    assert failure["number"] == FIRST + 1
    assert (failure["case"], failure["block"]) == (
        f"L3/random-{FIRST + 1}/taps",
        "down_blocks.0.resnets.1",
    )
    config = load_config(random_place / "reports" / f"random-{FIRST + 1}.toml")
    assert config.layers_per_block == 2
    output = " ".join((random_place / "output").read_text("utf-8").split())
    assert "2 of 2 configs, 1 failed" in output
    assert f"--config reports/random-{FIRST + 1}.toml --seed {FIRST + 1}" in output
    assert "fresh: FAILED" in output


def test_kept_goldens_are_used_again_and_a_right_backend_passes(random_place, monkeypatch):
    monkeypatch.chdir(random_place)
    monkeypatch.setattr(oracle.Oracle, "ask", None)  # nothing is to be made
    numbers = (f"--first={FIRST}", "--count=2", "--dtype=float64", "--reports=again")
    (random_place / "results.json").write_text(
        json.dumps({"columns": [COLUMN | {"dtype": "float32"}, COLUMN]})
    )
    more = ("--keep-goldens=kept", "--results=results.json", "--page=page.md")
    done = fresh("--impl=impl_numpy", *numbers, *more)
    assert done.exit_code == 0, done.output
    other, column = json.loads((random_place / "results.json").read_text("utf-8"))["columns"]
    assert other == COLUMN | {"dtype": "float32"}
    assert (column["first"], column["configs"], column["failures"]) == (FIRST, 2, [])
    shown = (random_place / "page.md").read_text("utf-8")
    assert f"| impl_numpy | float64 | eager | 2, from {FIRST} | 2 |" in shown
    assert "| impl_numpy | float32 | eager | 9, from 0 | 8 | 99 | 0.5 | L1/random-0/x |" in shown
    assert "- impl_numpy float32, config 7: L2/random-7/y failed, 3.0 of the limit" in shown
    assert "2 of 2 configs, all passed" in done.output
    assert "fresh: passed" in done.output


def test_goldens_that_cannot_be_made_fail_the_run_and_are_named(
    random_place, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    kept, asked = random_place / "kept", []

    def ask(self, request, told=None):
        asked.append((request["do"], request["random"]))
        assert request["seed"] == request["random"]
        if request["random"] == FIRST:
            raise GoldenError("the two sources are 1 apart")
        if request["do"] == "make":
            shutil.copytree(kept / str(request["random"]), request["out"])
        return {"toml": "a = 1\n"}

    monkeypatch.setattr(oracle.Oracle, "ask", ask)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    numbers = (f"--first={FIRST}", "--count=2", "--dtype=float64", "--oracle", sys.executable)
    done = fresh("--impl=impl_numpy", *numbers)
    assert done.exit_code == 1
    assert f"no goldens of config {FIRST}: the two sources are 1 apart" in done.output
    assert "2 of 2 configs, 1 failed" in done.output
    assert asked == [("plan", FIRST), ("plan", FIRST + 1), ("make", FIRST + 1)]
    report = json.loads((tmp_path / "reports" / "fresh.json").read_text("utf-8"))
    assert report["unmade"] == [{"number": FIRST, "problem": "the two sources are 1 apart"}]
    assert report["columns"][0]["passed"] == 1
    assert os.listdir(tmp_path / "temporary") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--count=0"], "--count 0 is outside 1..100000"),
        (["--first=-1"], "--first -1 is outside 0..2^32-1"),
        (["--mode=slow"], "--mode 'slow' is unknown"),
        (["--page=page.md"], "--page shows what --results holds"),
        (["--results=broken.json"], "--results broken.json is no file of results"),
        (["--oracle=nothing"], "interpreter nothing of the oracle cannot be run"),
    ],
)
def test_a_run_over_random_configs_that_cannot_be(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[]")
    done = fresh("--impl=impl_numpy", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_workers_go_from_goldens_to_goldens_in_one_process_and_survive_its_end(random_place):
    one, other = (Goldens(random_place / "kept" / str(FIRST + i)) for i in range(2))
    setup = Setup(one.folder, "cpu", None, 1, 60.0, one.cases[0].config)
    impl = Impl("impl_numpy", sys.executable)
    with Suite(Plan([impl], ["float64"], one, one.cases, setup)) as suite:
        for goldens in (one, other, one):
            suite.turn_to(goldens, goldens.cases)
            column = suite.run_column(impl, "float64")
            assert column.ok
            assert {result.case.config.name for result in column.results} == set(goldens.configs)
            assert not suite.has_passed(
                impl, "float64", (one if goldens is other else other).cases[1]
            )
        worker = suite.worker(impl, "float64")
        assert worker.starts == 1
        worker._process.kill()
        suite.turn_to(other, other.cases)
        assert suite.run_column(impl, "float64").ok
        assert worker.starts == 2


def test_two_runs_over_adjoining_configs_are_one_column():
    one = COLUMN | {"versions": {"numpy": "2"}, "end": 9, "seconds": 1.5}
    one["worst_by_level"] = {"L1": COLUMN["worst"], "L6": {"ratio": 0.2, "case": "L6/random-1/x"}}
    worst = {"ratio": 0.7, "case": "L6/random-9/x"}
    other = one | {"first": 9, "end": 12, "configs": 3, "passed": 3, "cases": 30, "failures": []}
    other |= {"worst": worst, "worst_by_level": {"L6": worst}}
    for both in (joined(one, other), joined(other, one)):
        assert both == one | {
            **{"end": 12, "configs": 12, "passed": 11, "cases": 129, "seconds": 3.0},
            **{"worst": worst, "worst_by_level": {"L1": COLUMN["worst"], "L6": worst}},
        }
        assert "| 12, from 0 | 11 | 129 | 0.7 | L6/random-9/x |" in page({"columns": [both]})
    nothing = other | {"worst": None, "worst_by_level": {}}
    assert joined(one, nothing)["worst"] == COLUMN["worst"]


@pytest.mark.parametrize("changed", [{"first": 8}, {"first": 10}, {"first": 0}, {"mode": "x"}])
def test_a_run_over_other_configs_takes_the_place_of_the_one_before(changed):
    one = COLUMN | {"versions": {}, "end": 9}
    other = one | {"first": 9, "end": 12} | changed
    assert joined(one, other) == other
    assert joined(other, one) == one
    assert joined(COLUMN, other) == other  # of before a column said where it ends


def test_the_mode_of_a_backend_goes_before_that_of_the_run():
    impls = [Impl("impl_tf", "python"), Impl("impl_jax", "python")]
    assert [impl.mode for impl in with_modes(impls, None)] == ["eager", None]
    assert [impl.mode for impl in with_modes(impls, "compiled")] == ["compiled"] * 2


def test_the_page_of_random_configs_shows_what_was_measured():
    held = json.loads((ROOT / "results" / "fresh.json").read_text("utf-8"))
    assert (ROOT / "docs" / "fresh.md").read_text("utf-8") == page(held)
    assert all(column["configs"] > 0 for column in held["columns"])
