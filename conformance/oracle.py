"""Fresh goldens of any config: finds an interpreter that has the oracle's packages, and asks it.

What makes goldens needs torch, diffusers and mpmath, which the runner does not; so it works in a
process of its own, `python -m spec.serve`, with whatever interpreter has them.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conformance.process import (
    ROOT,
    THREAD_VARIABLES,
    CannotStart,
    kill,
    read_errors,
)
from conformance.runner import UsageError, matching
from spec.config import Config, ConfigError
from spec.goldens import GoldenError, Goldens

MODULES = ("torch", "diffusers", "mpmath", "numpy", "rich", "safetensors", "sklearn", "typer")
ENVIRONMENTS = ("goldens", "tests", "torch-cpu")  # of nox, that may have them
NEEDED = "requirements/goldens.txt"
Told = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def find_oracle(named: str | None = None) -> str:
    """The interpreter that makes goldens: the named one, the present one, or one of nox's.

    Raises CannotStart, with what to install, where the named one, or every other, lacks a package.
    """
    if named is not None:
        if lacking := lacks(named):
            raise CannotStart(
                f"--oracle {named} lacks {', '.join(lacking)}, with which goldens are made; "
                f"{named} -m pip install -r {NEEDED}, or name another interpreter"
            )
        return named
    places = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    kept = [ROOT / ".nox" / name / places for name in ENVIRONMENTS]
    present = [sys.executable, *(str(path) for path in kept if path.exists())]
    for python in present:
        if not lacks(python):
            return python
    raise CannotStart(
        f"goldens of a config are made with {', '.join(MODULES[:3])}, and {sys.executable} lacks "
        f"{', '.join(lacks(sys.executable))}; {sys.executable} -m pip install -r {NEEDED}, or "
        "`nox -s conformance -- --config ...`, which makes an environment for it, or name an "
        "interpreter that has them: --oracle PATH/TO/python"
    )


def lacks(python: str) -> list[str]:
    """The packages of the oracle that an interpreter lacks. Raises CannotStart where it is none."""
    if python == sys.executable:
        return [name for name in MODULES if importlib.util.find_spec(name) is None]
    look = (
        "import importlib.util, sys; "
        "print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
    )
    try:
        done = subprocess.run(
            [python, "-c", look, *MODULES], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        said = getattr(error, "strerror", None) or "it does not answer"
        raise CannotStart(
            f"interpreter {python} of the oracle cannot be run ({said}); give the path of a Python",
            usage=True,
        ) from error
    if done.returncode:
        raise CannotStart(
            f"interpreter {python} of the oracle does not run Python: {done.stderr.strip()[-400:]}",
            usage=True,
        )
    return done.stdout.split()


class Oracle:
    """The process that makes goldens; it is started when first asked. Leave its `with` to end it"""

    def __init__(self, python: str) -> None:
        self.python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: collections.deque[bytes] = collections.deque()

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, and with it what it was asked for."""
        process, self._process = self._process, None
        if process is not None:
            kill(process)

    def ask(self, request: dict[str, Any], told: Told | None = None) -> dict[str, Any]:
        """The end of the reply to a request of spec/serve.py; `told` hears how far it is.

        Raises ConfigError where the config is refused, GoldenError where the goldens cannot be
        made, CannotStart where the process cannot run.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            reply = json.loads(line)
            if "status" not in reply:
                if told is not None:
                    told(reply["what"], reply["done"], reply["of"])
            elif reply["status"] == "done":
                return reply
            elif reply["status"] == "refused":
                raise ConfigError(reply["message"])
            else:
                raise GoldenError(f"the oracle could not make goldens: {reply['message']}")
        self._process = None
        kill(process)
        self._drain.join(1.0)
        said = b"".join(self._stderr).decode(errors="replace").strip()[-4000:]
        raise CannotStart(
            f"the oracle ({self.python} -m spec.serve) ended with exit code {process.returncode}"
            + (f":\n{said}" if said else "")
        )

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                [self.python, "-m", "spec.serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={
                    **os.environ,
                    **dict.fromkeys(THREAD_VARIABLES, "1"),  # its processes share the cores
                    "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                    "CUDA_VISIBLE_DEVICES": "",
                },
                start_new_session=True,
            )
            self._stderr = collections.deque()
            self._drain = threading.Thread(
                target=read_errors, args=(self._process, self._stderr), daemon=True
            )
            self._drain.start()
        return self._process


@dataclasses.dataclass
class Fresh:
    """Goldens that are yet to be made: of a config, on inputs that the seed draws."""

    config: Config
    seed: int
    folder: Path  # new or empty
    oracle: str | None  # the interpreter; None: one that is found
    processes: int
    told: Told

    def make(self, dtypes: Sequence[str], levels: Sequence[int], globs: Sequence[str]) -> Goldens:
        """Make them, with limits for these dtypes; before, see that levels and globs have cases.

        Raises ConfigError, UsageError, GoldenError, CannotStart.
        """
        request = {
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "brief": False,
        }
        columns = columns_of(dtypes)
        with Oracle(find_oracle(self.oracle)) as oracle:
            plan = oracle.ask({**request, "do": "plan"})
            matching([Announced(*case) for case in plan["cases"]], levels, globs)
            make = {"do": "make", "columns": columns, "processes": self.processes}
            oracle.ask({**request, **make, "out": str(self.folder.absolute())}, self.told)
        return Goldens(self.folder.absolute())


def columns_of(dtypes: Sequence[str]) -> list[str]:
    """The limits that goldens need for these dtypes, beside float64's that all have.

    What is outside the network has float32's in every column but float64's.
    """
    if set(dtypes) <= {"float64"}:
        return []  # the floors of the others are most of the work
    return ["float32", *(dtype for dtype in dtypes if dtype not in ("float64", "float32"))]


class Announced:
    """A case before it is made."""

    def __init__(self, case_id: str, level: int) -> None:
        self.id, self.level = case_id, level


def check_fresh(seed: int | None, keep: Path | None) -> int:
    """The seed, by default 0. Raises UsageError for one outside, or a folder that is not empty."""
    if seed is not None and not 0 <= seed < 2**64:
        raise UsageError(f"--seed {seed} is outside 0..2^64-1; choose one inside")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"--keep-goldens {keep} is there and not empty; name a new folder")
    return seed or 0
