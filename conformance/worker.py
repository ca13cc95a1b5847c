"""The worker process: one backend in one dtype, asked in JSON lines (conformance/README.md)."""

import contextlib
import dataclasses
import faulthandler
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors.numpy import load_file, save_file

PROTOCOL = 1
FRAMEWORKS = ("torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "jaxlib", "flax")
VERSIONS = ("numpy", *FRAMEWORKS, "safetensors")


def take_streams() -> tuple[TextIO, TextIO, int]:
    """Requests and replies on the real stdin and stdout, which are then closed to the backend.

    The third is a copy of stderr's descriptor. Whatever anybody prints, in Python or below it, goes
    to stderr; who reads finds an end of file.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    errors = os.dup(2)
    give_streams(errors)
    return requests, replies, errors


def give_streams(errors: int) -> None:
    """Give the backend its streams, anew where it has closed or replaced them in a call before."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing != 0:
        os.dup2(nothing, 0)
        os.close(nothing)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    if sys.stdin is None or sys.stdin.closed:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None or sys.stderr.closed:
        sys.stderr = os.fdopen(os.dup(errors), "w", encoding="utf-8", errors="backslashreplace")
    if sys.stdout is None or sys.stdout.closed or sys.stdout is sys.__stdout__:
        sys.stdout = sys.stderr


@contextlib.contextmanager
def time_limit(seconds: float | None, errors: int) -> Iterator[None]:
    """End the process, with a traceback of every thread on stderr, when the time is over.

    An alarm that the backend has set ends with the request that it was set in.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=errors)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the backend has loaded."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_info

        # whose kernels do the products, and those of which processor
        parts = ("internal_api", "version", "architecture")
        loaded = {
            " ".join(str(pool[part]) for part in parts if pool.get(part))
            for pool in threadpool_info()
            if pool["user_api"] == "blas"
        }
        if loaded:
            found["blas"] = ", ".join(sorted(loaded))
    return found


class Worker:
    """Answers requests; the backend is imported by the first of them, `hello`."""

    def __init__(self) -> None:
        self.session: Any = None
        self.timer: Any = None
        self.trainer: Any = None
        self.subject: Any = None
        self.folder = Path()
        self.count = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises ValueError for one that is not known."""
        handlers = {
            "hello": self.hello,
            "case": self.case,
            "time": self.time,
            "train": self.train,
            "bench": self.bench,
        }
        if request.get("do") not in handlers:
            raise ValueError(
                f"request {request.get('do')!r} is unknown; known are {', '.join(handlers)}, stop"
            )
        return handlers[request["do"]](request)

    def hello(self, request: dict[str, Any]) -> dict[str, Any]:
        """Import the backend; where a device is asked for by name, see that it is there."""
        from conformance.execute import Session
        from spec.backend import REQUIRED_DTYPES
        from spec.config import config_from_dict
        from spec.goldens import Goldens

        limit_cores(request["cores"])
        name = request["backend"]
        start = time.perf_counter()
        try:
            backend = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or str(error)
            known = missing != name and not name.startswith(f"{missing}.")
            status = "dependency missing" if known else "no such module"
            return {"status": status, "missing": missing, "message": str(error)}
        seconds = time.perf_counter() - start
        if message := unfit(name, backend):
            return {"status": "no backend", "message": message}
        dtypes = getattr(backend, "dtypes", REQUIRED_DTYPES)
        if request["dtype"] not in dtypes:
            message = f"{name} has no {request['dtype']}; it has {', '.join(dtypes)}"
            return {"status": "no dtype", "message": message}
        self.folder = Path(request["results"])
        goldens = Goldens(Path(request["goldens"]))
        self.session = Session(
            backend, goldens, request["dtype"], request["device"], request["mode"]
        )
        if request["device"] == "cuda" or request["dtype"] == "tf32":
            config = config_from_dict(request["config"])
            try:
                self.session.open(config, None)
            except ValueError as error:
                tf32 = request["dtype"] == "tf32" and request["device"] != "cuda"
                return {"status": "no dtype" if tf32 else "no device", "message": str(error)}
        return {
            "status": "ready",
            "protocol": PROTOCOL,
            "name": backend.name,
            "modes": list(backend.modes),
            "mode": self.session.mode,
            "versions": versions(),
            "seconds": seconds,
        }

    def case(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one case and write its results to a file of the folder that hello named."""
        case = read_case(request["case"])
        given = load_file(request["given"]) if request.get("given") else {}
        outcome = self.session.attempt(case, given)
        reply = dataclasses.asdict(outcome)
        del reply["results"]
        if outcome.status == "done":
            self.count += 1
            self.folder.mkdir(parents=True, exist_ok=True)  # a backend may have removed it
            path = self.folder / f"{self.count}.safetensors"
            save_file({key: value.copy(order="C") for key, value in outcome.results.items()}, path)
            reply["file"] = path.name
        return {**reply, "describe": self.session.describe, "versions": versions()}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        """Part of a timing: see conformance/bench/steps.py."""
        from conformance.bench import Timer

        if request["part"] == "open":
            self.session.forget()
            self.timer = Timer(self.session, request["config"], request["batch"])
            return {"status": "done"}
        if self.timer is None:
            raise ValueError("a timing begins with part = 'open'")
        if request["part"] == "close":
            self.timer = None
            return {"status": "done"}
        return {"status": "done", **self.timer.part(request)}

    def bench(self, request: dict[str, Any]) -> dict[str, Any]:
        """Part of the benchmark: see conformance/bench/subject.py."""
        from conformance.bench.subject import Subject

        if request["part"] == "open":
            self.session.forget()
            self.subject = Subject(self.session, {**request, "folder": str(self.folder)})
            return {"status": "done", "seconds": self.subject.build}
        if self.subject is None:
            raise ValueError("a benchmark begins with part = 'open'")
        return {"status": "done", **self.subject.part(request)}

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Part of a shared-noise run: see conformance/parity.py."""
        from conformance.parity import Trainer

        if request["part"] == "open":
            self.session.forget()
            self.trainer = Trainer(self.session, request)
            return {"status": "done"}
        if self.trainer is None:
            raise ValueError("a run begins with part = 'open'")
        return {"status": "done", **self.trainer.part(request)}


def unfit(name: str, backend: Any) -> str:
    """Why a module is no backend; empty for one that is."""
    lacking = [part for part in ("name", "modes", "open") if not hasattr(backend, part)]
    if lacking:
        folder = next(iter(getattr(backend, "__path__", ())), "")
        files = sorted(path.stem for path in Path(folder).glob("*.py")) if folder else []
        if folder and getattr(backend, "__file__", None) is None:
            which, file = ("the", name) if name in files else ("a", next(iter(files), ""))
            inside = f"; name {which} module in it: {name}.{file}" if file else ""
            return f"{name} is a folder, {folder}, and no module{inside}"
        return f"{name} has no {', '.join(lacking)}"
    modes = backend.modes
    if isinstance(modes, str) or not modes or not all(isinstance(mode, str) for mode in modes):
        return f'{name} has modes = {modes!r}; expected a tuple such as ("eager",)'
    if not isinstance(backend.name, str) or not callable(backend.open):
        return f"{name} has a name that is no text, or an open that cannot be called"
    return ""


def read_case(entry: dict[str, Any]) -> Any:
    """The Case of a request: what to call with which inputs, and no outputs."""
    from spec.config import config_from_dict
    from spec.goldens import Case

    return Case(
        id=entry["id"],
        level=0,
        clause="",
        config=config_from_dict(entry["config"]),
        call=entry["call"],
        params=entry["params"],
        inputs=entry["inputs"],
        options=entry["options"],
        outputs=(),
        causes=(),
        oracle="",
    )


def limit_cores(count: int) -> None:
    """Keep this process on as many cores, for frameworks that heed no environment variable."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:count])


def main() -> None:
    """Answer requests until `stop` or the end of the input."""
    requests, replies, errors = take_streams()
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        if request.get("do") == "stop":
            break
        try:
            with time_limit(request.get("timeout"), errors):
                reply = worker.answer(request)
        except BaseException as error:  # no Ctrl-C comes here: the process has a session of its own
            from conformance.execute import said, trace_of
            from spec.goldens import GoldenError

            status = "golden error" if isinstance(error, GoldenError) else "error"
            reply = {"status": status, "message": said(error), "trace": trace_of(error)}
            if worker.session is not None:
                worker.session.forget()  # what was left half done must not reach other cases
        give_streams(errors)
        replies.write(json.dumps({"id": request.get("id"), **reply}, default=str) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
