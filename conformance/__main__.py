"""The command line: `python -m conformance run`, `fresh`, `parity`, `samples`, `new`, and more."""

import errno
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from conformance import bench, coach, fresh, lines, parity, samples, show, starter
from conformance.mutants.command import mutants
from conformance.oracle import Fresh, Oracle, check_fresh, columns_of, find_oracle
from conformance.process import (
    ROOT,
    CannotStart,
    Impl,
    Setup,
    WorkerProcess,
    interpreter,
    shipped,
)
from conformance.reports import Report, write, write_all, write_json
from conformance.runner import (
    Column,
    Plan,
    Suite,
    UsageError,
    check_dtypes,
    check_jobs,
    check_threads,
    default_dtypes,
    finish_all,
    in_column,
    parse_impl,
    select,
)
from spec.backend import MODES
from spec.config import ConfigError, load_config
from spec.goldens import GOLDENS, Case, GoldenError, Goldens

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Checks implementations against the goldens of the spec, and times them.",
)

app.command("mutants")(mutants)

DEVICES = ("cpu", "cuda", "auto")
Impls = Annotated[
    list[str],
    typer.Option(
        "--impl",
        metavar="MODULE[=PYTHON]",
        help="A backend's module; after =, the interpreter that runs it. Repeat for more.",
    ),
]
EveryImpl = Annotated[
    list[str],
    typer.Option(
        "--impl",
        metavar="MODULE[=PYTHON]",
        help="A backend; default: all that stand here, each with the environment nox made it.",
    ),
]
OraclePython = Annotated[
    str | None, typer.Option(metavar="PYTHON", help="The interpreter that makes fresh goldens.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of every backend; default: all cores.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one case, compilation included.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: what a backend finds.")]
Mode = Annotated[
    str | None, typer.Option(help="eager, compiled, parallel, ...; default: a backend's first.")
]
Reports = Annotated[Path, typer.Option(help="Folder for the reports.")]
GoldensFolder = Annotated[Path, typer.Option("--goldens", help="Folder of the goldens.")]


def level_number(text: str | int) -> int:
    """The level of "2" or "L2". Raises typer.BadParameter for what is neither."""
    if not re.fullmatch(r"[Ll]?\d{1,3}", str(text)):
        raise typer.BadParameter(
            f"{text!r} is no level; they are L{min(coach.LEVELS)} to L{max(coach.LEVELS)}: "
            "give one as 2 or L2, and repeat --level for more"
        )
    return int(str(text).lstrip("Ll"))


def _plan(
    impls: list[str],
    dtypes: list[str],
    device: str,
    mode: str | None,
    levels: list[int],
    globs: list[str],
    threads: int | None,
    timeout: float,
    folder: Path | Fresh,
) -> Plan:
    """Everything asked for, checked before any work. Raises UsageError or GoldenError.

    No dtypes: those of the device, of which a backend may lack the optional ones. Fresh goldens are
    made here, when all else is checked.
    """
    dtypes, plan_of = _asked(impls, dtypes, device, mode, threads, timeout)
    if isinstance(folder, Fresh):
        goldens = folder.make(dtypes, levels, globs)
    else:
        goldens = Goldens(folder.absolute())
    cases = select(goldens, levels, globs)
    goldens.verify()
    return plan_of(goldens, cases)


def _asked(
    impls: list[str],
    dtypes: list[str],
    device: str,
    mode: str | None,
    threads: int | None,
    timeout: float,
) -> tuple[list[str], Callable[[Goldens, list[Case]], Plan]]:
    """The dtypes of a plan, and what makes it of goldens and cases. Raises UsageError."""
    asked = bool(dtypes)
    chosen: dict[str, Impl] = {}
    for text in impls:
        impl = parse_impl(text, sys.executable)
        if impl.name in chosen:
            raise UsageError(f"--impl {impl.name} is given twice; give each backend once")
        chosen[impl.name] = impl
    if device not in DEVICES:
        raise UsageError(f"--device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    standard, optional = default_dtypes(device)
    dtypes = check_dtypes(dtypes or standard)
    if mode is not None and mode not in MODES:
        raise UsageError(f"--mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if not 0 < timeout <= 86400:
        raise UsageError(f"--timeout {timeout:g} is outside (0, 86400] seconds; choose one inside")
    cores = check_threads(threads)

    def plan_of(goldens: Goldens, cases: list[Case]) -> Plan:
        columns = dtypes
        if not asked:  # goldens of one's own may have no tolerance for a column that may be lacking
            columns = [d for d in dtypes if d not in optional or in_column(cases, d)]
        for dtype in columns:
            if not in_column(cases, dtype):
                raise UsageError(f"no selected case has a {dtype} tolerance; choose other cases")
        setup = Setup(goldens.folder, device, mode, cores, timeout, cases[0].config)
        lacking = frozenset() if asked else frozenset(optional)
        return Plan(list(chosen.values()), columns, goldens, cases, setup, lacking)

    return dtypes, plan_of


def check_place(option: str, path: Path, is_folder: bool) -> None:
    """Raise UsageError where no file of this name, or in this folder, can be written."""
    folder = path if is_folder else path.parent
    try:
        if not is_folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=there).close()  # a run that is refused leaves no new folder
    except OSError as error:
        raise UsageError(
            f"{option} {path} cannot be written: {error.strerror}; name another place"
        ) from error


def _refuse(error: Exception) -> typer.Exit:
    """Print an error; the exit code is 2 where the command line is at fault, else 1."""
    show.Watch(show.console(stderr=True)).say(show.printable(f"error: {error}"))
    usage = isinstance(error, (UsageError, ConfigError)) or getattr(error, "usage", False)
    return typer.Exit(2 if usage else 1)


@app.command()
def run(
    context: typer.Context,
    impl: Impls,
    dtype: Annotated[
        list[str],
        typer.Option(
            help="float64, float32, tf32 or bf16; default: the first two, and all on a GPU."
        ),
    ] = [],  # noqa: B006
    device: Device = "cpu",
    mode: Mode = None,
    level: Annotated[
        list[int],
        typer.Option(help="Run only this level, 2 or L2; repeat for more.", parser=level_number),
    ] = [],  # noqa: B006
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
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="Check against fresh goldens of this config: a .toml file."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the inputs of fresh goldens; default: 0.")
    ] = None,
    oracle: OraclePython = None,
    keep_goldens: Annotated[
        Path | None, typer.Option(help="Folder, new or empty, that fresh goldens are left in.")
    ] = None,
    timeout: Timeout = 300.0,
    threads: Threads = None,
    jobs: Annotated[
        int | None, typer.Option(help="Columns checked at a time; default: 2, or 1 on one core.")
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(help="JSON file for points by clause and level, for a grading script."),
    ] = None,
    hide_expected: Annotated[
        bool, typer.Option("--hide-expected", help="Print and write no element of a golden.")
    ] = False,
) -> None:
    """Check backends against the goldens; then time them and sample digits.

    With --config, against goldens of that config, which are made first, on inputs that --seed
    draws.
    """
    out = show.console()
    watch = show.Watch(out)
    everything = not level and not case and config is None
    with_timing = everything if timing is None else timing
    with_samples = everything if samples_ is None else samples_
    try:
        if not 1 <= timing_batch <= 2**16:
            raise UsageError(f"--timing-batch {timing_batch} is outside 1..65536; choose one")
        if not 1 <= rounds <= 1000:
            raise UsageError(f"--rounds {rounds} is outside 1..1000; choose one inside")
        jobs = check_jobs(jobs)
        configs = bench.timing_configs(timing_config)
        check_place("--reports", reports, is_folder=True)
        if score:
            check_place("--score", score, is_folder=False)
        only = {"--seed": seed, "--oracle": oracle, "--keep-goldens": keep_goldens}
        if config is None:
            if given := [option for option, value in only.items() if value is not None]:
                raise UsageError(f"{given[0]} is for fresh goldens; give --config too")
            plan = _plan(impl, dtype, device, mode, level, case, threads, timeout, goldens)
        else:
            if goldens != GOLDENS:
                raise UsageError("--goldens and --config exclude each other; leave one out")
            if with_samples:
                raise UsageError("--samples is for the committed goldens; leave it or --config out")
            folder = keep_goldens or Path(context.with_resource(tempfile.TemporaryDirectory()))
            seed = check_fresh(seed, keep_goldens)
            with watch.work() as told:
                making = Fresh(load_config(config), seed, folder, oracle, jobs, told)
                plan = _plan(impl, dtype, device, mode, level, case, threads, timeout, making)
            watch.say(f"goldens of {making.config.name}, seed {seed}: {len(plan.cases)} cases")
        plan.hide_expected = hide_expected
        with Suite(plan) as suite:
            try:
                report = _run(suite, watch, jobs)
            except CannotStart as error:
                if score:
                    write_json(score, coach.score(coach.unstarted(plan), plan.goldens, str(error)))
                raise
            if with_timing:
                failed = {c.backend: "conformance did not pass" for c in report.columns if not c.ok}
                with watch.steps("timing") as seen:
                    report.timings = bench.run_timing(
                        suite, configs, timing_batch, rounds, failed, seen
                    )
            if with_samples:
                _samples(suite, watch, report, reports)
        paths = write_all(report, reports)
        if score:
            write_json(score, coach.score(report.columns, plan.goldens))
            paths.append(score)
    except (UsageError, ConfigError, GoldenError, CannotStart) as error:
        raise _refuse(error) from error
    show.show_report(out, report)
    watch.say(f"reports: {', '.join(map(str, paths))}")
    raise typer.Exit(0 if report.ok else 1)


def _run(suite: Suite, watch: show.Watch, jobs: int) -> Report:
    """Start every worker, which tells what is missing; then run `jobs` columns at a time."""
    plan, asked = suite.plan, []
    suite.share_cores(jobs)
    for impl, dtype, error in _start(suite, watch, jobs):
        if error is None:
            asked.append((impl, dtype))
        elif error.lacks and dtype in plan.optional:
            watch.say(str(error))
        else:
            raise error
    with watch.columns() as follow, ThreadPoolExecutor(min(jobs, len(asked))) as pool:

        def run_column(impl: Impl, dtype: str) -> Column:
            with follow(f"{impl.name} {dtype}", len(in_column(plan.cases, dtype))) as seen:
                column = suite.run_column(impl, dtype, seen)
            if dtype != bench.DTYPE:
                suite.worker(impl, dtype).close()  # timing and samples need the others only
            return column

        try:
            report = Report(plan, list(pool.map(run_column, *zip(*asked, strict=True))))
        except BaseException:
            suite.stop()  # a pool waits for its threads, and they wait for their workers
            raise
    suite.share_cores(1)
    finish_all(report.columns)
    return report


def _start(
    suite: Suite, watch: show.Watch, jobs: int
) -> list[tuple[Impl, str, CannotStart | None]]:
    """Start the workers of all columns, `jobs` at a time; gives what kept one from starting."""
    columns = [(impl, dtype) for impl in suite.plan.impls for dtype in suite.plan.dtypes]
    workers = [suite.worker(impl, dtype) for impl, dtype in columns]

    def start(worker: WorkerProcess) -> CannotStart | None:
        try:
            worker.start()
        except CannotStart as error:
            return error
        return None

    found = []
    with watch.steps("starting") as seen, ThreadPoolExecutor(jobs) as pool:
        try:
            for (impl, dtype), error in zip(columns, pool.map(start, workers), strict=True):
                seen(f"{impl.name} {dtype}")
                found.append((impl, dtype, error))
        except BaseException:
            suite.stop()  # as below
            raise
    return found


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
        check_place("--reports", reports, is_folder=True)
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


@app.command("parity")
def parity_command(
    impl: EveryImpl = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Train steps.")] = 100,
    config: Annotated[str, typer.Option(help="A config's name, or a .toml file.")] = "digits",
    batch_size: Annotated[
        int | None, typer.Option(help="Default: the golden run's, else the config's.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of initial weights and every draw; default: the golden run's, else 0."),
    ] = None,
    dtype: Annotated[
        list[str], typer.Option(help="float64, float32, tf32 or bf16; default: the first two.")
    ] = ["float64", "float32"],  # noqa: B006
    device: Device = "cpu",
    mode: Mode = None,
    reports: Reports = Path("reports"),
    goldens: GoldensFolder = GOLDENS,
    timeout: Timeout = 300.0,
    threads: Threads = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; default: 2, or 1 on one core.")
    ] = None,
) -> None:
    """Train every backend on the same weights, batches and noise; draw and compare the runs."""
    watch = show.Watch(show.console())
    try:
        chosen = load_config(config)
        jobs = check_jobs(jobs)
        check_place("--reports", reports, is_folder=True)
        impls = impl or [f"{name}={interpreter(name, device)}" for name in shipped()]
        plan = _plan(impls, dtype, device, mode, [], [], threads, timeout, goldens)
        if batch_size is None:
            chosen = parity.batch_of_golden(plan.goldens, chosen)
        else:
            chosen = chosen.replace(batch_size=batch_size)
        plan.setup = Setup(**{**vars(plan.setup), "probe": chosen})
        seed = parity.seed_of(plan.goldens, chosen) if seed is None else seed
        parity.check_run(steps, seed)
        with Suite(plan) as suite:
            suite.share_cores(jobs)
            for *_, error in _start(suite, watch, jobs):
                if error is not None:
                    raise error
            with watch.runs() as follow:
                made = parity.make_parity(suite, chosen, steps, seed, jobs, follow)
        paths = parity.write_all(made, reports)
    except (UsageError, ConfigError, GoldenError, CannotStart) as error:
        raise _refuse(error) from error
    for line in made.notes():
        watch.say(line)
    watch.say(f"reports: {', '.join(map(str, paths))}")
    watch.say(f"parity: {'passed' if made.ok else 'FAILED'}")
    raise typer.Exit(0 if made.ok else 1)


@app.command("fresh")
def fresh_command(
    context: typer.Context,
    impl: EveryImpl = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="Random configs.")] = 200,
    first: Annotated[int, typer.Option(help="Number of the first; each is also its seed.")] = 0,
    dtype: Annotated[
        list[str], typer.Option(help="float64, float32, tf32 or bf16; default: the first two.")
    ] = ["float64", "float32"],  # noqa: B006
    device: Device = "cpu",
    mode: Annotated[
        str | None, typer.Option(help="eager or compiled; default: what takes less time in each.")
    ] = None,
    reports: Reports = Path("reports"),
    oracle: OraclePython = None,
    keep_goldens: Annotated[
        Path | None,
        typer.Option(help="Folder that goldens are left in; those that it has are used again."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="JSON file that gets the figures, beside its others."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="File for a page of all that --results holds.")
    ] = None,
    timeout: Timeout = 300.0,
    threads: Threads = None,
    jobs: Annotated[
        int | None, typer.Option(help="Columns checked at a time; default: 2, or 1 on one core.")
    ] = None,
) -> None:
    """Check every backend on random configs and inputs, goldens of which are made on the way."""
    out = show.console()
    watch = show.Watch(out)
    try:
        fresh.check_numbers(first, count)
        jobs = check_jobs(jobs)
        check_place("--reports", reports, is_folder=True)
        if keep_goldens:
            check_place("--keep-goldens", keep_goldens, is_folder=True)
        if page and not results:
            raise UsageError("--page shows what --results holds; give that file too")
        for option, path in (("--results", results), ("--page", page)):
            if path:
                check_place(option, path, is_folder=False)
        if results:
            fresh.merged(results, {"columns": []})
        impls = impl or [f"{name}={interpreter(name, device)}" for name in shipped()]
        dtypes, plan_of = _asked(impls, dtype, device, mode, threads, timeout)

        def plan(goldens: Goldens) -> Plan:
            made = plan_of(goldens, goldens.cases)
            made.impls = fresh.with_modes(made.impls, mode)
            return made

        with Oracle(find_oracle(oracle)) as process, watch.configs(count) as seen:
            folder = keep_goldens or Path(context.with_resource(tempfile.TemporaryDirectory()))
            maker = fresh.Maker(process, folder, columns_of(dtypes), keep_goldens is not None)
            found = fresh.run_fresh(plan, maker, first, count, reports, jobs, seen)
    except (UsageError, ConfigError, GoldenError, CannotStart) as error:
        raise _refuse(error) from error
    show.show_fresh(out, found, reports)
    if results:
        held = fresh.merged(results, found.report())
        write_json(results, held)
        if page:
            write(page, fresh.page(held).encode())
    watch.say(f"reports: {reports / fresh.REPORT}")
    watch.say(f"fresh: {'passed' if found.ok else 'FAILED'}")
    raise typer.Exit(0 if found.ok else 1)


@app.command("new")
def new_command(
    folder: Annotated[Path, typer.Argument(help="A folder that is new, or empty.")],
    name: Annotated[
        str | None, typer.Option(help="Of the module; default: made from the folder's name.")
    ] = None,
    goldens: GoldensFolder = GOLDENS,
) -> None:
    """Write a starter for an implementation of your own: the protocol, to be filled in."""
    watch = show.Watch(show.console())
    try:
        paths = starter.write_starter(folder, name, Goldens(goldens).cases)
    except (UsageError, GoldenError) as error:
        raise _refuse(error) from error
    watch.say(f"wrote {', '.join(map(str, paths))}")
    watch.say(f"begin with {folder / 'README.md'}")


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
