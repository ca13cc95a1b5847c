"""Canonical names <-> native parameters: for NumPy they are the same dict, in arrays of its own."""

import numpy as np


def to_tree(model, params):
    """Arrays by canonical name -> the same in the model's dtype, copied."""
    return {name: np.array(value, model.time_table.dtype) for name, value in params.items()}


def from_tree(tree):
    """Native arrays -> arrays by canonical name, copied."""
    return {name: np.array(value, order="C") for name, value in tree.items()}


def load_params(model, params):
    """Put parameters, by canonical name, into the model; they are copied."""
    model.params.update(to_tree(model, params))


def read_params(model):
    """The model's parameters by canonical name, copied."""
    return from_tree(model.params)
