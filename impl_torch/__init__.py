"""The design in PyTorch: nn.Module and autograd, images as [B, C, H, W] in channels_last memory."""

from impl_torch.backend import dtypes, modes, name, open

__all__ = ["dtypes", "modes", "name", "open"]
