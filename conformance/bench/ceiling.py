"""How fast this machine can be: matrix products and copies, measured by each library itself.

`measure` starts a process of its own, with the interpreter, threads and device of the backend that
the figures stand beside: `python -m conformance.bench.ceiling` reads one JSON request on stdin and
writes one JSON answer to stdout. It imports NumPy and the one library that is asked for.

The best of many repetitions counts, not the median: a ceiling is what can be reached.
"""

import dataclasses
import functools
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from conformance.bench.count import Gemm
from conformance.process import START_LIMIT, pinned
from conformance.worker import limit_cores, take_streams
from spec.backend import DTYPES, keep_freed_memory

LIBRARIES = ("numpy", "torch", "tensorflow", "jax")
# Sides of large square products, of which the best counts, as far as the time goes.
SIDES = {"cpu": (512, 1024, 2048, 3072), "cuda": (2048, 4096, 8192, 16384)}
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes of the arrays that are copied: beyond every cache
# Of the time: for the large products, for the copy; the rest is for the step's own shapes.
LARGE_SHARE, COPY_SHARE = 0.4, 0.1
SAMPLE_SECONDS = 2e-3  # at least, in one sample: what is shorter is done several times in a row
SAMPLES = 3  # at least, of everything
MOST_FOR_SHAPES = 30.0  # seconds for all of the step's own shapes, or what is asked for
SMALL = 4e6  # operations: smaller products are done several in one call, as those of attention are


class CeilingError(Exception):
    """A ceiling that could not be measured; the message says why."""


def measure(
    python: str,
    library: str,
    dtype: str,
    device: str,
    threads: int,
    gemms: Iterable[Gemm],
    seconds: float,
) -> dict[str, Any]:
    """Rates of one library on one device, measured in a process of its own in about `seconds`.

    {"library", "version", "dtype", "device", "threads", "large": {"n", "flops_per_second"},
    "shapes": [{"m", "n", "k", "flops_per_second"}, ...], "copy_bytes_per_second"}: `shapes` holds
    every shape of the gemms once, as far as the time goes; a copy counts what it reads and what it
    writes.

    Raises CeilingError where the library is not there, or cannot do this on the device.
    """
    for name, value, allowed in (
        ("library", library, LIBRARIES),
        ("dtype", dtype, DTYPES),
        ("device", device, tuple(SIDES)),
    ):
        if value not in allowed:
            raise CeilingError(f"{name} = {value!r} is unknown; choose one of {', '.join(allowed)}")
    if seconds <= 0 or threads < 1:
        raise CeilingError(f"seconds = {seconds}, threads = {threads}; give more than 0 of each")
    request = {
        "library": library,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "shapes": list(dict.fromkeys((gemm.m, gemm.n, gemm.k) for gemm in gemms)),
        "seconds": seconds,
    }
    limit = START_LIMIT + 10 * seconds
    try:
        done = subprocess.run(
            [python, "-m", "conformance.bench.ceiling"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=pinned(dtype, device, threads),
            timeout=limit,
        )
    except OSError as error:
        raise CeilingError(f"interpreter {python} cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise CeilingError(f"{library} gave no ceiling within {limit:g} s") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        message = f"{library} in {python} ended with exit code {done.returncode}: {last}"
        raise CeilingError(message) from error
    if "error" in answer:
        raise CeilingError(f"{library} in {python}: {answer['error']}")
    return answer


@dataclasses.dataclass(frozen=True)
class Library:
    """What is measured of a library: functions that make a call to be repeated."""

    version: str
    multiplier: Callable[[tuple[int, ...], tuple[int, ...]], Callable[[], Any]]  # of two shapes
    copier: Callable[[int], Callable[[], Any]]  # of an array of so many bytes
    wait: Callable[[Any], object]  # until the device has what the calls gave


def numpy_library(dtype: str, device: str, threads: int) -> Library:
    """NumPy, whose BLAS has its threads from the environment; a copy has threads of ours."""
    if dtype not in ("float32", "float64"):
        raise ValueError(f"NumPy has no {dtype}; use float32 or float64")
    if device != "cpu":
        raise ValueError(f"NumPy cannot compute on {device!r}; use cpu")
    random = np.random.default_rng(0)
    pool = ThreadPoolExecutor(threads)

    def multiplier(a, b):
        left, right = (random.standard_normal(shape, np.float32).astype(dtype) for shape in (a, b))
        out = left @ right
        return lambda: np.matmul(left, right, out=out)

    def copier(size):
        source = np.ones((threads, size // (threads * np.dtype(dtype).itemsize)), dtype)
        target = np.zeros_like(source)
        return lambda: list(pool.map(np.copyto, target, source))

    return Library(np.__version__, multiplier, copier, lambda _: None)


def torch_library(dtype: str, device: str, threads: int) -> Library:
    """PyTorch, eager."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU here; use cpu")
    if dtype == "tf32" and device == "cpu":
        raise ValueError("tf32 is a mode of NVIDIA GPUs; use float32, or cuda")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    kind = {"float64": torch.float64, "bf16": torch.bfloat16}.get(dtype, torch.float32)

    def multiplier(a, b):
        left, right = (torch.randn(shape, device=device).to(kind) for shape in (a, b))
        out = left @ right
        return lambda: torch.matmul(left, right, out=out)

    def copier(size):
        source = torch.ones(size // kind.itemsize, dtype=kind, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    return Library(torch.__version__, multiplier, copier, wait)


def tensorflow_library(dtype: str, device: str, threads: int) -> Library:
    """TensorFlow, each call a `tf.function`; its copy adds 1, since it has no mere copy."""
    import tensorflow as tf

    if device == "cuda" and not tf.config.list_physical_devices("GPU"):
        raise ValueError("TensorFlow sees no GPU here; use cpu")
    if dtype == "tf32" and device == "cpu":
        raise ValueError("tf32 is a mode of NVIDIA GPUs; use float32, or cuda")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.experimental.enable_tensor_float_32_execution(dtype == "tf32")
    kind = {"float64": tf.float64, "bf16": tf.bfloat16}.get(dtype, tf.float32)
    place = "/GPU:0" if device == "cuda" else "/CPU:0"

    def multiplier(a, b):
        with tf.device(place):
            left, right = (tf.cast(tf.random.normal(shape), kind) for shape in (a, b))
        return functools.partial(tf.function(tf.matmul), left, right)

    def copier(size):
        with tf.device(place):
            source = tf.ones([size // kind.size], kind)
        return functools.partial(tf.function(lambda x: x + tf.ones([], kind)), source)

    return Library(
        tf.__version__, multiplier, copier, lambda _: tf.test.experimental.sync_devices()
    )


def jax_library(dtype: str, device: str, threads: int) -> Library:
    """JAX, each call compiled; its copy adds 1, since it has no mere copy."""
    import jax
    import jax.numpy as jnp

    platform = {"cpu": "cpu", "cuda": "gpu"}[device]
    try:
        place = jax.devices(platform)[0]
    except RuntimeError as error:
        raise ValueError(f"JAX has no {platform} here; use cpu") from error
    if dtype == "tf32" and device == "cpu":
        raise ValueError("tf32 is a mode of NVIDIA GPUs; use float32, or cuda")
    precision = "tensorfloat32" if dtype == "tf32" else "highest"
    kind = {"float64": jnp.float64, "bf16": jnp.bfloat16}.get(dtype, jnp.float32)
    random = np.random.default_rng(0)

    def put(array):
        return jax.device_put(jnp.asarray(array, kind), place)

    drawn = random.standard_normal(2**20, np.float32)  # repeated: to draw all takes seconds

    def multiplier(a, b):
        left, right = (put(np.resize(drawn, shape)) for shape in (a, b))
        multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
        return functools.partial(multiply, left, right)

    def copier(size):
        source = put(np.ones(size // np.dtype(kind).itemsize, np.float32))
        return functools.partial(jax.jit(lambda x: x + 1), source)

    return Library(jax.__version__, multiplier, copier, jax.block_until_ready)


LIBRARY = {
    "numpy": numpy_library,
    "torch": torch_library,
    "tensorflow": tensorflow_library,
    "jax": jax_library,
}


def fastest(call: Callable[[], Any], wait: Callable[[Any], object], seconds: float) -> float:
    """Seconds of one call, the least that was seen in about so many seconds of trying."""
    wait(call())  # compiles, and has the first pages

    def sample(times: int) -> float:
        start = time.perf_counter()
        wait([call() for _ in range(times)])  # all: a device may work on several at a time
        return (time.perf_counter() - start) / times

    end = time.perf_counter() + seconds
    best = sample(1)
    taken = 1
    while taken < SAMPLES or time.perf_counter() < end:
        best = min(best, sample(math.ceil(SAMPLE_SECONDS / best)))
        taken += 1
    return best


def large_rate(library: Library, sides: Iterable[int], seconds: float) -> tuple[int, float]:
    """The side and the operations a second of the best large square product."""
    end = time.perf_counter() + seconds
    best, prepared = (0, 0.0), 0.0
    for side in sides:
        flops = 2.0 * side**3
        began = time.perf_counter()
        left = end - began
        if best[0] and prepared + (SAMPLES + 1) * flops / best[1] > left:
            break  # there is no time for so large a one
        given = min(left / 2, seconds / 4)
        call = library.multiplier((side, side), (side, side))
        rate = flops / fastest(call, library.wait, given)
        best = max(best, (side, rate), key=lambda pair: pair[1])
        prepared = time.perf_counter() - began - given  # some compile for many seconds
    return best


def shape_rate(library: Library, m: int, n: int, k: int, seconds: float) -> float:
    """Operations a second of the product [m, k] @ [k, n]."""
    flops = 2.0 * m * n * k
    together = max(1, int(SMALL / flops))
    stack = (together,) if together > 1 else ()
    call = library.multiplier((*stack, m, k), (*stack, k, n))
    return together * flops / fastest(call, library.wait, seconds)


def rates(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request of `measure`. Raises ValueError for what the library cannot do."""
    name, dtype, device = request["library"], request["dtype"], request["device"]
    limit_cores(request["threads"])
    keep_freed_memory()
    library = LIBRARY[name](dtype, device, request["threads"])
    seconds, shapes = request["seconds"], request["shapes"]
    side, rate = large_rate(library, SIDES[device], LARGE_SHARE * seconds)
    copied = fastest(library.copier(COPIED[device]), library.wait, COPY_SHARE * seconds)
    each = (1 - LARGE_SHARE - COPY_SHARE) * seconds / max(1, len(shapes))
    # where each must be compiled for a second, those that the time does not reach are left out
    end = time.monotonic() + max(MOST_FOR_SHAPES, seconds)
    return {
        "library": name,
        "version": library.version,
        "dtype": dtype,
        "device": device,
        "threads": request["threads"],
        "large": {"n": side, "flops_per_second": rate},
        "shapes": [
            {"m": m, "n": n, "k": k, "flops_per_second": shape_rate(library, m, n, k, each)}
            for m, n, k in shapes
            if time.monotonic() < end
        ],
        "copy_bytes_per_second": 2 * COPIED[device] / copied,
    }


def main() -> None:
    """Answer the one request on stdin; what the library prints goes to stderr."""
    requests, replies, _ = take_streams()
    try:
        answer = rates(json.load(requests))
    except (ImportError, ValueError, RuntimeError) as error:
        answer = {"error": str(error) or type(error).__name__}
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
