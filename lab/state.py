"""S12: `state.safetensors`, all that a run goes on from, and what it may be put to. No pickle."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from lab.files import FileError, write_atomically
from spec.backend import State
from spec.config import Config, ConfigError, config_from_dict

STATE = "state.safetensors"
PARTS = ("params", "m", "v", "ema")
KEY = "rosetta"  # of the metadata; its value is JSON
FORMAT = 1
# What makes a run the run that it is: with another of these, going on would be another run.
IDENTITY = ("config", "seed", "shared_noise", "backend", "dtype", "data_sha256")
# What the last bits may depend on: with another of these, going on is sound but not bit-equal.
CIRCUMSTANCES = ("framework", "numpy", "python", "machine", "device", "mode", "threads")
# By these a person sets how many threads the libraries under a framework start.
THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


class Saved(NamedTuple):
    """A state with the config and all other facts of the run that it is from."""

    state: State
    config: Config
    facts: dict[str, Any]


def data_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of images [N, H, W, C] and labels [N]: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def circumstances(described: Mapping[str, Any]) -> dict[str, str]:
    """CIRCUMSTANCES as they are now, of a model's `describe()`."""
    settings = [f"{name}={os.environ[name]}" for name in THREAD_SETTINGS if name in os.environ]
    threads = " ".join([str(described["threads"]), *settings])
    return {
        "framework": described["framework"],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": described["device"],
        "mode": described["mode"],
        "threads": threads,
    }


def _digest(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors and of all facts but itself: safetensors has no checksum."""
    plain = {key: value for key, value in facts.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()


def write_state(folder: Path, state: State, facts: Mapping[str, Any]) -> None:
    """Write a state and the facts of its run; what stood there stays until all of it is on disk.

    Facts are plain values, as JSON has them. Raises OSError.
    """
    tensors = {
        f"{part}.{name}": np.ascontiguousarray(value)
        for part in PARTS
        for name, value in state[part].items()
    }
    facts = {"format": FORMAT, "step": state["step"], **facts}
    facts["sha256"] = _digest(tensors, facts)
    data = to_safetensors(tensors, metadata={KEY: json.dumps(facts)})
    write_atomically(folder / STATE, data)


def read_state(folder: Path) -> Saved:
    """The state that stands in a run's folder, whole and as it was written. Raises FileError."""
    path = folder / STATE
    remedy = "put a copy of it back, or train anew with --overwrite"
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileError(
            f"{folder} holds no {STATE} to go on from; leave --resume out to begin"
        ) from error
    except OSError as error:
        raise FileError(f"state {path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise FileError(f"state {path} is damaged, not a whole file ({error}); {remedy}") from error
    try:
        facts = json.loads(metadata[KEY])
        found = facts["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise FileError(f"state {path} was not written by this command; {remedy}") from error
    if found != FORMAT:
        raise FileError(f"state {path} has format {found}; this version reads {FORMAT}: {remedy}")
    if facts.get("sha256") != _digest(tensors, facts):
        raise FileError(f"state {path} is damaged: its values are not those written; {remedy}")
    if missing := [key for key in (*IDENTITY, "steps", "data", "mode") if key not in facts]:
        raise FileError(f"state {path} lacks {', '.join(missing)}; {remedy}")
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    try:
        config = config_from_dict(facts["config"])
    except ConfigError as error:
        raise FileError(f"state {path} holds a config of another version: {error}") from error
    return Saved({"step": facts["step"], **parts}, config, facts)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> list[str]:
    """Warnings of what is not as it was when this state was written, a line each.

    Raises FileError that names all by which it would be another run.
    """
    problems = []
    for key in IDENTITY:
        if saved[key] == now[key]:
            continue
        if key == "config":
            before, after = saved[key], now[key]
            problems += [
                f"{name} = {after.get(name)!r}, the run has {before.get(name)!r}"
                for name in after
                if before.get(name) != after[name]
            ]
        elif key == "data_sha256":
            problems.append(
                f"the data are not those of the run ({now['data']!r} now, {saved['data']!r} then; "
                "their fingerprints differ)"
            )
        else:
            problems.append(f"{key} = {now[key]!r}, the run has {saved[key]!r}")
    if problems:
        raise FileError(
            f"{where} cannot go on as another run: {'; '.join(problems)}. Leave these options "
            "out, for --resume knows them, or train anew in another --out"
        )
    return [
        f"{key} is {now[key]}, was {saved[key]}"
        for key in CIRCUMSTANCES
        if saved.get(key) != now[key]
    ]
