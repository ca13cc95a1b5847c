"""S7, S10: the blocks and parameters of a config by canonical name, and initial values."""

import dataclasses
import math

import numpy as np

from spec.config import Config
from spec.noise import uniforms

OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ParameterError(ValueError):
    """Parameters that do not fit a config; the message names every one of them."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of the network: what `taps` records and what `run_block` runs alone."""

    name: str  # diffusers' module name, such as down_blocks.0.resnets.0
    kind: str  # time_proj, emb, conv_in, resnet, attention, downsample, upsample, conv_out
    in_channels: int = 0
    out_channels: int = 0
    level: int = 0  # the resolution of its input: H / 2^level

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arguments of `run_block` that this block takes."""
        special = {"time_proj": ("t",), "emb": ("t", "labels"), "resnet": ("x", "emb")}
        return special.get(self.kind, ("x",))


def blocks(config: Config) -> list[Block]:
    """Every block of the network in the order in which it runs (S7)."""
    widths, last = config.channels, config.levels - 1
    plan = [
        Block("time_proj", "time_proj", 0, widths[0]),
        Block("emb", "emb", widths[0], config.time_width),
        Block("conv_in", "conv_in", config.in_channels, widths[0]),
    ]
    skips, width = [widths[0]], widths[0]
    for level in range(config.levels):
        name = f"down_blocks.{level}"
        for i in range(config.layers_per_block):
            plan.append(Block(f"{name}.resnets.{i}", "resnet", width, widths[level], level))
            width = widths[level]
            if level in config.attention_levels:
                plan.append(Block(f"{name}.attentions.{i}", "attention", width, width, level))
            skips.append(width)
        if level < last:
            plan.append(Block(f"{name}.downsamplers.0", "downsample", width, width, level))
            skips.append(width)
    plan.append(Block("mid_block.resnets.0", "resnet", width, width, last))
    plan.append(Block("mid_block.attentions.0", "attention", width, width, last))
    plan.append(Block("mid_block.resnets.1", "resnet", width, width, last))
    for step, level in enumerate(reversed(range(config.levels))):
        name = f"up_blocks.{step}"
        for i in range(config.layers_per_block + 1):
            joined = width + skips.pop()
            plan.append(Block(f"{name}.resnets.{i}", "resnet", joined, widths[level], level))
            width = widths[level]
            if level in config.attention_levels:
                plan.append(Block(f"{name}.attentions.{i}", "attention", width, width, level))
        if level > 0:
            plan.append(Block(f"{name}.upsamplers.0", "upsample", width, width, level))
    plan.append(Block("conv_out", "conv_out", width, config.in_channels))
    return plan


def find_block(config: Config, name: str) -> Block:
    """The block of this name. Raises ValueError that lists the names there are."""
    plan = {block.name: block for block in blocks(config)}
    if name not in plan:
        raise ValueError(f"unknown block {name!r}; config {config.name!r} has {', '.join(plan)}")
    return plan[name]


def _linear(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _conv(name: str, fan_in: int, fan_out: int, size: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in, size, size), f"{name}.bias": (fan_out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block_shapes(config: Config, block: Block) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the parameters of one block (linear OI, convolution OIHW)."""
    name, cin, cout = block.name, block.in_channels, block.out_channels
    if block.kind == "emb":
        shapes = _linear("time_embedding.linear_1", cin, cout)
        shapes |= _linear("time_embedding.linear_2", cout, cout)
        if config.num_classes:
            shapes["class_embedding.weight"] = (config.num_classes + 1, cout)
        return shapes
    if block.kind == "resnet":
        shapes = _norm(f"{name}.norm1", cin) | _conv(f"{name}.conv1", cin, cout)
        shapes |= _linear(f"{name}.time_emb_proj", config.time_width, cout)
        shapes |= _norm(f"{name}.norm2", cout) | _conv(f"{name}.conv2", cout, cout)
        return shapes | (_conv(f"{name}.conv_shortcut", cin, cout, 1) if cin != cout else {})
    if block.kind == "attention":
        shapes = _norm(f"{name}.group_norm", cin)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{name}.{part}", cin, cin)
        return shapes
    if block.kind in ("downsample", "upsample"):
        return _conv(f"{name}.conv", cin, cout)
    if block.kind == "conv_in":
        return _conv("conv_in", cin, cout)
    if block.kind == "conv_out":
        return _norm("conv_norm_out", cin) | _conv("conv_out", cin, cout)
    return {}


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, in the order in which the blocks run."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in blocks(config):
        shapes |= block_shapes(config, block)
    return shapes


def parameter_count(config: Config) -> int:
    """Number of scalars in all parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def initial_params(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Initial weights in float32 (S10): tensor i is keyed by (seed, "init", i).

    Linear and convolution: uniform within 1/sqrt(fan_in), weight and bias alike; GroupNorm: 1 and
    0; class embedding: uniform with variance 1. Source: the defaults of PyTorch, which
    diffusers keeps (but for the embedding, normal there).
    """
    shapes, params = parameter_shapes(config), {}
    for i, (name, shape) in enumerate(shapes.items()):
        module, _, part = name.rpartition(".")
        if "norm" in module.rpartition(".")[2]:
            params[name] = np.full(shape, 1.0 if part == "weight" else 0.0, np.float32)
            continue
        fan_in = math.prod(shapes[f"{module}.weight"][1:])
        bound = math.sqrt(3) if module == "class_embedding" else 1 / math.sqrt(fan_in)
        params[name] = (bound * (2 * uniforms(seed, "init", i, shape) - 1)).astype(np.float32)
    return params


def canonical_name(name: str) -> str:
    """The canonical name of a parameter, from that or from the older names of its attention."""
    module, _, part = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if ".attentions." in name and last in OLD_ATTENTION_NAMES:
        return f"{parent}.{OLD_ATTENTION_NAMES[last]}.{part}"
    return name


def check_params(config: Config, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters in canonical names and order, after every check.

    Raises ParameterError that names all that are missing, extra, misshapen, not floating point,
    or not finite.
    """
    shapes, given = parameter_shapes(config), {}
    for name, value in params.items():
        canonical = canonical_name(name)
        if canonical in given:
            raise ParameterError(f"parameter {canonical} is given twice, once as {name}; keep one")
        given[canonical] = np.asarray(value)
    problems = []
    if missing := [name for name in shapes if name not in given]:
        problems.append(f"missing: {', '.join(missing)}")
    if extra := [name for name in given if name not in shapes]:
        problems.append(f"not in this config: {', '.join(extra)}")
    for name, shape in shapes.items():
        if name not in given:
            continue
        value = given[name]
        if value.shape != shape:
            problems.append(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        elif value.dtype.kind != "f":
            problems.append(f"{name} has dtype {value.dtype}, expected a floating point one")
        elif not np.isfinite(value).all():
            bad = np.unravel_index(np.argmin(np.isfinite(value)), shape)
            problems.append(f"{name} holds {value[bad]} at {[int(i) for i in bad]}")
    if problems:
        raise ParameterError(
            f"parameters do not fit config {config.name!r}: {'; '.join(problems)}. "
            "Give the config that they were made with, or finite weights of these shapes"
        )
    return {name: given[name] for name in shapes}
