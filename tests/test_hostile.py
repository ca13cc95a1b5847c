"""What backends do that nobody asked for: each gets a verdict there, and the run goes on.

Every test runs the real runner on a real worker process.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonschema
import pytest
from conformance_fakes import write_goldens
from typer.testing import CliRunner

from conformance import process
from conformance.__main__ import app
from conformance.process import Impl, Setup, WorkerProcess
from conformance.reports import SCHEMA, Report, write_all
from conformance.runner import Plan, Suite
from conformance.show import console, show_report
from spec.config import load_config
from spec.goldens import Goldens

HERE = Path(__file__).resolve().parent
CASES = ("L0/tiny/schedule", "L1/tiny/q_sample", "L1/tiny/target", "L2/tiny/emb", "L3/tiny/taps")
TIMEOUT = 60.0  # for what is not to be reached
SHORT = 8.0  # for what is
HEAD = """
import ctypes, json, logging, os, signal, sys, threading, time
import numpy as np
from conformance_fakes import Fake, opener

{before}

class Hostile(Fake):
{body}

name, modes, open = "hostile", ("eager",), opener(Hostile)
"""
Q = "    def q_sample(self, x0, t, noise):\n        right = super().q_sample(x0, t, noise)\n"
TREE = "    def taps(self, x, t, labels=None):\n        right = super().taps(x, t, labels)\n"


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    return write_goldens(tmp_path_factory.mktemp("goldens"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with one for temporary files in it: some delete all of that."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan_of(goldens, impl, timeout=TIMEOUT, cases=CASES):
    held = Goldens(goldens)
    setup = Setup(goldens, "cpu", None, 1, timeout, load_config("tiny"))
    chosen = [case for case in held.cases if case.id in cases]
    return Plan([impl], ["float64"], held, chosen, setup)


def column_of(goldens, impl, timeout=TIMEOUT, cases=CASES):
    """All verdicts on a backend, every report written and printed as a run does it."""
    return checked_column(plan_of(goldens, impl, timeout, cases))[0]


def checked_column(plan):
    """The column of a plan, and how often its worker was started."""
    with Suite(plan) as suite:
        column = suite.run_column(plan.impls[0], "float64")
        starts = suite.worker(plan.impls[0], "float64").starts
    report = Report(plan, [column])
    paths = write_all(report, Path("reports"))
    jsonschema.validate(json.loads(paths[0].read_text()), json.loads(SCHEMA.read_text()))
    show_report(console(), report)
    assert column.complete
    return column, starts


def hostile(goldens, place, body, before="", **more):
    text = HEAD.format(before=before, body=body)
    (place / "hostile.py").write_text(text, encoding="utf-8")
    return column_of(goldens, Impl("hostile", sys.executable), **more)


def limit_for(status):
    return SHORT if "timed out" in status else TIMEOUT


def verdicts(column):
    return {result.case.id: (result.status, result.message) for result in column.results}


def lines(text, indent="        "):
    """The text in a method's body; what stands behind a | is in the class."""
    return "".join(
        f"    {line[1:]}\n" if line.startswith("|") else f"{indent}{line}\n"
        for line in text.strip().splitlines()
    )


# What q_sample does (or gives back), the status of its case, and words of the message.
RETURNS = {
    "sys.exit": ("sys.exit(3)", "error", "SystemExit: 3"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt('me')", "error", "KeyboardInterrupt: me"),
    "BaseException": ("raise BaseException('base')", "error", "BaseException: base"),
    "MemoryError": ("np.ones((2**30, 2**20))", "error", "MemoryError"),
    "RecursionError": ("return self.q_sample(x0, t, noise)", "error", "RecursionError"),
    "GoldenError": (
        "from spec.goldens import GoldenError\nraise GoldenError('golden x was changed')",
        "error",
        "golden x was changed",
    ),
    "Fault": (
        "from conformance.execute import Fault\nraise Fault('mine')",
        "fault",
        "mine",
    ),
    "text that no file can hold": ("raise ValueError('\\ud800 \\x1b[31m')", "error", "ValueError"),
    "a message without end": ("raise ValueError('x' * 10**7)", "error", "ValueError: xxx"),
    "an exception without a message": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "error",
        "E: its message cannot be made",
    ),
    "floods stdout": (
        "print('x' * 10**7); os.write(1, b'\\xff\\0' * 10**6); return right",
        "passed",
        "",
    ),
    "floods stderr": (
        "os.write(2, b'\\xfe' * 10**7); raise ValueError('v')",
        "error",
        "ValueError: v",
    ),
    "None": ("return None", "fault", "q_sample gave None; expected a NumPy array"),
    "a list": ("return right.tolist()", "fault", "gave a list of 3"),
    "a generator": ("return (x for x in right)", "fault", "gave a generator"),
    "objects": ("return right.astype(object)", "fault", "dtype object"),
    "texts": ("return right.astype(str)", "fault", "dtype <U"),
    "a text": ("return 'right'", "fault", "gave a str"),
    "masked": (
        "return np.ma.masked_array(right, right > 0)",
        "fault",
        "MaskedArray; expected a plain",
    ),
    "a matrix": ("return np.asmatrix(right[0, 0])", "fault", "matrix; expected a plain"),
    "a subclass": (
        "class A(np.ndarray):\n    def copy(self, order='C'): return 1\nreturn right.view(A)",
        "fault",
        "A; expected a plain NumPy array",
    ),
    "records": ("return np.zeros(3, [('a', float)])", "fault", "dtype [('a'"),
    "0-d": ("return np.float64(1.0)", "fault", "numpy.float64; expected a NumPy array: np.array"),
    "a 0-d array": ("return np.array(1.0)", "failed", "out has shape []"),
    "a memoryview": (
        "return memoryview(np.ascontiguousarray(right))",
        "fault",
        "gave a memoryview",
    ),
    "lazy and failing": (
        "class Lazy:\n    def __array__(self, *a, **k): raise RuntimeError('later')\nreturn Lazy()",
        "fault",
        "Lazy; expected a NumPy array: np.array(x)",
    ),
    "a tensor on a GPU": (
        "class Tensor:\n"
        "    def detach(self): return self\n"
        '    def __array__(self, *a, **k): raise TypeError("can\'t convert cuda:0 device")\n'
        "return Tensor()",
        "fault",
        "Tensor; expected a NumPy array: x.detach().cpu().numpy()",
    ),
    "float16": ("return right.astype('float16')", "failed", "dtype float16; expected float64"),
    "float32": ("return right.astype('float32')", "failed", "dtype float32; expected float64"),
    "long double": ("return right.astype(np.longdouble)", "fault", "expected floating point"),
    "complex": ("return right + 0j", "fault", "dtype complex128"),
    "integers": ("return right.astype(int)", "failed", "dtype int64; expected float64"),
    "booleans": ("return right > 0", "failed", "dtype bool; expected float64"),
    "big-endian": ("return right.astype('>f8')", "passed", ""),
    "NaN": ("right[1] = np.nan; return right", "failed", "out holds nan in 192 of 576"),
    "read-only": ("right.flags.writeable = False; return right", "passed", ""),
    "not contiguous": ("return np.asfortranarray(right)", "passed", ""),
    "a view of a view": ("return np.repeat(right, 2, 0)[::2]", "passed", ""),
    "broadcast": ("return np.broadcast_to(right[:1], right.shape)", "failed", "out of tolerance"),
    "changes its input": ("x0[0] = 0; return right", "fault", "q_sample changed its argument x0"),
    "changes its input by a view": (
        "x0.view(np.uint8).reshape(-1)[0] ^= 1; return right",
        "fault",
        "q_sample changed its argument x0",
    ),
    "closes its streams": (
        "sys.stdin.close(); sys.stdout.close(); sys.stderr.close(); return right",
        "passed",
        "",
    ),
    "closes the descriptors": ("os.close(0); os.close(1); os.close(2); return right", "passed", ""),
    "changes the folder": ("os.chdir('/'); return right", "passed", ""),
    "numpy raises": ("np.seterr(all='raise'); np.random.seed(0); return right", "passed", ""),
    "logs": (
        "logging.basicConfig(level=0, stream=sys.stdout)\n"
        "logging.critical('x' * 10**6); return right",
        "passed",
        "",
    ),
}
# The same for what ends the process, or may.
CALLS = {
    "hangs": ("time.sleep(600)", "timed out", "no answer within 8 s"),
    "hangs with the time limit taken off": (
        "import faulthandler; faulthandler.cancel_dump_traceback_later(); time.sleep(600)",
        "timed out",
        "no answer within 8 s",
    ),
    "segfaults": ("ctypes.string_at(0)", "crashed", "SIGSEGV"),
    "aborts": ("os.abort()", "crashed", "SIGABRT"),
    "leaves": ("os._exit(0)", "crashed", "exit code 0"),
    "SIGINT": (
        # a process that was started in the background ignores it
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.kill(os.getpid(), signal.SIGINT); [time.sleep(0.01) for _ in range(100)]",
        "error",
        "KeyboardInterrupt",
    ),
    "bottomless recursion": (
        "sys.setrecursionlimit(2**31 - 1)\ndef f(x): return repr([x, f])[:0] or f([x]) + f(x)\n"
        "return sorted([1, 2], key=lambda i: f(i))",
        ("crashed", "error", "timed out"),
        "",
    ),
    "forks and comes back twice": ("os.fork(); return right", "passed", ""),
    "starts threads": (
        "for _ in range(20): threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "return right",
        "passed",
        "",
    ),
    "a thread that prints on": (
        "def f():\n    while True: print('x' * 1000)\n"
        "threading.Thread(target=f, daemon=True).start(); return right",
        "passed",
        "",
    ),
    "a view written over later": (
        "Hostile.kept = right; return right\n"
        "|def target(self, x0, t, noise):\n|    Hostile.kept[:] = 0\n"
        "|    return super().target(x0, t, noise)",
        "passed",
        "",
    ),
    "closes every descriptor": ("os.closerange(0, 4096); return right", "crashed", ""),
    "deletes its folders": (
        "import glob, shutil, tempfile\n"
        "for f in glob.glob(os.path.join(tempfile.gettempdir(), 'conformance-*')):\n"
        "    shutil.rmtree(f)\n"
        "return right",
        "passed",
        "",
    ),
    "writes over its inputs": (
        "import glob, tempfile\n"
        "for f in glob.glob(os.path.join(tempfile.gettempdir(), 'conformance-*/inputs/*')):\n"
        "    with __builtins__['open'](f, 'ab') as file: file.write(b'x')\n"
        "os._exit(0)",
        "crashed",
        "exit code 0",
    ),
    "patches numpy": (
        "np.allclose = np.array_equal = lambda *a, **k: True\n"
        "np.isfinite = np.ones_like\nreturn right * 2",
        "failed",
        "out of tolerance",
    ),
    "an alarm": (
        "signal.alarm(1); return right\n"
        "|def target(self, x0, t, noise):\n|    time.sleep(1.5)\n"
        "|    return super().target(x0, t, noise)",
        "passed",
        "",
    ),
    "hangs at exit": (
        "import atexit; atexit.register(time.sleep, 600); return right",
        "passed",
        "",
    ),
    "hangs in a destructor": (
        "class D:\n    def __del__(self): time.sleep(600)\nself.d = D(); self.d = None",
        "timed out",
        "no answer within 8 s",
    ),
    "junk in the channel": (
        "for fd in range(3, 20):\n"
        '    try: os.write(fd, b\'{"id": 3, "status": "done"\\n\')\n'
        "    except OSError: pass\nreturn right",
        ("crashed", "passed"),
        "",
    ),
}


def test_what_a_call_does_in_one_process_is_a_verdict_on_its_case(goldens, place):
    """One worker, asked the same case again and again, does another thing every time."""
    body = "".join(
        f"    def do_{i}(self, x0, t, noise, right):\n{lines(text)}\n"
        for i, (text, _, _) in enumerate(RETURNS.values())
    )
    body += (
        "    count = -1\n\n"
        + Q
        + lines(
            """
Hostile.count += 1
return getattr(self, f"do_{Hostile.count}", None)(x0, t, noise, right)
"""
        )
    )
    body = body.replace("return self.q_sample(x0, t, noise)", "return self.again()")
    body += "\n    def again(self):\n        return self.again()\n"
    (place / "hostile.py").write_text(HEAD.format(before="", body=body), encoding="utf-8")
    impl = Impl("hostile", sys.executable)
    plan = plan_of(goldens, impl, 120.0)
    asked, other = (next(c for c in plan.cases if c.id == CASES[i]) for i in (1, 3))
    plan.cases = []
    for name in RETURNS:
        plan.cases += [
            dataclasses.replace(asked, id=name),
            dataclasses.replace(other, id=f"{name}+"),
        ]
    column, starts = checked_column(plan)
    found = verdicts(column)
    for name, (_, status, message) in RETURNS.items():
        assert found[name][0] == status, (name, found[name])
        assert message in found[name][1], (name, found[name])
        assert found[f"{name}+"] == ("passed", ""), (name, found[f"{name}+"])
    assert starts == 1


@pytest.mark.parametrize("what", CALLS)
def test_what_a_call_does_is_a_verdict_and_the_other_cases_go_on(goldens, place, what):
    text, status, message = CALLS[what]
    start = time.monotonic()
    column = hostile(goldens, place, Q + lines(text), timeout=limit_for(status))
    assert time.monotonic() - start < SHORT + process.GRACE + 50
    found = verdicts(column)
    got = found.pop("L1/tiny/q_sample")
    allowed = (status,) if isinstance(status, str) else status
    assert got[0] in allowed, got
    assert message in got[1], got
    # Where the process itself is spoilt for its next call, that one may be a crash; no more.
    spoilt = {"forks and comes back twice", "junk in the channel"}
    others = [status for status, _ in found.values()]
    assert others.count("passed") >= len(others) - (what in spoilt), found


# What taps does with its tree.
TREES = {
    "None": ("return None", "fault", "taps gave None; expected a dict"),
    "a list of pairs": ("return list(right.items())", "fault", "taps gave a list of"),
    "a name that is none": (
        "right['down_blocks.9'] = right.pop('conv_in'); return right",
        "failed",
        "conv_in is missing",
    ),
    "one more": ("right['extra'] = right['emb']; return right", "failed", "extra is not a result"),
    "a number as name": (
        "right[3] = right['emb']; return right",
        "fault",
        "names that are no texts",
    ),
    "a dict that lies": (
        "class Lies(dict):\n"
        "    def __iter__(self): return iter(['emb'])\n"
        "    def items(self): return [('emb', right['emb'])] * 2\nreturn Lies(right)",
        "fault",
        "taps gave a name twice",
    ),
    "a dict that fails": (
        "class Fails(dict):\n    def items(self): raise OSError('no')\nreturn Fails(right)",
        "error",
        "OSError: no",
    ),
    "a dict without end": (
        "import itertools\n"
        "class Long(dict):\n"
        "    def items(self): return ((str(i), None) for i in itertools.count())\n"
        "return Long(right)",
        ("timed out", "error", "crashed"),
        "",
    ),
    "one buffer for all": (
        "buffer = np.zeros(max(v.size for v in right.values()))\n"
        "for k, v in right.items():\n"
        "    buffer[: v.size] = v.reshape(-1); right[k] = buffer[: v.size].reshape(v.shape)\n"
        "return right",
        "failed",
        "out of tolerance",
    ),
    "names for a terminal": (
        "right['\\x1b[2J\\ud800'] = right['emb']; return right",
        ("failed", "error"),
        "",
    ),
}


@pytest.mark.parametrize("what", TREES)
def test_what_a_tree_holds_is_a_verdict(goldens, place, what):
    text, status, message = TREES[what]
    before = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"
    column = hostile(
        goldens,
        place,
        TREE + lines(text),
        before if "end" in what else "",
        timeout=limit_for(status),
    )
    found = verdicts(column)
    got = found.pop("L3/tiny/taps")
    assert got[0] in ((status,) if isinstance(status, str) else status), got
    assert message in got[1], got
    assert {status for status, _ in found.values()} == {"passed"}, found


DESCRIBES = {
    "NaN": "return {'loss': float('nan'), 'big': 10**5000, 'x': np.array(1.0)}",
    "keys that are none": "return {(1, 2): 3, None: object()}",
    "no dict": "return 3",
    "an exit": "raise ValueError('\\ud800')",
    "much": "return {str(i): 'x' * 10**6 for i in range(20)}",
    "text that no file can hold": "return {'framework': '\\ud800 \\x1b[2J'}",
}


@pytest.mark.parametrize("what", DESCRIBES)
def test_what_a_model_says_of_itself_costs_no_case_its_verdict(goldens, place, what):
    column = hostile(goldens, place, f"    def describe(self):\n        {DESCRIBES[what]}\n")
    assert {result.status for result in column.results} == {"passed"}


def run(goldens, *arguments):
    command = ["run", f"--goldens={goldens}", "--threads=1", "--dtype=float64", *arguments]
    return CliRunner().invoke(app, [*command, "--no-timing", "--no-samples"])


IMPORTS = {
    "hangs": ("import time; time.sleep(600)", "timed out while it was started: no answer within"),
    "leaves": ("import os; os._exit(0)", "its process ended with exit code 0"),
    "sys.exit": ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "cannot be imported: KeyboardInterrupt"),
    "segfaults": ("import ctypes; ctypes.string_at(0)", "by signal SIGSEGV"),
    "is no Python": ("def open(:", "cannot be imported: SyntaxError"),
    "floods": ("print('x' * 10**7)\nraise ValueError('v')", "cannot be imported: ValueError: v"),
    "speaks to a terminal": (
        "raise ValueError('\\x1b[2J')",
        "cannot be imported: ValueError: ?[2J",
    ),
    "modes is a text": (
        "name, modes, open = 'h', 'eager', print",
        "modes = 'eager'; expected a tuple",
    ),
    "modes is empty": ("name, modes, open = 'h', (), print", "modes = (); expected a tuple"),
    "name is none": ("name, modes, open = None, ('eager',), print", "a name that is no text"),
}


@pytest.mark.parametrize("what", IMPORTS)
def test_a_module_that_cannot_be_imported_is_refused_in_time(goldens, place, monkeypatch, what):
    monkeypatch.setattr(process, "START_LIMIT", SHORT)
    text, message = IMPORTS[what]
    (place / "hostile.py").write_text(text, encoding="utf-8")
    start = time.monotonic()
    done = run(goldens, "--impl=hostile", "--timeout=8")
    assert time.monotonic() - start < 30
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "\x1b" not in done.output


OPENS = {
    "hangs": ("time.sleep(600)", "timed out", "no answer within 8 s"),
    "raises": ("raise ValueError('no weights')", "error", "ValueError: no weights"),
    "leaves": ("os._exit(4)", "crashed", "exit code 4"),
    "is not written": ("raise NotImplementedError", "not implemented", ""),
    "gives nothing": ("return None", "fault", "open gave None; expected a model"),
}


@pytest.mark.parametrize("what", OPENS)
def test_what_open_does_is_the_verdict_on_each_case(goldens, place, what):
    text, status, message = OPENS[what]
    tail = "\ndef open(config, params=None, **more):\n" + lines(text, "    ")
    path = place / "hostile.py"
    path.write_text(HEAD.format(before="", body="    pass") + tail, encoding="utf-8")
    impl = Impl("hostile", sys.executable)
    column = column_of(goldens, impl, limit_for(status), CASES[:2])
    for result in column.results:
        assert result.status == status
        assert message in result.message


def test_a_child_that_leaves_the_session_holds_nobody_up(goldens, place):
    body = Q + lines(
        """
if os.fork() == 0:
    os.setsid()
    with __builtins__["open"]("pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
    os._exit(0)
return right
"""
    )
    body += "    def target(self, x0, t, noise):\n        os._exit(5)\n"
    start = time.monotonic()
    try:
        column = hostile(goldens, place, body, timeout=40.0)
    finally:
        os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    # The child keeps the pipes of its dead parent open; the end of the parent is seen all the same.
    assert time.monotonic() - start < 30
    found = verdicts(column)
    assert found.pop("L1/tiny/target") == ("crashed", "its process ended with exit code 5")
    assert {status for status, _ in found.values()} == {"passed"}


# --- programs of one's own ------------------------------------------------------------------------

OWN = """#!{python}
import json, os, sys, time
from pathlib import Path

def save_file(tensors, path):
    from safetensors.numpy import save_file
    save_file(tensors, path)

def say(value):
    line = value if isinstance(value, bytes) else json.dumps(value).encode() + b"\\n"
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()

for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "stop":
        break
    id = request["id"]
    if request["do"] == "hello":
        folder = Path(request["results"])
        say({{"id": id, "status": "ready", "name": "own", "modes": ["eager"], "mode": "eager"}})
        continue
    reply = {{"id": id, "status": "done", "file": "r.safetensors"}}
    if request["case"]["id"] != "L1/tiny/target":
        say({{"id": id, "status": "not implemented", "message": "no"}})
        continue
    path = folder / "r.safetensors"
{body}
"""
REPLIES = {
    "half a line, and the end": ('say(b\'{"id": 2, "sta\'); sys.exit()', "crashed", "no reply"),
    "half a line": ("say(b'{\"id\": 2'); time.sleep(600)", "timed out", "no answer"),
    "nothing": ("time.sleep(600)", "timed out", "no answer"),
    "a wrong id": ("say({**reply, 'id': 77})", "crashed", "no reply"),
    "no id": ("say({'status': 'done'})", "crashed", "no reply"),
    "no object": ("say([1, 2])", "crashed", "no reply"),
    "a huge line": ("say(b'x' * (40 << 20) + b'\\n')", "crashed", "no reply: 'xxx"),
    "a huge line without end": (
        "while True: say(b'x' * (1 << 20))",
        ("crashed", "timed out"),
        "",
    ),
    "lines without end": ("while True: say(b'{}\\n' * 1000)", "crashed", "no reply: '{}'"),
    "no UTF-8": ("say(b'\\xff\\xfe\\x00{\\n')", "crashed", "no reply"),
    "nested without end": ("say(b'[' * 10**6 + b'\\n')", "crashed", "no reply"),
    "a NaN for seconds": ("say({**reply, 'seconds': float('nan')})", "crashed", "seconds = nan"),
    "seconds beyond all": ("say({**reply, 'seconds': 10**400})", "crashed", "reply has"),
    "a text for seconds": (
        "say({**reply, 'seconds': '1'})",
        "crashed",
        "seconds = '1'; expected a",
    ),
    "a list for message": (
        "say({**reply, 'message': [1]})",
        "crashed",
        "message = '[1]'; expected",
    ),
    "a list for status": ("say({**reply, 'status': []})", "crashed", "status = '[]'; expected"),
    "a text for describe": ("say({**reply, 'describe': 'x'})", "crashed", "describe = 'x'"),
    "numbers for versions": ("say({**reply, 'versions': {'a': 1}})", "crashed", "versions = "),
    "NaN in describe": (
        "say({**reply, 'status': 'error', 'describe': {'a': float('nan')}})",
        "error",
        "",
    ),
    "a golden error": (
        "say({**reply, 'status': 'golden error', 'message': 'gone'})",
        "error",
        "could not read the inputs it was given: gone",
    ),
    "no file": ("say(reply)", "error", "cannot be read"),
    "a file elsewhere": ("say({**reply, 'file': '../../etc/passwd'})", "error", "is no name of a"),
    "an absolute path": ("say({**reply, 'file': '/etc/passwd'})", "error", "is no name of a file"),
    "a file of no name": ("say({**reply, 'file': '..'})", "error", "is no name of a file"),
    "a number for a file": ("say({**reply, 'file': 3})", "error", "is no name of a file"),
    "no tensors": ("path.write_bytes(b'no'); say(reply)", "error", "cannot be read"),
    "a cut file": (
        "import numpy as np; save_file({'out': np.ones((3, 8, 12, 2))}, path)\n"
        "os.truncate(path, path.stat().st_size - 8); say(reply)",
        "error",
        "cannot be read",
    ),
    "a link": (
        "import numpy as np; save_file({'out': np.ones(3)}, folder / 'x')\n"
        "path.symlink_to(folder / 'x'); say(reply)",
        "error",
        "cannot be read",
    ),
    "a hard link": (
        "import numpy as np; save_file({'out': np.ones(3)}, folder / 'x')\n"
        "os.link(folder / 'x', path); say(reply)",
        "error",
        "is no file of its own",
    ),
    "a pipe": ("os.mkfifo(path); say(reply)", "error", "is no file of its own"),
    "a folder": ("path.mkdir(); say(reply)", "error", "cannot be read"),
    "a file without end": (
        "path.touch(); os.truncate(path, 1 << 40); say(reply)",
        "error",
        "which no result of this case needs",
    ),
    "keys that are not asked for": (
        "import numpy as np; save_file({f'k{i}': np.ones(1) for i in range(5000)}, path)\n"
        "say(reply)",
        "failed",
        "out is missing",
    ),
}


def own(place, body):
    script = place / "own"
    text = OWN.format(python=sys.executable, body=lines(body, "    "))
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    return Impl("own", str(script))


@pytest.mark.parametrize("what", REPLIES)
def test_what_a_program_of_ones_own_answers_is_a_verdict(goldens, place, what):
    body, status, message = REPLIES[what]
    start = time.monotonic()
    column = column_of(goldens, own(place, body), limit_for(status), CASES[1:4])
    assert time.monotonic() - start < SHORT + process.GRACE + 50
    found = verdicts(column)
    got = found.pop("L1/tiny/target")
    assert got[0] in ((status,) if isinstance(status, str) else status), got
    assert message in got[1], got
    assert {status for status, _ in found.values()} == {"not implemented"}, found


def test_replies_to_requests_that_were_not_read_end_in_time(goldens, place):
    script = place / "deaf"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys, time\n"
        "ready = {'id': 1, 'status': 'ready', 'name': 'deaf', 'modes': ['eager']}\n"
        "print(json.dumps(ready), flush=True)\ntime.sleep(600)\n"
    )
    script.chmod(0o755)
    plan = plan_of(goldens, Impl("deaf", str(script)))
    worker = WorkerProcess(plan.impls[0], "float64", plan.setup, place / "w")
    worker.start()
    start = time.monotonic()
    with pytest.raises(process.WorkerDied, match="no answer within 1 s"):
        worker.ask({"do": "case", "filling": "x" * (1 << 20)}, 1.0)
    assert time.monotonic() - start < 15


# --- what a worker can see ------------------------------------------------------------------------

LOOKS = """
    def q_sample(self, x0, t, noise):
        import glob
        seen = [*sys.argv, *map(str, os.environ.items()), os.getcwd()]
        for fd in range(256):
            try:
                seen.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass
        for fd in [int(n) for n in os.listdir("/proc/self/fd")]:
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
                if target.startswith("/") and os.path.isfile(target):
                    seen.append(__builtins__["open"](target, "rb").read().decode("latin1"))
            except OSError:
                pass
        import tempfile
        for root in (os.getcwd(), *glob.glob(os.path.join(tempfile.gettempdir(), "conformance-*"))):
            for folder, _, names in os.walk(root):
                for name in names:
                    seen.append(os.path.join(folder, name))
                    data = __builtins__["open"](seen[-1], "rb").read()
                    seen.append(data.decode("latin1"))
        with __builtins__["open"]("seen.json", "w") as file:
            json.dump(seen, file)
        return super().q_sample(x0, t, noise)
"""


def test_no_expected_value_can_be_read_where_a_worker_is_started(goldens, place):
    """Not in argv, the environment, open files, the present folder, or what the suite gives it."""
    column = hostile(goldens, place, LOOKS)
    assert {result.status for result in column.results} == {"passed"}
    seen = json.loads(Path("seen.json").read_text())
    assert any("tiny.inputs.safetensors" in text for text in seen)
    whole = "\n".join(seen)
    held = Goldens(goldens)
    assert "tiny.expected" not in whole
    assert str(goldens) not in whole
    for case in held.cases:
        if case.id not in CASES or case.call == "target":  # which gives back its input, the noise
            continue
        for output in case.outputs:
            assert output.sha256 not in whole
            data = held.expected(case, output).tobytes()
            assert data not in whole.encode("latin1", errors="replace")


def test_the_command_ends_and_reports_whatever_its_backends_leave_behind(goldens, place):
    """A process of its own: its end is held up by no thread that still reads from a child."""
    body = Q + lines(
        """
if os.fork() == 0:
    os.setsid()
    with __builtins__["open"]("pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
    os._exit(0)
return right
"""
    )
    (place / "hostile.py").write_text(HEAD.format(before="", body=body), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, "-m", "conformance", "run", "--impl=hostile", "--level=0"]
    command += ["--level=1", "--dtype=float64", f"--goldens={goldens}", "--threads=1"]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=50, check=False
        )
    finally:
        os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance: passed" in done.stdout
    assert "Traceback" not in done.stderr
