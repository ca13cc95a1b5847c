"""A process for each backend and mode: checked, timed in randomised rounds, checked again."""

import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from conformance.bench.gate import AFTER, BEFORE, PARTS, FoundStep, Reference, Verdict
from conformance.bench.subject import starting_params
from conformance.bench.workloads import Workload
from conformance.process import CannotStart, Impl, Setup, WorkerDied, WorkerProcess
from spec.config import load_config
from spec.goldens import GOLDENS

WARM_CALLS = 2  # after the first, untimed: some frameworks compile a second time
PROCESSES = 5  # fresh ones with --thorough
JUDGED_AT_ONCE = 4  # states of the check after the rounds: each takes several copies of the weights
# The modes that are timed unless others are asked for; of every other backend the first that it
# names. Of PyTorch's two on a CPU, the processor decides which is faster.
USUAL = {
    "cpu": {
        "impl_jax": ("parallel",),
        "impl_tf": ("parallel",),
        "impl_numpy": ("parallel",),
        "impl_torch": ("parallel", "eager"),
    },
    "cuda": {
        "impl_jax": ("compiled",),
        "impl_tf": ("compiled",),
        "impl_torch": ("graph", "compiled"),
    },
}
PEER_MODES = {"cpu": 2, "cuda": 3}  # as it comes, and tuned; on a GPU compiled too
SLOW = {("impl_tf", "eager"), ("impl_jax", "eager")}  # not in `--mode all`: minutes a step


@dataclasses.dataclass(frozen=True)
class Contender:
    """What takes its turn in every round."""

    impl: Impl
    mode: str
    dtype: str
    peer: bool = False  # a library that this repository is compared with
    as_it_comes: bool = False  # in the mode in which its users have it: see peers/__init__.py

    @property
    def text(self) -> str:
        """Its name in tables and messages."""
        return f"{short(self.impl.name)} {self.mode} {self.dtype}"


def short(module: str) -> str:
    """A backend's name in tables."""
    return module.rpartition(".")[2].removeprefix("impl_")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run of the benchmark is asked to do."""

    workloads: list[Workload]
    device: str
    threads: int
    rounds: int
    seconds: float  # of samples, for each contender in each round
    processes: int  # of each contender, one after the other
    seed: int  # of the order of turns
    timeout: float
    at_once: int = 1  # processes that start, compile and are checked beside each other

    def setup(self, mode: str | None, as_it_comes: bool = False) -> Setup:
        """What its workers have in common; a small config shows whether the device is there."""
        return Setup(
            GOLDENS,
            self.device,
            mode,
            self.threads,
            self.timeout,
            probe=load_config("tiny"),
            as_it_comes=as_it_comes,
        )


@dataclasses.dataclass
class Run:
    """One contender on one workload."""

    workload: Workload
    contender: Contender
    status: str = "ok"  # or what schema.json lists
    message: str = ""
    starts: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    rounds: list[list[float]] = dataclasses.field(default_factory=list)  # seconds of each call
    processes: list[int] = dataclasses.field(default_factory=list)  # of each round
    before: Verdict | None = None
    after: Verdict | None = None
    peak_memory: int | None = None
    memory_of: str = "host"
    describe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def fail(self, status: str, message: str) -> None:
        """Say why there is no figure; the first reason stays."""
        if self.ok:
            self.status, self.message = status, message


Seen = Callable[[str, float | None], None]  # what is done now, and the seconds left


class Clock:
    """Guesses the seconds left: what is to be done takes as long as what was like it."""

    def __init__(self, plan: Plan, sizes: dict[str, float], contenders: int) -> None:
        self.sizes = sizes  # by workload, in any unit
        self.left: dict[tuple[str, str], int] = {}
        self.spent: dict[tuple[str, str], list[float]] = {}
        for workload in plan.workloads:
            for what, times in (("check", 1), ("round", plan.rounds), ("after", 1)):
                self.left[workload.key, what] = contenders * plan.processes * times

    @contextlib.contextmanager
    def doing(self, key: str, what: str) -> Iterator[None]:
        """Measure one thing of this kind."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent.setdefault((key, what), []).append(time.monotonic() - start)
            self.left[key, what] = max(0, self.left.get((key, what), 0) - 1)

    def drop(self, key: str, rounds: int) -> None:
        """Count no longer on a contender that is out."""
        for what, times in (("round", rounds), ("after", 1)):
            self.left[key, what] = max(0, self.left[key, what] - times)

    def seconds_left(self) -> float | None:
        """The seconds left; None while nothing is known."""
        total = 0.0
        for (key, what), count in self.left.items():
            each = self._each(key, what)
            if count and each is None:
                return None
            total += count * (each or 0.0)
        return total

    def _each(self, key: str, what: str) -> float | None:
        if spent := self.spent.get((key, what)):
            return float(np.mean(spent))
        like = [(k, w) for k, w in self.spent if w == what] or [(k, w) for k, w in self.spent]
        if not like:
            return None
        known, kind = like[-1]
        # much of it does not grow with the size: starting, compiling, the seconds of a round
        growth = (self.sizes.get(key, 1.0) / self.sizes.get(known, 1.0)) ** 0.5
        return float(np.mean(self.spent[known, kind])) * growth


def side_by_side(function: Callable[[Any], Any], items: Sequence[Any], count: int) -> list[Any]:
    """function(item) of every item, `count` at a time; Ctrl-C waits for none that has begun."""
    if count == 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(count)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def find_contenders(
    impls: Sequence[Impl],
    peers: Sequence[Impl],
    modes: Sequence[str],
    dtypes: Sequence[str],
    plan: Plan,
    seen: Seen,
) -> tuple[list[Contender], list[tuple[Contender, str]]]:
    """What takes part, after each backend was asked for its modes; and what cannot, with why.

    Raises CannotStart with `usage` where no backend has a mode that was asked for.
    """
    found: list[Contender] = []
    lacking: list[tuple[Contender, str]] = []
    known: dict[str, tuple[str, ...]] = {}

    def ask(impl: Impl) -> tuple[str, ...] | str:
        """Its modes, or in words why it has none; with the first precision, for all."""
        seen(f"asking {short(impl.name)} for its modes", None)
        worker = WorkerProcess(impl, dtypes[0], plan.setup(None), Path(folder))
        try:
            return tuple(worker.start().get("modes", ()))
        except CannotStart as error:
            return str(error)
        finally:
            worker.close()

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        answers = side_by_side(ask, [*impls, *peers], plan.at_once)
    for impl, answer in zip([*impls, *peers], answers, strict=True):
        peer = impl in peers
        if isinstance(answer, str):
            lacking += [(Contender(impl, "", dtype, peer), answer) for dtype in dtypes]
            continue
        known[impl.name] = answer
        chosen = choose_modes(impl.name, answer, modes, plan.device, peer)
        found += [
            Contender(impl, mode, dtype, peer, peer and mode == answer[0])
            for dtype in dtypes
            for mode in chosen
        ]
    had = {mode for names in known.values() for mode in names}
    for mode in modes:
        if known and mode != "all" and mode not in had:
            raise CannotStart(
                f"--mode {mode!r} is none of any backend here; they have {', '.join(sorted(had))}",
                usage=True,
            )
    return found, lacking


def choose_modes(
    module: str, has: Sequence[str], asked: Sequence[str], device: str, peer: bool = False
) -> list[str]:
    """The modes of a backend that are timed, of those that it has."""
    if "all" in asked:
        return [mode for mode in has if (module, mode) not in SLOW or mode in asked]
    if asked:
        return [mode for mode in has if mode in asked]
    if peer:
        return list(has[: PEER_MODES[device]])
    usual = USUAL[device].get(module, ())
    return [mode for mode in usual if mode in has] or [has[0]]


class Bench:
    """Runs a plan; `runs` fills as it goes on, and holds what is done when it is interrupted."""

    def __init__(
        self,
        plan: Plan,
        contenders: Sequence[Contender],
        sizes: dict[str, float],
        seen: Seen,
        finished: Callable[["Bench"], None] = lambda bench: None,
    ) -> None:
        self.plan, self.contenders, self.say = plan, list(contenders), seen
        self.finished = finished  # hears of each workload that is done
        self.clock = Clock(plan, sizes, len(contenders))
        self.runs: list[Run] = []
        self.complete = False
        self._order = random.Random(plan.seed)
        self._turns: list[Turn] = []
        self._pool = ThreadPoolExecutor()

    def seen(self, text: str) -> None:
        self.say(text, self.clock.seconds_left())

    def run(self) -> None:
        """Do everything; KeyboardInterrupt ends it, and what is finished is kept."""
        try:
            for workload in self.plan.workloads:
                self._workload(workload)
                self.finished(self)
            self.complete = True
        except KeyboardInterrupt:
            for run in self.runs:
                if run.after is None:
                    run.fail("incomplete", "stopped before its check after the rounds")
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _workload(self, workload: Workload) -> None:
        runs = [Run(workload, contender) for contender in self.contenders]
        self.runs += runs
        answers = Reference(workload, starting_params(workload), self._pool)
        for process in range(self.plan.processes):
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                try:
                    self._process(workload, runs, process, answers, Path(folder))
                finally:
                    for turn in self._turns:
                        turn.worker.close()

    def _process(
        self, workload: Workload, runs: list[Run], process: int, answers: Reference, folder: Path
    ) -> None:
        plan, count = self.plan, self.plan.processes
        name = workload.key if count == 1 else f"{workload.key}, process {process + 1} of {count}"
        self._turns = [
            Turn(run, plan, folder / str(i), answers) for i, run in enumerate(runs) if run.ok
        ]

        def begin(turn: Turn) -> None:
            self.seen(f"{name}: checking {turn.run.contender.text}")
            with self.clock.doing(workload.key, "check"):
                turn.begin()
            if not turn.run.ok:
                self.clock.drop(workload.key, plan.rounds)

        side_by_side(begin, self._turns, plan.at_once)
        for number in range(plan.rounds):
            if not any(run.ok for run in runs):
                break
            self._order.shuffle(self._turns)
            self.seen(f"{name}: round {number + 1} of {plan.rounds}")
            last = number == plan.rounds - 1  # the check that follows needs more
            needed = None if last else most_needed([run for run in runs if run.ok])
            for turn in self._turns:
                if turn.run.ok:
                    with self.clock.doing(workload.key, "round"):
                        turn.round(process, needed)
        self._turns.sort(key=lambda turn: runs.index(turn.run))
        with ThreadPoolExecutor(JUDGED_AT_ONCE) as judges:
            jobs = []
            for turn in self._turns:
                if turn.run.ok:
                    self.seen(f"{name}: checking {turn.run.contender.text} again")
                    with self.clock.doing(workload.key, "after"):
                        found = turn.ask({"part": "check", "when": "after"})
                        if found:
                            jobs.append(judges.submit(turn.judge, found, "after"))
                turn.worker.close()
            for job in jobs:
                job.result()


class Turn:
    """One process of a contender on a workload."""

    def __init__(self, run: Run, plan: Plan, folder: Path, answers: Reference) -> None:
        self.run, self.plan, self.folder, self.answers = run, plan, folder, answers
        contender = run.contender
        setup = plan.setup(contender.mode, contender.as_it_comes)
        self.worker = WorkerProcess(contender.impl, contender.dtype, setup, folder)
        self.process = 0

    def begin(self) -> None:
        """Start the process, open the model, check its first call, let it get warm."""
        run = self.run
        start: dict[str, float | None] = dict.fromkeys(("import", "build", "first", "copy"))
        try:
            hello = self.worker.start()
        except CannotStart as error:
            run.fail("cannot start", str(error))
            return
        self.process = self.worker.starts
        start["import"] = hello.get("seconds")
        workload = dataclasses.asdict(run.workload)
        workload["checkpoint"] = str(run.workload.checkpoint or "") or None
        opened = self.ask({"part": "open", "workload": workload})
        start["build"] = opened.get("seconds")
        found = self.ask({"part": "check", "when": "before"})
        if not run.ok:
            return
        start["first"] = found["first"]
        run.describe = found.get("describe") or run.describe
        run.versions = hello.get("versions", {})
        self.judge(found, "before")
        self.ask({"part": "warm", "calls": WARM_CALLS})
        copies = self.ask({"part": "copy"}).get("samples", [])
        start["copy"] = float(np.median(copies)) if copies else None
        if self.plan.at_once > 1:  # what these took beside others says nothing
            start = dict.fromkeys(start)
        if run.ok:
            run.starts.append(start)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request; a failure becomes the run's."""
        if not self.run.ok:
            return {}
        try:
            reply = self.worker.ask({"do": "bench", **request}, self.plan.timeout)
        except WorkerDied as died:
            self.run.fail(died.status, f"{died}\n{died.stderr}".strip())
            return {}
        if self.worker.starts != self.process:
            self.run.fail("error", "the worker was started anew between its check and its timing")
            return {}
        if reply["status"] != "done":
            message = reply.get("message", reply["status"])
            lacks = message.startswith(NotImplementedError.__name__)
            self.run.fail("not implemented" if lacks else "error", message)
            return {}
        return reply

    def round(self, process: int, needed: int | None) -> None:
        """One round of samples; then so many bytes are to be free, or half of all where None."""
        reply = self.ask({"part": "round", "seconds": self.plan.seconds, "needed": needed})
        if reply:
            run = self.run
            run.rounds.append([float(seconds) for seconds in reply["samples"]])
            run.processes.append(process)
            run.memory_of = reply.get("memory_of", "host")
            if reply["peak_memory"] is not None:
                run.peak_memory = max(run.peak_memory or 0, reply["peak_memory"])

    def judge(self, found: dict[str, Any], when: str) -> None:
        """Hold what a check has written against the reference."""
        verdict = self._verdict(found, when)
        before, after = (
            (verdict, self.run.after) if when == "before" else (self.run.before, verdict)
        )
        self.run.before, self.run.after = before, after
        if not verdict.passed:
            self.run.fail("failed check", f"{when} the rounds: {verdict.message}")

    def _verdict(self, found: dict[str, Any], when: str) -> Verdict:
        workload, dtype = self.run.workload, self.run.contender.dtype
        if not found.get("file"):
            return judge_loss(found, when)
        path = self.folder / found["file"]
        tensors = load(path.read_bytes())
        path.unlink()
        if workload.kind == "sample":
            verdict = self.answers.sampling(dtype, tensors["trajectory"])
            if found["changed"]:
                name = found["changed"][0]
                verdict = dataclasses.replace(
                    verdict, passed=False, message=f"sampling changed the parameters: {name}"
                )
            return verdict
        step = FoundStep(
            step=found["step"],
            expected_step=found["expected_step"],
            before=_trees(tensors, "before", list(self.answers.start)),
            after=_trees(tensors, "after", list(self.answers.start)),
            after_step=found["after_step"],
            loss=found["loss"],
        )
        return self.answers.step(dtype, BEFORE if when == "before" else AFTER, step)


def most_needed(runs: Sequence[Run]) -> int | None:
    """What the next turn may need of the host's memory, in bytes: the largest peak of all runs.

    None while it is not known of every run.
    """
    peaks = [run.peak_memory for run in runs if run.memory_of == "host"]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known and len(known) == len(runs) else None


def judge_loss(found: dict[str, Any], when: str) -> Verdict:
    """The verdict on a model that shows no state: its loss is finite, and falls."""
    said = str(found.get("describe", {}).get("checked") or "its network is not this one")
    how = f"{said}; no state to check: the loss on one batch is finite, and lower after the rounds"
    loss, first = found["loss"], found["first_loss"]
    if not np.isfinite(loss):
        return Verdict(False, how, f"the loss is {loss}", full=False)
    if when == "after" and not loss < first:
        return Verdict(False, how, f"the loss went from {first:.6g} to {loss:.6g}", full=False)
    return Verdict(True, how, full=False)


def _trees(
    tensors: dict[str, np.ndarray], side: str, names: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The state on one side of a step, its names in their usual order; a file has them sorted."""
    trees: dict[str, dict[str, np.ndarray]] = {}
    for part in PARTS:
        start = f"{side}/{part}/"
        found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        trees[part] = {name: found.pop(name) for name in names if name in found} | found
    return trees
