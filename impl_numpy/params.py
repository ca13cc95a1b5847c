"""Canonical names <-> native parameters: for NumPy they are the same dict, in arrays of its own."""

import numpy as np

from impl_numpy.unet import UNet


def load_params(model: UNet, params: dict[str, np.ndarray]) -> None:
    """Put parameters, by canonical name, into the model; they are copied."""
    for name, value in params.items():
        model.params[name] = np.array(value, model.time_table.dtype)


def read_params(model: UNet) -> dict[str, np.ndarray]:
    """The model's parameters by canonical name, copied."""
    return {name: value.copy() for name, value in model.params.items()}
