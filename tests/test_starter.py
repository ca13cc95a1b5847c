"""`conformance new`, and how the suite guides whoever fills in what it wrote."""

import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conformance_fakes import Fake, opener, write_goldens
from typer.testing import CliRunner

from conformance import coach
from conformance.__main__ import app
from conformance.runner import Column, Result, check_backend
from spec.backend import Backend, Model
from spec.config import load_config
from spec.goldens import Goldens

GOLDENS = Goldens()
SCHEDULE = """
        from spec.reference import make_schedule

        tables = make_schedule(self.config)
        return {name: np.array(table, self.dtype) for name, table in tables.items()}
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The folder of a new starter, and the present one."""
    folder = tmp_path / "my_model"
    result = CliRunner().invoke(app, ["new", str(folder)])
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(folder)
    return folder


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(folder: Path, method: str, body: str) -> None:
    """Put a body in the place of a method's NotImplementedError."""
    path = folder / "my_model.py"
    text = path.read_text()
    start = text.index(f"    def {method}(")
    end = text.index("        raise NotImplementedError\n", start)
    rest = text[end:].removeprefix("        raise NotImplementedError\n")
    path.write_text(text[:end] + body.lstrip("\n") + rest)


def run(*options: str):
    return CliRunner().invoke(app, ["run", "--impl", "my_model", *options])


def test_the_starter_is_the_protocol_and_nothing_of_it_is_written(started):
    module = imported(started / "my_model.py")
    assert module.name == "my_model"
    wanted = inspect.signature(Backend.open).parameters
    assert list(inspect.signature(module.open).parameters) == list(wanted)[1:]
    model = module.open(load_config("tiny"), dtype="float64")
    asked = [name for name in vars(Model) if not name.startswith("_")]
    assert {"fit", "synchronize"} == {name for name in asked if not hasattr(model, name)}
    for name in set(asked) - {"fit", "synchronize"}:
        method = getattr(module.Model, name)
        assert inspect.signature(method) == inspect.signature(getattr(Model, name))
        assert inspect.getdoc(method) == inspect.getdoc(getattr(Model, name))
        arguments = dict.fromkeys(inspect.signature(method).parameters)
        with pytest.raises(NotImplementedError):
            method(**arguments)
    with pytest.raises(ValueError, match="dtype = 'float16' is unknown"):
        module.open(load_config("tiny"), dtype="float16")


def test_every_link_and_option_of_its_readme_is_there(started):
    text = (started / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 3
    assert all((started / link).exists() for link in links)
    help_text = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"nox -- .*?(--[a-z-]+)", text):
        assert option in help_text
    for level, points in re.findall(r"\| (L\d) .*\| (\d+) \|", text):
        assert int(points) == sum(f"L{case.level}" == level for case in GOLDENS.cases)
    compile((started / "noxfile.py").read_text(), "noxfile.py", "exec")


def test_it_says_what_to_write_then_what_is_wrong_then_what_to_write_next(started):
    empty = run("--level", "0", "--level", "1", "--dtype", "float64", "--score", "score.json")
    assert empty.exit_code == 1
    assert "next: write schedule, by S1 (Schedule)" in empty.output
    assert "L0/tiny/ho2020" in empty.output
    assert json.loads(Path("score.json").read_text())["columns"][0]["points"] == 0

    fill(started, "schedule", SCHEDULE.replace("table,", "1.001 * table,"))
    wrong = run("--level", "0", "--dtype", "float64")
    assert wrong.exit_code == 1
    assert "next: mend schedule: L0/tiny/ho2020 failed, by S1 (Schedule)" in wrong.output
    assert "1.001 times the expected value" in wrong.output

    text = (started / "my_model.py").read_text()
    (started / "my_model.py").write_text(text.replace("1.001 * table,", "table,"))
    right = run("--level", "0", "--level", "1", "--dtype", "float64", "--score", "score.json")
    assert right.exit_code == 1
    assert "next: write q_sample, by S2 (Forward process)" in right.output
    assert "q_sample(x0, t, noise)" in right.output
    (column,) = json.loads(Path("score.json").read_text())["columns"]
    assert column["clauses"]["S1"] == {"title": "Schedule", "points": 10, "of": 10}
    assert column["levels"]["L0"] == {"title": "tables", "points": 10, "of": 10}
    assert column["clauses"]["S2"]["points"] == 0
    assert column["points"] == 10
    assert run("--level", "0").exit_code == 0


NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]?\d+)?(?![\w.])")


def numbers(*texts: str) -> set[str]:
    """Every number of eight digits or more in the texts, to eight digits."""
    found = {word for text in texts for word in NUMBER.findall(text)}
    long = [w for w in found if len(re.sub(r"\D|e.*", "", w).lstrip("0")) >= 8]
    return {f"{float(word):.8g}" for word in long}


def test_hide_expected_prints_and_writes_no_golden(started):
    fill(started, "schedule", SCHEDULE.replace("table,", "table + 0.25 * (table > 0.5),"))
    fill(started, "q_sample", "        return np.flip(x0, 0) * 1.25\n")
    fill(started, "target", "        raise ValueError(f'no target of {x0}')\n")
    cases = ["--case", "L0/*", "--case", "L1/tiny/q_sample", "--case", "L1/tiny/target"]
    options = (*cases, "--dtype", "float64", "--score", "reports/score.json")
    golden = {
        f"{value:.8g}"
        for case in GOLDENS.cases
        if case.level == 0 or case.id in cases
        for output in case.outputs
        for value in GOLDENS.expected(case, output).ravel()
    }
    golden |= {number.removeprefix("-") for number in golden}

    def told(*more: str) -> tuple[str, set[str]]:
        """What is printed, and every golden number in it or in any file that is written."""
        done = run(*options, *more)
        assert done.exit_code == 1
        files = sorted(path for path in Path("reports").rglob("*") if path.is_file())
        assert len(files) == 4
        return done.output, golden & numbers(done.output, *(f.read_text() for f in files))

    output, shown = told()
    assert "expected" in output
    assert len(shown) > 10
    output, shown = told("--hide-expected")
    assert "not shown" in output
    assert shown == set()
    report = json.loads(Path("reports/conformance.json").read_text())
    compared = [result for result in report["results"] if result["worst"]]
    assert len(compared) == 11
    assert {f["expected"] for r in compared for f in [r["worst"], *r["failures"]]} == {None}


def test_a_module_that_cannot_be_imported_has_a_score_too(started):
    (started / "my_model.py").write_text("import nothing_of_this_name\n")
    result = run("--level", "0", "--score", "score.json")
    assert result.exit_code != 0
    score = json.loads(Path("score.json").read_text())
    assert "nothing_of_this_name" in score["problem"]
    assert [(c["points"], c["of"]) for c in score["columns"]] == [(0, 10), (0, 10)]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(started):
    (started / "file").write_text("kept")
    for option, place in (("--score", "."), ("--score", "file/s.json"), ("--reports", "file")):
        result = run("--level", "0", option, place)
        assert result.exit_code == 2
        assert f"{option} {place} cannot be written" in result.output
        assert "cases ..." not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["numpy"], "the name of another module; give one by --name my_model"),
        (["my_model"], "is there already, and not empty; name a new folder"),
        (["my-model"], "the name of another module; give one by --name my_model_model"),
        (["random"], "the name of another module"),
        (["class"], "is no name of a Python module"),
        (["2d-model"], "is no name of a Python module"),
        (["mine", "--name", "a b"], "is no name of a Python module"),
        (["full"], "is there already, and not empty"),
        (["file"], "is there already, and not empty"),
    ],
)
def test_new_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("full", *(["my_model"] if arguments[0].startswith("my") else [])):
        Path(folder).mkdir()
        Path(folder, "kept").write_text("kept")
    Path("file").write_text("kept")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["new", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_a_name_of_ones_own_are_taken(tmp_path):
    folder = tmp_path / "2026-course"
    folder.mkdir()
    result = CliRunner().invoke(app, ["new", str(folder), "--name", "unet"])
    assert result.exit_code == 0
    assert imported(folder / "unet.py").name == "unet"


class Half(Fake):
    """Its q_sample is right, its target raises, its taps are not written for one of two calls."""

    def target(self, x0, t, noise):
        raise ZeroDivisionError("one over nothing")

    def guide(self, out_null, out_label, guidance_scale):
        raise NotImplementedError


def column_of(results: list[Result]) -> Column:
    return Column("half", "float64", [result.case for result in results], results=results)


def test_a_lesson_orders_the_methods_and_begins_with_the_lowest(tmp_path):
    class Backend:
        name, modes, open = "half", ("eager",), staticmethod(opener(Half))

    results = check_backend(Backend, ["float64"], goldens=Goldens(write_goldens(tmp_path)))
    tasks = coach.tasks(column_of(results))
    assert [task.level for task in tasks] == sorted(task.level for task in tasks)
    states = {task.method: task.state for task in tasks}
    assert states["q_sample"] == "done"
    assert states["target"] == "wrong"
    assert states["guide"] == "to write"
    steps = coach.next_steps(column_of(results))
    assert steps[0].startswith("mend target: L1/tiny/target error, by S2")
    assert "one over nothing" in steps[1]
    assert coach.next_steps(column_of([r for r in results if r.ok])) == []


class Partly(Fake):
    """Its guide is wrong for one scale and not written for another; its q_sample is in float32."""

    def guide(self, out_null, out_label, guidance_scale):
        if guidance_scale:
            raise NotImplementedError
        return super().guide(out_null, out_label, 2.0)

    def q_sample(self, x0, t, noise):
        return super().q_sample(x0, t, noise).astype(np.float32)


def test_the_lesson_is_of_the_column_that_stops_at_the_lowest_level(tmp_path):
    class Backend:
        name, modes, open = "partly", ("eager",), staticmethod(opener(Partly))

    goldens = Goldens(write_goldens(tmp_path))
    columns = [
        dataclasses.replace(column_of(found), dtype=dtype)
        for dtype in ("float64", "float32")
        if (found := check_backend(Backend, [dtype], ["L1/*", "L3/*"], goldens=goldens))
    ]
    for column in columns:
        states = {task.method: task.state for task in coach.tasks(column)}
        assert (states["q_sample"] == "done") == (column.dtype == "float32")
    above = dataclasses.replace(columns[0], selected=columns[0].selected[-1:])
    above.results = [dataclasses.replace(columns[0].results[-1], status="failed")]
    assert [column.dtype for column in coach.lessons([above, columns[1]])] == ["float32"]
    assert [column.dtype for column in coach.lessons(columns)] == ["float64"]
    above.dtype = "float32"
    assert " failed in float32, by S" in coach.next_steps(above)[0]


def test_a_method_with_a_wrong_case_is_wrong_and_with_none_to_write():
    statuses = {"wrong": ("passed", "failed", "not implemented"), "to write": ("not implemented",)}
    case = GOLDENS.cases[0]
    for state, found in statuses.items():
        results = [Result("half", "float64", case, status) for status in found]
        assert coach.Task(0, "schedule", results, len(results) + 1).state == state


def test_numbers_of_things_are_written_as_they_are_said():
    assert [coach.counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


def test_every_level_method_and_clause_of_the_goldens_has_words():
    assert {case.level for case in GOLDENS.cases} <= set(coach.LEVELS)
    assert {case.clause for case in GOLDENS.cases} <= set(coach.titles())
    for case in GOLDENS.cases:
        method = coach.METHODS.get(case.call, case.call)
        assert coach.signature(method).startswith(f"{method}(")
        assert coach.summary(method).endswith(".")
    assert coach.signature("guide") == "guide(out_null, out_label, guidance_scale)"


@pytest.mark.parametrize("command", ["parity", "samples"])
def test_the_other_commands_refuse_a_place_before_their_work_too(started, command):
    (started / "file").write_text("kept")
    result = CliRunner().invoke(app, [command, "--impl", "my_model", "--reports", "file"])
    assert result.exit_code == 2
    assert "--reports file cannot be written" in result.output
    assert "starting" not in result.output
