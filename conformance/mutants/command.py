"""The command: `python -m conformance mutants [--impl numpy] [--name GLOB] [--auto]`."""

import fnmatch
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from conformance.mutants import auto, report
from conformance.mutants.engine import IMPLS, Mutant, MutantError, load_mutants
from conformance.process import Setup, environment, interpreter
from conformance.reports import write, write_json
from conformance.runner import UsageError, check_dtypes, check_jobs
from conformance.show import Watch, console
from spec.config import load_config
from spec.goldens import GOLDENS, GoldenError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CURATED, AUTOMATIC, PAGE = "mutants.json", "mutants-auto.json", "mutants.md"
Job = dict[str, Any]  # see worker.replies


def choose(impls: list[str], globs: list[str], allowed: tuple[str, ...] = IMPLS) -> list[Mutant]:
    """The mutants of these implementations whose names match. Raises UsageError for none."""
    for impl in impls:
        if impl not in allowed:
            raise UsageError(f"--impl {impl!r} has no mutants; choose of {', '.join(allowed)}")
    every = [mutant for impl in impls for mutant in load_mutants(impl)]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(mutant.name, glob) for mutant in every):
            raise UsageError(
                f"--name {glob!r} matches none of {len(every)} mutants; names look like "
                f"{', '.join(mutant.name for mutant in every[:3])}"
            )
    return [m for m in every if not globs or any(fnmatch.fnmatchcase(m.name, g) for g in globs)]


def is_wrong(row: report.Row, own_column: bool = True) -> bool:
    """Whether a verdict fails the run.

    In a column that the mutants did not choose, survivors count and the rest is information.
    """
    if not own_column:
        return not row["killed"] and not row["pending"]
    return (row["problem"] is None) == bool(row["pending"])


def jobs_of(mutants: list[Mutant], dtype: str | None, parts: int) -> list[Job]:
    """A job for each implementation and column; parts of the slow ones, so that cores share."""
    names: dict[tuple[str, str], list[str]] = {}
    for mutant in mutants:
        names.setdefault((mutant.impl, dtype or mutant.dtype), []).append(mutant.name)
    made = []
    for (impl, column), chosen in names.items():
        count = parts if len(chosen) >= 20 else 1  # each has a run without a fault to do first
        made += [dict(impl=impl, dtype=column, names=chosen[i::count]) for i in range(count)]
    return sorted(made, key=lambda job: job["impl"] not in ("jax", "tf"))  # the longest first


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """The rows that a worker gives for a job. Raises MutantError where it ends otherwise."""
    impl = job["impl"]
    setup = Setup(GOLDENS, "cpu", "eager", 1, 0.0, load_config("tiny"))
    command = [interpreter(f"impl_{impl}", "cpu"), "-m", "conformance.mutants.worker"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(job["dtype"], setup),
            text=True,
            encoding="utf-8",
        )
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.close()
            for line in process.stdout:
                reply = json.loads(line)
                if "row" in reply:
                    yield reply["row"]
                elif reply["end"]:
                    raise MutantError(reply["end"])
                else:
                    return
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        told = errors.read().decode(errors="replace").strip().splitlines()
        raise MutantError(
            f"the worker of impl_{impl} ({command[0]}) ended before it was done"
            f"{': ' if told else ''}{' / '.join(told[-3:])}"
        )


def run_jobs(jobs: list[Job], at_a_time: int, seen: Callable[[str], None]) -> list[report.Row]:
    """The rows of all jobs, so many at a time; seen hears of every row."""

    def run(job: Job) -> list[report.Row]:
        rows = []
        for row in rows_of(job):
            rows.append(row)
            seen(f"{job['impl']} {row.get('name') or row['file']}")
        return rows

    with ThreadPoolExecutor(at_a_time) as pool:
        return [row for rows in pool.map(run, jobs) for row in rows]


def plain(rows: list[report.Row]) -> list[report.Row]:
    """The rows with infinite margins as words, as JSON has no infinity."""
    return [{k: "inf" if v == math.inf else v for k, v in row.items()} for row in rows]


def kept(path: Path) -> list[report.Row]:
    """The rows of an earlier run, so that one page tells of both kinds; none where none is."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return [{**row, "margin": float(row["margin"])} if row.get("margin") else row for row in rows]


@app.command()
def mutants(
    impl: Annotated[
        list[str], typer.Option(help="numpy, torch, tf, jax; default: all that there are.")
    ] = [],  # noqa: B006
    name: Annotated[list[str], typer.Option(help="Only mutants that match this glob.")] = [],  # noqa: B006
    dtype: Annotated[
        str | None, typer.Option(help="Run all in this column, not each in its own.")
    ] = None,
    automatic: Annotated[
        bool, typer.Option("--auto", help="Mutate every operator, number and index instead.")
    ] = False,
    every: Annotated[int, typer.Option(help="With --auto: take each n-th alone.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(help="Mutants at a time; default: 2, or 1 on one core.")
    ] = None,
    reports: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("reports"),
    page: Annotated[Path | None, typer.Option(help="Write the page to this file too.")] = None,
) -> None:
    """Put each fault into a copy of an implementation, and see that the suite catches it there.

    Exit code 1: one survived, or was caught at another clause than the one that it breaks.
    """
    out, watch = console(), Watch(console())
    try:
        at_a_time = check_jobs(jobs)
        if automatic:
            if name or dtype:
                raise UsageError("--auto mutates everything; leave out --name and --dtype")
            if every < 1:
                raise UsageError(f"--every {every} is less than 1; choose 1 or more")
            chosen_impls = impl or list(auto.IMPLS)
            choose(chosen_impls, [], auto.IMPLS)
            work = [
                dict(impl=i, dtype="float64", auto=dict(part=(part, at_a_time), every=every))
                for i in chosen_impls
                for part in range(at_a_time)
            ]
            total = sum(len(auto.mutants_of(i)[::every]) for i in chosen_impls)
        else:
            chosen = choose(impl or list(IMPLS), name)
            check_dtypes([dtype] if dtype else [])
            work, total = jobs_of(chosen, dtype, at_a_time), len(chosen)
        with watch.steps("mutants") as seen:
            done = 0

            def follow(text: str) -> None:
                nonlocal done
                done += 1
                if out.is_terminal or done % 50 == 0:
                    seen(f"{done} of {total}: {text}" if out.is_terminal else f"{done} of {total}")

            seen(f"{total} to do")
            rows = run_jobs(work, at_a_time, follow)
    except (UsageError, GoldenError, MutantError) as error:
        Watch(console(stderr=True)).say(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error
    write_json(reports / (AUTOMATIC if automatic else CURATED), {"mutants": plain(rows)})
    both = [kept(reports / CURATED), kept(reports / AUTOMATIC)]
    paths = [path for path in (reports / PAGE, page) if path]
    for path in paths:
        write(path, report.page(*both).encode())
    failed = _tell_auto(watch, rows) if automatic else _tell(watch, out, rows, dtype is None)
    watch.say(f"reports: {', '.join(map(str, paths))}")
    raise typer.Exit(1 if failed else 0)


def _tell(watch: Watch, out: Any, rows: list[report.Row], own: bool) -> bool:
    out.print(report.table(rows))
    for row in rows:
        if row["pending"] or (row["problem"] and (own or not row["killed"])):
            why = f" (pending: {row['pending']})" if row["pending"] else ""
            watch.say(f"{row['impl']}: {row['name']}: {row['problem']}{why}")
    for key, value in report.figures(rows).items():
        text = report.margin(value) if key.endswith("margin") else value
        watch.say(f"{key.replace('_', ' ')}: {text}")
    near = [f"{r['impl']} {r['name']} {report.margin(r['margin'])}" for r in report.narrowest(rows)]
    watch.say(f"smallest margins: {', '.join(near) or 'none'}")
    return any(is_wrong(row, own) for row in rows)


def _tell_auto(watch: Watch, rows: list[report.Row]) -> bool:
    for row in rows:
        if row["by"] is None:
            where = f"impl_{row['impl']}/{row['file']}:{row['line']} {row['function']}"
            why = f"equivalent: {row['reason']}" if row["reason"] else "SURVIVED"
            watch.say(f"{where}: {row['old']} -> {row['new']}: {why}")
    found = report.auto_figures(rows)
    watch.say(", ".join(f"{key}: {value}" for key, value in found.items()))
    return bool(found["unexplained"])
