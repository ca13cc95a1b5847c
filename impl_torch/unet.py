"""S7: the U-Net of Ho et al. 2020. Attributes are named so that state_dict has canonical names."""

import torch
import torch.nn.functional as F
from torch import nn

from impl_torch.layers import attend, conv, embedding, group_norm, linear, nearest, silu, time_table


def no_tap(name, value):
    """What a tap does by default: nothing."""
    return value


class ResBlock(nn.Module):
    """x [B, I, H, W], emb [B, 4*C0] -> [B, O, H, W]."""

    def __init__(self, fan_in, fan_out, config):
        super().__init__()
        self.norm1 = group_norm(config.groups, fan_in)
        self.conv1 = conv(fan_in, fan_out)
        self.time_emb_proj = linear(config.time_width, fan_out)
        self.norm2 = group_norm(config.groups, fan_out)
        self.conv2 = conv(fan_out, fan_out)
        self.conv_shortcut = conv(fan_in, fan_out, 1, pad=0) if fan_in != fan_out else None

    def forward(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))  # S7
        h += self.time_emb_proj(silu(emb))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class Attention(nn.Module):
    """x [B, C, H, W] -> [B, C, H, W]: every pixel looks at all pixels, row by row."""

    def __init__(self, width, config):
        super().__init__()
        self.group_norm = group_norm(config.groups, width)
        self.to_q, self.to_k, self.to_v = (linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x)  # S7
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, C]
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """x [B, C, H, W] -> [B, C, H/2, W/2]; padded below and on the right only."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width, stride=2, pad=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # S7


class Upsample(nn.Module):
    """x [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x):
        return self.conv(nearest(x))  # S7


class Level(nn.Module):
    """The blocks of one resolution; a list may be empty."""

    def __init__(self, fan_ins, width, config, attentions=0, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(fan_in, width, config) for fan_in in fan_ins])
        self.attentions = nn.ModuleList([Attention(width, config) for _ in range(attentions)])
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])


class UNet(nn.Module):
    """The network; its parameters wait for load_params."""

    def __init__(self, config):
        super().__init__()
        widths, count, emb_width = config.channels, config.layers_per_block, config.time_width
        table = time_table(config.timesteps, widths[0])
        self.register_buffer("time_table", table, persistent=False)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": linear(widths[0], emb_width), "linear_2": linear(emb_width, emb_width)}
        )
        if config.num_classes:
            self.class_embedding = embedding(config.num_classes + 1, emb_width)
        self.conv_in = conv(config.in_channels, widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]  # the width of every skip
        for level, width in enumerate(widths):
            fan_ins = [skips[-1]] + [width] * (count - 1)
            attentions = count if level in config.attention_levels else 0
            down = level < config.levels - 1
            self.down_blocks.append(Level(fan_ins, width, config, attentions, down=down))
            skips += [width] * (count + down)
        self.mid_block = Level([width, width], width, config, attentions=1)
        for level in reversed(range(config.levels)):
            fan_ins = [width + skips.pop()] + [widths[level] + skips.pop() for _ in range(count)]
            width = widths[level]
            attentions = count + 1 if level in config.attention_levels else 0
            self.up_blocks.append(Level(fan_ins, width, config, attentions, up=level > 0))
        self.conv_norm_out = group_norm(config.groups, width)
        self.conv_out = conv(width, config.in_channels)

    def embed(self, proj, labels):
        """proj [B, C0], labels [B] -> emb [B, 4*C0]: what every ResBlock is told."""
        h = silu(self.time_embedding["linear_1"](proj))  # S7
        emb = self.time_embedding["linear_2"](h)
        return emb if labels is None else emb + self.class_embedding(labels)

    def head(self, x):
        """x [B, C0, H, W] -> the network's output [B, C, H, W]."""
        return self.conv_out(silu(self.conv_norm_out(x)))  # S7

    def forward(self, x, t, labels=None, tap=no_tap):
        """The output [B, C, H, W] for x of that shape, t [B] and labels [B].

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
                h = torch.cat([h, skips.pop()], dim=1)
                h = tap(f"up_blocks.{step}.resnets.{i}", resnet(h, emb))
                if block.attentions:
                    h = tap(f"up_blocks.{step}.attentions.{i}", block.attentions[i](h))
            for upsample in block.upsamplers:
                h = tap(f"up_blocks.{step}.upsamplers.0", upsample(h))
        return tap("conv_out", self.head(h))
