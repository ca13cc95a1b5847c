"""Writes a folder in which somebody starts an implementation of their own."""

import inspect
import keyword
import os
import re
import string
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from conformance.coach import ALSO, LEVELS, method_of
from conformance.process import ROOT
from conformance.reports import write
from conformance.runner import UsageError
from spec.backend import Model
from spec.goldens import Case

TEMPLATES = Path(__file__).parent
LEFT_OUT = ("fit", "synchronize")  # no case calls the one; the other is for timing on a GPU
IGNORED = "__pycache__/\n.nox/\n.venv/\nreports/\nscore.json\n"


def write_starter(folder: Path, name: str | None, cases: Sequence[Case]) -> list[Path]:
    """Write the starter's files; gives their paths.

    name is the module's, by default made from the folder's. Raises UsageError where the folder
    holds something, or the name cannot be a module's.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and not empty; name a new folder")
    name = check_name(re.sub(r"\W+", "_", folder.resolve().name) if name is None else name)
    suite = Path(os.path.relpath(ROOT, folder.resolve()))
    values = {
        "name": name,
        "suite": repr(suite.as_posix()),
        "suite_path": suite.as_posix(),
        "suite_md": (suite / "conformance" / "README.md").as_posix(),
        "spec": (suite / "spec").as_posix(),
        "spec_md": (suite / "spec" / "SPEC.md").as_posix(),
        "levels": levels_table(cases),
    }
    files = {
        f"{name}.py": _filled("module.txt", values) + methods(cases),
        "README.md": _filled("readme.txt", values),
        "noxfile.py": _filled("noxfile.txt", values),
        "requirements.txt": "# What your implementation needs besides NumPy, such as torch.\n",
        ".gitignore": IGNORED,
    }
    for file, text in files.items():
        write(folder / file, text.encode())
    return [folder / file for file in files]


def check_name(name: str) -> str:
    """The name. Raises UsageError where a module of this name is none, or would hide another."""
    if not _is_name(name):
        raise UsageError(
            f"{name!r} is no name of a Python module; give one by --name {_other(name)}"
        )
    if _is_taken(name):
        raise UsageError(
            f"{name!r} is the name of another module; give one by --name {_other(name)}"
        )
    return name


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_taken(name: str) -> bool:
    return name in sys.stdlib_module_names or name in ("noxfile", "nox") or bool(find_spec(name))


def _other(name: str) -> str:
    """A name near to one that cannot be had, which can."""
    stem = re.sub(r"\W+", "_", name)
    tries = ["my_model", f"{stem}_model", f"my_{stem}", *(f"my_model_{n}" for n in range(2, 100))]
    return next((one for one in tries if _is_name(one) and not _is_taken(one)), "another")


def _filled(template: str, values: dict[str, str]) -> str:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


def level_of(cases: Sequence[Case]) -> dict[str, int]:
    """Method -> the first level that asks for it, in the order of the protocol."""
    found: dict[str, int] = {}
    for case in cases:
        method = method_of(case)
        found[method] = min(case.level, found.get(method, case.level))
    for method, others in ALSO.items():
        for other in others.split(", "):
            found.setdefault(other, found.get(method, max(LEVELS)))
    return {name: found[name] for name in _protocol() if name in found}


def _protocol() -> list[str]:
    names = [name for name, value in vars(Model).items() if inspect.isfunction(value)]
    return [name for name in names if not name.startswith("_") and name not in LEFT_OUT]


def methods(cases: Sequence[Case]) -> str:
    """The methods of the protocol, level by level, with their docstrings, none of them written."""
    levels = level_of(cases)
    order = sorted(levels, key=lambda method: levels[method])  # stable: the protocol's within one
    rest = [name for name in _protocol() if name not in levels]
    text, now = "", None
    for name in [*order, *rest]:
        level = levels.get(name)
        if name == order[0] or level != now:
            heading = "Asked for by no level" if level is None else f"L{level}: {LEVELS[level]}"
            text += f"\n    # {heading}\n"
        source = inspect.getsource(getattr(Model, name)).rstrip()
        body = source.removesuffix("...").rstrip()
        text += f"\n{body}\n        raise NotImplementedError\n"
        now = level
    return text


def levels_table(cases: Sequence[Case]) -> str:
    """Level by level, what is asked for and by which clauses: a table in Markdown."""
    lines = ["| level | what it asks for | clauses | points |", "| --- | --- | --- | --- |"]
    for level in sorted({case.level for case in cases}):
        chosen = [case for case in cases if case.level == level]
        calls = dict.fromkeys(method_of(case) for case in chosen)
        names = [name for name in _protocol() if name in calls]
        clauses = sorted({case.clause for case in chosen}, key=lambda clause: int(clause[1:]))
        texts = [f"L{level} {LEVELS[level]}", ", ".join(f"`{name}`" for name in names)]
        lines.append(f"| {' | '.join([*texts, ', '.join(clauses), str(len(chosen))])} |")
    return "\n".join(lines)
