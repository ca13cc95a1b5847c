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
        leaves, structure = jax.tree.flatten(tree)
        array, restored = ravel_pytree([a for a in leaves if a.size <= SMALL])
        small = iter(restored(jax.lax.pmean(array, "devices")))
        found = (next(small) if a.size <= SMALL else jax.lax.pmean(a, "devices") for a in leaves)
        return jax.tree.unflatten(structure, found)

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
