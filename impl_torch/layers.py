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


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I] -> [..., O]; many rows are taken as the pixels of 16 images.

    On a CPU, PyTorch gives products of matrices to MKL, which has AVX-512 for Intel's processors
    alone, and convolutions of 16 images or more to oneDNN, which has it for AMD's too: half the
    time there, and no more than MKL's with AVX2.
    """
    rows = x.numel() // x.shape[-1]
    if x.is_cuda or rows < 1024 or rows % 16:
        return F.linear(x, weight, bias)
    images = x.reshape(16, 1, rows // 16, -1).permute(0, 3, 1, 2)
    y = F.conv2d(images, weight[..., None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """x [..., I] -> [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """The layer above."""
    return Linear(fan_in, fan_out, bias=True)


def embedding(rows: int, width: int) -> nn.Embedding:
    """Row numbers [B] -> [B, O]."""
    return nn.Embedding(rows, width)


class Conv1x1(nn.Conv2d):
    """x [B, I, H, W] -> [B, O, H, W]; in channels_last memory, the product above for few images."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.is_contiguous() or len(x) >= 16:
            return super().forward(x)
        y = pointwise(x.permute(0, 2, 3, 1), self.weight[..., 0, 0], self.bias)
        return y.permute(0, 3, 1, 2)


def conv(fan_in: int, fan_out: int, size: int = 3, stride: int = 1, pad: int = 1) -> nn.Conv2d:
    """x [B, I, H, W] -> [B, O, H', W']; pad is the same on all four sides."""
    kind = Conv1x1 if size == 1 else nn.Conv2d
    return kind(fan_in, fan_out, size, stride, pad, bias=True)


class GroupNorm(nn.GroupNorm):
    """x [B, C, H, W], normalised over H, W and neighbouring channels, a group each, then scaled.

    For channels_last memory the framework's CPU kernel takes the variance in one pass, E[x^2] -
    E[x]^2, which loses all digits where the mean is far above the deviation. A shift of a whole
    group changes nothing, so one of its own values is taken off first. Its GPU kernel moves such
    memory to [B, C, H, W] and every convolution moves it back; written out, it stays as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            h = standardised(x.to(self.weight.dtype), self.num_groups)
            return (h * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
        size = x.shape[1] // self.num_groups
        shift = x.detach()[:, ::size, :1, :1].repeat_interleave(size, dim=1)  # [B, C, 1, 1]
        return super().forward(x - shift)


def standardised(x: Tensor, groups: int) -> Tensor:
    """x [B, C, H, W] with mean 0 and variance 1 in every group, in memory of the same order."""
    h = x.unflatten(1, (groups, -1))  # [B, G, C/G, H, W]
    variance, mean = torch.var_mean(h, (2, 3, 4), correction=0, keepdim=True)
    return ((h - mean) * torch.rsqrt(variance + EPS)).flatten(1, 2)


def group_norm(groups: int, width: int) -> nn.GroupNorm:
    """The layer above with the design's epsilon."""
    return GroupNorm(groups, width, eps=EPS, affine=True)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, N, C] -> [B, N, C]: softmax over keys of q.k / sqrt(C), applied to v."""
    scores = q @ k.mT * q.shape[-1] ** -0.5  # [B, queries, keys]
    return torch.softmax(scores, dim=-1) @ v


def nearest(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, 2H, 2W], every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
