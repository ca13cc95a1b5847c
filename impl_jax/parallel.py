"""Data parallel: a slice of the batch on each device, the gradients averaged over all devices."""

import functools

import jax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from impl_jax import train

WHOLE, SLICE = PartitionSpec(), PartitionSpec("devices")
SMALL = 4096  # numbers; copying so many takes less time than waiting


def loss_and_grads(workers, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads, on a Mesh of devices; each has its rows, and all get the mean."""
    if len(x0) % workers.size:  # rows that cannot be shared out evenly: each device takes them all
        return train.loss_and_grads(model, tables, config, x0, t, noise, labels, drop)

    def mean(tree):  # in every pmean the devices wait for one another: small arrays go as one
        small = jax.tree.map(lambda a: a if a.size <= SMALL else None, tree)
        large = jax.tree.map(lambda a: a if a.size > SMALL else None, tree)
        array, restored = ravel_pytree(small)
        array, large = jax.lax.pmean((array, large), "devices")
        either = {"is_leaf": lambda a: a is None}
        return jax.tree.map(lambda a, b: b if a is None else a, restored(array), large, **either)

    def run(model, *batch):
        return mean(train.loss_and_grads(model, tables, config, *batch))

    shapes = {"in_specs": (WHOLE, *[SLICE] * 5), "out_specs": WHOLE, "check_vma": False}
    return jax.shard_map(run, mesh=workers, **shapes)(model, x0, t, noise, labels, drop)


@functools.partial(jax.jit, static_argnames=("workers", "config"), donate_argnames="state")
def train_step(workers, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step; every device makes the whole update."""
    batch = (x0, t, noise, labels, drop)
    model = nnx.merge(*state.model)
    loss, grads = loss_and_grads(workers, model, tables, config, *batch)
    return train.apply_gradients(state, config, grads), loss
