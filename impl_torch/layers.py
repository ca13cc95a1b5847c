"""The layers with every default of the framework written out."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every GroupNorm (S7); the framework's default is 1e-5


def time_table(timesteps: int, width: int) -> Tensor:
    """[T, width] in float64: the sines of every time, then the cosines."""
    half = width // 2  # S7
    frequencies = np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
    angles = np.arange(timesteps)[:, None] * frequencies
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """x [..., I] -> [..., O]."""
    return nn.Linear(fan_in, fan_out, bias=True)


def embedding(rows: int, width: int) -> nn.Embedding:
    """Row numbers [B] -> [B, O]."""
    return nn.Embedding(rows, width)


def conv(fan_in: int, fan_out: int, size: int = 3, stride: int = 1, pad: int = 1) -> nn.Conv2d:
    """x [B, I, H, W] -> [B, O, H', W']; pad is the same on all four sides."""
    return nn.Conv2d(fan_in, fan_out, size, stride, pad, bias=True)


class GroupNorm(nn.GroupNorm):
    """x [B, C, H, W], normalised over H, W and neighbouring channels, a group each, then scaled.

    For channels_last memory the framework's CPU kernel takes the variance in one pass, E[x^2] -
    E[x]^2, which loses all digits where the mean is far above the deviation. A shift of a whole
    group changes nothing, so one of its own values is taken off first.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1] // self.num_groups
        shift = x.detach()[:, ::size, :1, :1].repeat_interleave(size, dim=1)  # [B, C, 1, 1]
        return super().forward(x - shift)


def group_norm(groups: int, width: int) -> nn.GroupNorm:
    """The layer above with the design's epsilon."""
    return GroupNorm(groups, width, eps=EPS, affine=True)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, N, C] -> [B, N, C]: softmax over keys of q.k / sqrt(C), applied to v."""
    return F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def nearest(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, 2H, 2W], every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
