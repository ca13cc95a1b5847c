"""What a run was made on: processor, memory, system, GPU, and the clocks before and after."""

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

# What holds a library to less than the processor can do, where somebody has set it.
HELD_BY = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "NPY_DISABLE_CPU_FEATURES",
    "TF_ENABLE_ONEDNN_OPTS",
)
QUERY = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "temperature.gpu")


def describe(threads: int) -> dict[str, Any]:
    """The machine, without its name."""
    gpu = _gpu()
    return {
        "cpu": _processor(),
        "cores": _cores(),
        "threads": threads,
        "memory": _memory(),
        "os": platform.platform(),
        "huge_pages": _huge_pages(),
        "held_by": {name: os.environ[name] for name in HELD_BY if os.environ.get(name)},
        "gpu": gpu.get("name"),
        "driver": gpu.get("driver_version"),
    }


def clocks() -> dict[str, Any]:
    """Clocks in MHz, the GPU's temperature, and the load of the last minute, as they are now."""
    gpu = _gpu()
    found: dict[str, Any] = {"cpu_mhz": _megahertz(), "load": None}
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = round(os.getloadavg()[0], 2)
    for name in ("clocks.sm", "clocks.mem", "temperature.gpu"):
        found[name.replace(".", "_")] = _number(gpu.get(name))
    return found


def _processor() -> str:
    """Its name; with family and model where Linux tells them, as names can cover generations."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = {key.strip(): value.strip() for key, _, value in (a.partition(":") for a in lines)}
        if name := found.get("model name"):
            numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
            return ", ".join([name, *numbers])
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _huge_pages() -> str | None:
    """Who gets them: "always", "madvise" (who asks, as the workers do) or "never"."""
    with contextlib.suppress(OSError, IndexError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
        return text.split("[")[1].split("]")[0]
    return None


def _megahertz() -> list[float]:
    """The clock of each core, where the system tells."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return []


def _gpu() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(QUERY, [part.strip() for part in lines[0].split(",")], strict=False))


def _number(text: str | None) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]
    return None
