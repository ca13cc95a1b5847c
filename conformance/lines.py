"""Counts the lines of code of the implementations, and holds them against their budgets."""

import ast
import dataclasses
import io
import tokenize
from pathlib import Path

CORE = ("schedule.py", "diffusion.py", "unet.py", "train.py")
ADDED = ("layers.py", "params.py", "parallel.py", "graph.py")
MAY_LACK = ("parallel.py", "graph.py")  # what only speed needs
BUDGETS = {"core": 300, "layers.py": 60, "params.py": 60, "parallel.py": 40, "graph.py": 40}
NUMPY_BUDGETS = {**BUDGETS, "core": 360, "layers.py": 150}
SILENT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


@dataclasses.dataclass(frozen=True)
class Count:
    """Lines of code of one implementation by file; None for a file that is not there."""

    name: str
    files: dict[str, int | None]
    budgets: dict[str, int]

    @property
    def core(self) -> int:
        """Lines of the four files that the reader compares."""
        return sum(self.files[file] or 0 for file in CORE)

    @property
    def problems(self) -> list[str]:
        """What is over its budget or missing, in words."""
        lines = []
        if self.core > self.budgets["core"]:
            lines.append(
                f"{self.name}: {' + '.join(CORE)} have {self.core} lines of code, allowed are "
                f"{self.budgets['core']}; take something out"
            )
        for file, count in self.files.items():
            if count is None and file not in MAY_LACK:
                lines.append(f"{self.name}: {file} is missing; each implementation has it")
            if count is not None and count > self.budgets.get(file, count):
                lines.append(
                    f"{self.name}: {file} has {count} lines of code, allowed are "
                    f"{self.budgets[file]}; take something out"
                )
        return lines


def count_lines(source: str) -> int:
    """Lines that hold code: no blank line, comment or docstring. Raises SyntaxError."""
    text = source.splitlines()
    docstrings: list[tuple[tuple[int, int], tuple[int, int]]] = []  # first and last position
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                # ast counts columns in bytes, tokenize in characters
                begin = len(text[first.lineno - 1].encode()[: first.col_offset].decode())
                docstrings.append(((first.lineno, begin), (first.end_lineno or 0, 10**6)))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SILENT:
            continue
        inside = token.type == tokenize.STRING and any(
            start <= token.start <= end for start, end in docstrings
        )
        if not inside:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def count_implementation(folder: Path) -> Count:
    """The Count of an implementation's folder. Raises SyntaxError, naming the file."""
    files: dict[str, int | None] = {}
    for file in (*CORE, *ADDED):
        path = folder / file
        files[file] = count_lines(path.read_text(encoding="utf-8")) if path.is_file() else None
    budgets = NUMPY_BUDGETS if folder.name == "impl_numpy" else BUDGETS
    return Count(folder.name, files, budgets)


def count_all(root: Path) -> list[Count]:
    """The Counts of every impl_* package under root, by name."""
    return [count_implementation(path.parent) for path in sorted(root.glob("impl_*/__init__.py"))]
