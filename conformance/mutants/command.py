"""The command: `python -m conformance mutants [--impl numpy] [--name GLOB] [--auto]`."""

import fnmatch
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer

from conformance.mutants import auto, report
from conformance.mutants import rows as keeping
from conformance.mutants.engine import IMPLS, Mutant, MutantError, load_mutants
from conformance.process import ROOT, Setup, environment, interpreter
from conformance.reports import write, write_json
from conformance.runner import UsageError, check_dtypes, check_jobs
from conformance.show import Watch, console
from spec.config import load_config
from spec.goldens import GOLDENS, GoldenError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CURATED, AUTOMATIC, PAGE = "mutants.json", "mutants-auto.json", "mutants.md"
SHARED, MOST = 20, 40  # faults: a job of so many is shared; one has no more, as it is kept whole
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
    """Jobs for each implementation and column; parts of the large ones, so that cores share."""
    names: dict[tuple[str, str], list[str]] = {}
    for mutant in mutants:
        names.setdefault((mutant.impl, dtype or mutant.dtype), []).append(mutant.name)
    made = []
    for (impl, column), chosen in names.items():
        # each has a run without a fault to do at its end, of the cases that caught its own
        count = max(parts if len(chosen) >= SHARED else 1, -(-len(chosen) // MOST))
        bounds = [len(chosen) * i // count for i in range(count + 1)]
        made += [
            dict(impl=impl, dtype=column, names=chosen[first:last])
            for first, last in itertools.pairwise(bounds)
        ]
    return sorted(made, key=lambda job: job["impl"] not in ("jax", "tf"))  # the longest first


def auto_jobs(impls: list[str], every: int, parts: int) -> tuple[list[Job], int]:
    """Jobs of so many parts for each implementation, and of how many mutants in all."""
    jobs = [
        dict(impl=impl, dtype="float64", auto=dict(part=(part, parts), every=every))
        for impl in impls
        for part in range(parts)
    ]
    return jobs, sum(len(auto.mutants_of(impl)[::every]) for impl in impls)


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """The rows that a worker gives for a job. Raises MutantError where it ends otherwise."""
    impl = job["impl"]
    setup = Setup(GOLDENS, "cpu", "eager", 1, 0.0, load_config("tiny"))
    command = [interpreter(f"impl_{impl}", "cpu"), "-m", "conformance.mutants.worker"]
    # a copy would keep what JAX compiles beside itself, and lose it with each mutant
    env = {"JAX_CACHE": str(ROOT / ".jax_cache"), **environment(job["dtype"], setup)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
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


def run_jobs(
    jobs: list[Job],
    at_a_time: int,
    seen: Callable[[str], None],
    keep: Callable[[Job, list[report.Row]], None] | None = None,
) -> list[report.Row]:
    """The rows of all jobs, so many at a time; seen hears of every row, keep of every job."""

    def run(job: Job) -> list[report.Row]:
        rows = []
        for row in rows_of(job):
            rows.append(row)
            seen(f"{job['impl']} {row.get('name') or row['file']}")
        return rows

    with ThreadPoolExecutor(at_a_time) as pool:
        running = {pool.submit(run, job): i for i, job in enumerate(jobs)}
        found: list[list[report.Row]] = [[]] * len(jobs)
        for future in as_completed(running):
            i = running[future]
            found[i] = future.result()
            if keep:
                keep(jobs[i], found[i])
    return [row for rows in found for row in rows]


def kept(path: Path) -> list[report.Row]:
    """The rows of an earlier run, so that one page tells of both kinds; none where none is."""
    if not path.exists():
        return []
    return keeping.revived(json.loads(path.read_text(encoding="utf-8"))["mutants"])


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
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Keep the rows in this file, try only what has none there for the files as they "
            "are, and write the page from all that it holds."
        ),
    ] = None,
    untried: Annotated[
        bool, typer.Option("--untried", help="With --rows: a page that names what lacks a row.")
    ] = False,
) -> None:
    """Put each fault into a copy of an implementation, and see that the suite catches it there.

    Exit code 1: one survived, or was caught at another clause than the one that it breaks.
    """
    out, watch = console(), Watch(console())
    try:
        at_a_time = check_jobs(jobs)
        if rows and (dtype or every != 1):
            raise UsageError("--rows keeps what the page tells; leave out --dtype and --every")
        if untried and not (rows and page):
            raise UsageError(
                "--untried is about the page of a file of rows; give --rows and --page"
            )
        store = keeping.Rows(rows) if rows else None
        if automatic:
            if name or dtype:
                raise UsageError("--auto mutates everything; leave out --name and --dtype")
            if every < 1:
                raise UsageError(f"--every {every} is less than 1; choose 1 or more")
            chosen_impls = impl or list(auto.IMPLS)
            choose(chosen_impls, [], auto.IMPLS)
            if store:
                chosen_impls = [i for i in chosen_impls if not store.fresh_auto(i)]
            work, total = auto_jobs(chosen_impls, every, at_a_time)
        else:
            chosen = choose(impl or list(IMPLS), name)
            check_dtypes([dtype] if dtype else [])
            if store:
                chosen = [mutant for mutant in chosen if not store.settled(mutant)]
            work, total = jobs_of(chosen, dtype, at_a_time), len(chosen)
        with watch.steps("mutants") as seen:
            done = 0

            def follow(text: str) -> None:
                nonlocal done
                done += 1
                if out.is_terminal or done % 50 == 0:
                    seen(f"{done} of {total}: {text}" if out.is_terminal else f"{done} of {total}")

            seen(f"{total} to do")
            if store:
                store.expect(work)
            found = run_jobs(work, at_a_time, follow, store.keep if store else None)
    except (UsageError, GoldenError, MutantError) as error:
        Watch(console(stderr=True)).say(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error
    write_json(reports / (AUTOMATIC if automatic else CURATED), {"mutants": keeping.plain(found)})
    failed = _tell_auto(watch, found) if automatic else _tell(watch, out, found, dtype is None)
    both = [kept(reports / CURATED), kept(reports / AUTOMATIC)]
    lacking: list[Mutant] = []
    earlier = ""
    try:
        if store and page and untried:
            tried, lacking = store.tried()
            fresh = all(store.fresh_auto(i) for i in auto.IMPLS)
            both = [tried, store.automatic_rows() if fresh else []]
            earlier = report.section_of(page)
        elif store and page:
            both = [store.curated_rows(), store.automatic_rows()]
    except keeping.StaleError as error:
        Watch(console(stderr=True)).say(f"error: {error}")
        raise typer.Exit(1) from error
    paths = [path for path in (reports / PAGE, page) if path]
    for path in paths:
        write(path, report.page(both[0], both[1], lacking, earlier).encode())
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
