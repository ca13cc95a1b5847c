"""What depends on the framework that is timed: copying to its device, and the memory it keeps.

Only a framework that the backend has imported already is asked for.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def framework_of(described: Mapping[str, Any]) -> str:
    """The module of a framework that a model says it runs on, or an empty text."""
    words = str(described.get("framework", "")).lower().split()
    names = {"torch": "torch", "tensorflow": "tensorflow", "jax": "jax", "numpy": "numpy"}
    return next((names[word] for word in words if word in names and names[word] in sys.modules), "")


def on_gpu(framework: str, device: str) -> bool:
    """Whether a model that was opened on this device computes on a GPU."""
    if device == "cpu" or framework in ("", "numpy"):
        return False
    module = sys.modules[framework]
    if framework == "torch":
        return bool(module.cuda.is_available())
    if framework == "jax":
        return any(found.platform == "gpu" for found in module.devices())
    return bool(module.config.list_logical_devices("GPU"))


def copier(framework: str, device: str) -> Callable[[list[np.ndarray]], None] | None:
    """A function that copies arrays to the device and waits for it; None where none is known."""
    module = sys.modules.get(framework)
    if module is None:
        return None
    if framework == "numpy":

        def to_numpy(arrays: list[np.ndarray]) -> None:
            for array in arrays:
                array.copy()

        return to_numpy
    gpu = on_gpu(framework, device)
    if framework == "torch":
        target = module.device("cuda" if gpu else "cpu")

        def to_torch(arrays: list[np.ndarray]) -> None:
            kept = [module.tensor(array, device=target) for array in arrays]
            if gpu:
                module.cuda.synchronize()
            del kept

        return to_torch
    if framework == "jax":
        place = module.devices("gpu" if gpu else "cpu")[0]

        def to_jax(arrays: list[np.ndarray]) -> None:
            module.block_until_ready(module.device_put(arrays, place))

        return to_jax

    def to_tensorflow(arrays: list[np.ndarray]) -> None:
        with module.device("/GPU:0" if gpu else "/CPU:0"):
            kept = [module.identity(module.constant(array)) for array in arrays]
        for tensor in kept[-1:]:
            tensor.numpy()  # on one stream, in order: when the last has arrived, all have

    return to_tensorflow


def reset_peak(framework: str, device: str) -> None:
    """Begin the peak of the device's memory anew, where the framework can."""
    if on_gpu(framework, device):
        module = sys.modules[framework]
        if framework == "torch":
            module.cuda.reset_peak_memory_stats()
        elif framework == "tensorflow":
            module.config.experimental.reset_memory_stats("GPU:0")


def peak(framework: str, device: str) -> int | None:
    """The largest memory in bytes that was in use on the device; None on a CPU."""
    if not on_gpu(framework, device):
        return None
    module = sys.modules[framework]
    if framework == "torch":
        return int(module.cuda.max_memory_allocated())
    if framework == "tensorflow":
        return int(module.config.experimental.get_memory_info("GPU:0")["peak"])
    stats = module.devices("gpu")[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def is_short(framework: str, device: str, needed: int | None = None) -> bool:
    """Whether fewer bytes than `needed` are free, or nobody can tell; None: half of all.

    Where a container has a limit of its own, that counts too; so does a GPU's memory, by half.
    """
    if framework == "torch" and on_gpu(framework, device):
        free, total = sys.modules["torch"].cuda.mem_get_info()
        if free < total / 2:
            return True
    try:
        lines = MEMORY.read_text(encoding="ascii").splitlines()
        found = {key: int(rest.split()[0]) for key, _, rest in (a.partition(":") for a in lines)}
        room = [(found["MemAvailable"] * 1024, found["MemTotal"] * 1024)]
    except (OSError, ValueError, KeyError, IndexError):
        return True
    with contextlib.suppress(OSError, ValueError):  # no such limit, or none: "max"
        most, now = (int((GROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
        room.append((most - now, most))
    return any(free < (total / 2 if needed is None else needed) for free, total in room)


def release(framework: str, device: str) -> None:
    """Give memory that lies idle back to the device and to the system, which other workers share.

    What the C library keeps of freed memory it gives back where it is glibc; elsewhere it stays.
    """
    if framework == "torch" and on_gpu(framework, device):
        sys.modules["torch"].cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
