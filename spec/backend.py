"""The protocol that every implementation meets, and the checks of its arguments.

A backend is a module with `name`, `modes` and `open`. Images are [B, H, W, C], times and labels
[B]; every array is NumPy, in and out; parameters stand under their canonical names (S7).
Every random quantity is an argument. A method may raise NotImplementedError.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spec.config import Config
from spec.params import check_params, find_block

# What `open` is asked for -> the dtype of every array, in and out, and of the training state.
# tf32 and bf16 are float32 but for the network's products and, in bf16, its activations (S7).
ARRAY_DTYPES = {"float64": "float64", "float32": "float32", "tf32": "float32", "bf16": "float32"}
DTYPES = tuple(ARRAY_DTYPES)
REQUIRED_DTYPES = ("float64", "float32")
MODES = (
    "eager",  # every operation as it is met
    "compiled",  # whole functions: torch.compile, tf.function, jax.jit
    "parallel",  # slices of the batch side by side, in threads or on devices
    "contiguous",  # PyTorch, eager: images in memory as [B, C, H, W] instead of [B, H, W, C]
    "graph",  # PyTorch on a GPU, compiled: the loss and its gradients as one CUDA graph
    "reduce-overhead",  # torch.compile with CUDA graphs of its own
    "max-autotune",  # torch.compile, which tries several kernels
    "xla",  # tf.function through XLA
)
# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
METHODS = ("ddpm", "ddim", "dpmpp")
Params = dict[str, np.ndarray]
State = dict[str, Any]  # {"step": int, "params": Params, "m": Params, "v": Params, "ema": Params}


@runtime_checkable
class Model(Protocol):
    """One network with its schedule and its training state, opened from a Config.

    Floating point arrays come in and go out in the dtype that ARRAY_DTYPES gives. Methods do not
    change their arguments and give arrays of their own. Bad arguments raise ValueError or
    TypeError.
    """

    def schedule(self) -> Params:
        """The tables of S1 by name, each [T]."""
        ...

    def q_sample(self, x0: np.ndarray, t: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """x_t [B, H, W, C] from x0 and noise of that shape, at times t [B] (S2)."""
        ...

    def target(self, x0: np.ndarray, t: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """What the network should give for `prediction`, [B, H, W, C] (S2)."""
        ...

    def predict_x0_eps(
        self, x_t: np.ndarray, t: np.ndarray, out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x0 and eps, both [B, H, W, C], read from x_t and the network's output (S3)."""
        ...

    def ddpm_step(
        self, x_t: np.ndarray, t: np.ndarray, out: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        """x_{t-1} [B, H, W, C] from x_t and the network's output; a t for each row (S4)."""
        ...

    def ddim_step(
        self,
        x_t: np.ndarray,
        t: np.ndarray,
        t_prev: np.ndarray,
        out: np.ndarray,
        noise: np.ndarray,
        eta: float = 0.0,
    ) -> np.ndarray:
        """x at t_prev [B] (-1: no noise left) from x_t at t [B] and the network's output (S5)."""
        ...

    def guide(
        self, out_null: np.ndarray, out_label: np.ndarray, guidance_scale: float
    ) -> np.ndarray:
        """The guided output [B, H, W, C] (S6)."""
        ...

    def predict(self, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """The network's output [B, H, W, C] (S7); labels [B] where the config has classes."""
        ...

    def taps(
        self, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The output of every block of `spec.params.blocks`, by name, in that order (S7)."""
        ...

    def run_block(
        self,
        name: str,
        x: np.ndarray | None = None,
        emb: np.ndarray | None = None,
        t: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """The output of one block on inputs of its own: those that `Block.inputs` names (S7).

        x [B, H, W, C] at the block's resolution; a resnet of an up block takes its input after
        the concatenation; emb [B, 4*channels[0]]. conv_out is GroupNorm, SiLU, conv.
        """
        ...

    def loss_and_grads(
        self,
        x0: np.ndarray,
        t: np.ndarray,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        drop: np.ndarray | None = None,
    ) -> tuple[float, Params]:
        """The loss and its gradient by every parameter; drop [B] bool: label to null (S6, S8)."""
        ...

    def apply_gradients(self, grads: Mapping[str, np.ndarray]) -> None:
        """One update of the state from these gradients: clip, Adam, EMA, step + 1 (S9)."""
        ...

    def train_step(
        self,
        x0: np.ndarray,
        t: np.ndarray,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        drop: np.ndarray | None = None,
    ) -> float:
        """Loss, gradients and update in one, as training runs it; gives the loss before it."""
        ...

    def fit(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        steps: int,
        shared_noise: bool = False,
    ) -> Iterator[float]:
        """Train on images [N, H, W, C] and labels [N]; yields each step's loss as it is done.

        Draws from the framework's own generator, or from the shared stream (S10), both keyed by
        the seed of `open` and the step. The lab uses it; no golden case does.
        """
        ...

    def sample(
        self,
        x: np.ndarray,
        noise: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        *,
        method: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        guidance_scale: float | None = None,
    ) -> np.ndarray:
        """The whole trajectory [S, B, H, W, C] from x = x_T; its last entry is the sample.

        method "ddpm" visits every t (S4; steps is None or T); "ddim" (S5) and "dpmpp" (S13) take
        `steps`, where None is T. noise [S, B, H, W, C]; None stands for zeros where none has an
        effect (ddim, eta 0). dpmpp takes neither noise nor eta.
        guidance_scale None: the network is asked once, with the labels (S6).
        """
        ...

    def params(self) -> Params:
        """The parameters as they are now."""
        ...

    def state(self) -> State:
        """step, params, m, v and ema: all that training goes on from."""
        ...

    def load_state(self, state: State) -> None:
        """Put a state in place of the present one."""
        ...

    def synchronize(self) -> None:
        """Return when the device has finished all that was asked of it."""
        ...

    def describe(self) -> dict[str, Any]:
        """name, framework, version, device, mode, dtype and threads, as they really are."""
        ...


class Backend(Protocol):
    """A module that opens models."""

    name: str
    modes: tuple[str, ...]  # of MODES; the first is what the suite runs by default
    dtypes: tuple[str, ...]  # of DTYPES; a module without it has REQUIRED_DTYPES

    def open(
        self,
        config: Config,
        params: Params | None = None,
        *,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "auto",
        mode: str = "compiled",
    ) -> Model:
        """A Model with these parameters, or with those that the seed gives (S10).

        For a mode that it does not have, `nearest_mode` says which it takes; `describe` tells.
        Raises ValueError for an unknown dtype or mode, or a device that is not there, and
        ParameterError for parameters that do not fit.
        """
        ...


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is unknown; choose one of {', '.join(allowed)}")


def nearest_mode(mode: str, modes: tuple[str, ...]) -> str:
    """The mode itself where it is among `modes`, else one that compiles as it does, else the first.

    "eager" and "parallel" do without torch.compile; the others compile, as "compiled" does.
    """
    for choice in (mode, "eager" if mode in ("eager", "contiguous", "parallel") else "compiled"):
        if choice in modes:
            return choice
    return modes[0]


def keep_freed_memory(heaps: int | None = None) -> None:
    """Let this process keep the memory that it frees, for its next arrays.

    A step makes and frees hundreds of large arrays. The C library gives each back to the system,
    whose fresh pages cost more than much of the arithmetic. Where it has no such setting (it is
    glibc's), nothing is changed.

    heaps: how many there are for all threads that begin from here on. None: one for each, so that
    what a thread frees is still in the cache of its core when it takes it again. But such a heap
    has parts of 64 MiB, and an array that is larger is mapped by itself and goes back to the system
    when it is freed; where a thread has such arrays, it is better off with heaps=1.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)  # bytes: arrays below are not mapped one by one
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)  # bytes: free ones at the top stay
        mallopt(M_TOP_PAD, 1 << 26)  # bytes: so large a part of a thread's heap stays when empty
        if heaps:
            mallopt(M_ARENA_MAX, heaps)


def check_open(
    config: Config,
    params: Params | None,
    dtype: str,
    device: str,
    mode: str,
    dtypes: tuple[str, ...] = DTYPES,
) -> Params | None:
    """The arguments of `Backend.open`, checked; gives the parameters in canonical names.

    dtypes are those that the backend has. TF32 is a mode of GPUs: on device "cpu" it is refused.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config is a {type(config).__name__}; give a Config, from load_config")
    one_of("dtype", dtype, dtypes)
    if dtype == "tf32" and device == "cpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs; use float32, or device='cuda'")
    one_of("mode", mode, MODES)
    one_of("device", device, ("auto", "cpu", "cuda"))
    return None if params is None else check_params(config, params)


class Checked:
    """A Model that checks every argument, then lets `model` do the work.

    The four implementations share this one set of checks; each error names the value, what is
    allowed and what to do.
    """

    def __init__(self, model: Model, config: Config, dtype: str) -> None:
        self.model, self.config, self.dtype = model, config, ARRAY_DTYPES[dtype]

    def _floats(self, name: str, value: object, shape: tuple[int | None, ...]) -> np.ndarray:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; give a NumPy array")
        if value.ndim != len(shape):
            raise ValueError(
                f"{name} has rank {value.ndim}, shape {list(value.shape)}; expected {_text(shape)}"
            )
        if value.ndim and value.shape[0] == 0:
            raise ValueError(
                f"{name} has an empty batch: {list(value.shape)}; give at least one row"
            )
        if any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected {_text(shape)}")
        if value.dtype != self.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}; this model was opened with {self.dtype}: "
                f"use {name}.astype('{self.dtype}')"
            )
        return value

    def _images(self, *named: tuple[str, object]) -> int:
        """Check images that all have the same batch size; gives that size."""
        rows: int | None = None
        for name, value in named:
            rows = self._floats(name, value, (rows, *self.config.image_shape)).shape[0]
        assert rows is not None
        return rows

    def _integers(
        self, name: str, value: object, rows: int | None, low: int, high: int, remedy: str
    ) -> int:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{name} is {kind}; give a NumPy array of integers, one a row")
        if value.ndim != 1 or rows not in (None, len(value)):
            raise ValueError(
                f"{name} has shape {list(value.shape)}; expected {_text((rows,))}, one a row"
            )
        if not len(value):
            raise ValueError(f"{name} has an empty batch, shape [0]; give at least one row")
        bad = (value < low) | (value > high)
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(f"{name}[{i}] = {value[i]} is outside {low}..{high}; {remedy}")
        return len(value)

    def _times(self, t: object, rows: int | None) -> int:
        last = self.config.timesteps - 1
        return self._integers("t", t, rows, 0, last, f"this config has {last + 1} timesteps")

    def _labels(self, labels: object, rows: int) -> None:
        null = self.config.num_classes
        if labels is None and null:
            raise ValueError(
                f"labels are missing; {self.config.name!r} has {null} classes: give [B] labels, "
                f"{null} for none"
            )
        if labels is not None and not null:
            raise ValueError(
                f"labels were given, but {self.config.name!r} has no classes; leave them out"
            )
        if labels is not None:
            self._integers("labels", labels, rows, 0, null, f"{null} is the null label")

    def _drop(self, drop: object, rows: int) -> None:
        if drop is None:
            return
        if not self.config.num_classes:
            raise ValueError(
                f"drop was given, but {self.config.name!r} has no classes; leave it out"
            )
        if not isinstance(drop, np.ndarray) or drop.dtype != bool or drop.shape != (rows,):
            kind = (
                f"{drop.dtype} {list(drop.shape)}"
                if isinstance(drop, np.ndarray)
                else type(drop).__name__
            )
            raise TypeError(f"drop is {kind}; give a NumPy array of {rows} booleans, one a row")

    def _number(self, name: str, value: object, low: float, high: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise TypeError(f"{name} is a {type(value).__name__}; give a number")
        if not low <= value <= high or value in (float("inf"), float("-inf")):
            raise ValueError(
                f"{name} = {value} is outside [{low}, {high}]; choose a finite value inside"
            )

    def schedule(self) -> Params:
        return self.model.schedule()

    def q_sample(self, x0, t, noise):
        self._times(t, self._images(("x0", x0), ("noise", noise)))
        return self.model.q_sample(x0, t, noise)

    def target(self, x0, t, noise):
        self._times(t, self._images(("x0", x0), ("noise", noise)))
        return self.model.target(x0, t, noise)

    def predict_x0_eps(self, x_t, t, out):
        self._times(t, self._images(("x_t", x_t), ("out", out)))
        return self.model.predict_x0_eps(x_t, t, out)

    def ddpm_step(self, x_t, t, out, noise):
        self._times(t, self._images(("x_t", x_t), ("out", out), ("noise", noise)))
        return self.model.ddpm_step(x_t, t, out, noise)

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        rows = self._images(("x_t", x_t), ("out", out), ("noise", noise))
        self._times(t, rows)
        last = self.config.timesteps - 1
        self._integers("t_prev", t_prev, rows, -1, last, "-1 is the end, where no noise is left")
        if (t_prev >= t).any():
            i = int(np.argmax(t_prev >= t))
            raise ValueError(
                f"t_prev[{i}] = {t_prev[i]} is not below t[{i}] = {t[i]}; DDIM steps go down"
            )
        self._number("eta", eta, 0.0, 1.0)
        return self.model.ddim_step(x_t, t, t_prev, out, noise, float(eta))

    def guide(self, out_null, out_label, guidance_scale):
        self._images(("out_null", out_null), ("out_label", out_label))
        self._number("guidance_scale", guidance_scale, float("-inf"), float("inf"))
        return self.model.guide(out_null, out_label, float(guidance_scale))

    def _network_inputs(self, x, t, labels):
        rows = self._images(("x", x))
        self._times(t, rows)
        self._labels(labels, rows)

    def predict(self, x, t, labels=None):
        self._network_inputs(x, t, labels)
        return self.model.predict(x, t, labels)

    def taps(self, x, t, labels=None):
        self._network_inputs(x, t, labels)
        return self.model.taps(x, t, labels)

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        block = find_block(self.config, name)
        for argument, value in (("x", x), ("emb", emb), ("t", t), ("labels", labels)):
            if (value is not None) > (argument in block.inputs):
                raise ValueError(
                    f"block {name} takes {', '.join(block.inputs)}; leave out {argument}"
                )
            if value is None and argument in block.inputs and argument != "labels":
                raise ValueError(
                    f"block {name} takes {', '.join(block.inputs)}; {argument} is missing"
                )
        rows = None
        if "x" in block.inputs:
            height, width = (side >> block.level for side in self.config.image_size)
            rows = self._floats("x", x, (None, height, width, block.in_channels)).shape[0]
        if "emb" in block.inputs:
            self._floats("emb", emb, (rows, self.config.time_width))
        if "t" in block.inputs:
            rows = self._times(t, rows)
        if "labels" in block.inputs:
            self._labels(labels, rows)
        return self.model.run_block(name, x, emb, t, labels)

    def _batch(self, x0, t, noise, labels, drop):
        rows = self._images(("x0", x0), ("noise", noise))
        self._times(t, rows)
        self._labels(labels, rows)
        self._drop(drop, rows)

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        self._batch(x0, t, noise, labels, drop)
        return self.model.loss_and_grads(x0, t, noise, labels, drop)

    def apply_gradients(self, grads):
        self.model.apply_gradients(self._dtyped(check_params(self.config, grads)))

    def train_step(self, x0, t, noise, labels=None, drop=None):
        self._batch(x0, t, noise, labels, drop)
        return self.model.train_step(x0, t, noise, labels, drop)

    def fit(self, images, labels, steps, shared_noise=False):
        rows = self._images(("images", images))
        if self.config.num_classes:
            self._labels(labels, rows)
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps = {steps!r} is not a number of steps; give at least 1")
        return self.model.fit(images, labels, int(steps), shared_noise)

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        rows = self._images(("x", x))
        self._labels(labels, rows)
        one_of("method", method, METHODS)
        timesteps = self.config.timesteps
        steps = timesteps if steps is None else steps
        if (
            isinstance(steps, bool)
            or not isinstance(steps, (int, np.integer))
            or not 1 <= steps <= timesteps
        ):
            raise ValueError(
                f"steps = {steps!r} is outside 1..{timesteps}, the timesteps of this config"
            )
        if method == "ddpm" and steps != timesteps:
            raise ValueError(
                f"steps = {steps}: ddpm visits all {timesteps} times; leave steps out, or use "
                "ddim or dpmpp"
            )
        self._number("eta", eta, 0.0, 1.0)
        if method != "ddim" and eta:
            raise ValueError(f"eta = {eta} has no meaning for {method}; leave it out, or use ddim")
        if guidance_scale is not None:
            self._number("guidance_scale", guidance_scale, float("-inf"), float("inf"))
            if not self.config.num_classes:
                raise ValueError(
                    f"guidance needs classes; {self.config.name!r} has none: leave it out"
                )
        if method == "dpmpp" and noise is not None:
            raise ValueError("noise was given, but dpmpp adds none; leave it out, or use ddim")
        if noise is not None:
            self._floats("noise", noise, (int(steps), *x.shape))
        elif method == "ddpm" or eta:
            raise ValueError(
                f"noise is missing; this sampler draws at every step: {_text((steps, *x.shape))}"
            )
        return self.model.sample(
            x,
            noise,
            labels,
            method=method,
            steps=int(steps),
            eta=float(eta),
            guidance_scale=guidance_scale,
        )

    def params(self) -> Params:
        return self.model.params()

    def state(self) -> State:
        return self.model.state()

    def load_state(self, state):
        needed = ("step", "params", "m", "v", "ema")
        if sorted(state) != sorted(needed):
            raise ValueError(
                f"state holds {', '.join(sorted(state))}; expected {', '.join(needed)}"
            )
        step = state["step"]
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
            raise ValueError(f"step = {step!r} is not a whole number of steps done; give 0 or more")
        trees = {part: self._dtyped(check_params(self.config, state[part])) for part in needed[1:]}
        self.model.load_state({"step": int(step), **trees})

    def _dtyped(self, tree: Params) -> Params:
        return {name: np.asarray(value, self.dtype) for name, value in tree.items()}

    def synchronize(self) -> None:
        self.model.synchronize()

    def describe(self) -> dict[str, Any]:
        return self.model.describe()


def _text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("B" if n is None else str(n) for n in shape) + "]"
