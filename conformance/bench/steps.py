"""Times the train step of each backend, after it was checked in the very process that is timed."""

import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.execute import Outcome, Session
from conformance.process import Impl, WorkerDied
from spec import reference
from spec.config import Config, config_from_dict, load_config
from spec.goldens import Case
from spec.noise import normals, training_draws, uniforms
from spec.params import initial_params

DTYPE = "float32"
ROUND_SECONDS = 0.5  # of steady steps, for each backend in each round
BATCHES = 4  # different ones, worked in turn
WARM_STEPS = 2  # after the first, untimed: some frameworks compile a second time
SMALL_BATCH = 2  # rows, for the check against the reference

# For the check against spec/reference.py. Float32 rounds at u = 6e-8. Through the some fifty
# operations between a weight and the loss, roundings of random sign leave a gradient uncertain by
# about sqrt(50) u, with sums in between 1e-6 of its norm, and the loss, a mean, by less. The limits
# are twenty times that; TF32 (5e-4), a wrong epsilon or a lost term are far above them.
GRADIENT_LIMIT = 2e-5  # of the gradient's norm, for one random direction, and for Adam's m
LOSS_LIMIT = 5e-6  # of the loss
UPDATE_LIMIT = 2e-5  # of the update's norm, beside the rounding of the parameters themselves
ROUNDING = 2.0**-23  # two roundings of a float32 parameter, relative

Arrays = dict[str, Any]  # of NumPy arrays


def batch_of(config: Config, step: int) -> Arrays:
    """The inputs of one train step from the shared stream, float64, no data set needed."""
    draws = training_draws(config, 1000, 0, step)
    x0 = 2 * uniforms(0, "golden", step, (config.batch_size, *config.image_shape)) - 1
    batch = {"x0": x0, "t": draws.t, "noise": draws.noise}
    if config.num_classes:
        batch |= {"labels": draws.rows % config.num_classes, "drop": draws.drop}
    return {name: _as_float32(value) for name, value in batch.items()}


def _as_float32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.float64) if value.dtype.kind == "f" else value


class Timer:
    """The worker's side: one model in training, its steps timed one by one."""

    def __init__(self, session: Session, config: dict[str, Any], batch: int) -> None:
        self.config = config_from_dict(config).replace(batch_size=batch)
        self.dtype = session.dtype
        self.model = session.open(self.config, initial_params(self.config, 0))
        self.batches = [batch_of(self.config, step) for step in range(BATCHES)]
        for batch_ in self.batches:
            for name, value in batch_.items():
                if value.dtype.kind == "f":
                    batch_[name] = value.astype(self.dtype)
        self.steps = 0

    def part(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`first`: the first step, alone; `round`: steady steps for some seconds, at least one."""
        if request["part"] == "first":
            reset_peak_memory()
            first = self.step()
            for _ in range(WARM_STEPS):
                self.step()
            return {"first": first, "describe": self.model.describe()}
        end = time.perf_counter() + request["seconds"]
        samples = [self.step()]
        while time.perf_counter() < end:
            samples.append(self.step())
        return {"samples": samples, "peak_memory": peak_memory()}

    def step(self) -> float:
        """Seconds of one train step, until the device has finished it. Raises for a NaN loss."""
        batch = self.batches[self.steps % BATCHES]
        self.steps += 1
        start = time.perf_counter()
        loss = self.model.train_step(**batch)
        self.model.synchronize()
        seconds = time.perf_counter() - start
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {self.steps} steps")
        return seconds


def reset_peak_memory() -> None:
    """Begin the peak anew where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """The largest resident memory of this process in bytes, or None where it cannot be known."""
    most = _memory("VmHWM")
    if most is not None:
        return most
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_memory() -> int | None:
    """What of it is resident now, or None where it cannot be known."""
    return _memory("VmRSS")


def _memory(key: str) -> int | None:
    """A figure in bytes of what Linux tells of a process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


@dataclasses.dataclass
class Timing:
    """The train step of one backend on one config."""

    backend: str
    config: str
    batch: int
    verified: str = ""  # how the step was checked in the process that was timed
    problem: str = ""  # why there are no numbers
    first: float | None = None  # seconds, compilation included
    rounds: list[list[float]] = dataclasses.field(default_factory=list)  # seconds of each step
    peak_memory: int | None = None  # bytes, on the host
    threads: int = 0
    describe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the steady steps, in seconds."""
        steps = [seconds for samples in self.rounds for seconds in samples]
        low, middle, high = np.percentile(steps, (25, 50, 75))
        return float(low), float(middle), float(high)

    def report(self) -> dict[str, Any]:
        """The entry of the JSON report."""
        entry = dataclasses.asdict(self)
        entry["ok"] = self.ok
        if self.ok:
            low, middle, high = self.quartiles
            entry |= {"q1": low, "median": middle, "q3": high}
            entry["images_per_second"] = self.batch / middle
        return entry


def run_timing(
    suite: Any,  # runner.Suite
    configs: list[Config],
    batch: int,
    rounds: int,
    failed: Mapping[str, str],
    seen: Callable[[str], None],
) -> list[Timing]:
    """Time every backend on every config, rounds interleaved in a random order.

    `failed` names backends that are not timed, and why; `seen` hears what is done.
    """
    timings: list[Timing] = []
    order = random.Random(0)
    for config in configs:
        group: list[tuple[Impl, Timing]] = []
        for impl in suite.plan.impls:
            timing = Timing(impl.name, config.name, batch, threads=suite.plan.setup.threads)
            timings.append(timing)
            if impl.name in failed:
                timing.problem = failed[impl.name]
                continue
            seen(f"{config.name}: checking the step of {impl.name}")
            timing.verified, timing.problem = verify(suite, impl, config)
            if timing.ok:
                seen(f"{config.name}: first step of {impl.name}")
                _first(suite, impl, config, timing)
            if timing.ok:
                group.append((impl, timing))
        for number in range(rounds):
            seen(f"{config.name}: round {number + 1} of {rounds}")
            order.shuffle(group)
            for impl, timing in group:
                if timing.ok:
                    _round(suite, impl, timing)
        for impl, timing in group:
            if timing.ok:
                _ask(suite, impl, timing, {"part": "close"})
    return timings


def _ask(suite: Any, impl: Impl, timing: Timing, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a part of the timing; a failure becomes the timing's problem."""
    worker = suite.worker(impl, DTYPE)
    starts = worker.starts
    try:
        reply = worker.ask({"do": "time", **request}, suite.plan.setup.timeout)
    except WorkerDied as died:
        timing.problem = f"{died.status}: {died.message}"
        return {}
    if reply["status"] != "done":
        timing.problem = reply.get("message", reply["status"])
    elif worker.starts != starts:
        timing.problem = "the worker was started anew between the check and the timing"
    return reply


def _first(suite: Any, impl: Impl, config: Config, timing: Timing) -> None:
    opening = {"part": "open", "config": dataclasses.asdict(config), "batch": timing.batch}
    _ask(suite, impl, timing, opening)
    if timing.ok:
        reply = _ask(suite, impl, timing, {"part": "first"})
        timing.first = reply.get("first")
        timing.describe = reply.get("describe", {})
        timing.versions = suite.worker(impl, DTYPE).hello.get("versions", {})


def _round(suite: Any, impl: Impl, timing: Timing) -> None:
    reply = _ask(suite, impl, timing, {"part": "round", "seconds": ROUND_SECONDS})
    if timing.ok:
        timing.rounds.append(reply["samples"])
        timing.peak_memory = reply["peak_memory"]


def verify(suite: Any, impl: Impl, config: Config) -> tuple[str, str]:
    """How the backend's float32 train step was checked in its worker, and what was wrong.

    By the manifest's train_steps cases of this config; where there is none, by the reference.
    """
    cases = [
        case
        for case in suite.plan.goldens.cases
        if case.call == "train_steps"
        and case.config.replace(batch_size=config.batch_size) == config
        and all(output.tolerance.get(DTYPE) for output in case.outputs)
    ]
    for case in cases:
        if not suite.has_passed(impl, DTYPE, case):
            result = suite.run_case(impl, DTYPE, case)
            if not result.ok:
                return "", ": ".join(filter(None, [case.id, result.status, result.message]))
    if cases:
        return ", ".join(case.id for case in cases), ""
    return _verify_by_reference(suite, impl, config)


def _case(config: Config, call: str, inputs: Arrays, options: dict[str, Any]) -> Case:
    return Case(
        id=f"timing/{config.name}/{call}",
        level=5,
        clause="S8",
        config=config,
        call=call,
        params="given:params",
        inputs={name: f"given:{name}" for name in inputs},
        options=options,
        outputs=(),
        causes=(),
        oracle="spec/reference.py",
    )


def _verify_by_reference(suite: Any, impl: Impl, config: Config) -> tuple[str, str]:
    small = config.replace(batch_size=SMALL_BATCH)
    batch = batch_of(small, 0)
    start = {n: p.astype(np.float64) for n, p in initial_params(small, 0).items()}
    given = {f"params/{name}": value for name, value in start.items()}
    once = {name: value[None] for name, value in batch.items()}
    asked: dict[str, Outcome] = {}
    for call, inputs, options in (
        ("loss_and_grads", batch, {}),
        ("train_steps", once, {"record": [1]}),
    ):
        case = _case(small, call, inputs, options)
        asked[call], _ = suite.ask_case(impl, DTYPE, case, {**given, **inputs})
        if asked[call].status != "done":
            return "", f"{call}: {asked[call].status}: {asked[call].message}"
    shares = reference_shares(
        small, start, batch, asked["loss_and_grads"].results, asked["train_steps"].results
    )
    over = {what: share for what, share in shares.items() if not share <= 1}
    if over:
        text = ", ".join(f"{what} {share:.3g}" for what, share in over.items())
        return "", f"against spec/reference.py, in shares of the float32 limit: {text}"
    worst = max(shares, key=shares.__getitem__)
    return (
        f"spec/reference.py, batch {SMALL_BATCH}: loss, gradient along one direction, Adam and EMA "
        f"(worst: {worst}, {shares[worst]:.2g} of its limit)"
    ), ""


def reference_shares(
    config: Config, start: Arrays, batch: Arrays, graded: Arrays, stepped: Arrays
) -> dict[str, float]:
    """error / limit of a float32 train step against the reference, by what was compared.

    graded: the results of loss_and_grads; stepped: those of one train step. The gradient of the
    reference is known along one random direction; the step's own is read from Adam's first m.
    """
    tables = reference.make_schedule(config)
    loss = float(np.real(reference.loss(config, tables, start, **batch)))
    grads = {name: graded[f"grads/{name}"].astype(np.float64) for name in start}
    direction = {
        name: normals(0, "golden", i, value.shape) for i, (name, value) in enumerate(start.items())
    }
    slope = reference.directional_derivative(config, tables, start, direction, batch)
    own = sum(float(np.vdot(grads[name], direction[name])) for name in start)
    size = _norm(grads)
    state = reference.initial_state(start)
    by_grads = reference.update(config, state, grads)
    m, v, delta, ema_delta = (
        {name: stepped[f"1/{part}/{name}"].astype(np.float64) for name in start}
        for part in ("m", "v", "delta", "ema_delta")
    )
    by_m = reference.update(config, state, {name: value / 0.1 for name, value in m.items()})
    rounding = ROUNDING * _norm(start)
    moved = {part: _difference(by_m[part], start) for part in ("params", "ema")}

    def update_share(got: Arrays, expected: Arrays, absolute: float = 0.0) -> float:
        error = _norm(_difference(got, expected))
        return error / (UPDATE_LIMIT * _norm(expected) + absolute)

    return {
        "loss": abs(float(graded["loss"]) - loss) / (LOSS_LIMIT * abs(loss)),
        "loss of the step": abs(float(stepped["loss"][0]) - loss) / (LOSS_LIMIT * abs(loss)),
        "gradient along one direction": abs(own - slope) / (GRADIENT_LIMIT * size),
        "m": _norm(_difference(m, by_grads["m"])) / (GRADIENT_LIMIT * _norm(by_grads["m"])),
        "v": update_share(v, by_m["v"]),
        "update": update_share(delta, moved["params"], rounding),
        "EMA": update_share(ema_delta, moved["ema"], rounding),
    }


def _norm(tree: Arrays) -> float:
    return float(np.sqrt(sum(float(np.sum(value * value)) for value in tree.values())))


def _difference(a: Arrays, b: Arrays) -> Arrays:
    return {name: a[name] - b[name] for name in b}


def timing_configs(names: list[str]) -> list[Config]:
    """The configs to be timed. Raises ConfigError for an unknown name."""
    return [load_config(name) for name in dict.fromkeys(names)]
