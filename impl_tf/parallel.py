"""Data parallel: slices of the batch side by side in one graph, their gradients averaged."""

import tensorflow as tf

from impl_tf import train


def loss_and_grads(workers, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads, in so many slices; nothing in one waits for another."""
    rows, count = len(x0), min(workers, len(x0))
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    shares = [(part.stop - part.start) / rows for part in parts]

    def run(part):
        batch = (a if a is None else a[part] for a in (x0, t, noise, labels, drop))
        return train.loss_and_grads(model, tables, config, *batch)

    losses, grads = zip(*map(run, parts), strict=True)

    def mean(values):
        return tf.add_n([share * value for share, value in zip(shares, values, strict=True)])

    return mean(losses), {name: mean([g[name] for g in grads]) for name in grads[0]}


@tf.function
def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(workers, state.model, tables, config, *batch)
    train.apply_gradients(state, config, grads)
    return loss
