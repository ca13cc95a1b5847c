"""The protocol of spec/backend.py for JAX: whole functions are compiled, blocks reached here."""

import contextlib
import functools
import os
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from impl_jax import diffusion, parallel, train, unet
from impl_jax.params import from_tree, load_params, read_params, to_tree
from impl_jax.schedule import make_schedule
from spec.backend import ARRAY_DTYPES, Checked, check_open, keep_freed_memory, nearest_mode
from spec.config import Config
from spec.noise import training_draws
from spec.params import blocks, find_block, initial_params

name = "jax"
dtypes = ("float64", "float32", "tf32", "bf16")
modes = ("compiled", "eager", "parallel")  # parallel: a slice of the batch on each device
CACHE = Path(__file__).parent.parent / ".jax_cache"  # compiled functions, kept between processes


def open(config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
    """A Model with these parameters, or those that the seed gives.

    eager: op by op, without jit. parallel: over all devices; of the CPU, one for each core.
    """
    params, mode = (
        check_open(config, params, dtype, device, mode, dtypes),
        nearest_mode(mode, modes),
    )
    # One heap for all devices takes a sixth off a step, but holds up a compiler of many threads.
    keep_freed_memory(heaps=1 if mode == "parallel" else None)
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    # float32 means float32: products would use TF32 on a GPU by default
    precision = {"tf32": "tensorfloat32", "bf16": "default"}.get(dtype, "highest")
    jax.config.update("jax_default_matmul_precision", precision)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE", str(CACHE)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if mode == "parallel" and device != "cuda":
        split_cpu()
    platforms = {"cpu": "cpu", "cuda": "gpu", "auto": None}
    try:
        chosen = jax.devices(platforms[device])
    except RuntimeError as error:
        raise ValueError(
            f"device = {device!r}: JAX has none; use device='cpu' or 'auto'"
        ) from error
    if dtype == "tf32" and chosen[0].platform != "gpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs, and JAX sees none here")
    params = initial_params(config, seed) if params is None else params
    return Checked(JaxModel(config, params, seed, dtype, chosen, mode), config, dtype)


def split_cpu() -> None:
    """Let JAX see a device for each core; it counts them once, when a process first asks.

    Raises ValueError where it has counted fewer.
    """
    with contextlib.suppress(RuntimeError, AttributeError):  # begun already, or an older JAX
        jax.config.update("jax_num_cpu_devices", threads())
    if len(jax.devices("cpu")) < threads():
        raise ValueError(
            f"mode = 'parallel': JAX began with {len(jax.devices('cpu'))} device for {threads()} "
            "cores; open this mode first in its process, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={threads()} before it starts"
        )


def threads() -> int:
    """Threads of XLA on the CPU: one for each core that it may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class JaxModel:
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(self, config: Config, params, seed: int, precision: str, devices, mode) -> None:
        self.config, self.seed, self.precision = config, seed, precision
        self.dtype = jnp.dtype(ARRAY_DTYPES[precision])
        self.device, self.mode = devices[0], mode
        self.tables = make_schedule(config)
        compute = jnp.bfloat16 if precision == "bf16" else self.dtype
        with self._placed():
            model = nnx.eval_shape(lambda: unet.UNet(config, compute))
            load_params(model, params)
            self._state = train.init_state(model)
        self._compiled = {}
        self._loss_and_grads, self._train_step = train.loss_and_grads, train.train_step
        if mode == "parallel":
            workers = jax.sharding.Mesh(np.array(devices), "devices")
            self._loss_and_grads = functools.partial(parallel.loss_and_grads, workers)
            self._train_step = functools.partial(parallel.train_step, workers)

    @property
    def _model(self) -> unet.UNet:
        return nnx.merge(*self._state.model)

    @contextlib.contextmanager
    def _placed(self):
        """Arrays made here live on the device; in eager mode nothing is compiled as a whole."""
        eager = jax.disable_jit() if self.mode == "eager" else contextlib.nullcontext()
        with jax.default_device(self.device), eager:
            yield

    def _call(self, key, function, *inputs):
        """function(*inputs) as a whole under jax.jit, compiled once for each key; NumPy arrays."""
        if key not in self._compiled:
            self._compiled[key] = jax.jit(function)
        with self._placed():
            return jax.tree.map(self._numpy, self._compiled[key](*inputs))

    def _numpy(self, value) -> np.ndarray:
        """An array of its own, of a dtype that NumPy has."""
        return np.array(value, self.dtype if value.dtype == jnp.bfloat16 else None)

    def schedule(self):
        return {key: table.astype(self.dtype) for key, table in self.tables.items()}

    def q_sample(self, x0, t, noise):
        function = functools.partial(diffusion.q_sample, self.tables)
        return self._call("q_sample", function, x0, t, noise)

    def target(self, x0, t, noise):
        function = functools.partial(diffusion.target, self.tables, self.config)
        return self._call("target", function, x0, t, noise)

    def predict_x0_eps(self, x_t, t, out):
        function = functools.partial(diffusion.predict_x0_eps, self.tables, self.config)
        return self._call("predict_x0_eps", function, x_t, t, out)

    def ddpm_step(self, x_t, t, out, noise):
        function = functools.partial(diffusion.ddpm_step, self.tables, self.config)
        return self._call("ddpm_step", function, x_t, t, out, noise)

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        coefficients = diffusion.ddim_coefficients(self.tables, t, t_prev, eta)
        function = functools.partial(diffusion.ddim_step, self.tables, self.config)
        return self._call("ddim_step", function, x_t, t, out, noise, coefficients)

    def guide(self, out_null, out_label, guidance_scale):
        return self._call("guide", diffusion.guide, out_null, out_label, guidance_scale)

    def predict(self, x, t, labels=None):
        return self._call("predict", unet.UNet.__call__, self._model, x, t, labels)

    def taps(self, x, t, labels=None):
        def record(model, x, t, labels):
            seen = {}

            def tap(key, value):
                seen[key] = value
                return value

            model(x, t, labels, tap)
            return seen

        seen = self._call("taps", record, self._model, x, t, labels)
        return {block.name: seen[block.name] for block in blocks(self.config)}

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        kind = find_block(self.config, name).kind

        def run(model, x, emb, t, labels):
            if kind == "time_proj":
                return model.time_table[t]
            if kind == "emb":
                return model.embed(model.time_table[t], labels)
            if kind == "conv_out":
                return model.head(x)
            block = model
            for part in name.split("."):
                block = block[int(part)] if part.isdigit() else getattr(block, part)
            return block(x, emb) if kind == "resnet" else block(x)

        return self._call(("run_block", name), run, self._model, x, emb, t, labels)

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        def run(model, *batch):
            return self._loss_and_grads(model, self.tables, self.config, *batch)

        loss, grads = self._call("loss_and_grads", run, self._model, x0, t, noise, labels, drop)
        return float(loss), from_tree(grads)

    def apply_gradients(self, grads):
        def run(state, grads):
            return train.apply_gradients(state, self.config, grads)

        if "apply_gradients" not in self._compiled:
            self._compiled["apply_gradients"] = jax.jit(run)
        with self._placed():
            native = to_tree(self._model, grads)
            self._state = self._compiled["apply_gradients"](self._state, native)

    def train_step(self, x0, t, noise, labels=None, drop=None):
        with self._placed():
            self._state, loss = self._train_step(
                self._state, self.tables, self.config, x0, t, noise, labels, drop
            )
        return float(loss)

    def fit(self, images, labels, steps, shared_noise=False):
        """Train for `steps` steps on images [N, H, W, C] and labels [N]; yields each step's loss.

        Native randomness is keyed by (seed, step), so a run goes on where its state stopped.
        """

        def draws():
            first = int(self._state.step)
            for step in range(first, first + steps):
                if shared_noise:
                    yield training_draws(self.config, len(images), self.seed, step)
                else:
                    key = jax.random.fold_in(jax.random.key(self.seed), step)
                    yield train.draw_batch(self.config, len(images), key)

        with self._placed():
            images, labels = images.astype(self.dtype), np.asarray(labels)
            run = (self._state, self.tables, self.config, images, labels, draws(), self._train_step)
            updates = train.train(*run)
        while True:  # no scope stays open while the caller has its turn
            with self._placed():
                update = next(updates, None)
            if update is None:
                return
            self._state, loss = update
            yield float(loss)

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        def run(model, x, noise, labels):
            inputs = (x, noise, labels, guidance_scale, method, steps, eta)
            return diffusion.sample(model, self.tables, self.config, *inputs)

        noise = np.zeros((steps, 1, 1, 1, 1), x.dtype) if noise is None else noise
        key = ("sample", method, steps, eta, guidance_scale)
        return self._call(key, run, self._model, x, noise, labels)

    def params(self):
        return read_params(self._model)

    def state(self):
        trees = {part: from_tree(getattr(self._state, part)) for part in ("m", "v", "ema")}
        return {"step": int(self._state.step), "params": self.params(), **trees}

    def load_state(self, state):
        model = self._model
        with self._placed():
            trees = (to_tree(model, state[part]) for part in ("params", "m", "v", "ema"))
            parts = (self._state.model[0], next(trees))
            self._state = train.State(parts, *trees, jnp.asarray(state["step"], jnp.int32))

    def synchronize(self):
        jax.block_until_ready(self._state)

    def describe(self):
        return {
            "name": name,
            "framework": f"jax {jax.__version__}, flax {flax.__version__}",
            "device": self.device.device_kind,
            "mode": self.mode,
            "dtype": self.precision,
            "threads": threads(),
        }
