"""What must hold before a figure counts: the timed function itself, against spec/reference.py.

A train step shows its gradient in Adam's first moment: g = (m' - 0.9 m) / 0.1. So the function that
is timed, in its own process, dtype and mode and on its own shapes, is held to the gradient (L4) and
the update (L5), and nothing else has to be compiled for that. The reference costs seconds for a
row, so a batch for a check repeats a few rows, in a drawn order, until it has the full size.
"""

import dataclasses
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from conformance.bench.steps import batch_of
from conformance.bench.workloads import Workload
from spec import reference
from spec.backend import ARRAY_DTYPES
from spec.config import Config
from spec.noise import integers, normals, sampling_noise

Tree = dict[str, np.ndarray]
BEFORE, AFTER = 0, 1000  # steps of the shared stream that the two checks draw from
ROWS = {BEFORE: 4, AFTER: 2}  # different ones of a batch
PARTS = ("params", "m", "v", "ema")
IMAGINARY = 1e-30
SEED = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an error may be, relative to the size of what is compared."""

    loss: float
    gradient: float
    sample: float  # of the network's output, in a step of a sampling
    rounding: float  # of a stored number: two roundings


# Float32 rounds at u = 6e-8. Through the some fifty operations between a weight and the loss,
# roundings of random sign leave a gradient uncertain by about sqrt(50) u, with sums in between 1e-6
# of its norm, and the loss, a mean, by less. The limits are twenty times that. Those of TF32 and
# bfloat16 are what the goldens allow a train step and a guided trajectory of `digits`, their
# largest network, rounded up.
LIMITS = {
    "float64": Limits(1e-11, 1e-10, 1e-10, 2.0**-52),
    "float32": Limits(5e-6, 2e-5, 2e-5, 2.0**-23),
    "tf32": Limits(3e-3, 2e-2, 5e-3, 2.0**-23),
    "bf16": Limits(1.5e-2, 0.1, 3e-2, 2.0**-23),
}
UPDATE = {"float64": 1e-9, "float32": 2e-5}  # of m, v, an update and the EMA, by array dtype


def rows_of(batch: int, when: int) -> np.ndarray:
    """Which of the few rows stands at each place of a batch for a check, [batch]."""
    rows = min(ROWS[when], batch)
    which = integers(SEED, "rows", when, (batch,), rows)
    which[:rows] = np.arange(rows)
    return which


def checked_batch(config: Config, when: int) -> Tree:
    """The inputs of a train step for a check: few rows, repeated to the full size."""
    which = rows_of(config.batch_size, when)
    return {name: value[which] for name, value in batch_of(config, when).items()}


def drawn_direction(params: Mapping[str, np.ndarray]) -> Tree:
    """One direction in the space of all parameters."""
    return {
        name: normals(SEED, "golden", i, value.shape)
        for i, (name, value) in enumerate(params.items())
    }


@dataclasses.dataclass(frozen=True)
class Known:
    """What the reference says of a batch for a check."""

    loss: float
    slope: float  # of the loss, along the drawn direction


def known(config: Config, params: Tree, when: int, pool: ThreadPoolExecutor) -> Known:
    """The loss and its slope at these parameters, from a complex step for each different row."""
    tables = reference.make_schedule(config)
    which = rows_of(config.batch_size, when)
    batch = checked_batch(config, when)
    direction = drawn_direction(params)
    moved = {n: p.astype(np.float64) + 1j * IMAGINARY * direction[n] for n, p in params.items()}

    def of_row(row: int) -> complex:
        return reference.loss(
            config, tables, moved, **{n: value[row : row + 1] for n, value in batch.items()}
        )

    rows = np.unique(which)
    values = np.array(list(pool.map(of_row, rows)))
    mean = (values * np.bincount(which)).sum() / len(which)
    return Known(float(mean.real), float(mean.imag / IMAGINARY))


def step_shares(
    config: Config,
    dtype: str,
    before: Mapping[str, Tree],
    after: Mapping[str, Tree],
    step: int,
    loss: float,
    known: Known,
    pool: ThreadPoolExecutor,
) -> dict[str, float]:
    """error / limit of a train step from state `before` to `after`, by what was compared."""
    limits, update = LIMITS[dtype], UPDATE[ARRAY_DTYPES[dtype]]
    direction = drawn_direction(before["params"])
    unclipped = config.replace(max_grad_norm=0.0)  # what m shows has been clipped already

    def sums_of(name: str) -> dict[str, float]:
        """What one parameter adds to the slope, and to the square of every norm."""
        old, new = (
            {part: state[part][name].astype(np.float64) for part in PARTS}
            for state in (before, after)
        )
        grad = (new["m"] - 0.9 * old["m"]) / 0.1
        state = {"step": step, **{part: {name: value} for part, value in old.items()}}
        expected = reference.update(unclipped, state, {name: grad})
        sums = {
            "slope": float(np.vdot(grad, direction[name])),
            "gradient": _square(grad),
            "old m": _square(old["m"]),
            "new m": _square(new["m"]),
            "old params": _square(old["params"]),
            "v": _square(expected["v"][name]),
            "v off": _square(new["v"] - expected["v"][name]),
        }
        for part in ("params", "ema"):
            should = expected[part][name] - old[part]
            sums[part] = _square(should)
            sums[f"{part} off"] = _square(new[part] - old[part] - should)
        return sums

    found = list(pool.map(sums_of, direction))
    sums = {key: math.fsum(part[key] for part in found) for key in found[0]}
    slope = sums.pop("slope")
    norm = {key: math.sqrt(value) for key, value in sums.items()}
    stored = 10 * limits.rounding * (norm["old m"] + norm["new m"])  # what m lost, in g
    off_by = abs(slope - known.slope) / (limits.gradient * norm["gradient"] + stored)
    rounding = limits.rounding * norm["old params"]
    return {
        "loss": abs(loss - known.loss) / (limits.loss * abs(known.loss)),
        "gradient along one direction": off_by,
        "v": norm["v off"] / (update * norm["v"]),
        "update": norm["params off"] / (update * norm["params"] + rounding),
        "EMA": norm["ema off"] / (update * norm["ema"] + rounding),
    }


def sampling_inputs(workload: Workload) -> dict[str, Any]:
    """x_T [B, H, W, C], float64, and labels [B] of a guided sampling."""
    x, _ = sampling_noise(workload.config, workload.batch, SEED, 0 + 1)
    return {"x": x, "labels": np.arange(workload.batch) % workload.config.num_classes}


def sample_shares(
    workload: Workload, dtype: str, params: Tree, trajectory: np.ndarray
) -> dict[str, float]:
    """error / limit of single steps of a trajectory [S, B, H, W, C]: its first, middle and last.

    Each begins at the trajectory's own image, so that what came before does not count. The first
    row and the last are asked.
    """
    config, steps = workload.config, workload.steps
    tables, wide = reference.make_schedule(config), _wide(params)
    given = sampling_inputs(workload)
    start = np.concatenate([given["x"].astype(ARRAY_DTYPES[dtype])[None], trajectory[:-1]])
    rows = sorted({0, workload.batch - 1})
    times = reference.ddim_times(config.timesteps, steps)
    shares = {}
    for i in sorted({0, steps // 2, steps - 1}):
        x, labels = start[i, rows].astype(np.float64), given["labels"][rows]
        t = np.full(len(rows), times[i])
        null = np.full(len(rows), config.num_classes)
        out_null, out = (reference.predict(config, wide, x, t, k) for k in (null, labels))
        scale = workload.guidance_scale or 0.0
        out = reference.guide(out_null, out, scale)
        end = np.full(len(rows), times[i + 1] if i + 1 < steps else -1)
        want = reference.ddim_step(config, tables, x, t, end, out, np.zeros_like(x), 0.0)
        now = tables["alphas_cumprod"][times[i]]
        then = tables["alphas_cumprod"][end[0]] if i + 1 < steps else 1.0
        # how far an error of the two outputs moves the image, where nothing is clipped
        reach = math.sqrt(then * (1 - now) / now) + math.sqrt(1 - then)
        reach *= abs(1 - scale) + abs(scale)
        limit = LIMITS[dtype].sample * reach * np.linalg.norm(out)
        limit += LIMITS[dtype].rounding * np.linalg.norm(x)
        shares[f"step {i + 1}"] = float(np.linalg.norm(trajectory[i, rows] - want) / limit)
    return shares


@dataclasses.dataclass
class Verdict:
    """What a check found; `full` where the whole step was held against the reference."""

    passed: bool
    how: str
    message: str = ""  # what was wrong
    worst: str = ""
    share: float | None = None  # error / limit of the worst
    full: bool = True

    def report(self) -> dict[str, Any]:
        """The entry of the results."""
        share = self.share if self.share is None or math.isfinite(self.share) else None
        return {**dataclasses.asdict(self), "share": share}


def judged(shares: Mapping[str, float], how: str) -> Verdict:
    """The verdict on shares of limits."""
    worst = max(shares, key=lambda what: math.inf if shares[what] != shares[what] else shares[what])
    over = [f"{what} {share:.3g}" for what, share in shares.items() if not share <= 1]
    message = (
        f"against spec/reference.py, in shares of the limit: {', '.join(over)}" if over else ""
    )
    return Verdict(not over, how, message, worst, shares[worst])


class Reference:
    """The reference's answers of one workload; those at the initial weights are made once."""

    def __init__(self, workload: Workload, start: Tree, pool: ThreadPoolExecutor) -> None:
        self.workload, self.start, self.pool = workload, start, pool
        self._known: Known | None = None
        self._making = threading.Lock()  # several checks may ask at once

    def at_start(self) -> Known:
        """Of the batch before, at the initial weights."""
        with self._making:
            if self._known is None:
                self._known = known(self.workload.config, self.start, BEFORE, self.pool)
        return self._known

    def step(self, dtype: str, when: int, found: "FoundStep") -> Verdict:
        """The verdict on a train step."""
        config = self.workload.config
        problem = _unsound(found, self.start, config)
        if when == BEFORE and not problem and found.step:
            problem = f"the state of a new model is at step {found.step}; expected 0"
        rows, batch = min(ROWS[when], self.workload.batch), self.workload.batch
        state = "the initial weights" if when == BEFORE else f"the state after {found.step} steps"
        how = (
            f"one step from {state}, {batch} rows, {rows} of them different: loss, gradient along "
            "one direction, Adam's m and v, update, EMA"
        )
        if problem:
            return Verdict(False, how, problem)
        if when == BEFORE:
            for name, value in self.start.items():
                if not np.array_equal(found.before["params"][name], value):
                    return Verdict(False, how, f"{name} is not what the model was opened with")
        answer = (
            self.at_start()
            if when == BEFORE
            else known(config, found.before["params"], when, self.pool)
        )
        shares = step_shares(
            config, dtype, found.before, found.after, found.step, found.loss, answer, self.pool
        )
        return judged(shares, how)

    def sampling(self, dtype: str, trajectory: np.ndarray) -> Verdict:
        """The verdict on a sampling."""
        steps, batch = self.workload.steps, self.workload.batch
        how = f"the first, middle and last of {steps} guided steps, two of {batch} rows"
        shape = (steps, batch, *self.workload.config.image_shape)
        if trajectory.shape != shape:
            message = f"the trajectory has shape {list(trajectory.shape)}; expected {list(shape)}"
            return Verdict(False, how, message)
        return judged(sample_shares(self.workload, dtype, self.start, trajectory), how)


@dataclasses.dataclass(frozen=True)
class FoundStep:
    """A train step as the worker saw it: the state on both sides, and the loss."""

    step: int  # how many steps had been made before it
    expected_step: int  # how many the worker had asked for
    before: dict[str, Tree]
    after: dict[str, Tree]
    after_step: int
    loss: float


def _unsound(found: FoundStep, start: Tree, config: Config) -> str:
    """What is wrong with the states themselves; empty where nothing is."""
    if (found.step, found.after_step) != (found.expected_step, found.expected_step + 1):
        return (
            f"state is at step {found.step} and one step later at {found.after_step}; "
            f"{found.expected_step} had been asked for"
        )
    for state in (found.before, found.after):
        for part in PARTS:
            if list(state[part]) != list(start) or any(
                state[part][n].shape != start[n].shape for n in start
            ):
                return f"{part} does not have the names and shapes of {config.name}"
            for name, value in state[part].items():
                if not np.isfinite(value).all():
                    return f"{part}[{name}] is not finite after {found.step} steps"
    if found.step and all(np.array_equal(found.before["params"][n], start[n]) for n in start):
        return f"the parameters are still the initial ones after {found.step} steps"
    return ""


def _wide(tree: Mapping[str, np.ndarray]) -> Tree:
    return {name: value.astype(np.float64) for name, value in tree.items()}


def _square(value: np.ndarray) -> float:
    return float(np.sum(value * value))
