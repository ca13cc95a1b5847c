"""The command line: `python -m conformance run`, `lines`, `samples`."""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from conformance import bench, lines, samples, show
from conformance.process import ROOT, CannotStart, Impl, Setup
from conformance.reports import Report, write_all
from conformance.runner import (
    Column,
    Plan,
    Suite,
    UsageError,
    check_dtypes,
    check_jobs,
    check_threads,
    in_column,
    parse_impl,
    select,
)
from spec.backend import MODES
from spec.config import ConfigError, load_config
from spec.goldens import GOLDENS, GoldenError, Goldens

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Checks implementations against the goldens of the spec, and times them.",
)

DEVICES = ("cpu", "cuda", "auto")
Impls = Annotated[
    list[str],
    typer.Option(
        "--impl",
        metavar="MODULE[=PYTHON]",
        help="A backend's module; after =, the interpreter that runs it. Repeat for more.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of every backend; default: all cores.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one case, compilation included.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: what a backend finds.")]
Mode = Annotated[
    str | None, typer.Option(help="eager or compiled; default: the first that a backend has.")
]
Reports = Annotated[Path, typer.Option(help="Folder for the reports.")]
GoldensFolder = Annotated[Path, typer.Option("--goldens", help="Folder of the goldens.")]


def _plan(
    impls: list[str],
    dtypes: list[str],
    device: str,
    mode: str | None,
    levels: list[int],
    globs: list[str],
    threads: int | None,
    timeout: float,
    folder: Path,
) -> Plan:
    """Everything asked for, checked before any work. Raises UsageError or GoldenError."""
    chosen: dict[str, Impl] = {}
    for text in impls:
        impl = parse_impl(text, sys.executable)
        if impl.name in chosen:
            raise UsageError(f"--impl {impl.name} is given twice; give each backend once")
        chosen[impl.name] = impl
    dtypes = check_dtypes(dtypes)
    if device not in DEVICES:
        raise UsageError(f"--device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    if mode is not None and mode not in MODES:
        raise UsageError(f"--mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if not 0 < timeout <= 86400:
        raise UsageError(f"--timeout {timeout:g} is outside (0, 86400] seconds; choose one inside")
    threads = check_threads(threads)
    goldens = Goldens(folder.absolute())
    cases = select(goldens, levels, globs)
    goldens.verify()
    for dtype in dtypes:
        if not in_column(cases, dtype):
            raise UsageError(f"no selected case has a {dtype} tolerance; choose other cases")
    setup = Setup(goldens.folder, device, mode, threads, timeout, cases[0].config)
    return Plan(list(chosen.values()), dtypes, goldens, cases, setup)


def _refuse(error: Exception) -> typer.Exit:
    """Print an error; the exit code is 2 where the command line is at fault, else 1."""
    show.Watch(show.console(stderr=True)).say(f"error: {error}")
    usage = isinstance(error, (UsageError, ConfigError)) or getattr(error, "usage", False)
    return typer.Exit(2 if usage else 1)


@app.command()
def run(
    impl: Impls,
    dtype: Annotated[list[str], typer.Option(help="float64, float32; default: both.")] = [  # noqa: B006
        "float64",
        "float32",
    ],
    device: Device = "cpu",
    mode: Mode = None,
    level: Annotated[list[int], typer.Option(help="Run only this level.")] = [],  # noqa: B006
    case: Annotated[list[str], typer.Option(help="Run only cases that match this glob.")] = [],  # noqa: B006
    timing: Annotated[
        bool | None,
        typer.Option(help="Time the train step; default: unless --level or --case is given."),
    ] = None,
    timing_config: Annotated[list[str], typer.Option(help="Config to be timed.")] = ["digits"],  # noqa: B006
    timing_batch: Annotated[int, typer.Option(help="Images in a timed step.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.")] = 5,
    samples_: Annotated[
        bool | None,
        typer.Option(
            "--samples/--no-samples",
            help="Sample digits in every backend; default: unless --level or --case is given.",
        ),
    ] = None,
    reports: Reports = Path("reports"),
    goldens: GoldensFolder = GOLDENS,
    timeout: Timeout = 300.0,
    threads: Threads = None,
    jobs: Annotated[
        int | None, typer.Option(help="Columns checked at a time; default: 2, or 1 on one core.")
    ] = None,
) -> None:
    """Check backends against the goldens; then time them and sample digits."""
    out = show.console()
    watch = show.Watch(out)
    everything = not level and not case
    with_timing = everything if timing is None else timing
    with_samples = everything if samples_ is None else samples_
    try:
        if not 1 <= timing_batch <= 2**16:
            raise UsageError(f"--timing-batch {timing_batch} is outside 1..65536; choose one")
        if not 1 <= rounds <= 1000:
            raise UsageError(f"--rounds {rounds} is outside 1..1000; choose one inside")
        jobs = check_jobs(jobs)
        configs = bench.timing_configs(timing_config)
        plan = _plan(impl, dtype, device, mode, level, case, threads, timeout, goldens)
        with Suite(plan) as suite:
            report = _run(suite, watch, jobs)
            if with_timing:
                failed = {c.backend: "conformance did not pass" for c in report.columns if not c.ok}
                with watch.steps("timing") as seen:
                    report.timings = bench.run_timing(
                        suite, configs, timing_batch, rounds, failed, seen
                    )
            if with_samples:
                _samples(suite, watch, report, reports)
        paths = write_all(report, reports)
    except (UsageError, ConfigError, GoldenError, CannotStart) as error:
        raise _refuse(error) from error
    show.show_report(out, report)
    watch.say(f"reports: {', '.join(map(str, paths))}")
    raise typer.Exit(0 if report.ok else 1)


def _run(suite: Suite, watch: show.Watch, jobs: int) -> Report:
    """Start every worker, which tells what is missing; then run `jobs` columns at a time."""
    with watch.steps("starting") as seen:
        for impl in suite.plan.impls:
            for dtype in suite.plan.dtypes:
                seen(f"{impl.name} {dtype}")
                suite.worker(impl, dtype).start()
    plan, asked = suite.plan, []
    for impl in plan.impls:
        asked += [(impl, dtype) for dtype in plan.dtypes]
    with watch.columns() as follow, ThreadPoolExecutor(min(jobs, len(asked))) as pool:

        def run_column(impl: Impl, dtype: str) -> Column:
            with follow(f"{impl.name} {dtype}", len(in_column(plan.cases, dtype))) as seen:
                column = suite.run_column(impl, dtype, seen)
            if dtype != bench.DTYPE:
                suite.worker(impl, dtype).close()  # timing and samples need the others only
            return column

        try:
            return Report(plan, list(pool.map(run_column, *zip(*asked, strict=True))))
        except BaseException:
            suite.stop()  # a pool waits for its threads, and they wait for their workers
            raise


def _samples(suite: Suite, watch: show.Watch, report: Report, folder: Path) -> None:
    try:
        with watch.steps("samples") as seen:
            report.samples = samples.make_samples(suite, seen)
        if report.samples.images:
            samples.draw(report.samples, folder / "samples.png")
            watch.say(f"samples: {folder / 'samples.png'}")
    except samples.SamplesError as error:
        report.samples_problem = str(error)


@app.command("samples")
def samples_command(
    impl: Impls,
    device: Device = "cpu",
    mode: Mode = None,
    reports: Reports = Path("reports"),
    goldens: GoldensFolder = GOLDENS,
    timeout: Timeout = 300.0,
    threads: Threads = None,
) -> None:
    """Sample one digit of each class in every backend, and draw and compare them."""
    watch = show.Watch(show.console())
    try:
        plan = _plan(impl, [bench.DTYPE], device, mode, [], [], threads, timeout, goldens)
        plan.setup = Setup(**{**vars(plan.setup), "probe": load_config("digits")})
        with Suite(plan) as suite:
            report = Report(plan, [])
            _samples(suite, watch, report, reports)
    except (UsageError, ConfigError, GoldenError, CannotStart) as error:
        raise _refuse(error) from error
    if report.samples_problem:
        raise _refuse(samples.SamplesError(report.samples_problem))
    assert report.samples is not None
    from conformance.reports import sample_notes

    for line in sample_notes(report.samples):
        watch.say(line)
    raise typer.Exit(0 if report.samples.ok else 1)


@app.command("lines")
def lines_command(
    root: Annotated[Path, typer.Option(help="Folder that holds the implementations.")] = ROOT,
) -> None:
    """Count the lines of code of every implementation, and hold them against their budgets."""
    counts = lines.count_all(root)
    if not counts:
        raise _refuse(UsageError(f"--root {root} holds no impl_*/ folder; give one that does"))
    out = show.console()
    out.print(show.lines_table(counts))
    problems = [problem for count in counts for problem in count.problems]
    for problem in problems:
        out.print(show.Text(problem, "bold red"))
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    # End by an exception, so that workers and temporary files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="python -m conformance")
