"""noxfile.py: what is asked for, what is installed, and that environments are kept."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"


def load_jobs():
    spec = importlib.util.spec_from_file_location("jobs", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["jobs"] = module
    spec.loader.exec_module(module)
    return module


jobs = load_jobs()
PRESENT = ["numpy", "torch"]


def test_all_backends_by_default():
    assert jobs.parse(["--accelerator", "cpu"], PRESENT).backends == PRESENT
    assert jobs.present_backends()[:2] == PRESENT


def test_some_backends_and_the_runners_own_options():
    request = jobs.parse(["torch", "--accelerator=cuda", "--level", "3"], PRESENT)
    assert request == (["torch"], "cuda", "chosen by --accelerator", ["--level", "3"])
    assert jobs.parse(["torch", "numpy"], PRESENT).backends == PRESENT
    assert jobs.parse(["--level", "3", "--accelerator", "cpu"], PRESENT).passed_on == [
        "--level",
        "3",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pytorch"], ["pytorch", "numpy, torch"]),
        (["numpy", "jax"], ["jax", "numpy, torch"]),
        (["--accelerator", "tpu"], ["tpu", "cpu or cuda"]),
        (["--accelerator"], ["cpu or cuda"]),
        (["--accelerator="], ["cpu or cuda"]),
        (["--device", "cuda"], ["--accelerator", "cpu or cuda"]),
    ],
)
def test_unknown_names_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=r"allowed|give|choose") as error:
        jobs.parse(arguments, PRESENT)
    assert all(word in str(error.value) for word in words)


def accelerator_with(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return jobs.find_accelerator()


@pytest.mark.skipif(sys.platform == "win32", reason="the made-up tool is a shell script")
def test_the_accelerator_is_what_nvidia_smi_finds(tmp_path, monkeypatch):
    line = "GPU 0: NVIDIA H200 (UUID: GPU-1234)"
    found = accelerator_with(tmp_path, monkeypatch, f"echo '{line}'")
    assert found == ("cuda", "nvidia-smi finds GPU 0: NVIDIA H200")
    assert accelerator_with(tmp_path, monkeypatch, "exit 9")[0] == "cpu"
    assert accelerator_with(tmp_path, monkeypatch, "echo No devices were found")[0] == "cpu"
    (tmp_path / "nvidia-smi").unlink()
    assert jobs.find_accelerator() == ("cpu", "nvidia-smi is not on this machine")


def test_every_backend_has_its_requirements():
    for name in jobs.ORDER:
        for accelerator in ("cpu",) if name == "numpy" else jobs.ACCELERATORS:
            assert (REQUIREMENTS / f"{name}-{accelerator}.txt").exists()


def test_every_requirement_is_pinned_and_needed_once():
    for path in REQUIREMENTS.glob("*.txt"):
        lines = [
            line
            for file in jobs.requirement_files(path)
            for line in file.read_text("utf-8").splitlines()
        ]
        pins = [line.strip() for line in lines if line.strip() and line[0] not in "#-"]
        assert all(
            re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z0-9-]+\])?==[0-9][^\s]*", pin) for pin in pins
        )
        names = [re.split(r"[\[=]", pin)[0] for pin in pins]
        assert len(names) == len(set(names))


def test_a_changed_requirement_changes_the_fingerprint(tmp_path):
    (tmp_path / "base.txt").write_text("numpy==1\n")
    (tmp_path / "top.txt").write_text("-r base.txt\nrich==1\n")
    before = jobs.fingerprint(tmp_path / "top.txt")
    assert before == jobs.fingerprint(tmp_path / "top.txt")
    (tmp_path / "base.txt").write_text("numpy==2\n")
    assert before != jobs.fingerprint(tmp_path / "top.txt")


class Session:
    """Takes the part of nox's session: notes the commands, makes what `venv` would make."""

    def __init__(self):
        self.commands, self.fail = [], False

    def log(self, text): ...

    warn = log

    def run(self, *command, external):
        self.commands.append(command)
        if self.fail and "pip" in command:
            raise RuntimeError("no network")
        if "venv" in command:
            subprocess.run([*command[:-1], "--without-pip", command[-1]], check=True)


def test_an_environment_is_kept_until_its_requirements_change(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(jobs, "REQUIREMENTS", tmp_path)
    requirements, session = tmp_path / "small.txt", Session()
    requirements.write_text("rich==1\n")
    session.fail = True
    with pytest.raises(RuntimeError):
        jobs.environment(session, "small")
    session.fail = False
    jobs.environment(session, "small")
    assert len(session.commands) == 4, "a failed installation is not kept"
    python = Path(jobs.environment(session, "small"))
    assert len(session.commands) == 4
    assert python.exists()
    left_over = python.parent / "left-over"
    left_over.touch()
    requirements.write_text("rich==2\n")
    jobs.environment(session, "small")
    assert len(session.commands) == 6
    assert not left_over.exists()


def test_the_oracles_environment_is_made_only_where_none_has_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(jobs, "REQUIREMENTS", tmp_path)
    (tmp_path / "goldens.txt").write_text("mpmath==1\n")
    (tmp_path / "tests.txt").write_text("-r goldens.txt\npytest==1\n")
    session = Session()
    assert jobs.oracle_environment(session) == str(jobs.python_of("goldens"))
    count = len(session.commands)
    jobs.environment(session, "tests")
    made = len(session.commands)
    assert made > count
    assert jobs.oracle_environment(session) == str(jobs.python_of("tests"))
    assert len(session.commands) == made


@pytest.mark.parametrize(
    ("arguments", "is_made"),
    [
        (["--config", "mine.toml", "--seed", "3"], True),
        (["numpy", "--config=mine.toml"], True),
        (["--config", "mine.toml", "--oracle", "python3"], False),
        (["--timing-config", "tiny"], False),
    ],
)
def test_a_config_brings_the_oracles_environment(arguments, is_made, monkeypatch):
    session = Session()
    session.posargs = ["--accelerator", "cpu", *arguments]
    made = []
    monkeypatch.setattr(jobs, "environment", lambda session, name: made.append(name) or name)
    monkeypatch.setattr(jobs, "stands", lambda name: False)
    getattr(jobs.conformance, "func", jobs.conformance)(session)
    assert ("goldens" in made) == is_made
    (command,) = session.commands
    oracle = ["--oracle", "goldens"] if is_made else []
    passed_on = [argument for argument in arguments if argument != "numpy"]
    assert list(command[-len(oracle) - len(passed_on) :]) == [*oracle, *passed_on]


@pytest.fixture
def asked(monkeypatch):
    """A session whose environments are names, to see what `nox -s bench` would run."""
    made = []

    def environment(session, name):
        made.append(name)
        return f"python of {name}"

    monkeypatch.setattr(jobs, "environment", environment)
    monkeypatch.setattr(jobs, "present_backends", lambda: ["numpy", "torch"])

    def run(*arguments):
        session = Session()
        session.posargs = list(arguments)
        made.clear()
        jobs.bench(session)
        (command,) = session.commands
        return made.copy(), list(command)

    return run


def test_the_benchmark_runs_each_backend_in_its_own_environment(asked):
    made, command = asked("--accelerator", "cpu", "--rounds", "7")
    assert made == ["base", "numpy-cpu", "torch-cpu"]
    assert command[:4] == ["python of base", "-m", "conformance.bench", "run"]
    assert command[4:] == [
        *("--impl", "impl_numpy=python of numpy-cpu"),
        *("--impl", "impl_torch=python of torch-cpu"),
        *("--device", "cpu", "--rounds", "7"),
    ]
    made, command = asked("--accelerator", "cuda")
    assert made == ["base", "torch-cuda"]
    assert command[4:] == ["--impl", "impl_torch=python of torch-cuda", "--device", "cuda"]
    assert asked("scaling", "torch", "--accelerator", "cpu")[1][3:5] == ["scaling", "--impl"]


def test_peers_are_installed_only_where_they_are_asked_for(asked):
    made, command = asked("torch", "--accelerator", "cpu", "--peers")
    assert made[:2] == ["base", "torch-cpu"]
    assert made[2:] == [path.stem for path in sorted(REQUIREMENTS.glob("peers-*-cpu.txt"))]
    assert command[-1] == "--peers"


def test_files_of_results_need_no_backend(asked):
    made, command = asked("compare", "a.json", "b.json")
    assert made == ["base"]
    assert command[3:] == ["compare", "a.json", "b.json"]
