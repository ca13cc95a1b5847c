"""S7: the U-Net of Ho et al. 2020. A block's `back` is its forward lines read bottom-up."""

import numpy as np

from impl_numpy.layers import (
    add,
    attend,
    conv,
    embedding,
    group_norm,
    linear,
    nearest,
    silu,
    time_table,
)


def no_tap(name, value):
    """What a tap does by default: nothing."""
    return value


def res_block(p, name, x, emb, groups):
    """x [B, H, W, I], emb [B, 4*C0] -> [B, H, W, O]; back adds the gradient of emb to g["emb"]."""
    h, norm1_back = group_norm(p, f"{name}.norm1", x, groups)  # S7
    h, silu1_back = silu(h)
    h, conv1_back = conv(p, f"{name}.conv1", h)
    e, silu_emb_back = silu(emb)
    e, proj_back = linear(p, f"{name}.time_emb_proj", e)
    h, norm2_back = group_norm(p, f"{name}.norm2", h + e[:, None, None, :], groups)
    h, silu2_back = silu(h)
    h, conv2_back = conv(p, f"{name}.conv2", h)
    shortcut, shortcut_back = x, None
    if f"{name}.conv_shortcut.weight" in p:
        shortcut, shortcut_back = conv(p, f"{name}.conv_shortcut", x, pad=(0, 0))

    def back(dy, g):
        dx = shortcut_back(dy, g) if shortcut_back else dy
        dh = norm2_back(silu2_back(conv2_back(dy, g), g), g)
        add(g, "emb", silu_emb_back(proj_back(dh.sum((1, 2)), g), g))
        return dx + norm1_back(silu1_back(conv1_back(dh, g), g), g)

    return h + shortcut, back


def attention(p, name, x, groups):
    """x [B, H, W, C] -> [B, H, W, C]: every pixel looks at all pixels, row by row."""
    h, norm_back = group_norm(p, f"{name}.group_norm", x, groups)  # S7
    h = h.reshape(h.shape[0], -1, h.shape[-1])  # [B, H*W, C]
    q, q_back = linear(p, f"{name}.to_q", h)
    k, k_back = linear(p, f"{name}.to_k", h)
    v, v_back = linear(p, f"{name}.to_v", h)
    h, attend_back = attend(q, k, v)
    h, out_back = linear(p, f"{name}.to_out.0", h)

    def back(dy, g):
        dq, dk, dv = attend_back(out_back(dy.reshape(h.shape), g), g)
        dh = q_back(dq, g) + k_back(dk, g) + v_back(dv, g)
        return dy + norm_back(dh.reshape(x.shape), g)

    return x + h.reshape(x.shape), back


def downsample(p, name, x):
    """x [B, H, W, C] -> [B, H/2, W/2, C]; padded below and on the right only."""
    return conv(p, f"{name}.conv", x, stride=2, pad=(0, 1))  # S7


def upsample(p, name, x):
    """x [B, H, W, C] -> [B, 2H, 2W, C]."""
    h, nearest_back = nearest(x)  # S7
    h, conv_back = conv(p, f"{name}.conv", h)
    return h, lambda dy, g: nearest_back(conv_back(dy, g), g)


def embed(p, proj, labels):
    """proj [B, C0], labels [B] -> emb [B, 4*C0]: what every ResBlock is told."""
    h, linear1_back = linear(p, "time_embedding.linear_1", proj)  # S7
    h, silu_back = silu(h)
    emb, linear2_back = linear(p, "time_embedding.linear_2", h)
    class_back = None
    if labels is not None:
        rows, class_back = embedding(p, "class_embedding", labels)
        emb = emb + rows

    def back(dy, g):
        if class_back:
            class_back(dy, g)
        linear1_back(silu_back(linear2_back(dy, g), g), g)

    return emb, back


def head(p, x, groups):
    """x [B, H, W, C0] -> the network's output [B, H, W, C]."""
    h, norm_back = group_norm(p, "conv_norm_out", x, groups)  # S7
    h, silu_back = silu(h)
    h, conv_back = conv(p, "conv_out", h)
    return h, lambda dy, g: norm_back(silu_back(conv_back(dy, g), g), g)


def push_skip(skips, h):
    """Keep h for the way up; back adds the gradient that came over the skip."""
    skips.append(h)
    return h, lambda dy, g: dy + g["skips"].pop()


def join_skip(h, skips):
    """[h, skip] along the channels, last skip first; back keeps the skip's gradient."""
    width = h.shape[-1]

    def back(dy, g):
        g.setdefault("skips", []).append(dy[..., width:])
        return dy[..., :width]

    return np.concatenate([h, skips.pop()], axis=-1), back


class UNet:
    """The network; its parameters, under canonical names, wait for load_params."""

    def __init__(self, config, dtype):
        self.config, self.params = config, {}
        self.time_table = time_table(config.timesteps, config.channels[0]).astype(dtype)

    def __call__(self, x, t, labels=None, tap=no_tap):
        """The output [B, H, W, C] for x of that shape, t [B] and labels [B]."""
        return self.forward(x, t, labels, tap)[0]

    def forward(self, x, t, labels=None, tap=no_tap):
        """The output and its back; tap(name, value) sees what every block gives."""
        p, groups, backs, skips = self.params, self.config.groups, [], []

        def run(step, name=None):  # one link of the chain from x to the output
            y, back = step
            backs.append(back)
            return tap(name, y) if name else y

        proj = tap("time_proj", self.time_table[t])  # S7
        emb, embed_back = embed(p, proj, labels)
        emb = tap("emb", emb)
        h = run(conv(p, "conv_in", x), "conv_in")
        h = run(push_skip(skips, h))
        for level in range(self.config.levels):
            for i in range(self.config.layers_per_block):
                name = f"down_blocks.{level}.resnets.{i}"
                h = run(res_block(p, name, h, emb, groups), name)
                if level in self.config.attention_levels:
                    name = f"down_blocks.{level}.attentions.{i}"
                    h = run(attention(p, name, h, groups), name)
                h = run(push_skip(skips, h))
            if level < self.config.levels - 1:
                name = f"down_blocks.{level}.downsamplers.0"
                h = run(downsample(p, name, h), name)
                h = run(push_skip(skips, h))
        h = run(res_block(p, "mid_block.resnets.0", h, emb, groups), "mid_block.resnets.0")
        h = run(attention(p, "mid_block.attentions.0", h, groups), "mid_block.attentions.0")
        h = run(res_block(p, "mid_block.resnets.1", h, emb, groups), "mid_block.resnets.1")
        for step, level in enumerate(reversed(range(self.config.levels))):
            for i in range(self.config.layers_per_block + 1):
                name = f"up_blocks.{step}.resnets.{i}"
                h = run(join_skip(h, skips))
                h = run(res_block(p, name, h, emb, groups), name)
                if level in self.config.attention_levels:
                    name = f"up_blocks.{step}.attentions.{i}"
                    h = run(attention(p, name, h, groups), name)
            if level > 0:
                name = f"up_blocks.{step}.upsamplers.0"
                h = run(upsample(p, name, h), name)
        h = run(head(p, h, groups), "conv_out")

        def back(dy, g):
            for step_back in reversed(backs):
                dy = step_back(dy, g)
            embed_back(g.pop("emb"), g)
            del g["skips"]
            return dy

        return h, back
