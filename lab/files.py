"""S12: weights and settings on disk, in the layout that diffusers opens. No pickle."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

from spec.config import Config, load_config
from spec.params import check_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = "config.json"  # what diffusers reads: the network alone
CONFIG = "config.toml"  # what `load_config` reads: the network, the schedule and the training
DOWN, DOWN_ATTENTION = "DownBlock2D", "AttnDownBlock2D"
UP, UP_ATTENTION = "UpBlock2D", "AttnUpBlock2D"

# S7: key of UNet2DModel -> (what it must be, what diffusers takes where the key is missing).
FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "dropout": (0.0, 0.0),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "num_train_timesteps": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
# The keys that a Config decides, and what diffusers takes where one is missing.
FREE: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": [DOWN, DOWN_ATTENTION, DOWN_ATTENTION, DOWN_ATTENTION],
    "up_block_types": [UP_ATTENTION, UP_ATTENTION, UP_ATTENTION, UP],
    "num_class_embeds": None,
}
# The fields of a Config that make the network.
NETWORK = (
    "image_size",
    "in_channels",
    "channels",
    "layers_per_block",
    "groups",
    "attention_levels",
    "num_classes",
)


class FileError(ValueError):
    """A file that is missing, broken or not of this design; the message names it."""


def write_atomically(path: Path, data: bytes) -> None:
    """Put data at path so that a kill at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp allows the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_diffusers(config: Config) -> dict[str, Any]:
    """The settings of diffusers' UNet2DModel that make this network (S7)."""
    attention = [level in config.attention_levels for level in range(config.levels)]
    height, width = config.image_size
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "down_block_types": [DOWN_ATTENTION if a else DOWN for a in attention],
        "up_block_types": [UP_ATTENTION if a else UP for a in reversed(attention)],
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
        **{key: needed for key, (needed, _) in FIXED.items()},
    }


def from_diffusers(settings: dict[str, Any], base: Config) -> Config:
    """`base` with the network that these settings of UNet2DModel describe.

    A key that is not there counts as diffusers' default. Raises FileError that names every
    setting which this design does not have: what it is, what it would have to be.
    """
    given = {key: value for key, value in settings.items() if not key.startswith("_")}
    free = {key: given.get(key, default) for key, default in FREE.items()}
    problems = [
        f"{key} = {given.get(key, default)!r}, expected {needed!r}"
        for key, (needed, default) in FIXED.items()
        if given.get(key, default) != needed
    ]
    problems += [f"{key} is unknown" for key in given if key not in FIXED and key not in FREE]
    for key, default in FREE.items():
        if isinstance(default, list) and not isinstance(free[key], list):
            problems.append(f"{key} = {free[key]!r}, expected a list")
            free[key] = default
    if (class_name := settings.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        problems.append(f"_class_name = {class_name!r}, expected 'UNet2DModel'")
    if free["in_channels"] != free["out_channels"]:
        problems.append(f"out_channels = {free['out_channels']}, expected in_channels")
    size = free["sample_size"]
    if isinstance(size, int):
        size = [size, size]
    if not isinstance(size, list):
        problems.append(f"sample_size = {size!r}, expected a number or [height, width]")
    down, up = free["down_block_types"], free["up_block_types"]
    attention = [i for i, kind in enumerate(down) if kind == DOWN_ATTENTION]
    if unknown := [str(kind) for kind in down if kind not in (DOWN, DOWN_ATTENTION)]:
        problems.append(
            f"down_block_types holds {', '.join(unknown)}, expected {DOWN}, {DOWN_ATTENTION}"
        )
    expected_up = [UP_ATTENTION if i in attention else UP for i in reversed(range(len(down)))]
    if up != expected_up:
        problems.append(f"up_block_types = {up}, expected {expected_up}, down_block_types mirrored")
    classes = free["num_class_embeds"]
    if classes is not None and (not isinstance(classes, int) or classes < 2):
        problems.append(f"num_class_embeds = {classes!r}, expected classes + 1 (the null label)")
    if problems:
        raise FileError(f"settings that this design does not have: {'; '.join(problems)}")
    same_order = base.attention_levels  # diffusers' settings do not keep the order
    return base.replace(
        image_size=tuple(size),
        in_channels=free["in_channels"],
        channels=tuple(free["block_out_channels"]),
        layers_per_block=free["layers_per_block"],
        groups=free["norm_num_groups"],
        attention_levels=same_order if sorted(same_order) == attention else tuple(attention),
        num_classes=classes - 1 if classes else 0,
        label_dropout=base.label_dropout if classes else 0.0,
    )


def config_text(config: Config) -> str:
    """The config as TOML, one field a line, as `load_config` reads it."""
    values = dataclasses.asdict(config)
    # JSON writes numbers, strings, booleans and lists as TOML does.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def write_run(folder: Path, config: Config, params: dict[str, np.ndarray]) -> None:
    """Write a run's weights and settings; diffusers' UNet2DModel.from_pretrained opens them."""
    tensors = {
        name: np.ascontiguousarray(value, np.float32)
        for name, value in check_params(config, params).items()
    }
    write_atomically(folder / CONFIG, config_text(config).encode())
    write_atomically(
        folder / SETTINGS, (json.dumps(to_diffusers(config), indent=2) + "\n").encode()
    )
    # Last, for it is what makes the folder a run.
    write_atomically(folder / WEIGHTS, to_safetensors(tensors, metadata={"format": "pt"}))


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, in float32. Raises FileError."""
    try:
        tensors = parse_safetensors(path.read_bytes())
    except OSError as error:
        raise FileError(f"weights {path} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError) as error:
        raise FileError(f"weights {path} are not a safetensors file of NumPy's types") from error
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a `config.json`. Raises FileError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"settings {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise FileError(f"settings {path} hold a {type(settings).__name__}, expected an object")
    return settings


def read_run(source: Path, config_name: str | None) -> tuple[Config, dict[str, np.ndarray]]:
    """The config and weights of a run's folder or a safetensors file, checked to fit together.

    `config_name` is a config's name or path; None stands for the folder's own `config.toml`. Where
    the folder holds a `config.json`, it must describe the same network. Raises FileError,
    ConfigError or ParameterError.
    """
    folder = source if source.is_dir() else None
    if config_name is None and (folder is None or not (folder / CONFIG).exists()):
        raise FileError(f"{source} holds no {CONFIG}: name the config that it was made with")
    config = load_config(folder / CONFIG if folder and config_name is None else str(config_name))
    if folder and (folder / SETTINGS).exists():
        found = from_diffusers(read_settings(folder / SETTINGS), config)
        differ = [
            f"{name} = {getattr(found, name)}, the config has {getattr(config, name)}"
            for name in NETWORK
            if getattr(found, name) != getattr(config, name)
        ]
        if differ:
            raise FileError(
                f"{folder / SETTINGS} is not the network of config {config.name!r}: "
                f"{'; '.join(differ)}"
            )
    weights = read_weights(folder / WEIGHTS if folder else source)
    return config, check_params(config, weights)
