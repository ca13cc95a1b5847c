"""Canonical names <-> native parameters: PyTorch's state_dict has the same names and layouts."""

import numpy as np
import torch

from impl_torch.unet import UNet


@torch.no_grad()
def load_params(model: UNet, params: dict[str, np.ndarray]) -> None:
    """Put parameters, by canonical name, into the model; they are copied."""
    native = dict(model.named_parameters())
    for name, value in params.items():
        native[name].copy_(torch.from_numpy(np.asarray(value)))


def read_params(model: UNet) -> dict[str, np.ndarray]:
    """The model's parameters by canonical name, copied."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
