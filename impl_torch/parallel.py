"""Data parallel: a slice of the batch for each thread, the gradients summed in a fixed order."""

import dataclasses
from concurrent.futures import Executor

from impl_torch import train


@dataclasses.dataclass
class Workers:
    """An executor, and how many threads it has; no operation in them has threads of its own."""

    executor: Executor
    count: int


def loss_and_grads(workers, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads, in slices: no layer looks across images, so nothing is lost."""
    rows, count = len(x0), min(workers.count, len(x0))
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    shares = [len(x0[part]) / rows for part in parts]

    def run(part):
        batch = (a if a is None else a[part] for a in (x0, t, noise, labels, drop))
        return train.loss_and_grads(model, tables, config, *batch)

    losses, grads = zip(*workers.executor.map(run, parts), strict=True)

    def mean(values):
        return sum(share * value for share, value in zip(shares, values, strict=True))

    return mean(losses), {name: mean(g[name] for g in grads) for name in grads[0]}


def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(workers, state.model, tables, config, *batch)
    train.apply_gradients(state, config, grads)
    return loss
