"""Data parallel: a slice of the batch for each thread, the gradients summed in a fixed order."""

import dataclasses
from concurrent.futures import Executor

from threadpoolctl import ThreadpoolController

from impl_numpy import train

BLAS = ThreadpoolController()


@dataclasses.dataclass
class Workers:
    """An executor, and how many threads it has."""

    executor: Executor
    count: int

    def map(self, function, pieces):
        """The results of the function, in order; no product starts threads of its own."""
        with BLAS.limit(limits=1, user_api="blas"):
            return list(self.executor.map(function, pieces))

    def each(self, function, params):
        """The function of every name, by name; each thread has its share, dealt out by size."""
        names = sorted(params, key=lambda name: params[name].size)
        shares = [names[i :: self.count] for i in range(self.count)]
        found = self.map(lambda share: {name: function(name) for name in share}, shares)
        return {name: value for share in found for name, value in share.items()}


def loss_and_grads(workers, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads, in slices: no layer looks across images, so nothing is lost."""
    rows, count = len(x0), min(workers.count, len(x0))
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    shares = [len(x0[part]) / rows for part in parts]

    def run(part):
        batch = (a if a is None else a[part] for a in (x0, t, noise, labels, drop))
        return train.loss_and_grads(model, tables, config, *batch)

    losses, grads = zip(*workers.map(run, parts), strict=True)

    def mean(values):
        return sum(share * value for share, value in zip(shares, values, strict=True))

    means = workers.each(lambda name: mean(g[name] for g in grads), model.params)
    return mean(losses), means


def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step; each parameter is updated in one of the threads."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(workers, state.model, tables, config, *batch)
    grads = train.clip_by_global_norm(grads, config.max_grad_norm)  # S9
    lr, params = train.learning_rate(config, state.step), state.model.params

    def update(name):
        train.adam_update(params, {name: grads[name]}, state.m, state.v, lr, state.step)
        train.ema_update(state.ema, {name: params[name]}, config.ema_decay, state.step)

    workers.each(update, params)
    state.step += 1
    return loss
