"""What the peers on PyTorch have in common: devices, tensors, modes, and the train step."""

import contextlib
from typing import Any

import numpy as np
import torch

from conformance.bench.peers import Peer
from spec.backend import ARRAY_DTYPES
from spec.config import Config

DTYPES = ("float32", "tf32", "bf16")  # the libraries' own tables have no more digits
# As it comes; tuned: channels_last memory, Adam in one kernel, the EMA in one loop; and that with
# torch.compile, on a GPU also with all the time that it likes to search.
MODES = ("eager", "tuned", "compiled", "max-autotune")
BETAS, EPS = (0.9, 0.999), 1e-8


def place(device: str, dtype: str) -> torch.device:
    """The device; TF32 is allowed on it where that is asked for, and only there.

    Raises ValueError where PyTorch sees no GPU and one is needed.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': PyTorch sees no GPU here; use device='cpu' or 'auto'")
    if dtype == "tf32" and device == "cpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs, and PyTorch sees none here")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    return torch.device(device)


class TorchPeer(Peer):
    """A network of PyTorch with Adam and warm-up; the loss and the EMA are the library's."""

    def __init__(
        self, config: Config, network: torch.nn.Module, precision: str, device: str, mode: str
    ) -> None:
        self.config, self.precision, self.mode = config, precision, mode
        self.device, self.dtype = place(device, precision), getattr(torch, ARRAY_DTYPES[precision])
        self.tuned = mode != "eager"
        self.memory = torch.channels_last if self.tuned else torch.contiguous_format
        # torch.nn.Module.to itself: some libraries put their own around it, and warn
        self.network: Any = torch.nn.Module.to(
            network, self.device, self.dtype, memory_format=self.memory
        )
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=BETAS,
            eps=EPS,
            fused=True if self.tuned else None,  # None: as the library chooses
        )
        warmup = max(1, config.warmup)
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup)
        )
        self.step = 0
        if mode in ("compiled", "max-autotune"):
            self.network.compile(mode="max-autotune" if mode == "max-autotune" else None)

    def loss(self, x0, t, noise, labels) -> torch.Tensor:
        """The loss of a batch of tensors [B, C, H, W], as the library computes it."""
        raise NotImplementedError("a peer on PyTorch has a loss of its own")

    def move_ema(self) -> None:
        """Move the EMA towards the parameters, as the library does it."""
        raise NotImplementedError("a peer on PyTorch has an EMA of its own")

    def precise(self):
        """The context in which the network computes in the precision that was asked for."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def native(self, value: np.ndarray | None) -> torch.Tensor | None:
        """A tensor on the device; images [B, H, W, C] become [B, C, H, W]."""
        if value is None:
            return None
        tensor = torch.from_numpy(np.array(value)).to(self.device)
        if value.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=self.memory)
        return tensor

    def batch_loss(self, x0, t, noise, labels=None, drop=None) -> torch.Tensor:
        """The loss of a batch of arrays; where drop holds, the label is the null one."""
        x0, t, noise, labels, drop = (self.native(v) for v in (x0, t, noise, labels, drop))
        if drop is not None:
            labels = torch.where(drop, self.config.num_classes, labels)
        return self.loss(x0, t, noise, labels)

    def train_step(self, x0, t, noise, labels=None, drop=None) -> float:
        loss = self.batch_loss(x0, t, noise, labels, drop)
        loss.backward()
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.move_ema()
        self.step += 1
        return loss.item()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def described(self, name: str, library: str, checked: str) -> dict[str, Any]:
        """What `describe` gives."""
        on_gpu = self.device.type == "cuda"
        return {
            "name": name,
            "framework": f"torch {torch.__version__}, {library}",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "mode": self.mode,
            "dtype": self.precision,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "checked": checked,
        }
