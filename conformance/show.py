"""Prints a run: progress, the matrix, a panel for each failure, tables of timing and of lines."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from conformance.coach import DONE, LEVELS, WRONG, counted, lessons, next_steps, tasks
from conformance.defaults import notes
from conformance.fresh import Run, again
from conformance.lines import ADDED, CORE, Count
from conformance.reports import (
    Report,
    cell,
    explain,
    printable,
    sample_notes,
    share_text,
    timing_notes,
    timing_rows,
    to_json,
)
from conformance.runner import Column, Result

Following = contextlib.AbstractContextManager[Callable[[Result], None]]
PANELS = 5  # printed for each backend; all are in the reports
LINES_APART = 10  # configs, where the output is no terminal
ABREAST = 8  # columns of the matrix side by side
PLAIN_WIDTH = 132  # columns where the output is no terminal: eight columns of the matrix fit


def console(stderr: bool = False) -> Console:
    """A console that is plain, and wide enough for tables, where the output is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


class Watch:
    """Tells what is going on: a bar on a terminal, a line for each step elsewhere."""

    def __init__(self, out: Console) -> None:
        self.out = out

    @contextlib.contextmanager
    def columns(self) -> Iterator[Callable[[str, int], Following]]:
        """Follows columns that run beside each other: gives what follows one of a name and size."""
        if self.out.is_terminal:
            with self._bar() as bar:
                yield functools.partial(self._barred, bar)
        else:
            yield self._written

    @contextlib.contextmanager
    def _barred(self, bar: Progress, name: str, total: int) -> Iterator[Callable[[Result], None]]:
        task = bar.add_task(name, total=total, now="")
        yield lambda result: bar.update(task, advance=1, now=result.case.id)

    @contextlib.contextmanager
    def _written(self, name: str, total: int) -> Iterator[Callable[[Result], None]]:
        failed = 0

        def seen(result: Result) -> None:
            nonlocal failed
            failed += not result.ok

        self.say(f"{name}: {counted(total, 'case')} ...")
        yield seen
        self.say(f"{name}: {f'{failed} not passed' if failed else 'all passed'}")

    @contextlib.contextmanager
    def runs(self) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
        """Follows training runs beside each other: gives what hears how many steps are done."""
        if self.out.is_terminal:
            with self._bar() as bar:

                def barred(name: str, total: int) -> Callable[[int], None]:
                    task = bar.add_task(name, total=total, now="")
                    return lambda done: bar.update(task, completed=done)

                yield barred
            return

        def written(name: str, total: int) -> Callable[[int], None]:
            self.say(f"{name}: {total} steps ...")
            return lambda done: self.say(f"{name}: done") if done == total else None

        yield written

    @contextlib.contextmanager
    def work(self) -> Iterator[Callable[[str, int, int], None]]:
        """Follows work of several kinds: gives what hears how much of a kind is done, and of how
        much.
        """
        tasks: dict[str, Any] = {}
        if self.out.is_terminal:
            with self._bar() as bar:

                def barred(what: str, done: int, total: int) -> None:
                    if what not in tasks:
                        tasks[what] = bar.add_task(what, total=total, now="")
                    bar.update(tasks[what], completed=done)

                yield barred
            return

        def written(what: str, done: int, total: int) -> None:
            if what not in tasks:
                self.say(f"{what}: {total} to do ...")
                tasks[what] = True
            if done == total:
                self.say(f"{what}: done")

        yield written

    @contextlib.contextmanager
    def configs(self, total: int) -> Iterator[Callable[[int, Run], None]]:
        """Follows a run over random configs, with the time that is left."""
        start, done = time.monotonic(), 0
        if self.out.is_terminal:
            with self._bar(TimeRemainingColumn()) as bar:
                task = bar.add_task("configs", total=total, now="")
                yield lambda number, run: bar.update(task, advance=1, now=failed_in(run))
            return

        def written(number: int, run: Run) -> None:
            nonlocal done
            done += 1
            if done in (1, total) or done % LINES_APART == 0:
                left = (time.monotonic() - start) / done * (total - done) / 60
                self.say(f"{done} of {total} configs, {failed_in(run)}, {left:.0f} min left")

        yield written

    @contextlib.contextmanager
    def steps(self, name: str) -> Iterator[Callable[[str], None]]:
        """Follows work whose steps say what they are."""
        if self.out.is_terminal:
            with self.out.status(name) as status:
                yield lambda text: status.update(Text(f"{name}: {text}"))
            return
        yield lambda text: self.say(f"{name}: {text} ...")

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.out.print(Text(text))

    def _bar(self, *more: ProgressColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            *more,
            TextColumn("{task.fields[now]}", markup=False),
            console=self.out,
            transient=True,
        )


def matrices(report: Report) -> list[Table]:
    """The matrix, in parts where it has more columns than a page is wide."""
    columns = to_json(report)["columns"]
    return [matrix(columns[i : i + ABREAST]) for i in range(0, len(columns), ABREAST)]


def matrix(columns: Sequence[dict[str, Any]]) -> Table:
    """Rows are levels, columns backends and dtypes."""
    table = Table()
    table.add_column("level")
    for column in columns:
        table.add_column(Text(f"{column['backend']}\n{column['dtype']}"), justify="right")
    for number in sorted({e["level"] for column in columns for e in column["levels"]}):
        row = [Text(f"L{number}")]
        for column in columns:
            entry = next((e for e in column["levels"] if e["level"] == number), None)
            if entry is None:
                row.append(Text("-"))
            else:
                style = "green" if entry["passed"] == entry["total"] else "bold red"
                row.append(Text(cell(entry), style))
        table.add_row(*row)
    return table


def panel(result: Result) -> Panel:
    """All that is known of one failure."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    lines = [line.partition(": ") for line in explain(result)]
    for i, (label, _, text) in enumerate(lines):
        again = i and lines[i - 1][0] == label
        grid.add_row(Text("" if again else label), Text(printable(text)))
    body: list[Table | Text] = [grid]
    if result.trace:
        tail = "\n".join(result.trace.strip().splitlines()[-12:])
        body.append(Text(printable(f"\n{tail}"), style="dim"))
    title = Text(f"{result.backend} {result.dtype}  {result.case.id}  {result.status}")
    return Panel(Group(*body), title=title, border_style="red", title_align="left")


def lesson(column: Column) -> Group:
    """How far a backend is, method by method, and what to do next."""
    table = Table(title=f"{column.backend} {column.dtype}, method by method", title_justify="left")
    for name in ("level", "method", "clause", "", "points"):
        table.add_column(name, justify="right" if name == "points" else "left")
    level = None
    for task in tasks(column):
        style = {DONE: "green", WRONG: "bold red"}.get(task.state, "yellow")
        table.add_row(
            "" if task.level == level else f"L{task.level} {LEVELS[task.level]}",
            task.method,
            ", ".join(task.clauses),
            Text(task.state, style),
            f"{task.passed}/{task.total}",
        )
        level = task.level
    steps = [
        Text(printable(f"{'next: ' if not i else '      '}{line}"), "bold" if not i else "")
        for i, line in enumerate(next_steps(column))
    ]
    return Group(table, *steps)


def show_report(out: Console, report: Report) -> None:
    """Print everything that a run found, the verdict last."""
    for backend in dict.fromkeys(column.backend for column in report.columns):
        failures = [
            result
            for column in report.columns
            if column.backend == backend
            for result in column.failures
            if result.status != "not implemented"  # the lesson below lists what is to write
        ]
        failures.sort(key=Result.order)
        for result in failures[:PANELS]:
            out.print(panel(result))
        if (more := len(failures) - PANELS) > 0:
            out.print(Text(f"{backend}: {counted(more, 'failure')} more, all in the reports\n"))
    if report.columns:
        out.print(Text("passed/all, and the worst error as a share of its tolerance"))
        if any(result.ratio == math.inf for column in report.columns for result in column.results):
            out.print(
                Text("inf: NaN or infinity, or a name, shape or dtype that is not the golden's")
            )
        for table in matrices(report):
            out.print(table)
    for column in {column.backend: column for column in report.columns}.values():
        out.print(Text(what_ran(column), style="dim"))
    for backend, found in notes(impl.name for impl in report.plan.impls).items():
        matters = ", ".join(default.matter for default in found)
        text = f"{backend} overrides what its framework does by default: {matters}"
        out.print(Text(text, style="dim"))
    for column in report.columns:
        out.print(verdict(column))
    for column in lessons(report.columns):
        out.print(lesson(column))
    if report.timings:
        head, *rows = timing_rows(report.timings)
        table = Table(title="Train step, float32")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)
        for line in timing_notes(report.timings):
            out.print(Text(line))
    if report.timing_problem:
        out.print(Text(f"not timed: {report.timing_problem}", "bold red"))
    if report.samples:
        for line in sample_notes(report.samples):
            out.print(Text(line))
    if report.samples_problem:
        out.print(Text(f"no samples: {report.samples_problem}", "bold red"))
    if report.ok:
        out.print(Text("conformance: passed", "bold green"))
    else:
        out.print(Text("conformance: FAILED", "bold red"))


def what_ran(column: Column) -> str:
    """One line on the framework, mode, device and threads of a backend, as it describes them."""
    said = [
        str(column.describe.get(key, default))
        for key, default in (
            ("framework", "unknown framework"),
            ("mode", column.hello.get("mode")),
            ("device", "unknown device"),
        )
    ]
    threads = column.describe.get("threads", "unknown")
    return printable(f"{column.backend} ran {', '.join(said)}, threads {threads}")


def verdict(column: Column) -> Text:
    """One line on a column: what it passed, and the first clause that differs."""
    name = f"{column.backend} {column.dtype}"
    passed = sum(result.ok for result in column.results)
    if column.ok:
        return Text(f"{name}: all {passed} cases passed", "green")
    if not column.complete:
        return Text(
            f"{name}: {len(column.results)} of {len(column.selected)} selected cases were checked",
            "bold red",
        )
    if not column.failures:
        return Text(
            f"{name}: {passed} cases passed, but {len(column.left_out)} cases have no "
            f"{column.dtype} tolerance in the manifest and were not checked: "
            f"{', '.join(case.id for case in column.left_out[:3])} ... (all in the reports)",
            "bold red",
        )
    first = column.failures[0]
    block = f", block {first.block}" if first.block else ""
    reached = "no level is" if column.reached is None else f"levels up to L{column.reached} are"
    return Text(
        f"{name}: {passed} of {len(column.selected)} cases passed; {reached} reached; "
        f"the first clause that differs: {first.case.clause} ({first.case.id}, {first.status}"
        f"{block})",
        "red",
    )


def failed_in(run: Run) -> str:
    """In how many configs something failed so far, in words."""
    numbers = {made.number for made in run.unmade}
    numbers |= {failure.number for tally in run.tallies for failure in tally.failures}
    return f"{len(numbers)} failed" if numbers else "all passed"


def show_fresh(out: Console, run: Run, reports: Path) -> None:
    """Print what came of random configs: a table, and every config that failed."""
    table = Table(title=f"Random configs {run.first} to {run.first + run.count - 1}")
    for name in ("backend", "dtype", "mode", "configs", "cases", "worst share", "case", "seconds"):
        table.add_column(name, justify="left" if name in ("backend", "dtype", "mode") else "right")
    for tally in run.tallies:
        worst, case = (share_text(tally.worst[0]), tally.worst[1]) if tally.worst else ("-", "-")
        style = "green" if tally.ok else "bold red"
        table.add_row(
            tally.backend,
            tally.dtype,
            tally.mode,
            Text(f"{tally.passed}/{tally.configs}", style),
            str(tally.cases),
            worst,
            Text(printable(case)),
            f"{tally.seconds:.0f}",
        )
    out.print(table)
    for made in run.unmade:
        out.print(
            Text(printable(f"no goldens of config {made.number}: {made.problem}"), "bold red")
        )
    for tally in run.tallies:
        for failure in tally.failures[:PANELS]:
            out.print(panel(failure.result))
            out.print(Text(f"again: {again(tally, failure, reports)}"))
        if (more := len(tally.failures) - PANELS) > 0:
            out.print(Text(f"{tally.backend} {tally.dtype}: {more} configs more, in the report"))


def lines_table(counts: Sequence[Count]) -> Table:
    """Lines of code by file, beside their budgets."""
    table = Table(
        title="Lines of code",
        caption="no blank line, comment or docstring; a slash parts a count from its budget",
    )
    table.add_column("")
    for file in (*CORE, "the four", *ADDED):
        table.add_column(file, justify="right")
    for count in counts:
        row = [Text(count.name)]
        row += [Text(_count(count.files[file])) for file in CORE]
        row.append(_of(count.core, count.budgets["core"]))
        row += [_of(count.files[file], count.budgets[file]) for file in ADDED]
        table.add_row(*row)
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _of(value: int | None, budget: int) -> Text:
    over = value is not None and value > budget
    return Text(f"{_count(value)}/{budget}", "bold red" if over else "")
