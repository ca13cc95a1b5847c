"""Data parallel: a slice of the batch for each thread, the gradients summed in a fixed order."""

import dataclasses
from concurrent.futures import Executor

from impl_torch import train


@dataclasses.dataclass
class Workers:
    """An executor, and how many threads it has; no operation in them has threads of its own.

    All work is done in them: in the caller's thread, operations would start threads that keep the
    cores busy for a while after.
    """

    executor: Executor
    count: int

    def each(self, function, params):
        """What the function gives for the names of every thread's share, dealt out by size."""
        names = sorted(params, key=lambda name: params[name].numel())
        shares = [names[i :: self.count] for i in range(self.count)]
        return list(self.executor.map(function, shares))


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

    found = workers.each(lambda names: {n: mean([g[n] for g in grads]) for n in names}, grads[0])
    return mean(losses), {name: value for share in found for name, value in share.items()}


def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step; each parameter is updated in one of the threads."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(workers, state.model, tables, config, *batch)
    clipped = workers.executor.submit(train.clip_by_global_norm, grads, config.max_grad_norm)
    grads = clipped.result()  # S9
    lr = train.learning_rate(config, state.step)
    params = {name: p.detach() for name, p in state.model.named_parameters()}

    def update(names):
        train.adam_update(params, {n: grads[n] for n in names}, state.m, state.v, lr, state.step)
        train.ema_update(state.ema, {n: params[n] for n in names}, config.ema_decay, state.step)

    workers.each(update, params)
    state.step += 1
    return loss
