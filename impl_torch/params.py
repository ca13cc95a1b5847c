"""Canonical names <-> native parameters: PyTorch's state_dict has the same names and layouts."""

import numpy as np
import torch


def to_tree(model, params):
    """Arrays by canonical name -> tensors by that name on the model's device, copied."""
    like = model.conv_in.bias
    return {
        name: torch.tensor(p, dtype=like.dtype, device=like.device) for name, p in params.items()
    }


def from_tree(tree):
    """Tensors by canonical name -> arrays by that name, copied."""
    return {name: np.array(p.detach().cpu().numpy(), order="C") for name, p in tree.items()}


@torch.no_grad()
def load_params(model, params):
    """Put parameters, by canonical name, into the model; they are copied."""
    tree = to_tree(model, params)
    for name, parameter in model.named_parameters():
        parameter.copy_(tree[name])


def read_params(model):
    """The model's parameters by canonical name, copied."""
    return from_tree(dict(model.named_parameters()))
