"""Canonical names <-> native parameters: NumPy keeps convolutions as HWIO, ready for a product."""

import numpy as np


def to_tree(model, params):
    """Arrays by canonical name -> native arrays by that name in the model's dtype, copied."""
    dtype, tree = model.time_table.dtype, {}
    for name, value in params.items():
        value = np.asarray(value)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        tree[name] = np.array(value, dtype, order="C")
    return tree


def from_tree(tree):
    """Native arrays by canonical name -> canonical arrays by that name, copied."""
    params = {}
    for name, value in tree.items():
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        params[name] = np.array(value, order="C")
    return params


def load_params(model, params):
    """Put parameters, by canonical name, into the model; they are copied."""
    model.params.update(to_tree(model, params))


def read_params(model):
    """The model's parameters by canonical name, copied."""
    return from_tree(model.params)
