"""Data parallel: a slice of the batch for each thread, the gradients summed in a fixed order."""

import dataclasses
from concurrent.futures import Executor

from impl_torch import train


@dataclasses.dataclass
class Workers:
    """An executor, and how many threads it has; no operation in them has threads of its own."""

    executor: Executor
    count: int

    def run(self, function, *arguments):
        """What the function gives, worked out in one of the threads.

        In the caller's, operations would start threads of their own, and these keep the cores
        busy for a while after.
        """
        return self.executor.submit(function, *arguments).result()


def loss_and_grads(workers, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads, in slices: no layer looks across images, so nothing is lost."""
    rows, count = len(x0), min(workers.count, len(x0))
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    shares = [len(x0[part]) / rows for part in parts]

    def run(part):
        batch = (a if a is None else a[part] for a in (x0, t, noise, labels, drop))
        return train.loss_and_grads(model, tables, config, *batch)

    losses, grads = zip(*workers.executor.map(run, parts), strict=True)

    def mean(values):  # in the memory of the first
        total = values[0].mul_(shares[0])
        for share, value in zip(shares[1:], values[1:], strict=True):
            total.add_(value, alpha=share)
        return total

    def means():
        return {name: mean([g[name] for g in grads]) for name in grads[0]}

    return mean(losses), workers.run(means)


def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(workers, state.model, tables, config, *batch)
    workers.run(train.apply_gradients, state, config, grads)
    return loss
