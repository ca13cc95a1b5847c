"""The jobs of this repository: `nox -s conformance`, `bench`, `tests`, `lint` and others.

Each backend runs in an environment of its own, so that no two frameworks meet in one process.
Environments stand in .nox/ and are kept until their requirement files change.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nox

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"
REQUIREMENTS = ROOT / "requirements"
ACCELERATORS = ("cpu", "cuda")
STAMP = "made-from.sha256"  # in an environment: the fingerprint of its requirements
BENCH_COMMANDS = ("run", "scaling", "show", "compare")
ORDER = ("numpy", "torch", "tf", "jax")  # in which reports name the backends

nox.needs_version = ">=2024.3.2"
nox.options.default_venv_backend = "none"  # `environment` makes them: one job needs several
nox.options.sessions = ["conformance"]


class Request(NamedTuple):
    """What stands behind `nox -s conformance --`."""

    backends: list[str]
    accelerator: str
    reason: str  # why this accelerator
    passed_on: list[str]  # to `python -m conformance run`


def present_backends(root: Path = ROOT) -> list[str]:
    """The backends that have a folder impl_*, in the order of ORDER, then by name."""
    found = {path.parent.name.removeprefix("impl_") for path in root.glob("impl_*/backend.py")}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def find_accelerator() -> tuple[str, str]:
    """The accelerator of this machine, and how that is known."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu", "nvidia-smi is not on this machine"
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "cpu", f"nvidia-smi does not run: {error}"
    devices = [line for line in done.stdout.splitlines() if line.startswith("GPU")]
    if done.returncode or not devices:
        return "cpu", "nvidia-smi finds no device"
    return "cuda", f"nvidia-smi finds {devices[0].split(' (UUID')[0]}"


def parse(arguments: list[str], present: list[str]) -> Request:
    """Backends first, then options; all but --accelerator go on to the runner.

    Raises ValueError for an unknown backend or accelerator, naming those that are allowed.
    """
    rest, accelerator = list(arguments), None
    names: list[str] = []
    passed_on: list[str] = []
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option == "--accelerator":
            accelerator = value if equals else rest.pop(0) if rest else ""
            if accelerator not in ACCELERATORS:
                raise ValueError(
                    f"--accelerator {accelerator!r} is unknown; choose {' or '.join(ACCELERATORS)}"
                )
        elif option == "--device":
            raise ValueError("--device follows from --accelerator; give that one, cpu or cuda")
        elif argument.startswith("-") or passed_on:
            passed_on.append(argument)
        else:
            names.append(argument)
    if unknown := [name for name in names if name not in present]:
        raise ValueError(
            f"unknown backend {', '.join(map(repr, unknown))}; allowed are {', '.join(present)}, "
            "each a folder impl_NAME; names stand before options"
        )
    backends = [name for name in present if name in names] if names else present
    if accelerator:
        return Request(backends, accelerator, "chosen by --accelerator", passed_on)
    return Request(backends, *find_accelerator(), passed_on)


def requirement_files(path: Path) -> list[Path]:
    """A requirement file and all that it includes with `-r`."""
    files = [path]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            files += requirement_files(path.parent / line.removeprefix("-r ").strip())
    return files


def fingerprint(path: Path) -> str:
    """What an environment is made from: every requirement file, and this Python."""
    text = [sys.version, sys.base_prefix]
    text += [file.read_text(encoding="utf-8") for file in requirement_files(path)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def python_of(name: str) -> Path:
    """The Python of .nox/NAME, there or not."""
    return ENVIRONMENTS / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stands(name: str) -> bool:
    """Whether .nox/NAME is there, and made from what its requirement files say now."""
    stamp = ENVIRONMENTS / name / STAMP
    wanted = fingerprint(REQUIREMENTS / f"{name}.txt")
    there = python_of(name).exists() and stamp.exists()
    return there and stamp.read_text(encoding="utf-8") == wanted


def environment(session: nox.Session, name: str) -> str:
    """The Python of .nox/NAME, which holds requirements/NAME.txt; made where it is not there.

    One whose requirement files have changed is made anew, so that nothing old stays in it.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (nox starts with older ones)
        session.error(
            f"this is Python {sys.version.split()[0]}; Python 3.11 or newer is needed: "
            "make .venv with one, and install nox there"
        )
    folder, requirements = ENVIRONMENTS / name, REQUIREMENTS / f"{name}.txt"
    python, wanted = python_of(name), fingerprint(requirements)
    if stands(name):
        session.log(f"environment .nox/{name}: kept")
        return str(python)
    if folder.exists():
        shutil.rmtree(folder)
    session.log(f"environment .nox/{name}: made from requirements/{name}.txt; this takes a while")
    session.run(sys.executable, "-m", "venv", str(folder), external=True)
    warn_of_large_torch(session, str(python), requirements)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    install = [str(python), "-m", "pip", "install", *quiet, "-r", str(requirements)]
    session.run(*install, external=True)
    (folder / STAMP).write_text(wanted, encoding="utf-8")  # last: half an environment is never kept
    return str(python)


def oracle_environment(session: nox.Session) -> str:
    """The Python that makes fresh goldens: of whichever environment has its packages."""
    return environment(session, "tests" if stands("tests") else "goldens")


def asks(options: list[str], name: str) -> bool:
    """Whether an option is among those that are passed on."""
    return any(option.partition("=")[0] == name for option in options)


def warn_of_large_torch(session: nox.Session, python: str, requirements: Path) -> None:
    """Say, before a CPU environment is made, where pip will fetch the build for CUDA."""
    names = [file.name for file in requirement_files(requirements)]
    if sys.platform != "linux" or "torch-cpu.txt" not in names:
        return
    settings = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    places = [line for line in settings.stdout.splitlines() if not line.endswith("=''")]
    if not any("index-url=" in line or "find-links=" in line for line in places):
        session.warn(
            "pip knows no index besides its own, whose PyTorch for Linux is the build for CUDA: "
            "it runs on a CPU too, but is several GB. For the small one, stop here, set "
            "PIP_EXTRA_INDEX_URL to the index of CPU builds that PyTorch's own installation page "
            "names, and start again"
        )


@nox.session
def conformance(session: nox.Session) -> None:
    """Check every backend against the spec: `-- [numpy torch ...] [--accelerator cpu|cuda] [...]`.

    Options other than --accelerator go on to `python -m conformance run`. For `--config FILE` the
    environment is made too that makes fresh goldens.
    """
    try:
        request = parse(session.posargs, present_backends())
    except ValueError as error:
        session.error(str(error))
    session.log(f"backends: {', '.join(request.backends)}")
    session.log(f"accelerator: {request.accelerator} ({request.reason})")
    runner = environment(session, "base")
    implementations = []
    for name in request.backends:
        # NumPy has one set of requirements: it runs on the CPU beside any accelerator.
        accelerator = "cpu" if name == "numpy" else request.accelerator
        python = environment(session, f"{name}-{accelerator}")
        implementations += ["--impl", f"impl_{name}={python}"]
    # On "auto" a backend takes the GPU where it can use one; NumPy cannot.
    device = ["--device", "auto"] if request.accelerator == "cuda" else []
    oracle = []
    if asks(request.passed_on, "--config") and not asks(request.passed_on, "--oracle"):
        oracle = ["--oracle", oracle_environment(session)]
    command = ["-m", "conformance", "run", *implementations, *device, *oracle, *request.passed_on]
    session.run(runner, *command, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Time the backends: `-- [show|compare FILE ...] [numpy torch ...] [--peers] [...]`.

    `--accelerator cpu|cuda` is as above; the rest goes on to `python -m conformance.bench run`.
    """
    command, arguments = "run", list(session.posargs)
    if arguments and arguments[0] in BENCH_COMMANDS:
        command = arguments.pop(0)
    runner = environment(session, "base")
    if command in ("show", "compare"):
        session.run(runner, "-m", "conformance.bench", command, *arguments, external=True)
        return
    try:
        request = parse(arguments, present_backends())
    except ValueError as error:
        session.error(str(error))
    accelerator = request.accelerator
    session.log(f"accelerator: {accelerator} ({request.reason})")
    implementations = []
    for name in request.backends:
        if name == "numpy" and accelerator == "cuda":
            session.log("numpy is left out: it runs on the CPU; `--accelerator cpu` times it")
            continue
        python = environment(session, f"{name}-{accelerator}")
        implementations += ["--impl", f"impl_{name}={python}"]
    if "--peers" in request.passed_on:
        for path in sorted(REQUIREMENTS.glob(f"peers-*-{accelerator}.txt")):
            environment(session, path.stem)  # the command finds them there
    device = ["--device", accelerator]
    command_line = ["-m", "conformance.bench", command, *implementations, *device]
    session.run(runner, *command_line, *request.passed_on, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the suite itself, the command lines and the pages: `-- [pytest's arguments]`."""
    python = environment(session, "tests")
    session.run(python, "-m", "pytest", "-n", "2", *session.posargs, external=True)


@nox.session
def slow(session: nox.Session) -> None:
    """Try thousands of random configs, shapes and arguments, new ones each time: `-- [pytest's]`.

    `-- --hypothesis-seed=N` draws the same again.
    """
    python = environment(session, "tests")
    command = ["-m", "pytest", "-s", "-v", "tests/test_any_config.py", *session.posargs]
    session.run(python, *command, external=True, env={"ROSETTA_SLOW_TESTS": "1"})


@nox.session
def goldens(session: nox.Session) -> None:
    """Make the goldens anew, in an environment of their own; `-- --check` compares instead."""
    python = environment(session, "goldens")
    session.run(python, "-m", "spec.generate", *session.posargs, external=True)


@nox.session
def mutants(session: nox.Session) -> None:
    """See that the suite catches faults: `-- [--impl NAME] [--name GLOB] [--auto] [...]`.

    All that stands behind `--` goes on to `python -m conformance mutants`.
    """
    for name in present_backends():
        environment(session, f"{name}-cpu")  # each implementation runs in its own
    python = environment(session, "base")
    session.run(python, "-m", "conformance", "mutants", *session.posargs, external=True)


@nox.session
def fresh(session: nox.Session) -> None:
    """Check every backend on random configs and inputs: `-- [--count 200] [--first 0] [...]`.

    All that stands behind `--` goes on to `python -m conformance fresh`.
    """
    for name in present_backends():
        environment(session, f"{name}-cpu")  # each implementation runs in its own
    python, oracle = environment(session, "base"), oracle_environment(session)
    command = ["-m", "conformance", "fresh", "--oracle", oracle, *session.posargs]
    session.run(python, *command, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types: ruff's rules, its format, and mypy."""
    python = environment(session, "lint")
    session.run(python, "-m", "ruff", "check", external=True)
    session.run(python, "-m", "ruff", "format", "--check", external=True)
    session.run(python, "-m", "mypy", external=True)
