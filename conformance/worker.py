"""The worker process: one backend in one dtype, asked in JSON lines (conformance/README.md)."""

import contextlib
import dataclasses
import faulthandler
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors.numpy import load_file, save_file

PROTOCOL = 1
FRAMEWORKS = ("torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "jaxlib", "flax")
VERSIONS = ("numpy", *FRAMEWORKS, "safetensors")


def take_streams() -> tuple[TextIO, TextIO]:
    """Requests and replies on the real stdin and stdout, which are then closed to the backend.

    Whatever anybody prints, in Python or below it, goes to stderr; who reads finds an end of file.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End the process, with a traceback of every thread on stderr, when the time is over."""
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the backend has loaded."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


class Worker:
    """Answers requests; the backend is imported by the first of them, `hello`."""

    def __init__(self) -> None:
        self.session: Any = None
        self.timer: Any = None
        self.trainer: Any = None
        self.folder = Path()
        self.count = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises ValueError for one that is not known."""
        handlers = {"hello": self.hello, "case": self.case, "time": self.time, "train": self.train}
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
        try:
            backend = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or str(error)
            known = missing != name and not name.startswith(f"{missing}.")
            status = "dependency missing" if known else "no such module"
            return {"status": status, "missing": missing, "message": str(error)}
        lacking = [part for part in ("name", "modes", "open") if not hasattr(backend, part)]
        if lacking:
            return {"status": "no backend", "message": f"{name} has no {', '.join(lacking)}"}
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
            path = self.folder / f"{self.count}.safetensors"
            save_file({key: value.copy(order="C") for key, value in outcome.results.items()}, path)
            reply["file"] = path.name
        return {**reply, "describe": self.session.describe, "versions": versions()}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        """Part of a timing: see conformance/bench.py."""
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
    requests, replies = take_streams()
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        if request.get("do") == "stop":
            break
        try:
            with time_limit(request.get("timeout")):
                reply = worker.answer(request)
        except Exception as error:
            from conformance.execute import trace_of
            from spec.goldens import GoldenError

            status = "golden error" if isinstance(error, GoldenError) else "error"
            reply = {"status": status, "message": f"{type(error).__name__}: {error}"}
            reply["trace"] = trace_of(error)
        replies.write(json.dumps({"id": request.get("id"), **reply}, default=str) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
