"""The suite over worker processes: verdicts on what no process survives, and the command line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from conformance_fakes import write_goldens
from typer.testing import CliRunner

from conformance.__main__ import app
from conformance.process import KEPT, Impl, Setup, WorkerDied, WorkerProcess
from conformance.reports import SCHEMA, Report, explain, number, printable
from conformance.runner import Plan, Suite
from spec.config import load_config
from spec.goldens import GOLDENS, GoldenError, Goldens

HERE = Path(__file__).resolve().parent
GOOD = """
from conformance_fakes import Fake, opener

name, modes, open = "good", ("eager",), opener(Fake)
"""
# Each method goes wrong in its own way; run_block does not.
ZOO = """
import os
import signal
import sys
import time

import numpy as np
from conformance_fakes import Fake, opener


class Zoo(Fake):
    def schedule(self):
        print("before the hang", file=sys.stderr)
        time.sleep(600)

    def q_sample(self, x0, t, noise):
        print("last words", file=sys.stderr)
        os._exit(3)

    def target(self, x0, t, noise):
        for _ in range(40):
            print("x" * 100_000)
            os.write(1, b"y" * 100_000)
            os.write(2, b"z" * 100_000)
        assert sys.stdin.read() == ""
        return super().target(x0, t, noise)

    def predict_x0_eps(self, x_t, t, out):
        return [x_t, out, 3]

    def ddpm_step(self, x_t, t, out, noise):
        return super().ddpm_step(x_t, t, out, noise) * np.nan

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        x_t += 1
        return super().ddim_step(x_t, t, t_prev, out, noise, eta)

    def guide(self, out_null, out_label, guidance_scale):
        raise NotImplementedError("guidance comes later")

    def predict(self, x, t, labels=None):
        return 0.5

    def taps(self, x, t, labels=None):
        taps = super().taps(x, t, labels)
        del taps["emb"]
        return taps

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        raise ValueError("no \\x1b[31mgradient\\x1b[0m <today> & [bold]never")

    def apply_gradients(self, grads):
        os.kill(os.getpid(), signal.SIGKILL)

    def sample(self, x, noise=None, labels=None, **options):
        return super().sample(x, noise, labels, **options) * 1.01


name, modes, open = "zoo", ("eager", "compiled"), opener(Zoo)
"""
EXPECTED = {
    "L0/tiny/schedule": ("timed out", "no answer within 1.5 s"),
    "L1/tiny/q_sample": ("crashed", "its process ended with exit code 3"),
    "L1/tiny/target": ("passed", ""),
    "L1/tiny/predict_x0_eps": ("fault", "gave a list of 3; expected a tuple of 2"),
    "L1/tiny/ddpm_step": ("failed", "out holds nan in 576 of 576 elements"),
    "L1/tiny/ddim_step": ("fault", "changed its argument x_t"),
    "L1/tiny/guide": ("not implemented", "guidance comes later"),
    "L2/tiny/emb": ("passed", ""),
    "L2/tiny/down_blocks.0.resnets.0": ("passed", ""),
    "L2/tiny/down_blocks.1.attentions.0": ("passed", ""),
    "L2/tiny/up_blocks.0.resnets.0": ("passed", ""),
    "L3/tiny/predict": ("fault", "predict gave a float"),
    "L3/tiny/taps": ("failed", "emb is missing from the results"),
    "L4/tiny/grads": ("error", "ValueError: no "),
    "L5/tiny/apply": ("crashed", "by signal SIGKILL"),
    "L5/tiny/apply_later": ("crashed", "by signal SIGKILL"),
    "L5/tiny/train_steps": ("error", "ValueError: no "),
    "L6/digits/guided": ("failed", "times what is allowed"),
}


@pytest.fixture(scope="session")
def goldens(tmp_path_factory):
    return write_goldens(tmp_path_factory.mktemp("goldens"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for backends that workers find, and that the command line runs in."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(folder, name, text):
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return name


def conformance(goldens, *arguments, command="run", impl=()):
    given = [f"--impl={name}" for name in impl]
    done = CliRunner().invoke(
        app, [command, *given, f"--goldens={goldens}", "--threads=1", *arguments]
    )
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def plan_of(goldens, impl, timeout=60.0, dtypes=("float32",)):
    held = Goldens(goldens)
    setup = Setup(goldens, "cpu", None, 1, timeout, load_config("tiny"))
    return Plan([Impl(impl, sys.executable)], list(dtypes), held, held.cases, setup)


def test_every_broken_backend_gets_its_verdict_and_the_run_goes_on(goldens, place):
    add(place, "zoo", ZOO)
    start = time.monotonic()
    done = conformance(goldens, "--dtype=float64", "--timeout=1.5", "--no-timing", impl=["zoo"])
    assert time.monotonic() - start < 60
    assert done.exit_code == 1
    report = json.loads((place / "reports/conformance.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    results = {result["case"]: result for result in report["results"]}
    assert list(results) == list(EXPECTED)
    for case_id, (status, message) in EXPECTED.items():
        assert results[case_id]["status"] == status, results[case_id]
        assert message in results[case_id]["message"]
    assert "before the hang" in results["L0/tiny/schedule"]["trace"]
    assert "in schedule" in results["L0/tiny/schedule"]["trace"]  # where it hung
    assert results["L1/tiny/q_sample"]["trace"].endswith("last words")
    assert "in loss_and_grads" in results["L4/tiny/grads"]["trace"]
    (column,) = report["columns"]
    assert (column["ok"], column["selected"], column["checked"]) == (False, 18, 18)
    assert column["reached"] is None
    assert column["first_difference"]["case"] == "L0/tiny/schedule"
    assert column["modes"] == ["eager", "compiled"]
    assert column["mode"] == "eager"
    assert column["describe"] == {"name": "fake", "dtype": "float64"}
    assert "numpy" in column["versions"]

    assert "conformance: FAILED" in done.output
    assert "the first clause that differs: S1 (L0/tiny/schedule, timed out)" in done.output
    assert done.output.count("╭") == 5  # panels
    assert "zoo: 7 failures more, all in the reports" in done.output  # guide is to be written

    root = ElementTree.parse(place / "reports/conformance.xml").getroot()
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("18", "6", "7")
    broken = {case.get("name"): case[0] for case in suite if len(case)}
    assert broken["L3/tiny/taps"].tag == "failure"
    assert broken["L5/tiny/apply"].tag == "error"
    page = (place / "reports/conformance.md").read_text()
    assert "| L2 | 4/4" in page
    assert "### zoo float64: L4/tiny/grads" in page
    assert "no samples" in done.output.lower() or "No samples" in page
    assert not list((place / "reports").glob(".*"))  # no unfinished file is left


def test_a_right_backend_passes_in_both_dtypes(goldens, place):
    add(place, "good", GOOD)
    add(place, "better", GOOD.replace('"good"', '"better"'))
    arguments = ["--no-timing", "--no-samples", "--reports=out/here"]
    done = conformance(goldens, *arguments, impl=["good", f"better={sys.executable}"])
    assert done.exit_code == 0, done.output
    report = json.loads((place / "out/here/conformance.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["ok"]
    heads = [(column["backend"], column["dtype"]) for column in report["columns"]]
    assert heads == [(b, d) for b in ("good", "better") for d in ("float64", "float32")]
    assert all(column["checked"] == column["passed"] == 18 for column in report["columns"])
    assert all(column["reached"] == 6 for column in report["columns"])
    assert {column["describe"]["dtype"] for column in report["columns"]} == {"float64", "float32"}
    assert "conformance: passed" in done.output
    assert "good float64: all 18 cases passed" in done.output


def test_the_suite_runs_from_a_checkout_as_a_module(goldens, place):
    add(place, "good", GOOD)
    env = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{HERE}", "COLUMNS": "200"}
    command = [sys.executable, "-m", "conformance", "run", "--impl=good", "--case=L1/*"]
    command += [f"--goldens={goldens}", f"--reports={place / 'r'}", "--threads=1"]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout  # plain where it is no terminal
    assert "good float64: all passed" in done.stdout


def test_the_parent_and_the_machinery_import_no_framework():
    code = (
        "import sys, conformance.__main__; print({'torch', 'tensorflow', 'jax'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--case=L3/nothing"], 2, "'L3/nothing' matches none of 18 cases"),
        (["--level=8"], 2, "--level 8 has no cases"),
        (["--dtype=float16"], 2, "--dtype 'float16' is unknown; choose one of float64, float32"),
        (["--dtype=bf16"], 2, "good has no bf16; it has float64, float32. Leave this --dtype out"),
        (["--dtype=tf32"], 2, "no selected case has a tf32 tolerance"),
        (["--device=tpu"], 2, "--device 'tpu' is unknown; choose one of cpu, cuda, auto"),
        (["--mode=fast"], 2, "--mode 'fast' is unknown; choose one of eager, compiled"),
        (["--timeout=0"], 2, "--timeout 0 is outside"),
        (["--timeout=nan"], 2, "--timeout nan is outside"),
        (["--threads=9999"], 2, "--threads 9999 is outside 1.."),
        (["--rounds=0"], 2, "--rounds 0 is outside 1..1000"),
        (["--timing-batch=0"], 2, "--timing-batch 0 is outside"),
        (["--timing-config=huge"], 2, "unknown config 'huge'"),
        (["--impl=good"], 2, "--impl good is given twice"),
        (["--impl=other="], 2, "--impl 'other=' is not MODULE or MODULE=PATH/TO/python"),
        (["--device=cuda"], 2, "good cannot run on --device cuda: device = 'cuda' is not on"),
        (["--impl=nobody_has_this"], 2, "backend 'nobody_has_this' is not a module"),
        (["--impl=empty"], 2, "empty has no name, modes, open"),
        (["--impl=folder"], 2, "and no module; name the module in it: folder.folder"),
        (["--impl=other_folder"], 2, "and no module; name a module in it: other_folder.one"),
        (["--level=L1x"], 2, "'L1x' is no level; they are L0 to L7: give one as 2 or L2"),
        (["--level=L8"], 2, "--level 8 has no cases"),
        (["--level=0,1"], 2, "'0,1' is no level; they are L0 to L7"),
        (["--impl=b=/no/such/python"], 2, "interpreter /no/such/python of b cannot be run"),
        (["--impl=impl_lacking"], 1, "needs nobody_has_this, which"),
        (["--impl=impl_lacking"], 1, "-m pip install -r requirements/lacking-cpu.txt"),
        (["--impl=dies"], 1, "dies crashed while it was started: its process ended with exit"),
        (["--impl=raises"], 1, "raises cannot be imported: RuntimeError: not today"),
        ([], 2, "Missing option '--impl'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_what_cannot_be_run_is_refused_before_any_work(goldens, place, arguments, code, text):
    add(place, "good", GOOD)
    add(place, "impl_lacking", "import nobody_has_this")
    add(place, "empty", "")
    for file in ("folder/folder.py", "folder/one.py", "other_folder/one.py"):
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text("")
    add(place, "dies", "import os; os._exit(7)")
    add(place, "raises", "raise RuntimeError('not today')")
    alone = not arguments or (arguments[0].startswith("--impl=") and "good" not in arguments[0])
    impl = [] if alone else ["good"]
    done = conformance(goldens, "--dtype=float32", *arguments, impl=impl)
    assert done.exit_code == code, done.output
    output = " ".join((done.output + done.stderr).replace("│", " ").split())
    assert text in output
    assert not (place / "reports").exists()


def test_a_changed_golden_is_refused_by_name_and_hash(goldens, place):
    add(place, "good", GOOD)
    folder = place / "changed"
    shutil.copytree(goldens, folder)
    path = folder / "tiny.expected.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = conformance(folder, impl=["good"])
    assert done.exit_code == 1
    assert "tiny.expected.safetensors has sha256" in " ".join(done.stderr.split())
    shutil.rmtree(folder)
    done = conformance(folder, impl=["good"])
    assert done.exit_code == 1
    assert "manifest.json cannot be read" in " ".join(done.stderr.split())


def test_a_case_without_a_tolerance_fails_the_run(goldens, place):
    add(place, "good", GOOD)
    folder = place / "lacking"
    shutil.copytree(goldens, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for output in manifest["cases"][2]["outputs"].values():
        del output["tolerance"]["float32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = conformance(folder, "--level=1", "--dtype=float32", impl=["good"])
    assert done.exit_code == 1
    assert "1 cases have no float32 tolerance" in done.output
    report = json.loads((place / "reports/conformance.json").read_text())
    assert report["columns"][0]["left_out"] == ["L1/tiny/target"]
    assert report["columns"][0]["levels"][0]["total"] == 6
    assert report["columns"][0]["reached"] is None


def test_results_that_do_not_match_the_selection_fail(goldens, place):
    add(place, "good", GOOD)
    with Suite(plan_of(goldens, "good")) as suite:
        column = suite.run_column(suite.plan.impls[0], "float32")
    assert column.ok
    column.results.pop(3)
    assert not column.complete
    assert not column.ok
    column.results.clear()
    assert not column.ok
    assert not Report(suite.plan, [column]).ok
    column.selected.clear()  # nothing asked for and nothing done is no pass either
    assert not column.ok
    assert not Report(suite.plan, [column]).ok
    assert not Report(suite.plan, []).ok


def test_a_worker_keeps_the_end_of_a_flood_and_nothing_more(goldens, place):
    add(
        place,
        "flood",
        "import os, sys\n"
        "for _ in range(50):\n    os.write(2, b'f' * 100_000)\n"
        "print('the end', file=sys.stderr); sys.stderr.flush(); os._exit(9)",
    )
    plan = plan_of(goldens, "flood")
    worker = WorkerProcess(plan.impls[0], "float32", plan.setup, place / "w")
    with pytest.raises(WorkerDied) as died:
        worker.ask({"do": "case"}, 30.0)
    assert "the end" in died.value.message
    assert sum(map(len, worker._stderr)) <= KEPT + 8192
    worker.close()


def test_a_worker_that_speaks_out_of_turn_is_a_crash(goldens, place):
    script = place / "babble"
    script.write_text(
        f"#!{sys.executable}\nprint('hello?', flush=True)\nimport time\ntime.sleep(60)"
    )
    script.chmod(0o755)
    plan = plan_of(goldens, "good")
    worker = WorkerProcess(Impl("good", str(script)), "float32", plan.setup, place / "w")
    with pytest.raises(WorkerDied, match="answered with no reply: 'hello"):
        worker.ask({"do": "case"}, 30.0)
    worker.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"status": "done", "file": "none.safetensors"}, "file of results cannot be read"),
        ({"status": "done", "file": "../../bad"}, "file of results cannot be read"),
        ({"status": "done"}, "file of results cannot be read"),
        ({"status": "splendid"}, "its worker answered 'splendid'"),
    ],
)
def test_a_worker_of_ones_own_that_answers_badly(goldens, place, reply, message):
    """Any program may be a worker: this one is a few lines, and knows nothing of the suite."""
    (place / "bad").write_bytes(b"no tensors")
    script = place / "own"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['do'] == 'stop':\n        break\n"
        "    ready = {'status': 'ready', 'name': 'own', 'modes': ['eager'], 'mode': 'eager'}\n"
        f"    reply = ready if request['do'] == 'hello' else {reply!r}\n"
        "    print(json.dumps({'id': request['id'], **reply}), flush=True)\n"
    )
    script.chmod(0o755)
    plan = plan_of(goldens, "own")
    plan.impls = [Impl("own", str(script))]
    plan.cases = plan.cases[:2]
    with Suite(plan) as suite:
        column = suite.run_column(plan.impls[0], "float32")
    assert [result.status for result in column.results] == ["error", "error"]
    assert message in column.results[0].message


def test_children_of_a_hanging_worker_end_with_it(goldens, place):
    add(
        place,
        "parent",
        """
import subprocess
import sys
import time

from conformance_fakes import Fake, opener


class Hangs(Fake):
    def schedule(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, file=sys.stderr)
        time.sleep(600)


name, modes, open = "parent", ("eager",), opener(Hangs)
""",
    )
    plan = plan_of(goldens, "parent", timeout=1.0)
    with Suite(plan) as suite:
        outcome, _ = suite.ask_case(plan.impls[0], "float32", plan.cases[0])
        assert outcome.status == "timed out", outcome
        pid = int(outcome.trace.split("child ")[1].split()[0])
        for _ in range(50):
            if not Path(f"/proc/{pid}").exists() or "Z" in _state_of(pid):
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists() or "Z" in _state_of(pid)


def _state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_requests_that_are_unknown_are_answered(goldens, place):
    add(place, "good", GOOD)
    plan = plan_of(goldens, "good")
    worker = WorkerProcess(plan.impls[0], "float32", plan.setup, place / "w")
    assert worker.start()["protocol"] == 1
    reply = worker.ask({"do": "dance"}, 30.0)
    assert reply["status"] == "error"
    known = "hello, case, time, train, bench, stop"
    assert f"request 'dance' is unknown; known are {known}" in reply["message"]
    reply = worker.ask({"do": "time", "part": "round"}, 30.0)
    assert "begins with part = 'open'" in reply["message"]
    worker.close()
    assert worker._process is None


def test_threads_and_dtypes_reach_the_worker(goldens, place):
    add(
        place,
        "tells",
        GOOD.replace('"good"', '"tells"')
        + """
import os
from conformance_fakes import Fake


def describe(self):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "JAX_ENABLE_X64", "CUDA_VISIBLE_DEVICES")
    return {"cores": cores, **{name: os.environ.get(name) for name in names}}


Fake.describe = describe
""",
    )
    done = conformance(goldens, "--level=0", impl=["tells"])
    assert done.exit_code == 0, done.output
    columns = json.loads((place / "reports/conformance.json").read_text())["columns"]
    for column, x64 in zip(columns, ("1", "0"), strict=True):
        assert column["describe"] == {
            "cores": 1,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "JAX_ENABLE_X64": x64,
            "CUDA_VISIBLE_DEVICES": "",
        }


HALF = """
import numpy as np
from conformance_fakes import Fake, opener


class Half(Fake):
    def cast(self, value):
        if isinstance(value, dict):
            return {key: self.cast(leaf) for key, leaf in value.items()}
        kept = np.asarray(value, np.float32)
        return (kept.view(np.uint32) & 0xFFFF0000).view(np.float32) if self.coarse else kept


def open(config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
    opened = opener(Half)(config, params, seed=seed, dtype="float32", device="cpu", mode=mode)
    opened.coarse = dtype == "bf16"
    return opened


name, modes, dtypes = "half", ("eager",), ("float64", "float32", "bf16")
"""


def test_a_column_of_a_coarser_precision_has_its_own_limits_and_float32_arrays(goldens, place):
    add(place, "half", HALF)
    arguments = ("--level=1", "--level=2")
    done = conformance(goldens, *arguments, "--dtype=bf16", impl=["half"])
    assert done.exit_code == 0, done.output
    values = json.loads((place / "reports/conformance.json").read_text())
    assert [column["dtype"] for column in values["columns"]] == ["bf16"]
    assert max(result["ratio"] for result in values["results"]) > 0.01
    # what is coarse everywhere is no float32
    add(place, "half", HALF.replace('dtype == "bf16"', "True"))
    assert conformance(goldens, *arguments, "--dtype=float32", impl=["half"]).exit_code == 1
    assert conformance(goldens, *arguments, "--dtype=bf16", impl=["half"]).exit_code == 0


def test_on_auto_a_backend_may_lack_what_only_a_gpu_has(goldens, place):
    add(place, "good", GOOD)
    done = conformance(goldens, "--level=0", "--device=auto", impl=["good"])
    assert done.exit_code == 0, done.output
    assert "good has no bf16; it has float64, float32" in done.output
    columns = json.loads((place / "reports/conformance.json").read_text())["columns"]
    assert [column["dtype"] for column in columns] == ["float64", "float32"]


def test_text_for_xml_and_for_people():
    assert printable("a\x00b\x1b[1mc\ud800d\n") == "a?b?[1mc?d\n"
    assert number(None) == "-"
    assert number(1234.5) == "1.23e+03"


def test_a_failure_says_all_that_is_known(goldens, place):
    add(
        place,
        "wrong",
        GOOD
        + """

class Wrong(Fake):
    def run_block(self, name, **inputs):
        out = super().run_block(name, **inputs)
        return out * 2 if name == "emb" else out


name, modes, open = "wrong", ("eager",), opener(Wrong)
""",
    )
    with Suite(plan_of(goldens, "wrong")) as suite:
        column = suite.run_column(suite.plan.impls[0], "float32")
    (failure,) = column.failures
    text = "\n".join(explain(failure))
    for part in (
        "clause: S7, level 2, config tiny, run_block",
        "block: emb",
        "outputs: 1 of 1 differ",
        "worst at: (",
        "of shape (3, 32)",
        "got: ",
        "expected: ",
        "max: error 1, tolerance 1e-05: 1e+05 tolerances, too much",
        "tolerance from: float32, made up",
        "clue: this block is wrong by itself",
        "clue: out is 2 times the expected value",
        "likely cause: the first cause",
    ):
        assert part in text, text


def test_a_stopped_run_ends_its_workers_and_starts_no_other(goldens, place):
    plan = plan_of(goldens, add(place, "good", GOOD))
    with Suite(plan) as suite:
        with pytest.raises(RuntimeError, match="was stopped before"):
            suite.run_column(plan.impls[0], "float32", lambda result: suite.stop())
        worker = suite.worker(plan.impls[0], "float32")
        assert worker.starts == 1


@pytest.mark.parametrize("jobs", [["--jobs=1"], []])
def test_columns_stand_in_the_order_asked_for_however_many_run_at_a_time(goldens, place, jobs):
    names = [add(place, f"good{i}", GOOD) for i in range(2)]
    done = conformance(goldens, *jobs, "--level=1", "--reports=reports", impl=names)
    assert done.exit_code == 0, done.output
    report = json.loads(Path("reports/conformance.json").read_text("utf-8"))
    columns = [(column["backend"], column["dtype"]) for column in report["columns"]]
    assert columns == [(name, dtype) for name in names for dtype in ("float64", "float32")]


def test_more_columns_at_a_time_than_cores_are_refused(goldens, place):
    done = conformance(goldens, "--jobs=1000", impl=[add(place, "good", GOOD)])
    assert done.exit_code == 2
    assert "--jobs 1000 is outside 1.." in done.output


def test_workers_are_told_of_no_expected_value(place):
    plan = plan_of(GOLDENS, "good")
    with Suite(plan) as suite:
        told = Goldens(suite.setup.goldens)
        for case in told.cases:
            for reference in case.inputs.values():
                assert told.holds(reference) or told.tree(reference)
            for output in case.outputs:
                with pytest.raises(GoldenError, match="is missing"):
                    told.expected(case, output)
        suite.share_cores(2)
        assert suite.setup.goldens == told.folder
    assert not told.folder.exists()
