"""Chooses cases, runs them on backends, judges the results."""

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import math
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from safetensors.numpy import load

from conformance import diagnose
from conformance.compare import Finding, compare_case, hidden
from conformance.execute import Outcome, Session
from conformance.process import CannotStart, Impl, Setup, WorkerDied, WorkerProcess, case_request
from spec.backend import ARRAY_DTYPES, REQUIRED_DTYPES
from spec.goldens import Case, GoldenError, Goldens

RESULTS = 64 * 2**20  # bytes that a file of results may have beside four times those asked for
RUN_TIME = 3  # times as long as another case may take: a training run is a hundred steps


class UsageError(ValueError):
    """A request that cannot be carried out; the message names the value, the limit, the remedy."""


@dataclasses.dataclass
class Result:
    """The verdict on one case of one backend in one dtype."""

    backend: str
    dtype: str
    case: Case
    status: str  # passed, failed, fault, error, not implemented, crashed, timed out
    seconds: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)
    message: str = ""  # for every status but passed
    trace: str = ""
    clues: list[str] = dataclasses.field(default_factory=list)
    block: str | None = None  # the block that a failure points at

    @property
    def ok(self) -> bool:
        return self.status == "passed"

    def order(self) -> tuple[int, bool, bool]:
        """What failures are sorted by: the level, then those first that say most."""
        return self.case.level, self.block is None, self.case.call != "taps"

    @property
    def worst(self) -> Finding | None:
        """The finding that matters most: of tables and taps the first wrong one, else the worst."""
        first = diagnose.first_wrong(self.case, self.findings)
        return first or max(self.findings, key=lambda finding: finding.ratio, default=None)

    @property
    def causes(self) -> tuple[str, ...]:
        """What usually makes the case fail, most likely first; none unless numbers are wrong."""
        return diagnose.likely(self) if self.status == "failed" else ()

    @property
    def ratio(self) -> float | None:
        """The largest error / tolerance of the case; None where nothing was compared."""
        return max((finding.ratio for finding in self.findings), default=None)


@dataclasses.dataclass
class Column:
    """All verdicts on one backend in one dtype, and what ran there."""

    backend: str
    dtype: str
    selected: list[Case]
    left_out: list[Case] = dataclasses.field(default_factory=list)  # no tolerance for the dtype
    results: list[Result] = dataclasses.field(default_factory=list)
    hello: dict[str, Any] = dataclasses.field(default_factory=dict)
    describe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def failures(self) -> list[Result]:
        """Results that are no pass: by level, those that name a block first, else as they ran."""
        return sorted((r for r in self.results if not r.ok), key=Result.order)

    @property
    def complete(self) -> bool:
        """Whether the checked cases are exactly those selected, at least one, each once."""
        checked = [result.case.id for result in self.results]
        return bool(checked) and checked == [case.id for case in self.selected]

    @property
    def ok(self) -> bool:
        return self.complete and not self.left_out and not self.failures

    def level(self, number: int) -> list[Result]:
        """The results of one level."""
        return [result for result in self.results if result.case.level == number]

    @property
    def reached(self) -> int | None:
        """The highest level up to which every case that was chosen has passed."""
        reached = None
        lacking = {case.level for case in self.left_out}
        for number in sorted({case.level for case in self.selected} | lacking):
            if number in lacking or not all(result.ok for result in self.level(number)):
                break
            reached = number
        return reached


def parse_impl(text: str, python: str) -> Impl:
    """The Impl of `module` or `module=interpreter`. Raises UsageError for an empty half."""
    name, equals, interpreter = text.partition("=")
    if not name or (equals and not interpreter):
        raise UsageError(f"--impl {text!r} is not MODULE or MODULE=PATH/TO/python; give one")
    return Impl(name, interpreter or python)


def check_dtypes(dtypes: Sequence[str]) -> list[str]:
    """The dtypes, each once. Raises UsageError for one that has no column."""
    for dtype in dtypes:
        if dtype not in ARRAY_DTYPES:
            raise UsageError(
                f"--dtype {dtype!r} is unknown; choose one of {', '.join(ARRAY_DTYPES)}"
            )
    return list(dict.fromkeys(dtypes))


def default_dtypes(device: str) -> tuple[list[str], set[str]]:
    """The columns of a device, and those of them that a backend may lack.

    Without a GPU, TF32 does not exist and bfloat16 is slow: both have columns where one is used.
    """
    more = [] if device == "cpu" else [d for d in ARRAY_DTYPES if d not in REQUIRED_DTYPES]
    return [*REQUIRED_DTYPES, *more], set(more)


def check_threads(threads: int | None) -> int:
    """The number of threads, by default all cores. Raises UsageError for more or fewer."""
    cores = available_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise UsageError(f"--threads {threads} is outside 1..{cores}, the cores available here")
    return threads or cores


def check_jobs(jobs: int | None) -> int:
    """The number of columns at a time. Raises UsageError for more than cores, or none."""
    cores = available_cores()
    if jobs is not None and not 1 <= jobs <= cores:
        raise UsageError(f"--jobs {jobs} is outside 1..{cores}, the cores available here")
    return jobs or min(2, cores)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Named(Protocol):
    """What cases are chosen by."""

    @property
    def id(self) -> str: ...

    @property
    def level(self) -> int: ...


C = TypeVar("C", bound=Named)


def select(goldens: Goldens, levels: Sequence[int] = (), globs: Sequence[str] = ()) -> list[Case]:
    """The cases of these levels whose ids match one of the globs too, in the manifest's order.

    Raises UsageError for a level or a glob that matches nothing.
    """
    chosen = matching(goldens.cases, levels, globs)
    if not chosen:
        raise UsageError(f"no case is selected; {goldens.folder / 'manifest.json'} has none")
    return chosen


def matching(cases: Sequence[C], levels: Sequence[int], globs: Sequence[str]) -> list[C]:
    """Those of the cases that `select` chooses. Raises UsageError as it does."""
    known = sorted({case.level for case in cases})
    for level in levels:
        if level not in known:
            text = ", ".join(map(str, known)) or "none"
            raise UsageError(f"--level {level} has no cases; the manifest has levels {text}")
    chosen = [case for case in cases if not levels or case.level in levels]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(case.id, glob) for case in chosen):
            ids = [case.id for case in chosen]
            of_levels = (
                f" of --level {', '.join(map(str, levels))} (a case must match both)" * bool(levels)
            )
            near = difflib.get_close_matches(glob, ids, 3, 0.3) or ids[:3]
            raise UsageError(
                f"--case {glob!r} matches none of {len(ids)} cases"
                f"{of_levels}; ids look like {', '.join(near)}; quote globs such as 'L3/*'"
            )
    if globs:
        chosen = [c for c in chosen if any(fnmatch.fnmatchcase(c.id, glob) for glob in globs)]
    return chosen


def in_column(cases: Sequence[Case], dtype: str) -> list[Case]:
    """The cases that have a tolerance for this dtype.

    Raises GoldenError for a case where only some outputs have one.
    """
    chosen = []
    for case in cases:
        with_limit = [output for output in case.outputs if output.tolerance.get(dtype)]
        if with_limit and len(with_limit) != len(case.outputs):
            without = next(o.name for o in case.outputs if not o.tolerance.get(dtype))
            raise GoldenError(
                f"case {case.id} has a {dtype} tolerance for some outputs and none for {without}; "
                "correct the manifest"
            )
        if with_limit or not case.outputs:  # a case without outputs is refused when compared
            chosen.append(case)
    return chosen


def judge(
    goldens: Goldens, backend: str, dtype: str, case: Case, outcome: Outcome, hide: bool = False
) -> Result:
    """The verdict on what came of a call; hide: without anything that gives a golden away."""
    result = Result(backend, dtype, case, outcome.status, outcome.seconds, trace=outcome.trace)
    result.message = outcome.message
    if outcome.status != "done":
        return result
    expected = functools.partial(goldens.expected, case)
    result.findings = compare_case(case, dtype, outcome.results, expected)
    if hide:
        result.findings = [hidden(finding) for finding in result.findings]
    bad = [finding for finding in result.findings if not finding.ok]
    result.status = "failed" if bad else "passed"
    if bad and result.worst is not None:
        result.message = result.worst.text
        by_row = {
            name: goldens.array(case.inputs[name])
            for name in diagnose.BY_ROW
            if goldens.holds(case.inputs.get(name, ""))
        }
        result.clues = diagnose.clues(
            case, result.findings, outcome.results, expected, hide, by_row
        )
    return result


def finish(column: Sequence[Result]) -> None:
    """Name the blocks that failures point at, once all results of a column are there."""
    for result in column:
        if result.status == "failed":
            result.block, lines = diagnose.blame(result, column)
            result.clues = [*lines, *result.clues]
        elif result.case.call == "run_block" and result.status not in ("passed", "not implemented"):
            result.block = result.case.options["name"]


def finish_all(columns: Sequence[Column]) -> None:
    """Add what only the columns of one backend together tell, once all of them are there."""
    for backend in {column.backend for column in columns}:
        own = [column for column in columns if column.backend == backend]
        diagnose.across({column.dtype: column.results for column in own})


def check(
    backend: Any,
    dtypes: Sequence[str] = ("float64", "float32"),
    cases: Sequence[str | Case] = (),
    *,
    goldens: Goldens | None = None,
    device: str = "cpu",
    mode: str | None = None,
) -> Iterator[Result]:
    """Run cases (all, those of the globs, or those given) on an imported backend, in this process.

    Yields each Result as it comes, so that the caller may stop at the first failure. There is no
    time limit, and a crash of the backend is one of the caller. For float64 in JAX, x64 must be on.
    """
    goldens = goldens or Goldens()
    globs = [case for case in cases if isinstance(case, str)]
    chosen = [case for case in cases if isinstance(case, Case)]
    if globs or not chosen:
        chosen += select(goldens, (), globs)
    for dtype in check_dtypes(dtypes):
        session = Session(backend, goldens, dtype, device, mode)
        for case in in_column(chosen, dtype):
            yield judge(goldens, backend.name, dtype, case, session.attempt(case))


def check_backend(
    backend: Any,
    dtypes: Sequence[str] = ("float64", "float32"),
    cases: Sequence[str | Case] = (),
    *,
    goldens: Goldens | None = None,
    device: str = "cpu",
    mode: str | None = None,
) -> list[Result]:
    """All Results of `check`, with the blocks that failures point at. Raises UsageError for none"""
    results = list(check(backend, dtypes, cases, goldens=goldens, device=device, mode=mode))
    if not results:
        raise UsageError(f"no case has a tolerance for {', '.join(dtypes)}; nothing was checked")
    by_dtype = {dtype: [r for r in results if r.dtype == dtype] for dtype in dtypes}
    for column in by_dtype.values():
        finish(column)
    diagnose.across(by_dtype)
    return results


@dataclasses.dataclass
class Plan:
    """All that a run of the suite over worker processes is asked to do."""

    impls: list[Impl]
    dtypes: list[str]
    goldens: Goldens
    cases: list[Case]
    setup: Setup
    optional: frozenset[str] = frozenset()  # dtypes that a backend may lack
    hide_expected: bool = False  # no element of a golden in what is printed and written


class Suite:
    """The workers of a run, one for each backend and dtype; end them by leaving the `with`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # A child that a backend has left behind may still write there.
        self._folder = tempfile.TemporaryDirectory(
            prefix="conformance-", ignore_cleanup_errors=True
        )
        self.folder = Path(self._folder.name)
        # What a worker is told of the goldens has no expected value in it.
        self._inputs = plan.goldens.inputs()
        self._writing = threading.Lock()
        self._written: dict[str, tuple[int, int]] = {}  # file -> size and time
        self.give_inputs()
        self.setup = dataclasses.replace(plan.setup, goldens=self.folder / "inputs")
        self.workers: dict[tuple[str, str], WorkerProcess] = {}
        self._made = 0
        self.passed: set[tuple[str, str, int, str]] = set()  # backend, dtype, start, case id
        self.stopped = threading.Event()

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End every worker; a column that is running ends with its case."""
        self.stopped.set()
        for worker in self.workers.values():
            worker.close()

    def give_inputs(self) -> None:
        """Write what workers are told of the goldens, anew where a backend has touched it."""
        folder = self.folder / "inputs"

        def seen(name: str) -> tuple[int, int] | None:
            with contextlib.suppress(OSError):
                found = os.lstat(folder / name)
                return found.st_size, found.st_mtime_ns
            return None

        with self._writing:
            for name, data in self._inputs.items():
                if self._written.get(name) is None or seen(name) != self._written[name]:
                    folder.mkdir(parents=True, exist_ok=True)
                    path = folder / f"{name}.new"
                    path.write_bytes(data)
                    os.replace(path, folder / name)
                    self._written[name] = seen(name) or (0, 0)

    def turn_to(self, goldens: Goldens, cases: list[Case]) -> None:
        """Go on with other goldens, in the same workers, which forget what they have opened."""
        self.plan.goldens, self.plan.cases = goldens, cases
        self.passed.clear()
        with self._writing:
            for name in set(self._inputs):
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / "inputs" / name).unlink()
            self._inputs = goldens.inputs()
            self._written.clear()
        self.give_inputs()
        for worker in self.workers.values():
            if worker.runs:
                try:
                    worker.greet()
                except CannotStart:  # it has ended since: the next case finds a new one
                    worker.close()

    def worker(self, impl: Impl, dtype: str) -> WorkerProcess:
        """The worker of this backend and dtype."""
        key = (impl.name, dtype)
        if key not in self.workers:
            folder = self.folder / str(self._made)
            self._made += 1
            self.workers[key] = WorkerProcess(impl, dtype, self.setup, folder)
        return self.workers[key]

    def share_cores(self, jobs: int) -> None:
        """Prepare for so many workers at a time, each with its share of the threads.

        Threads of two workers on the same cores wait for one another by spinning: two columns of
        PyTorch with two threads each, on two cores, are twenty times slower. (XLA heeds no number
        of threads, and does not spin.) Workers that have another share end here, and with them
        what they have passed.
        """
        cores = self.plan.setup.threads
        setup = dataclasses.replace(self.setup, threads=max(1, cores // jobs), cores=cores)
        if setup != self.setup:
            for worker in self.workers.values():
                worker.close()
            self.workers, self.passed, self.setup = {}, set(), setup

    def ask_case(
        self, impl: Impl, dtype: str, case: Case, given: dict[str, np.ndarray] | None = None
    ) -> tuple[Outcome, dict[str, Any]]:
        """What came of one case in its worker, and the worker's reply."""
        worker = self.worker(impl, dtype)
        self.give_inputs()
        path = None
        if given is not None:
            from safetensors.numpy import save_file

            path = self.folder / "given.safetensors"
            save_file({k: np.array(v, order="C") for k, v in given.items()}, path)
        timeout = self.plan.setup.timeout * (RUN_TIME if case.call == "train_run" else 1)
        try:
            reply = worker.ask(case_request(case, path), timeout)
        except WorkerDied as died:
            seconds = timeout if died.status == "timed out" else 0.0
            return Outcome(died.status, {}, seconds, died.message, died.stderr), {}
        fields = {key: reply[key] for key in ("seconds", "message", "trace") if key in reply}
        outcome = Outcome(reply["status"], **fields)
        if outcome.status == "golden error":  # its inputs were touched: all anew for the next case
            self._written.clear()
            said = f"its worker could not read the inputs it was given: {outcome.message}"
            outcome.status, outcome.message = "error", said
        if outcome.status not in ("done", "fault", "error", "not implemented"):
            outcome.status, outcome.message = "error", f"its worker answered {reply['status']!r}"
        if outcome.status == "done":
            try:
                outcome.results = read_results(worker.folder, reply.get("file"), most_bytes(case))
            except Exception as error:  # whatever a stranger's bytes make a parser raise
                outcome.status = "error"
                outcome.message = f"the worker's file of results cannot be read: {error}"
        return outcome, reply

    def run_case(self, impl: Impl, dtype: str, case: Case) -> Result:
        """The verdict on one case."""
        return self._judged(impl, dtype, case)[0]

    def _judged(self, impl: Impl, dtype: str, case: Case) -> tuple[Result, dict[str, Any]]:
        outcome, reply = self.ask_case(impl, dtype, case)
        hide = self.plan.hide_expected
        result = judge(self.plan.goldens, impl.name, dtype, case, outcome, hide)
        if result.ok:
            self.passed.add((impl.name, dtype, self.worker(impl, dtype).starts, case.id))
        return result, reply

    def has_passed(self, impl: Impl, dtype: str, case: Case) -> bool:
        """Whether the case has passed in the very process that this worker is now."""
        return (impl.name, dtype, self.worker(impl, dtype).starts, case.id) in self.passed

    def run_column(
        self, impl: Impl, dtype: str, seen: Callable[[Result], None] = lambda result: None
    ) -> Column:
        """Run every selected case on one backend in one dtype; `seen` hears of each verdict."""
        chosen = in_column(self.plan.cases, dtype)
        left_out = [case for case in self.plan.cases if case not in chosen]
        column = Column(impl.name, dtype, chosen, left_out)
        worker = self.worker(impl, dtype)
        column.hello = worker.start()
        column.versions = column.hello.get("versions", {})
        for case in column.selected:
            if self.stopped.is_set():
                raise RuntimeError(f"{impl.name} {dtype} was stopped before {case.id}")
            result, reply = self._judged(impl, dtype, case)
            column.results.append(result)
            column.describe = reply.get("describe") or column.describe
            column.versions = reply.get("versions") or column.versions
            seen(result)
        finish(column.results)
        return column


def most_bytes(case: Case) -> int:
    """The size in bytes that no file of the case's results needs to have."""
    elements = sum(math.prod(output.shape) for output in case.outputs)
    return RESULTS + 4 * 8 * elements


def read_results(folder: Path, name: Any, limit: int) -> dict[str, np.ndarray]:
    """The tensors of a worker's file of results, which is then removed.

    Raises ValueError or OSError for what is no file of its folder, or larger than the limit. It is
    read, not mapped: whoever wrote it may still cut it.
    """
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"file = {name!r} is no name of a file in its folder")
    path = folder / name
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise ValueError(f"{name} is no file of its own, but a pipe, a device or a link")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{name} is larger than {limit} bytes, which no result of this case needs")
    path.unlink()
    return load(data)


def finite(value: float | None) -> float | str | None:
    """A number for JSON, which has no words of its own for infinity and NaN."""
    return value if value is None or math.isfinite(value) else str(value)
