"""Other libraries, as a good user of each would train the same model: what this one is held beside.

Each module here is a backend of the benchmark (see spec/backend.py), and imports its library where
it is needed. Its model has `train_step`, `synchronize` and `describe`, and as much of the rest as
the library lets through: one with `state` passes the same checks as the implementations of this
repository. `describe()["checked"]` says in words what else could be checked.

The first of its modes is the library as it comes. Where memory lies, and whether it is kept, is
then left to the system; in its other modes it is given what the implementations here ask for.
"""

from typing import Any

import numpy as np

from spec.backend import ARRAY_DTYPES, Params, keep_freed_memory, one_of
from spec.config import Config
from spec.params import check_params, initial_params, parameter_count


class Peer:
    """A model of another library; what it does not have raises NotImplementedError."""

    config: Config

    def train_step(self, x0, t, noise, labels=None, drop=None) -> float:
        """One update; gives the loss before it. Arrays as in spec.backend.Model.train_step."""
        raise NotImplementedError("this peer does not train")

    def predict(self, x, t, labels=None) -> np.ndarray:
        """The network's output [B, H, W, C]."""
        raise NotImplementedError("this peer does not show its network's output")

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None) -> tuple[float, Params]:
        """The loss and its gradient by every parameter."""
        raise NotImplementedError("this peer does not show its gradients")

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ) -> np.ndarray:
        """The whole trajectory [S, B, H, W, C]."""
        raise NotImplementedError("this peer does not sample")

    def params(self) -> Params:
        """The parameters by canonical name."""
        raise NotImplementedError("this peer's parameters have no canonical names")

    def state(self) -> dict[str, Any]:
        """step, params, m, v and ema by canonical name."""
        raise NotImplementedError("this peer's state has no canonical names")

    def synchronize(self) -> None:
        """Return when the device has finished all that was asked of it."""
        raise NotImplementedError("this peer cannot wait for its device")

    def describe(self) -> dict[str, Any]:
        """As spec.backend.Model.describe; and parameters, and what was checked in words."""
        raise NotImplementedError("this peer says nothing of itself")


def opened_with(
    config: Config,
    params: Params | None,
    seed: int,
    dtype: str,
    device: str,
    mode: str,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
) -> Params:
    """The arguments of a peer's `open`, checked; gives the parameters, in the dtype of arrays.

    In any mode but the first, freed memory is kept from here on.

    Raises ValueError for a dtype, device or mode that is unknown, and ParameterError.
    """
    one_of("dtype", dtype, dtypes)
    one_of("device", device, ("auto", "cpu", "cuda"))
    one_of("mode", mode, modes)
    if dtype == "tf32" and device == "cpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs; use float32, or device='cuda'")
    if mode != modes[0]:
        keep_freed_memory()
    params = initial_params(config, seed) if params is None else check_params(config, params)
    return {name: value.astype(ARRAY_DTYPES[dtype]) for name, value in params.items()}


def size_beside_ours(config: Config, parameters: int, flops: float, our_flops: float) -> str:
    """How large another network is beside the config's own, in words; operations of a train step"""
    return (
        f"{parameters:,} parameters (here {parameter_count(config):,}), {flops / 1e9:.4g} GFLOP "
        f"a step of {config.batch_size} images (here {our_flops / 1e9:.4g})"
    )
