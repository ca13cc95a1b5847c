"""S12: weights and settings on disk, in the layouts that diffusers opens and writes. No pickle."""

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

from spec.config import Config, ConfigError, load_config
from spec.params import check_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = "config.json"  # what diffusers reads: the network alone
CONFIG = "config.toml"  # what `load_config` reads: the network, the schedule and the training
SCHEDULER = "scheduler_config.json"  # what diffusers reads: the schedule and the sampling
INDEX = "model_index.json"  # what makes the folder one that DDPMPipeline opens
UNET, SCHEDULER_FOLDER = "unet", "scheduler"  # parts of a pipeline that has a folder for each
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HO2020 = "ddpm_cifar10"  # the config to start from where a folder has none of this design
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
# S1 to S5: what a Config calls -> what the schedulers of diffusers call it.
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large"}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
# The keys of a scheduler that a Config decides, and what diffusers takes where one is missing.
SCHEDULER_FREE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
# Key of a scheduler -> what it must be, which is also what diffusers takes where it is missing.
SCHEDULER_FIXED: dict[str, Any] = {
    "clip_sample_range": 1.0,
    "predict_epsilon": True,  # of older releases, which had it in place of prediction_type
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "timestep_values": None,  # of older releases
    "trained_betas": None,
}
# Keys of a scheduler that decide nothing here: where a shorter run stops is S5's, the next two
# belong to thresholding, and the last says that tensors were torch's.
SCHEDULER_UNUSED = (
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "tensor_format",
)
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
    """Put data at path so that a kill at any moment leaves the old file or the new one, whole.

    Raises OSError that names the path; what stood there is then as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp allows the owner alone
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # name the file, not its temporary
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last through a loss of power, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def to_scheduler(config: Config) -> dict[str, Any]:
    """The settings of diffusers' DDPMScheduler that make this schedule and sampling (S1 to S5)."""
    return {
        "_class_name": SCHEDULERS[0],
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": SCHEDULES[config.schedule],
        "prediction_type": PREDICTIONS[config.prediction],
        "variance_type": VARIANCES[config.variance],
        "clip_sample": config.clip,
        "timestep_spacing": "trailing",  # the times of S5, where the steps divide T
    }


def from_scheduler(settings: dict[str, Any], base: Config) -> Config:
    """`base` with the schedule, prediction, variance and clip of a scheduler of diffusers.

    A key that is not there counts as diffusers' default; DDIMScheduler has no `variance_type`, and
    leaves that of `base`. Raises FileError that names every setting which this design does not
    have, and ConfigError for a value that no Config takes.
    """
    given = {key: value for key, value in settings.items() if not key.startswith("_")}
    free = {**SCHEDULER_FREE, **{key: given[key] for key in SCHEDULER_FREE if key in given}}
    class_name = settings.get("_class_name", SCHEDULERS[0])
    problems = []
    if class_name not in SCHEDULERS:
        problems.append(f"_class_name = {class_name!r}, expected {' or '.join(SCHEDULERS)}")
    elif class_name != SCHEDULERS[0] and "variance_type" not in given:
        free["variance_type"] = VARIANCES[base.variance]
    problems += [
        f"{key} = {given.get(key, needed)!r}, expected {needed!r}"
        for key, needed in SCHEDULER_FIXED.items()
        if given.get(key, needed) != needed
        and (key != "clip_sample_range" or free["clip_sample"])  # of no effect without the clip
    ]
    known = (*SCHEDULER_FREE, *SCHEDULER_FIXED, *SCHEDULER_UNUSED)
    problems += [f"{key} is unknown" for key in given if key not in known]
    chosen = {}
    for field, key, names in (
        ("schedule", "beta_schedule", SCHEDULES),
        ("prediction", "prediction_type", PREDICTIONS),
        ("variance", "variance_type", VARIANCES),
    ):
        ours = [name for name, theirs in names.items() if theirs == free[key]]
        if not ours:
            problems.append(f"{key} = {free[key]!r}, expected {' or '.join(names.values())}")
        chosen[field] = next(iter(ours), "")
    if problems:
        raise FileError(f"settings that this design does not have: {'; '.join(problems)}")
    return base.replace(
        timesteps=free["num_train_timesteps"],
        beta_start=free["beta_start"],
        beta_end=free["beta_end"],
        clip=free["clip_sample"],
        **chosen,
    )


def config_text(config: Config) -> str:
    """The config as TOML, one field a line, as `load_config` reads it."""
    values = dataclasses.asdict(config)
    # JSON writes numbers, strings, booleans and lists as TOML does, but for two things: TOML has no
    # pairs of escapes for one character, as of an emoji, and does not allow a bare DEL.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    return "".join(lines).replace("\x7f", "\\u007f")


def json_text(settings: dict[str, Any]) -> bytes:
    """Settings as the bytes of a JSON file."""
    return (json.dumps(settings, indent=2) + "\n").encode()


def write_run(folder: Path, config: Config, params: dict[str, np.ndarray]) -> None:
    """Write a run's weights and settings so that diffusers opens the folder.

    UNet2DModel.from_pretrained and DDPMScheduler.from_pretrained open every run. DDPMPipeline and
    DDIMPipeline open one without classes: they have no way to be given labels.
    """
    tensors = {
        name: np.ascontiguousarray(value, np.float32)
        for name, value in check_params(config, params).items()
    }
    write_atomically(folder / CONFIG, config_text(config).encode())
    write_atomically(folder / SETTINGS, json_text(to_diffusers(config)))
    write_atomically(folder / SCHEDULER, json_text(to_scheduler(config)))
    if config.num_classes:
        (folder / INDEX).unlink(missing_ok=True)  # of a run that stood here before
    else:
        index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", SCHEDULERS[0]]}
        write_atomically(folder / INDEX, json_text({"_class_name": "DDPMPipeline", **index}))
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
    except (OSError, ValueError, RecursionError) as error:  # the last: lists in lists in lists
        raise FileError(f"settings {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise FileError(f"settings {path} hold a {type(settings).__name__}, expected an object")
    return settings


def network_folder(source: Path) -> Path:
    """Where a folder holds its network: itself, or its `unet` as pipelines of diffusers have it."""
    if any((source / name).exists() for name in (CONFIG, SETTINGS, WEIGHTS)):
        return source
    return source / UNET if (source / UNET).is_dir() else source


def weights_file(source: Path) -> Path:
    """The safetensors file of a folder, or the file itself. Raises FileError where it is a pickle.

    Opening a pickle runs what is written in it, so none is opened here.
    """
    path = source / WEIGHTS if source.is_dir() else source
    pickles = [file for file in sorted(path.parent.glob("*.*")) if file.suffix in PICKLES]
    if path.suffix in PICKLES or (pickles and not path.exists()):
        pickle = path if path.suffix in PICKLES else pickles[0]
        raise FileError(
            f"{pickle} is a pickle, which can run anything when it is opened, so it is not read; "
            "where you trust it, convert it once, with diffusers: "
            f"UNet2DModel.from_pretrained({str(pickle.parent)!r}).save_pretrained('converted')"
        )
    return path


def derive_config(folder: Path, name: str) -> Config:
    """The Config of a network that diffusers saved in this folder, with the scheduler beside it.

    Where no scheduler is saved, the schedule and the sampling are those of Ho et al. 2020. Raises
    FileError that names every setting which this design does not have.
    """
    places = [folder, folder / SCHEDULER_FOLDER]
    if folder.name == UNET:
        places += [folder.parent / SCHEDULER_FOLDER, folder.parent]
    schedulers = [place / SCHEDULER for place in places if (place / SCHEDULER).exists()]
    config, problems = load_config(HO2020).replace(name=name), []
    parts = [(folder / SETTINGS, from_diffusers), *((s, from_scheduler) for s in schedulers[:1])]
    for path, read in parts:
        settings = read_settings(path)
        try:
            config = read(settings, config)
        except (FileError, ConfigError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise FileError("; ".join(problems))
    return config


def read_run(source: Path, config_name: str | None) -> tuple[Config, dict[str, np.ndarray]]:
    """The config and weights of a folder or a safetensors file, checked to fit together.

    The folder is a run's, or one that diffusers saved: a network, or a pipeline. `config_name` is
    a config's name or path; None stands for the folder's own `config.toml` or, where there is
    none, for what its `config.json` and `scheduler_config.json` describe. In any case
    `config.json`, where there is one, must describe the same network. Raises FileError,
    ConfigError or ParameterError.
    """
    if not source.exists():
        raise FileError(f"{source} cannot be read: there is no such folder or file")
    folder = network_folder(source) if source.is_dir() else None
    weights = weights_file(folder or source)
    if config_name is not None:
        config = load_config(config_name)
    elif folder and (folder / CONFIG).exists():
        config = load_config(folder / CONFIG)
    elif folder and (folder / SETTINGS).exists():
        config = derive_config(folder, source.resolve().name)
    else:
        holds = f"holds no {CONFIG} or {SETTINGS}" if folder else "is a file of weights alone"
        raise FileError(f"{source} {holds}: name the config that it was made with")
    if folder and (folder / SETTINGS).exists():
        settings = read_settings(folder / SETTINGS)
        try:
            found = from_diffusers(settings, config)
        except FileError as error:
            raise FileError(f"{folder / SETTINGS}: {error}") from error
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
    return config, check_params(config, read_weights(weights))
