"""The package denoising-diffusion-pytorch (lucidrains): its Unet and GaussianDiffusion.

Another network, of the nearest configuration: the same widths and levels, full attention on the
same levels, the library's own defaults in all else. It has two blocks a level whatever the config
says, linear attention on the other levels, RMSNorm for GroupNorm, scale and shift by the time, a
first convolution of 7x7, and no attention over a single head. So its weights cannot be ours, and
only its loss can be watched; `describe` gives its parameters and operations beside ours.

`eager` is as its Trainer does it, but that the EMA moves in every step, as here; the other modes
are tuned (conformance/bench/peers/on_torch.py), with its fused attention.
"""

import contextlib
import importlib.metadata
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from conformance.bench.count import count
from conformance.bench.peers import opened_with, size_beside_ours
from conformance.bench.peers.on_torch import DTYPES, MODES, TorchPeer
from spec.config import Config


@contextlib.contextmanager
def some_torchvision() -> Iterator[None]:
    """torchvision, or where it cannot be loaded empty modules in its place, while one imports.

    The package names it where it is imported, and uses it for its data sets alone. Its wheel on
    the usual index is made for CUDA, and does not load beside a PyTorch for CPUs.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        empty = {f"torchvision{part}": None for part in ("", ".transforms", ".utils", ".models")}
        modules: dict[str, Any] = {key: types.ModuleType(key) for key in empty}
        for key, module in modules.items():
            if key != "torchvision":
                setattr(modules["torchvision"], key.rpartition(".")[2], module)
        before = {key: sys.modules.get(key) for key in modules}
        sys.modules.update(modules)
        try:
            yield
        finally:
            for key, kept in before.items():
                del sys.modules[key]
                if kept is not None:
                    sys.modules[key] = kept
    else:
        yield


with some_torchvision():
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

name, modes, dtypes = "lucidrains", MODES, DTYPES


def open(
    config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="eager"
) -> "Lucidrains":
    """A model of this size; its weights are its own, from the seed: params are only checked.

    Raises NotImplementedError for a config that the package has nothing near to.
    """
    opened_with(config, params, seed, dtype, device, mode, dtypes, modes)
    if problem := unfit(config):
        raise NotImplementedError(f"denoising-diffusion-pytorch {problem}")
    torch.manual_seed(seed)
    return Lucidrains(config, dtype, device, mode)


def unfit(config: Config) -> str:
    """Why the package has no model near to this config; empty where it has."""
    first, scale = config.channels[0], 1000 / config.timesteps
    if any(width % first for width in config.channels):
        return f"has widths that are multiples of the first, not {list(config.channels)}"
    if config.num_classes:
        return "has a Unet without classes"
    if config.prediction != "eps":
        return f"weighs its loss unless prediction = 'eps', not {config.prediction!r}"
    betas = (config.beta_start, config.beta_end)
    if config.schedule == "linear" and betas != (1e-4 * scale, 0.02 * scale):
        return f"has one linear schedule, {1e-4 * scale:g} to {0.02 * scale:g}, not {betas}"
    return ""


def unet(config: Config, flash: bool) -> Unet:
    """The package's network of the nearest configuration."""
    return Unet(
        dim=config.channels[0],
        dim_mults=tuple(width // config.channels[0] for width in config.channels),
        channels=config.in_channels,
        full_attn=tuple(level in config.attention_levels for level in range(config.levels)),
        flash_attn=flash,
    )


def flops(config: Config) -> float:
    """Operations of a train step of config.batch_size images, as PyTorch counts them.

    Forward and backward on a device that only follows shapes; with the plain attention, since a
    fused one is not counted everywhere.
    """
    height, width, channels = config.image_shape
    network = unet(config, flash=False).to("meta")
    x = torch.zeros(config.batch_size, channels, height, width, device="meta")
    t = torch.zeros(config.batch_size, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, t).sum().backward()
    return float(counter.get_total_flops())


class Lucidrains(TorchPeer):
    """A network of the package, its loss and its EMA."""

    def __init__(self, config: Config, precision: str, device: str, mode: str) -> None:
        network = unet(config, flash=mode != "eager")
        super().__init__(config, network, precision, device, mode)
        self.diffusion = GaussianDiffusion(
            self.network,
            image_size=config.image_size,
            timesteps=config.timesteps,
            objective="pred_noise",
            beta_schedule=config.schedule,
        ).to(self.device)
        self.ema = EMA(
            self.network,
            beta=config.ema_decay,
            update_every=1,
            update_after_step=0,
            include_online_model=False,
            use_foreach=self.tuned,
        )

    def loss(self, x0, t, noise, labels):
        with self.precise():
            return self.diffusion.p_losses(x0, t, noise=noise)

    def move_ema(self):
        self.ema.update()

    def describe(self):
        parameters = sum(p.numel() for p in self.network.parameters())
        own, ours = flops(self.config), count(self.config, self.config.batch_size).flops
        size = size_beside_ours(self.config, parameters, own, ours)
        version = importlib.metadata.version("denoising-diffusion-pytorch")
        library = f"denoising-diffusion-pytorch {version}"
        return {**self.described(name, library, f"another network: {size}"), "flops": own}
