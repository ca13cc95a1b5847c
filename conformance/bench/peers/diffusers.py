"""The library diffusers: its UNet2DModel of the same configuration, its schedule, its EMA.

`eager` is what its training example does: contiguous images, torch's Adam as it comes, the EMA
parameter by parameter. The other modes are tuned (conformance/bench/peers/on_torch.py).

Its network has the canonical names (S7), so its train step is checked as those of this repository.
One thing is not as it comes: the decay of the EMA is S9's, where the library's is 0 in the first
step. Its times are sines in float32, its tables float32 too, and they stay so.
"""

import warnings
from typing import Any

import numpy as np
import torch

from conformance.bench.peers import opened_with
from conformance.bench.peers.on_torch import DTYPES, MODES, TorchPeer
from spec.backend import Params, State
from spec.config import Config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

name, modes, dtypes = "diffusers", MODES, DTYPES
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
CHECKED = "the same network, by the same names: its train step is checked like those of this suite"


def open(
    config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="eager"
) -> "Diffusers":
    """A model with these parameters, or with those that the seed gives."""
    params = opened_with(config, params, seed, dtype, device, mode, dtypes, modes)
    return Diffusers(config, params, dtype, device, mode)


def unet_arguments(config: Config) -> dict[str, Any]:
    """The arguments of UNet2DModel that stand for a config (S7)."""
    attends = [level in config.attention_levels for level in range(config.levels)]
    down = tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends)
    up = tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends))
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "norm_eps": 1e-6,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": None,
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    }


class Ema(EMAModel):
    """The library's, but for the decay in the first step: (1 + k) / (10 + k) for k = 0, too."""

    def get_decay(self, optimization_step: int) -> float:
        step = optimization_step - 1  # it counts the present one
        return min(self.decay, (1 + step) / (10 + step))


class Diffusers(TorchPeer):
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(
        self, config: Config, params: Params, precision: str, device: str, mode: str
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = UNet2DModel(**unet_arguments(config))
        network.load_state_dict({key: torch.from_numpy(p) for key, p in params.items()})
        super().__init__(config, network, precision, device, mode)
        self.names = list(params)
        self.ema = Ema(self.network.parameters(), decay=config.ema_decay, foreach=self.tuned)
        tables = {
            "num_train_timesteps": config.timesteps,
            "beta_schedule": SCHEDULE[config.schedule],
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "prediction_type": PREDICTION[config.prediction],
            "clip_sample": config.clip,
        }
        self.schedule = DDPMScheduler(**tables)
        self.sampler = DDIMScheduler(**tables, set_alpha_to_one=True, timestep_spacing="trailing")

    def loss(self, x0, t, noise, labels):
        noisy = self.schedule.add_noise(x0, noise, t)
        target = noise if self.config.prediction == "eps" else x0
        if self.config.prediction == "v":
            target = self.schedule.get_velocity(x0, noise, t)
        with self.precise():
            out = self.network(noisy, t, class_labels=labels).sample
        return torch.nn.functional.mse_loss(out.to(self.dtype), target)

    def move_ema(self):
        self.ema.step(self.network.parameters())

    @torch.no_grad()
    def predict(self, x, t, labels=None):
        x, t, labels = (self.native(value) for value in (x, t, labels))
        return self._array(self._network(x, t, labels))

    def _network(self, x, t, labels):
        with self.precise():
            return self.network(x, t, class_labels=labels).sample.to(self.dtype)

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        loss = self.batch_loss(x0, t, noise, labels, drop)
        named = self._named()
        grads = torch.autograd.grad(loss, list(named.values()))
        return loss.item(), self._arrays(dict(zip(named, grads, strict=True)))

    @torch.no_grad()
    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        if method != "ddim" or eta:
            raise NotImplementedError("this peer samples with method = 'ddim', eta = 0 alone")
        steps = steps or self.config.timesteps
        if self.config.timesteps % steps:
            raise NotImplementedError(f"this peer samples with steps that divide T, not {steps}")
        self.sampler.set_timesteps(steps)
        x, labels = self.native(x), self.native(labels)
        null = None if guidance_scale is None else torch.full_like(labels, self.config.num_classes)
        trajectory = []
        for time in self.sampler.timesteps:
            if null is None:
                out = self._network(x, time, labels)
            else:  # S6
                both = self._network(torch.cat([x, x]), time, torch.cat([null, labels]))
                out_null, out_label = both.chunk(2)
                out = out_null + guidance_scale * (out_label - out_null)
            x = self.sampler.step(out, time, x, use_clipped_model_output=True).prev_sample
            trajectory.append(self._array(x))
        return np.stack(trajectory)

    def params(self):
        return self._arrays(self._named())

    def state(self) -> State:
        found = self._named()
        moments = {n: self.optimizer.state.get(p, {}) for n, p in found.items()}
        zeros = {n: torch.zeros_like(p) for n, p in found.items()}
        m, v = (
            {n: kept.get(part, zeros[n]) for n, kept in moments.items()}
            for part in ("exp_avg", "exp_avg_sq")
        )
        own = (key for key, _ in self.network.named_parameters())
        shadows = dict(zip(own, self.ema.shadow_params, strict=True))
        ema = {n: shadows[n] for n in self.names}
        parts = {"params": found, "m": m, "v": v, "ema": ema}
        return {"step": self.step, **{key: self._arrays(tree) for key, tree in parts.items()}}

    def describe(self):
        return self.described(name, f"diffusers {diffusers.__version__}", CHECKED)

    def _named(self) -> dict[str, torch.Tensor]:
        """The parameters by canonical name, in the order in which the blocks run."""
        named = dict(self.network.named_parameters())
        return {key: named[key] for key in self.names}

    def _array(self, x: torch.Tensor) -> np.ndarray:
        """Images [B, C, H, W] as an array [B, H, W, C] of its own."""
        return np.array(x.permute(0, 2, 3, 1).cpu().numpy(), order="C")

    def _arrays(self, tree: dict[str, torch.Tensor]) -> Params:
        return {n: np.array(p.detach().cpu().numpy(), order="C") for n, p in tree.items()}
