"""Config: one diffusion model and how it is trained; read from `spec/configs/*.toml`, checked."""

import dataclasses
import math
import tomllib
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
CHOICES = {
    "schedule": ("linear", "cosine"),
    "prediction": ("eps", "x0", "v"),
    "variance": ("small", "large"),
    "data": ("digits", "mnist", "fashion_mnist", "cifar10", "folder"),  # the last: one's own
}


class ConfigError(ValueError):
    """A config that names an unknown key or holds a value that the design does not allow."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One model, its schedule and its training; every field is checked on construction.

    Raises ConfigError with every fault found: the value, what is allowed, what to do.
    """

    name: str
    image_size: tuple[int, int]  # height, width in pixels
    in_channels: int  # of the images, and of the network's output
    channels: tuple[int, ...]  # one width a level, first level at full resolution
    layers_per_block: int  # resnets in a down level; an up level has one more
    groups: int  # of every GroupNorm
    attention_levels: tuple[int, ...] = ()  # levels with attention after each resnet
    num_classes: int = 0  # 0: unconditional; the null label is num_classes
    timesteps: int = 1000  # T
    schedule: str = "linear"
    beta_start: float = 1e-4  # linear only
    beta_end: float = 0.02  # linear only
    prediction: str = "eps"
    variance: str = "small"
    clip: bool = True  # clip x0 to [-1, 1] when sampling
    data: str = "digits"
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 0  # steps; 0 is off
    max_grad_norm: float = 1.0  # 0 is off
    ema_decay: float = 0.999
    label_dropout: float = 0.0  # probability of the null label in training

    def __post_init__(self) -> None:
        problems = [*_type_problems(self)] or [*_value_problems(self)]
        if problems:
            raise ConfigError(f"config {self.name!r}: " + "; ".join(problems))

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of one image."""
        return (*self.image_size, self.in_channels)

    @property
    def time_width(self) -> int:
        """Width of the time embedding, 4 * channels[0] (S7)."""
        return 4 * self.channels[0]

    def replace(self, **changes: object) -> "Config":
        """The same config with some fields changed, checked again."""
        return config_from_dict({**dataclasses.asdict(self), **changes})


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
INTS = ("in_channels", "layers_per_block", "groups", "num_classes", "timesteps", "batch_size")
POSITIVE = tuple(name for name in INTS if name != "num_classes")
FLOATS = ("beta_start", "beta_end", "learning_rate", "max_grad_norm", "ema_decay", "label_dropout")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_problems(c: Config):
    for name in (*INTS, "warmup"):
        if not _is_int(getattr(c, name)):
            yield f"{name} = {getattr(c, name)!r} is not an integer; give a whole number"
    for name in FLOATS:
        value = getattr(c, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            yield f"{name} = {value!r} is not a finite number; give a number"
    for name in ("image_size", "channels", "attention_levels"):
        value = getattr(c, name)
        if not isinstance(value, tuple) or not all(_is_int(v) for v in value):
            yield f"{name} = {value!r} is not a list of integers; give one, such as [8, 8]"
    if not isinstance(c.clip, bool):
        yield f"clip = {c.clip!r} is not a boolean; give true or false"
    for name, allowed in CHOICES.items():
        if getattr(c, name) not in allowed:
            yield f"{name} = {getattr(c, name)!r} is unknown; choose one of {', '.join(allowed)}"


def _value_problems(c: Config):
    for name in POSITIVE:
        if getattr(c, name) < 1:
            yield f"{name} = {getattr(c, name)} is below 1; give at least 1"
    for name in ("num_classes", "warmup"):
        if getattr(c, name) < 0:
            yield f"{name} = {getattr(c, name)} is negative; give 0 or more"
    if len(c.image_size) != 2 or min(c.image_size) < 1:
        yield f"image_size = {list(c.image_size)} is not [height, width], both positive"
    elif c.channels:
        step = 2 ** (c.levels - 1)
        for side, length in zip(("height", "width"), c.image_size, strict=True):
            if length % step:
                yield (
                    f"image_size: {side} {length} is not divisible by {step} = 2^(levels-1); "
                    f"use a multiple of {step}, or fewer levels than {c.levels}"
                )
    if not c.channels:
        yield "channels is empty; give one width a level, such as [32, 64]"
    elif c.channels[0] % 2 or c.channels[0] < 4:
        yield f"channels[0] = {c.channels[0]} must be even and at least 4 (sin and cos halves)"
    for level, width in enumerate(c.channels):
        if c.groups >= 1 and (width < 1 or width % c.groups):
            yield (
                f"channels[{level}] = {width} is not a positive multiple of groups = {c.groups}; "
                "change one of them"
            )
    for level in c.attention_levels:
        if not 0 <= level < c.levels:
            yield f"attention_levels names level {level}; allowed are 0..{c.levels - 1}"
    if len(set(c.attention_levels)) != len(c.attention_levels):
        yield f"attention_levels = {list(c.attention_levels)} names a level twice; name each once"
    for name in ("beta_start", "beta_end"):
        if c.schedule == "linear" and not 0 < getattr(c, name) < 1:
            yield f"{name} = {getattr(c, name)} is outside (0, 1); a beta is a variance below 1"
    if c.learning_rate <= 0:
        yield f"learning_rate = {c.learning_rate} is not positive; a usual value is 1e-3"
    if c.max_grad_norm < 0:
        yield f"max_grad_norm = {c.max_grad_norm} is negative; give a norm, or 0 for no clipping"
    if not 0 <= c.ema_decay < 1:
        yield f"ema_decay = {c.ema_decay} is outside [0, 1); a usual value is 0.999"
    if not 0 <= c.label_dropout <= 1:
        yield f"label_dropout = {c.label_dropout} is outside [0, 1]; a usual value is 0.1"
    if c.label_dropout and not c.num_classes:
        yield f"label_dropout = {c.label_dropout} without classes; set num_classes, or 0 here"


def config_from_dict(values: dict) -> Config:
    """A Config from plain values; unknown and missing keys are named. Raises ConfigError."""
    name = values.get("name", "unnamed")
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ConfigError(
            f"config {name!r}: unknown key {', '.join(map(repr, unknown))}; "
            f"allowed are {', '.join(FIELDS)}"
        )
    missing = [f.name for f in FIELDS.values() if f.default is dataclasses.MISSING]
    missing = [key for key in missing if key not in values and key != "name"]
    if missing:
        raise ConfigError(f"config {name!r}: missing key {', '.join(map(repr, missing))}; add it")
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Config(**{"name": name, **tuples})


def config_names() -> list[str]:
    """Names of the configs that the spec ships."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def load_config(name_or_path: str | Path) -> Config:
    """The Config of a shipped name (`digits`) or of a `.toml` file's path.

    Raises ConfigError where the file is missing, is not TOML, or breaks a rule of Config.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = CONFIGS / f"{name_or_path}.toml"
        if str(name_or_path) not in config_names():
            raise ConfigError(
                f"unknown config {str(name_or_path)!r}; shipped are {', '.join(config_names())}; "
                "or give the path of a .toml file"
            )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: not TOML ({error}); see spec/configs for examples"
        ) from error
    return config_from_dict({"name": path.stem, **values})
