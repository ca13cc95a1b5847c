"""S7: the U-Net of Ho et al. 2020. Attributes are named as in the canonical names."""

import jax.numpy as jnp
from flax import nnx

from impl_jax.layers import attend, conv, embedding, group_norm, linear, nearest, silu, time_table


def no_tap(name, value):
    """What a tap does by default: nothing."""
    return value


class ResBlock(nnx.Module):
    """x [B, H, W, I], emb [B, 4*C0] -> [B, H, W, O]."""

    def __init__(self, fan_in, fan_out, config, dtype):
        self.norm1 = group_norm(config.groups, fan_in, dtype)
        self.conv1 = conv(fan_in, fan_out, dtype)
        self.time_emb_proj = linear(config.time_width, fan_out, dtype)
        self.norm2 = group_norm(config.groups, fan_out, dtype)
        self.conv2 = conv(fan_out, fan_out, dtype)
        shortcut = conv(fan_in, fan_out, dtype, 1, pad=(0, 0)) if fan_in != fan_out else None
        self.conv_shortcut = nnx.data(shortcut)  # part of the tree even where it is None

    def __call__(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))  # S7
        h = h + self.time_emb_proj(silu(emb))[:, None, None, :]
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """x [B, H, W, C] -> [B, H, W, C]: every pixel looks at all pixels, row by row."""

    def __init__(self, width, config, dtype):
        self.group_norm = group_norm(config.groups, width, dtype)
        self.to_q, self.to_k, self.to_v = (linear(width, width, dtype) for _ in range(3))
        self.to_out = nnx.List([linear(width, width, dtype)])

    def __call__(self, x):
        h = self.group_norm(x)  # S7
        h = h.reshape(h.shape[0], -1, h.shape[-1])  # [B, H*W, C]
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.reshape(x.shape)


class Downsample(nnx.Module):
    """x [B, H, W, C] -> [B, H/2, W/2, C]; padded below and on the right only."""

    def __init__(self, width, dtype):
        self.conv = conv(width, width, dtype, stride=2, pad=(0, 1))

    def __call__(self, x):
        return self.conv(x)  # S7


class Upsample(nnx.Module):
    """x [B, H, W, C] -> [B, 2H, 2W, C]."""

    def __init__(self, width, dtype):
        self.conv = conv(width, width, dtype)

    def __call__(self, x):
        return self.conv(nearest(x))  # S7


class Level(nnx.Module):
    """The blocks of one resolution; a list may be empty."""

    def __init__(self, fan_ins, width, config, dtype, attentions=0, down=False, up=False):
        self.resnets = nnx.List([ResBlock(fan_in, width, config, dtype) for fan_in in fan_ins])
        self.attentions = nnx.List([Attention(width, config, dtype) for _ in range(attentions)])
        self.downsamplers = nnx.List([Downsample(width, dtype)] if down else [])
        self.upsamplers = nnx.List([Upsample(width, dtype)] if up else [])


class UNet(nnx.Module):
    """The network; its parameters wait for load_params."""

    def __init__(self, config, dtype):
        widths, count, emb_width = config.channels, config.layers_per_block, config.time_width
        self.config = config
        self.time_embedding = nnx.Dict(
            linear_1=linear(widths[0], emb_width, dtype),
            linear_2=linear(emb_width, emb_width, dtype),
        )
        if config.num_classes:
            self.class_embedding = embedding(config.num_classes + 1, emb_width, dtype)
        self.conv_in = conv(config.in_channels, widths[0], dtype)
        self.down_blocks, self.up_blocks = nnx.List(), nnx.List()
        skips = [widths[0]]  # the width of every skip
        for level, width in enumerate(widths):
            fan_ins = [skips[-1]] + [width] * (count - 1)
            attentions = count if level in config.attention_levels else 0
            down = level < config.levels - 1
            self.down_blocks.append(Level(fan_ins, width, config, dtype, attentions, down=down))
            skips += [width] * (count + down)
        self.mid_block = Level([width, width], width, config, dtype, attentions=1)
        for level in reversed(range(config.levels)):
            fan_ins = [width + skips.pop()] + [widths[level] + skips.pop() for _ in range(count)]
            width = widths[level]
            attentions = count + 1 if level in config.attention_levels else 0
            self.up_blocks.append(Level(fan_ins, width, config, dtype, attentions, up=level > 0))
        self.conv_norm_out = group_norm(config.groups, width, dtype)
        self.conv_out = conv(width, config.in_channels, dtype)

    @property
    def time_table(self):
        """The sines and cosines of every time [T, C0]: a constant where the step is compiled."""
        table = time_table(self.config.timesteps, self.config.channels[0])
        return jnp.asarray(table, self.conv_in.bias.dtype)

    def embed(self, proj, labels):
        """proj [B, C0], labels [B] -> emb [B, 4*C0]: what every ResBlock is told."""
        h = silu(self.time_embedding["linear_1"](proj))  # S7
        emb = self.time_embedding["linear_2"](h)
        return emb if labels is None else emb + self.class_embedding(labels)

    def head(self, x):
        """x [B, H, W, C0] -> the network's output [B, H, W, C]."""
        return self.conv_out(silu(self.conv_norm_out(x)))  # S7

    def __call__(self, x, t, labels=None, tap=no_tap):
        """The output [B, H, W, C] for x of that shape, t [B] and labels [B].

        tap(name, value) sees what every block gives.
        """
        proj = tap("time_proj", self.time_table[t])  # S7
        emb = tap("emb", self.embed(proj, labels))
        h = tap("conv_in", self.conv_in(x))
        skips = [h]
        for level, block in enumerate(self.down_blocks):
            for i, resnet in enumerate(block.resnets):
                h = tap(f"down_blocks.{level}.resnets.{i}", resnet(h, emb))
                if block.attentions:
                    h = tap(f"down_blocks.{level}.attentions.{i}", block.attentions[i](h))
                skips.append(h)
            for downsample in block.downsamplers:
                h = tap(f"down_blocks.{level}.downsamplers.0", downsample(h))
                skips.append(h)
        h = tap("mid_block.resnets.0", self.mid_block.resnets[0](h, emb))
        h = tap("mid_block.attentions.0", self.mid_block.attentions[0](h))
        h = tap("mid_block.resnets.1", self.mid_block.resnets[1](h, emb))
        for step, block in enumerate(self.up_blocks):
            for i, resnet in enumerate(block.resnets):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = tap(f"up_blocks.{step}.resnets.{i}", resnet(h, emb))
                if block.attentions:
                    h = tap(f"up_blocks.{step}.attentions.{i}", block.attentions[i](h))
            for upsample in block.upsamplers:
                h = tap(f"up_blocks.{step}.upsamplers.0", upsample(h))
        out = tap("conv_out", self.head(h))
        return out.astype(self.conv_in.bias.dtype)  # bfloat16, where used, ends here
