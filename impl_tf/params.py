"""Canonical names <-> native parameters: Keras keeps linear as IO and convolutions as HWIO."""

import numpy as np
import tensorflow as tf

from impl_tf.layers import named_parameters

EMBEDDING = "class_embedding.weight"  # has the same layout everywhere


def to_tree(model, params):
    """Arrays by canonical name -> tensors by that name in the framework's layout, copied."""
    tree = {}
    for name, parameter in named_parameters(model).items():
        value = np.asarray(params[name])
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2 and name != EMBEDDING:
            value = value.T
        tree[name] = tf.constant(value, parameter.dtype)
    return tree


def from_tree(tree):
    """Tensors by canonical name in the framework's layout -> arrays by that name, copied."""
    params = {}
    for name, tensor in tree.items():
        value = np.asarray(tensor)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2 and name != EMBEDDING:
            value = value.T
        params[name] = np.array(value, order="C")
    return params


def load_params(model, params):
    """Put parameters, by canonical name, into the model; they are copied."""
    tree = to_tree(model, params)
    for name, parameter in named_parameters(model).items():
        parameter.assign(tree[name])


def read_params(model):
    """The model's parameters by canonical name, copied."""
    return from_tree(named_parameters(model))
