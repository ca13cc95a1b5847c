"""Canonical names <-> native parameters: Flax keeps linear as IO and convolutions as HWIO."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict


def _canonical_name(path):
    """The canonical name of the parameter at this path of nested dicts."""
    *words, part = (str(word) for word in path)
    return ".".join([*words, "bias" if part == "bias" else "weight"])


def to_tree(model, params):
    """Arrays by canonical name -> nested dicts of native arrays, copied."""
    flat = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(params[_canonical_name(path)])
        if path[-1] == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        flat[path] = jnp.array(value, variable.dtype)
    return unflatten_dict(flat)


def from_tree(tree):
    """Nested dicts of native arrays -> arrays by canonical name, copied."""
    params = {}
    for path, value in flatten_dict(tree).items():
        value = np.asarray(value)
        if path[-1] == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        params[_canonical_name(path)] = np.array(value, order="C")
    return params


def load_params(model, params):
    """Put parameters, by canonical name, into the model; they are copied."""
    nnx.update(model, to_tree(model, params))


def read_params(model):
    """The model's parameters by canonical name, copied."""
    return from_tree(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
