"""Guides through an implementation: what is done, what is wrong, what to write next, and points.

A point is a case of the manifest that passed, so a method that is right in one config and wrong in
another earns a part. Clauses, levels and methods only sort the same points differently.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from conformance.runner import Column, Plan, Result, in_column
from spec.backend import Model
from spec.goldens import Case, Goldens, sha256, titles

SCORE_FORMAT = 1
LEVELS = {
    0: "tables",
    1: "single steps",
    2: "blocks",
    3: "network",
    4: "gradients",
    5: "optimiser",
    6: "sampling",
    7: "training",
}
# The method that a case's call needs, where it is not the call itself.
METHODS = {"train_steps": "train_step", "train_run": "train_step"}
# What the suite asks for beside the method: a training state that can be read and set.
ALSO = {"apply_gradients": "state, load_state", "train_step": "state, load_state"}
CAUSES = 4  # of a failure that are named in what to do next
DONE, WRONG, TO_WRITE = "done", "wrong", "to write"


@dataclasses.dataclass
class Task:
    """One method at one level: its cases, and how far they are."""

    level: int
    method: str
    results: list[Result]
    total: int  # those that have no tolerance in this column among them

    @property
    def clauses(self) -> list[str]:
        """The clauses that its cases check, in the order of their numbers."""
        return sorted({result.case.clause for result in self.results}, key=_number)

    @property
    def passed(self) -> int:
        return sum(result.ok for result in self.results)

    @property
    def state(self) -> str:
        """done, wrong, or to write; a method of which a part is written and right is to write."""
        if self.passed == self.total:
            return DONE
        bad = {result.status for result in self.results if not result.ok}
        return TO_WRITE if bad == {"not implemented"} else WRONG

    @property
    def first(self) -> Result | None:
        """The result to look at first, if one is no pass: an error before what is not written."""
        bad = [result for result in self.results if not result.ok]
        bad.sort(key=lambda result: (result.status == "not implemented", result.order()))
        return bad[0] if bad else None


def method_of(case: Case) -> str:
    """The method of the protocol that the case's call needs."""
    return METHODS.get(case.call, case.call)


def tasks(column: Column) -> list[Task]:
    """The methods of a column, level by level, in the order of the protocol."""
    groups: dict[tuple[int, str], Task] = {}
    for case in [*column.selected, *column.left_out]:
        method = method_of(case)
        groups.setdefault((case.level, method), Task(case.level, method, [], 0)).total += 1
    for result in column.results:
        method = method_of(result.case)
        groups[result.case.level, method].results.append(result)
    order = [name for name in vars(Model) if not name.startswith("_")]
    return sorted(groups.values(), key=lambda task: (task.level, order.index(task.method)))


def next_steps(column: Column) -> list[str]:
    """What to do now, a line each: what to mend, or what to write; [] where nothing is left."""
    task = next((task for task in tasks(column) if task.state != DONE), None)
    first = task.first if task else None
    if task is None or first is None:  # all passed, or what is left has no tolerance here
        return []
    asked = task.clauses if first.status == "not implemented" else [first.case.clause]
    clauses = " and ".join(f"{clause} ({titles()[clause]})" for clause in asked)
    if first.status == "not implemented":
        lines = [
            f"write {task.method}, by {clauses} in spec/SPEC.md",
            signature(task.method),
            summary(task.method),
            *([first.message] if first.message else []),
        ]
        also = ALSO.get(task.method)
        return lines + (
            [f"the suite reads and sets the training state too: {also}"] if also else []
        )
    where = "" if column.dtype == "float64" else f" in {column.dtype}"
    lines = [
        f"mend {task.method}: {first.case.id} {first.status}{where}, by {clauses} in spec/SPEC.md"
    ]
    lines += [first.message] if first.message else []
    lines += [f"look at block {first.block}"] if first.block else []
    lines += [f"clue: {clue}" for clue in first.clues[:2]]
    lines += [f"likely cause: {cause}" for cause in first.causes[:CAUSES]]
    if (more := len(first.causes) - CAUSES) > 0:
        page = "conformance.md in the folder of reports"
        lines.append(f"{counted(more, 'cause')} more, less likely: {page}")
    return lines


def counted(number: int, what: str) -> str:
    """ "1 cause", "2 causes"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def lessons(columns: Sequence[Column]) -> list[Column]:
    """For each backend that has not passed, its column that stopped at the lowest level.

    Each level stands on those below, in whatever dtype; of two columns the first.
    """
    found: dict[str, list[Column]] = {}
    for column in columns:
        if not column.ok:
            found.setdefault(column.backend, []).append(column)
    return [min(group, key=_stopped) for group in found.values()]


def _stopped(column: Column) -> int:
    """The first level of a column where something is left to do."""
    return next((task.level for task in tasks(column) if task.state != DONE), max(LEVELS) + 1)


def _number(clause: str) -> int:
    return int(clause.removeprefix("S"))


def signature(method: str) -> str:
    """The call as the protocol has it, without types: "guide(out_null, out_label, ...)"."""
    parameters = list(inspect.signature(getattr(Model, method)).parameters.values())[1:]
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return f"{method}{inspect.Signature(bare)}"


def summary(method: str) -> str:
    """The first line of the protocol's docstring."""
    return (inspect.getdoc(getattr(Model, method)) or "").partition("\n")[0]


def score(columns: Sequence[Column], goldens: Goldens, problem: str = "") -> dict[str, Any]:
    """Points by clause and by level, for a grading script; `problem` says why there are none."""
    manifest = (goldens.folder / "manifest.json").read_bytes()
    return {
        "format": SCORE_FORMAT,
        "manifest_sha256": sha256(manifest),
        "problem": problem,
        "columns": [
            {
                "backend": column.backend,
                "dtype": column.dtype,
                **_points([*column.selected, *column.left_out], column.results),
                "clauses": {
                    clause: {"title": titles()[clause]} | _points(cases, column.results)
                    for clause, cases in _by_clause(column).items()
                },
                "levels": {
                    f"L{level}": {"title": LEVELS[level]} | _points(cases, column.results)
                    for level, cases in _by_level(column).items()
                },
            }
            for column in columns
        ],
    }


def unstarted(plan: Plan) -> list[Column]:
    """Columns without a result, for backends that could not be started."""
    return [
        Column(impl.name, dtype, in_column(plan.cases, dtype))
        for impl in plan.impls
        for dtype in plan.dtypes
    ]


def _points(cases: Sequence[Case], results: Sequence[Result]) -> dict[str, int]:
    """Points, and how many there are to have."""
    chosen = {case.id for case in cases}
    earned = sum(result.ok for result in results if result.case.id in chosen)
    return {"points": earned, "of": len(cases)}


def _by_clause(column: Column) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in [*column.selected, *column.left_out]:
        groups.setdefault(case.clause, []).append(case)
    return dict(sorted(groups.items(), key=lambda item: _number(item[0])))


def _by_level(column: Column) -> dict[int, list[Case]]:
    groups: dict[int, list[Case]] = {}
    for case in [*column.selected, *column.left_out]:
        groups.setdefault(case.level, []).append(case)
    return dict(sorted(groups.items()))
