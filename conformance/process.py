"""The suite's side of a worker: starts it, asks it, bounds its time and output, starts it again."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from conformance.execute import plain
from spec.config import Config
from spec.goldens import Case

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# What a worker of a module and mode needs in its environment before it imports anything. {threads}
# stands for the number that it may use.
MODE_ENVIRONMENT: dict[tuple[str, str], dict[str, str]] = {
    # XLA makes one device of the host unless it is told otherwise.
    ("impl_jax", "parallel"): {"XLA_FLAGS": "--xla_force_host_platform_device_count={threads}"},
}
HUGE_PAGES = "glibc.malloc.hugetlb"  # of GLIBC_TUNABLES; 1: large arrays ask the system for them
START_LIMIT = 300.0  # seconds to start an interpreter and import a framework
GRACE = 5.0  # seconds after a time limit, in which the worker ends itself and tells where it was
KEPT = 64 * 1024  # bytes of stderr
LINE = 16 * 2**20  # bytes of a reply; a longer one is none
WAITING = 64  # replies that nobody has asked for yet; more are thrown away
SHOWN = 4000  # characters of what a worker says
POLL = 0.5  # seconds between two looks whether a worker that does not answer is alive


class WorkerDied(Exception):
    """A worker that ended or did not answer; `status` is "crashed" or "timed out"."""

    def __init__(self, status: str, message: str, stderr: str) -> None:
        super().__init__(message)
        self.status, self.message, self.stderr = status, message, stderr


class CannotStart(Exception):
    """A backend that cannot be run here; `usage` where the command line asked for the impossible.

    `lacks` where it is the dtype alone that the backend, or its device, does not have.
    """

    def __init__(self, message: str, usage: bool = False, lacks: bool = False) -> None:
        super().__init__(message)
        self.usage, self.lacks = usage, lacks


@dataclasses.dataclass(frozen=True)
class Impl:
    """A backend's module, and the interpreter that runs it."""

    name: str
    python: str
    mode: str | None = None  # None: the run's, else the first of the backend's own


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all workers of a run have in common."""

    goldens: Path
    device: str
    mode: str | None
    threads: int
    timeout: float
    probe: Config  # opened once where a device is asked for by name
    cores: int | None = None  # that workers beside each other share; None: as many as threads
    as_it_comes: bool = False  # a library as its users have it, with nothing asked of its memory


def environment(dtype: str, setup: Setup, backend: str = "") -> dict[str, str]:
    """The environment of a worker: that of `pinned`, and what its mode needs besides."""
    env = pinned(dtype, setup.device, setup.threads, huge_pages=not setup.as_it_comes)
    for name, value in MODE_ENVIRONMENT.get((backend, setup.mode or ""), {}).items():
        value = value.format(threads=setup.threads)
        # what the user has in XLA_FLAGS stays; of two values of one flag the last counts
        env[name] = f"{env.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
    return env


def pinned(dtype: str, device: str, threads: int, huge_pages: bool = True) -> dict[str, str]:
    """An environment with threads pinned, huge pages, float64 allowed in JAX, devices as asked."""
    paths = [os.getcwd(), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "PYTHONIOENCODING": "utf-8",
        "JAX_ENABLE_X64": "1" if dtype == "float64" else "0",
    }
    if huge_pages:
        env["GLIBC_TUNABLES"] = _tunables(env.get("GLIBC_TUNABLES", ""))
    env.pop("NVIDIA_TF32_OVERRIDE", None)  # it would decide in the place of the column
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:  # the workers of several backends share one device
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        env.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    return env


def _tunables(given: str) -> str:
    """What the user gave the C library, and huge pages unless that says otherwise.

    With small pages it is chance where in memory the parts of an array lie, and a step that
    transposes arrays, as JAX's does, takes up to a quarter longer from one process to the next.
    """
    return given if HUGE_PAGES in given else f"{given}:{HUGE_PAGES}=1".lstrip(":")


class WorkerProcess:
    """A worker that is started when it is first asked, and again after it has died."""

    def __init__(self, impl: Impl, dtype: str, setup: Setup, folder: Path) -> None:
        self.impl, self.dtype, self.setup, self.folder = impl, dtype, setup, folder
        self.hello: dict[str, Any] = {}
        self.starts = 0  # models and compiled functions are lost from one start to the next
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._stderr: collections.deque[bytes] = collections.deque()
        self._drains: list[threading.Thread] = []
        self._id = 0

    def start(self) -> dict[str, Any]:
        """Start the process unless it runs, and greet it; gives its answer.

        Raises CannotStart where the backend cannot be imported or the device is not there.
        """
        if self._process is not None:
            return self.hello
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._process = subprocess.Popen(
                [self.impl.python, "-m", "conformance.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(self.dtype, self.setup, self.impl.name),
                start_new_session=True,
            )
        except OSError as error:
            raise CannotStart(
                f"interpreter {self.impl.python} of {self.impl.name} cannot be run "
                f"({error.strerror}); give the path of a Python",
                usage=True,
            ) from error
        self.starts += 1
        self._lines, self._stderr = queue.Queue(WAITING), collections.deque()
        self._drains = [
            threading.Thread(target=drain, args=(self._process, store), daemon=True)
            for drain, store in ((_read_lines, self._lines), (read_errors, self._stderr))
        ]
        for thread in self._drains:
            thread.start()
        return self.greet()

    def greet(self) -> dict[str, Any]:
        """Say hello to the process; gives its answer. Said again, it drops what it has opened.

        Raises CannotStart as `start` does.
        """
        setup = self.setup
        request = {
            "do": "hello",
            "backend": self.impl.name,
            "dtype": self.dtype,
            "device": setup.device,
            "mode": self.impl.mode or setup.mode,
            "threads": setup.threads,
            "cores": setup.cores or setup.threads,
            "goldens": str(setup.goldens),
            "results": str(self.folder),
            "config": dataclasses.asdict(setup.probe),
        }
        try:
            self.hello = self._exchange(request, max(START_LIMIT, setup.timeout))
        except WorkerDied as died:
            tail = f"\n{died.stderr}" if died.stderr else ""
            raise CannotStart(
                f"{self.impl.name} {died.status} while it was started: {died.message}{tail}"
            ) from died
        if self.hello["status"] != "ready":
            self.close()
            raise refusal(self.impl, self.setup, self.hello)
        return self.hello

    @property
    def runs(self) -> bool:
        """Whether there is a process; it may have ended since it was last asked."""
        return self._process is not None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to a request. Raises WorkerDied; the next request finds a new process."""
        try:
            self.start()
        except CannotStart as error:
            raise WorkerDied("crashed", str(error), "") from error
        return self._exchange(request, timeout)

    def close(self) -> None:
        """End the process: ask it, then kill it and whatever it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        _write(process, b'{"do": "stop"}\n', 1.0, last=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
        kill(process)
        for thread in self._drains:
            thread.join(1.0)

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process is not None
        self._id += 1
        message = json.dumps({"id": self._id, "timeout": timeout, **request}) + "\n"
        start = time.monotonic()
        _write(self._process, message.encode(), timeout + GRACE)
        line = self._line(start + timeout + GRACE)
        spent = time.monotonic() - start
        if line is not None:
            try:
                reply = json.loads(line)
            except (ValueError, RecursionError):  # half a line, no UTF-8, nested without end
                reply = None
            if not isinstance(reply, dict) or reply.get("id") != self._id or "status" not in reply:
                text = line[:200].decode(errors="replace").strip()
                raise self._died("crashed", f"its worker answered with no reply: {text!r}")
            try:
                return checked(reply)
            except (ValueError, OverflowError) as error:
                raise self._died("crashed", f"its worker's reply has {error}") from error
        if spent >= timeout:
            raise self._died("timed out", f"no answer within {timeout:g} s")
        raise self._died("crashed", "")

    def _line(self, end: float) -> bytes | None:
        """The next line of the worker; None where the time is over, or the worker has ended.

        Its end is looked for too, since a child that outlives it may keep the pipe open.
        """
        process = self._process
        assert process is not None
        while (left := end - time.monotonic()) > 0:
            ended = process.poll() is not None
            try:
                return self._lines.get(timeout=min(POLL, left))
            except queue.Empty:
                if ended:
                    break
        return None

    def _died(self, status: str, message: str) -> WorkerDied:
        process, self._process = self._process, None
        assert process is not None
        if not message:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        code = process.poll()
        kill(process)
        for thread in self._drains:
            thread.join(1.0)
        stderr = b"".join(self._stderr).decode(errors="replace")[-4000:].strip()
        return WorkerDied(status, message or f"its process ended {_ending(code)}", stderr)


def checked(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, its texts cut to a length that can be shown, its numbers fit for JSON.

    Raises ValueError, naming the field, where one is of a kind that the protocol does not have.
    """
    for field, (kind, what) in FIELDS.items():
        if field in reply and not isinstance(reply[field], kind):
            raise ValueError(f"{field} = {str(reply[field])[:80]!r}; expected {what}")
    if not math.isfinite(reply.get("seconds", 0.0)):
        raise ValueError(f"seconds = {reply['seconds']}; expected a finite number")
    for field in ("status", "message", "trace", "missing", "name"):
        if field in reply:
            reply[field] = reply[field][-SHOWN:] if field == "trace" else reply[field][:SHOWN]
    if "describe" in reply:
        reply["describe"] = plain(reply["describe"])
    for field in ("versions", "modes"):
        held = reply.get(field, {})
        if not all(isinstance(v, str) for v in (held.values() if field == "versions" else held)):
            raise ValueError(f"{field} = {str(held)[:80]!r}; expected texts in it")
    return reply


FIELDS: dict[str, tuple[Any, str]] = {
    "status": (str, "a text"),
    "message": (str, "a text"),
    "trace": (str, "a text"),
    "missing": (str, "a text"),
    "name": (str, "a text"),
    "seconds": ((int, float), "a number"),
    "describe": (dict, "an object"),
    "versions": (dict, "an object"),
    "modes": (list, "a list"),
    "mode": ((str, type(None)), "a text, or null"),
}


def refusal(impl: Impl, setup: Setup, reply: dict[str, Any]) -> CannotStart:
    """The error for a backend that answered `hello` with anything but "ready"."""
    status, message = reply["status"], reply.get("message", "")
    if status == "no such module":
        return CannotStart(
            f"backend {impl.name!r} is not a module that {impl.python} finds; give "
            f"{', '.join(shipped()) or 'the name of a module'}, or a module of your own "
            "in the present folder or on PYTHONPATH",
            usage=True,
        )
    if status == "dependency missing":
        wanted = reply["missing"]
        if impl.name.startswith("impl_"):
            pinned = f"requirements/{impl.name.removeprefix('impl_')}"
            cuda = setup.device == "cuda" and (ROOT / f"{pinned}-cuda.txt").is_file()
            wanted = f"-r {pinned}-{'cuda' if cuda else 'cpu'}.txt"
        return CannotStart(
            f"{impl.name} needs {reply['missing']}, which {impl.python} does not have; "
            f"{impl.python} -m pip install {wanted}, "
            f"or name an interpreter that has it: --impl {impl.name}=PATH/TO/python"
        )
    if status == "no dtype":
        return CannotStart(f"{message}. Leave this --dtype out for it", usage=True, lacks=True)
    if status == "no device":
        return CannotStart(
            f"{impl.name} cannot run on --device {setup.device}: {message}. "
            "Use --device cpu, or a machine with a GPU and a build of the framework for it",
            usage=True,
        )
    if status == "no backend":
        return CannotStart(f"{message}; a backend is described in spec/backend.py", usage=True)
    trace = f"\n{reply['trace']}" if reply.get("trace") else ""
    return CannotStart(f"{impl.name} cannot be imported: {message}{trace}")


def shipped() -> list[str]:
    """Names of the backends in this checkout."""
    return sorted(path.parent.name for path in ROOT.glob("impl_*/__init__.py"))


def interpreter(name: str, device: str) -> str:
    """The Python of the environment that nox made for this backend, or the one that runs this."""
    short, windows = name.removeprefix("impl_"), os.name == "nt"
    kinds = ("cpu",) if device == "cpu" or short == "numpy" else ("cuda", "cpu")
    for kind in kinds:
        folder = ROOT / ".nox" / f"{short}-{kind}"
        path = folder / ("Scripts/python.exe" if windows else "bin/python")
        if path.exists():
            return str(path)
    return sys.executable


def case_request(case: Case, given: Path | None = None) -> dict[str, Any]:
    """The request to run a case: what to call with which inputs, and nothing of what is expected"""
    entry = {
        "id": case.id,
        "config": dataclasses.asdict(case.config),
        "call": case.call,
        "params": case.params,
        "inputs": case.inputs,
        "options": case.options,
    }
    return {"do": "case", "case": entry, "given": str(given) if given else None}


def _read_lines(process: subprocess.Popen, lines: queue.Queue) -> None:
    """Read stdout to its end, a line at a time, however long and however many they are."""
    whole = True
    with contextlib.suppress(ValueError, OSError):
        while line := process.stdout.readline(LINE):  # type: ignore[union-attr]
            if whole:  # of what is longer than a reply may be, the first part alone
                with contextlib.suppress(queue.Full):
                    lines.put_nowait(line)
            whole = line.endswith(b"\n")
    with contextlib.suppress(queue.Full):
        lines.put_nowait(None)


def _write(process: subprocess.Popen, data: bytes, timeout: float, last: bool = False) -> None:
    """Write to stdin, for at most so many seconds: who does not read may let the pipe fill."""

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(data)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            if last:
                process.stdin.close()  # type: ignore[union-attr]

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(timeout)


def read_errors(process: subprocess.Popen, kept: collections.deque) -> None:
    """Read stderr to its end, so that the worker never waits, and keep the last part of it."""
    size = 0
    with contextlib.suppress(ValueError, OSError):
        while chunk := process.stderr.read1(8192):  # type: ignore[union-attr]
            kept.append(chunk)
            size += len(chunk)
            while size > KEPT and len(kept) > 1:
                size -= len(kept.popleft())


def kill(process: subprocess.Popen) -> None:
    """Kill the process and every process of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _ending(code: int | None) -> str:
    if code is None:
        return "without an exit code"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        why = ", which the system sends where memory runs out" if name == "SIGKILL" else ""
        return f"by signal {name}{why}"
    return f"with exit code {code}"
