"""What is timed: the train step of three sizes, and guided sampling of two."""

import dataclasses
from pathlib import Path

from spec.config import Config, ConfigError, config_names, load_config
from spec.goldens import SPEC

FOLDER = Path(__file__).parent / "workloads"
CHECKPOINT = SPEC / "checkpoints" / "digits.safetensors"
MOST_IMAGES = 2**16


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to be timed: a train step of `batch` images, or `batch` images sampled at once."""

    key: str
    config: Config
    batch: int
    kind: str = "train"  # or "sample": guided DDIM
    steps: int = 0  # of a sampling
    guidance_scale: float | None = None
    checkpoint: Path | None = None  # of the weights; None: the initial ones of seed 0

    @property
    def text(self) -> str:
        """What it is, in one line."""
        height, width, channels = self.config.image_shape
        shape = f"{self.batch} images of {height}x{width}x{channels}"
        if self.kind == "train":
            return f"a train step, {shape}"
        return f"guided DDIM, {self.steps} steps, {shape}"


def _train(key: str, config: Config) -> Workload:
    return Workload(key, config, config.batch_size)


def _sample(key: str, config: Config, batch: int, checkpoint: Path | None = None) -> Workload:
    config = config.replace(batch_size=batch)
    return Workload(key, config, batch, "sample", 50, 1.5, checkpoint)


def shipped() -> dict[str, Workload]:
    """Every workload that has a name of its own."""
    large = load_config("ddpm_cifar10").replace(max_grad_norm=0.0)
    with_classes = large.replace(num_classes=10, label_dropout=0.1)
    found = (
        _train("S", load_config(FOLDER / "s.toml")),
        _train("M", load_config(FOLDER / "m.toml")),
        _train("L", large),
        _sample("sample-digits", load_config("digits"), 16, CHECKPOINT),
        _sample("sample-L", with_classes, 16),
    )
    return {workload.key: workload for workload in found}


def default_keys(device: str) -> list[str]:
    """What is timed unless something is named: L is for a GPU."""
    return ["S", "M", "sample-digits"] if device == "cpu" else ["L", "sample-L"]


def find(name: str, batch: int | None = None) -> Workload:
    """The workload of this name, or the train step of a config by its name or .toml file.

    Raises ConfigError for an unknown name, or a batch outside 1..65536.
    """
    if batch is not None and not 1 <= batch <= MOST_IMAGES:
        raise ConfigError(f"--batch {batch} is outside 1..{MOST_IMAGES}; choose one inside")
    known = {key.lower(): workload for key, workload in shipped().items()}
    workload = known.get(name.lower())
    if workload is None:
        if not name.endswith(".toml") and name not in config_names():
            raise ConfigError(
                f"unknown workload {name!r}; there are {', '.join(shipped())}; a config may be "
                f"named too ({', '.join(config_names())}), or the path of a .toml file"
            )
        config = load_config(name)
        workload = _train(config.name, config.replace(max_grad_norm=0.0))
    if batch is None or batch == workload.batch:
        return workload
    config = workload.config.replace(batch_size=batch)
    return dataclasses.replace(workload, key=f"{workload.key}@{batch}", config=config, batch=batch)
