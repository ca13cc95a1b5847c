"""S7 once more, for peers whose library has layers and no such network: what runs in what order."""

from typing import Any, Protocol

from spec.config import Config
from spec.params import Block, blocks

Array = Any  # of the library


class Layers(Protocol):
    """The layers of a library by canonical name; images are [B, H, W, C]."""

    def times(self, t: Array) -> Array:
        """[B] -> the sines of S7, [B, channels[0]]."""
        ...

    def classes(self, labels: Array) -> Array:
        """[B] -> rows of class_embedding, [B, 4*channels[0]]."""
        ...

    def linear(self, name: str, x: Array, width: int) -> Array:
        """[B, I] -> [B, width]."""
        ...

    def conv(self, name: str, x: Array, width: int, size: int = 3) -> Array:
        """[B, H, W, I] -> [B, H, W, width]."""
        ...

    def half(self, name: str, x: Array, width: int) -> Array:
        """[B, H, W, I] -> [B, H/2, W/2, width], padded below and on the right."""
        ...

    def double(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
        ...

    def norm(self, name: str, x: Array) -> Array:
        """GroupNorm of [B, H, W, C]."""
        ...

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x)."""
        ...

    def attend(self, name: str, x: Array) -> Array:
        """[B, H, W, C] -> the same: attention of one head over all pixels, its four layers too."""
        ...

    def everywhere(self, x: Array, emb: Array) -> Array:
        """x [B, H, W, C] plus emb [B, C] at every pixel."""
        ...

    def join(self, x: Array, skip: Array) -> Array:
        """Both, one behind the other along the channels."""
        ...


def unet(config: Config, layers: Layers, x: Array, t: Array, labels: Array = None) -> Array:
    """The output [B, H, W, C] of the network of S7 for x of that shape, t [B] and labels [B]."""
    width = config.time_width
    emb = layers.silu(layers.linear("time_embedding.linear_1", layers.times(t), width))
    emb = layers.linear("time_embedding.linear_2", emb, width)
    if config.num_classes:
        emb = emb + layers.classes(labels)
    skips: list[Array] = []
    h = x
    for block in blocks(config):
        name, cout = block.name, block.out_channels
        down = name.startswith("down_blocks")
        if block.kind == "conv_in":
            h = layers.conv(name, h, cout)
        elif block.kind == "resnet":
            if name.startswith("up_blocks"):
                h = layers.join(h, skips.pop())
            h = resnet(layers, block, h, emb)
        elif block.kind == "attention":
            h = h + layers.attend(name, layers.norm(f"{name}.group_norm", h))
        elif block.kind == "downsample":
            h = layers.half(f"{name}.conv", h, cout)
        elif block.kind == "upsample":
            h = layers.conv(f"{name}.conv", layers.double(h), cout)
        elif block.kind == "conv_out":
            h = layers.conv(name, layers.silu(layers.norm("conv_norm_out", h)), cout)
        waits = block.kind == "resnet" and block.level in config.attention_levels
        if block.kind == "conv_in" or (down and not waits):
            skips.append(h)  # after its attention, where a resnet has one
    return h


def resnet(layers: Layers, block: Block, x: Array, emb: Array) -> Array:
    """One residual block, [B, H, W, I] -> [B, H, W, O]."""
    name, cout = block.name, block.out_channels
    h = layers.conv(f"{name}.conv1", layers.silu(layers.norm(f"{name}.norm1", x)), cout)
    moved = layers.linear(f"{name}.time_emb_proj", layers.silu(emb), cout)
    h = layers.everywhere(h, moved)
    h = layers.conv(f"{name}.conv2", layers.silu(layers.norm(f"{name}.norm2", h)), cout)
    same = block.in_channels == cout
    return h + (x if same else layers.conv(f"{name}.conv_shortcut", x, cout, 1))
