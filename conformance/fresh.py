"""Random configs: fresh goldens of one after the other, and every backend checked against them.

Config N and its inputs follow from N, so that any of them can be made again. One process makes the
goldens, ahead of the backends; each backend has one process a dtype, which goes from config to
config.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conformance.oracle import Oracle
from conformance.process import Impl
from conformance.reports import suite_version, write, write_json
from conformance.runner import Column, Plan, Result, Suite, UsageError, finish_all, finite
from spec.config import ConfigError
from spec.goldens import GoldenError, Goldens

FORMAT = 1
REPORT = "fresh.json"
MOST = 100_000  # configs of a run
# What a config compiles is used a few times only, and compiling it takes longer than all else. So
# TensorFlow builds no graphs. JAX would compile each operation by itself where it compiles no whole
# functions, and take longer still: it leaves out most of what its compiler does beyond translating.
MODES = {"impl_tf": "eager"}
FEW_PASSES = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
RENEW = 20  # configs of one process: what frameworks keep of each adds up


@dataclasses.dataclass
class Failure:
    """A config that a backend did not pass."""

    number: int
    config: str
    result: Result

    def report(self) -> dict[str, Any]:
        """For JSON."""
        result = self.result
        return {
            "number": self.number,
            "config": self.config,
            "case": result.case.id,
            "clause": result.case.clause,
            "status": result.status,
            "block": result.block,
            "ratio": finite(result.ratio),
            "message": result.message,
        }


@dataclasses.dataclass
class Tally:
    """What one backend did in one dtype, over all configs so far."""

    backend: str
    dtype: str
    mode: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    configs: int = 0
    passed: int = 0
    cases: int = 0
    seconds: float = 0.0  # of the cases' calls, compilation included
    worst: tuple[float, str] | None = None  # error / tolerance, and the case
    worst_by_level: dict[int, tuple[float, str]] = dataclasses.field(default_factory=dict)
    failures: list[Failure] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.configs > 0 and self.passed == self.configs

    def add(self, number: int, column: Column) -> None:
        """Count the verdicts on one config."""
        self.mode = str(column.hello.get("mode"))
        self.versions = column.versions
        self.configs += 1
        self.passed += column.ok
        self.cases += len(column.results)
        for result in column.results:
            self.seconds += result.seconds
            if result.ok and result.ratio is not None:
                found = (result.ratio, result.case.id)
                level = result.case.level
                self.worst_by_level[level] = max(self.worst_by_level.get(level, found), found)
                self.worst = max(self.worst or found, found)
        if not column.ok:
            first = column.failures[0]
            self.failures.append(Failure(number, first.case.config.name, first))

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "mode": self.mode,
            "configs": self.configs,
            "passed": self.passed,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "worst": _share(self.worst),
            "worst_by_level": {
                f"L{level}": _share(found) for level, found in sorted(self.worst_by_level.items())
            },
            "failures": [failure.report() for failure in self.failures],
            "versions": self.versions,
        }


def _share(found: tuple[float, str] | None) -> dict[str, Any] | None:
    return found and {"ratio": float(f"{found[0]:.3g}"), "case": found[1]}


@dataclasses.dataclass
class Made:
    """One random config: its goldens, or why there are none."""

    number: int
    goldens: Goldens | None
    problem: str = ""


class Maker:
    """Makes the goldens of random configs, one ahead of who takes them; keeps those in `keep`."""

    def __init__(self, oracle: Oracle, folder: Path, columns: list[str], keep: bool) -> None:
        self.oracle, self.folder, self.columns, self.keep = oracle, folder, columns, keep

    def made(self, number: int) -> Made:
        """The goldens of one config; those that an earlier run has kept, where they are whole."""
        out = self.folder / str(number)
        request = {"random": number, "seed": number, "brief": True}
        if self.keep and (out / "config.toml").exists():
            goldens = Goldens(out)
            goldens.verify()
            return Made(number, goldens)
        try:
            toml = self.oracle.ask({**request, "do": "plan"})["toml"]
            shutil.rmtree(out, ignore_errors=True)  # of a run that was ended
            half = out.with_name(f"{number}.new")
            shutil.rmtree(half, ignore_errors=True)
            make = {"do": "make", "columns": self.columns, "processes": 0}
            self.oracle.ask({**request, **make, "out": str(half.absolute())})
            write(half / "config.toml", toml.encode())
            os.replace(half, out)
        except (ConfigError, GoldenError) as error:
            return Made(number, None, str(error))
        return Made(number, Goldens(out))

    def all(self, first: int, count: int) -> Generator[Made]:
        """Those of `count` numbers, each made while its forerunner is used."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.made, first)
            for number in range(first, first + count):
                made = ahead.result()
                if number + 1 < first + count:
                    ahead = pool.submit(self.made, number + 1)
                try:
                    yield made
                except GeneratorExit:  # the pool waits for its thread, and it for the process
                    self.oracle.stop()
                    raise
                if not self.keep and made.goldens is not None:
                    shutil.rmtree(made.goldens.folder, ignore_errors=True)


@dataclasses.dataclass
class Run:
    """All that a run over random configs has found."""

    first: int
    count: int
    tallies: list[Tally]
    unmade: list[Made] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.unmade and all(tally.ok for tally in self.tallies)

    def report(self) -> dict[str, Any]:
        """For JSON."""
        tried = len(self.unmade)
        columns = [
            {"first": self.first, "end": self.first + tally.configs + tried, **tally.report()}
            for tally in self.tallies
        ]
        return {
            "format": FORMAT,
            "ok": self.ok,
            "suite": suite_version(),
            "first": self.first,
            "count": self.count,
            "unmade": [{"number": made.number, "problem": made.problem} for made in self.unmade],
            "columns": columns,
        }


def check_numbers(first: int, count: int) -> None:
    """Raise UsageError for numbers of configs that make no sense."""
    if not 1 <= count <= MOST:
        raise UsageError(f"--count {count} is outside 1..{MOST}; choose one inside")
    if not 0 <= first < 2**32:
        raise UsageError(f"--first {first} is outside 0..2^32-1; choose one inside")


def with_modes(impls: list[Impl], mode: str | None) -> list[Impl]:
    """The backends, each with the mode in which it is done soonest, unless one was asked for."""
    return [dataclasses.replace(impl, mode=mode or MODES.get(impl.name)) for impl in impls]


def run_fresh(
    plan_of: Callable[[Goldens], Plan],
    maker: Maker,
    first: int,
    count: int,
    reports: Path,
    jobs: int,
    seen: Callable[[int, Run], None],
) -> Run:
    """Check every backend of the plan on so many configs; `seen` hears of each, and what was found.

    The report is written after each config. Raises CannotStart where a backend cannot be run.
    """
    suite: Suite | None = None
    run = Run(first, count, [])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quick_compilers())
        for made in stack.enter_context(contextlib.closing(maker.all(first, count))):
            if made.goldens is None:
                run.unmade.append(made)
            elif suite is None:
                plan = plan_of(made.goldens)
                suite = stack.enter_context(Suite(plan))
                suite.share_cores(jobs)
                columns = [(impl, dtype) for impl in plan.impls for dtype in plan.dtypes]
                run.tallies = [Tally(impl.name, dtype) for impl, dtype in columns]
            else:
                if run.tallies[0].configs % RENEW == 0:
                    for worker in suite.workers.values():
                        worker.close()
                suite.turn_to(made.goldens, made.goldens.cases)
            if suite is not None and made.goldens is not None:
                _check(suite, made.number, run.tallies, reports, jobs)
            write_json(reports / REPORT, run.report())
            seen(made.number, run)
    return run


@contextlib.contextmanager
def _quick_compilers() -> Iterator[None]:
    """The environment of workers that meet each config once.

    What JAX keeps of compiled functions goes to a folder that is removed: nobody asks again.
    """
    with tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True) as folder:
        wanted = {"JAX_CACHE": folder, **FEW_PASSES}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ |= wanted
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _check(suite: Suite, number: int, tallies: list[Tally], reports: Path, jobs: int) -> None:
    """Run every column on the present goldens, `jobs` at a time, and count what came of it."""
    plan = suite.plan
    columns = [(impl, dtype) for impl in plan.impls for dtype in plan.dtypes]
    with ThreadPoolExecutor(min(jobs, len(columns))) as pool:
        try:
            done = list(pool.map(lambda pair: suite.run_column(*pair), columns))
        except BaseException:
            suite.stop()
            raise
    finish_all(done)
    for tally, column in zip(tallies, done, strict=True):
        tally.add(number, column)
        if not column.ok:  # the config, so that it can be run again by itself
            text = (plan.goldens.folder / "config.toml").read_bytes()
            write(reports / f"{column.failures[0].case.config.name}.toml", text)


def again(tally: Tally, failure: Failure, reports: Path) -> str:
    """The command that checks a failed config again, in full."""
    file = reports / f"{failure.config}.toml"
    return (
        f"python -m conformance run --impl {tally.backend} --dtype {tally.dtype} "
        f"--mode {tally.mode} --config {file} --seed {failure.number}"
    )


def merged(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a file of results holds, with the columns of a report in place of its own of that name.

    Where one goes on with the next config where the other ended, both are kept, as one.

    Raises UsageError where the file is there and cannot be read.
    """
    columns = {(c["backend"], c["dtype"]): c for c in report["columns"]}
    before = []
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["columns"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--results {path} is no file of results; name a new one") from error
    kept = [joined(c, columns.pop((c["backend"], c["dtype"]), c)) for c in before]
    return {"format": FORMAT, "columns": [*kept, *columns.values()]}


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both columns as one where their configs adjoin and the rest is alike; else the other."""
    latest, (one, other) = other, sorted([one, other], key=lambda column: column["first"])
    adjoin = one.get("end") == other["first"]
    if not adjoin or any(one[key] != other[key] for key in ("mode", "versions")):
        return latest

    def worse(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
        return max((share for share in (a, b) if share), key=lambda s: s["ratio"], default=None)

    levels = sorted({*one["worst_by_level"], *other["worst_by_level"]})
    return {
        **one,
        "end": other["end"],
        **{key: one[key] + other[key] for key in ("configs", "passed", "cases", "failures")},
        "seconds": round(one["seconds"] + other["seconds"], 1),
        "worst": worse(one["worst"], other["worst"]),
        "worst_by_level": {
            level: worse(one["worst_by_level"].get(level), other["worst_by_level"].get(level))
            for level in levels
        },
    }


FOREWORD = """# Random configs

Config N and all its inputs follow from the number N: the image's sides, channels, levels, layers,
groups, attention, classes, timesteps, schedule, prediction, variance, clip, and how it is trained.
For each, goldens are made by the two sources that made those in `spec/goldens`, which had to agree
there too, with limits derived in the same way: tables, steps, the network block by block, every
gradient, two train steps, and one trajectory of a kind that N draws.

    python -m conformance fresh --count 200

A config counts as passed where every case did. The worst share is the largest error as a share of
its limit. NumPy and PyTorch run as usual. What a config compiles is used a few times only, so
TensorFlow runs without graphs (`eager`), and JAX compiles whole functions with few of the
compiler's passes; `nox -s conformance` has both in their usual mode.

"""
AFTERWORD = """
What no golden could judge is not drawn, and is refused in a config of one's own, with the reason:
one channel a group, and attention over one pixel, whose gradients are zero but for rounding (S8); a
first beta below 5e-6, from which float64 itself does not build the tables to 1e-10; and an
alphas_cumprod that ends below 1e-10, where it does not take a DDIM step to that (`spec/fresh.py`).
"""


def page(results: dict[str, Any]) -> str:
    """The page of what a file of results holds."""
    lines = [
        "| backend | dtype | mode | configs | passed | cases | worst share | case |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    failures = []
    for column in results["columns"]:
        worst = column["worst"] or {"ratio": "-", "case": "-"}
        first = column["first"]
        cells = [
            column["backend"],
            column["dtype"],
            column["mode"],
            f"{column['configs']}, from {first}",
            column["passed"],
            column["cases"],
            worst["ratio"],
            worst["case"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for failure in column["failures"]:
            failures.append(
                f"- {column['backend']} {column['dtype']}, config {failure['number']}: "
                f"{failure['case']} {failure['status']}, {failure['ratio']} of the limit"
            )
    failed = ["", "Not passed:", "", *failures] if failures else []
    return FOREWORD + "\n".join([*lines, *failed]) + "\n" + AFTERWORD
