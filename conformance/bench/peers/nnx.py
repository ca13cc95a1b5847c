"""Plain Flax NNX: its own layers, `nnx.Optimizer` with optax' Adam, `nnx.jit`.

`compiled` is as its guides do it; `tuned` is with nnx.cached_partial, which goes through the graph
of modules once and not in every step.

The network is that of S7, Adam and the EMA are S9's: its train step is checked as those of this
repository. Its GroupNorm takes the variance in one pass, as it comes.
"""

import functools
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from conformance.bench.peers import Peer, opened_with
from conformance.bench.peers.network import unet
from conformance.process import ROOT
from spec import reference
from spec.backend import ARRAY_DTYPES, Params, State
from spec.config import Config
from spec.params import parameter_shapes

name = "nnx"
modes = ("compiled", "tuned")
dtypes = ("float64", "float32", "tf32", "bf16")
EPS = 1e-6  # of every GroupNorm (S7)
CACHE = ROOT / ".jax_cache"  # compiled functions, where impl_jax keeps its own
CHECKED = "the same network, by the same names: its train step is checked like those of this suite"
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}


def open(
    config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"
) -> "Nnx":
    """A model with these parameters, or with those that the seed gives."""
    params = opened_with(config, params, seed, dtype, device, mode, dtypes, modes)
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    precision = {"tf32": "tensorfloat32", "bf16": "default"}.get(dtype, "highest")
    jax.config.update("jax_default_matmul_precision", precision)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE", str(CACHE)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        place = jax.devices({"cpu": "cpu", "cuda": "gpu", "auto": None}[device])[0]
    except RuntimeError as error:
        raise ValueError(
            f"device = {device!r}: JAX has none; use device='cpu' or 'auto'"
        ) from error
    if dtype == "tf32" and place.platform != "gpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs, and JAX sees none here")
    return Nnx(config, params, dtype, place, mode)


@functools.cache
def time_table(config: Config) -> np.ndarray:
    """[T, channels[0]] in float64: the sines of every time, then the cosines (S7)."""
    return reference.time_proj(config, np.arange(config.timesteps))


class UNet(nnx.Module):
    """The layers by canonical name, and the network of them; the first call makes them."""

    def __init__(self, config: Config, kept: Any, compute: Any) -> None:
        self.config, self.kept, self.compute = config, kept, compute
        self.layers = nnx.Dict()
        shape = (1, *config.image_shape)
        labels = jnp.zeros(1, int) if config.num_classes else None
        self(jnp.zeros(shape, kept), jnp.zeros(1, int), labels)

    def __call__(self, x, t, labels=None):
        return unet(self.config, self, x, t, labels).astype(self.kept)

    def _layer(self, key: str, kind: Any, *sizes: Any, **named: Any) -> Any:
        if key not in self.layers:
            types = {"dtype": self.compute, "param_dtype": self.kept, "rngs": nnx.Rngs(0)}
            self.layers[key] = kind(*sizes, **named, **types)
        return self.layers[key]

    def times(self, t):
        return jnp.asarray(time_table(self.config), self.compute)[t]

    def classes(self, labels):
        rows, width = self.config.num_classes + 1, self.config.time_width
        return self._layer("class_embedding", nnx.Embed, rows, width)(labels)

    def linear(self, name, x, width):
        return self._layer(name, nnx.Linear, x.shape[-1], width)(x)

    def conv(self, name, x, width, size=3):
        return self._layer(name, nnx.Conv, x.shape[-1], width, (size, size))(x)

    def half(self, name, x, width):
        padding = ((0, 1), (0, 1))
        named = {"strides": 2, "padding": padding}
        return self._layer(name, nnx.Conv, x.shape[-1], width, (3, 3), **named)(x)

    def double(self, x):
        rows, height, width, channels = x.shape
        return jax.image.resize(x, (rows, 2 * height, 2 * width, channels), "nearest")

    def norm(self, name, x):
        groups = self.config.groups
        return self._layer(name, nnx.GroupNorm, x.shape[-1], groups, epsilon=EPS)(x)

    def silu(self, x):
        return nnx.silu(x)

    def attend(self, name, x):
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        named = {"decode": False, "keep_rngs": False}  # there is no dropout to draw for
        layer = self._layer(name, nnx.MultiHeadAttention, 1, x.shape[-1], **named)
        return layer(h).reshape(x.shape)

    def everywhere(self, x, emb):
        return x + emb[:, None, None, :]

    def join(self, x, skip):
        return jnp.concatenate([x, skip], axis=-1)


def make_step(config: Config, tables: dict[str, Any]):
    """The train step of plain NNX: model, optimizer and EMA are changed in place."""

    def row(key, t):
        return tables[key][t][:, None, None, None]

    def loss_of(model, x0, t, noise, labels):
        signal, sigma = row("sqrt_alphas_cumprod", t), row("sqrt_one_minus_alphas_cumprod", t)
        goals = {"eps": noise, "x0": x0, "v": signal * noise - sigma * x0}
        out = model(signal * x0 + sigma * noise, t, labels)
        return jnp.mean((out - goals[config.prediction]) ** 2)

    def step(model, optimizer, ema, x0, t, noise, labels, drop):
        if drop is not None:
            labels = jnp.where(drop, config.num_classes, labels)
        k = optimizer.step[...].astype(x0.dtype)
        loss, grads = nnx.value_and_grad(loss_of)(model, x0, t, noise, labels)
        optimizer.update(model, grads)
        decay = jnp.minimum(config.ema_decay, (1 + k) / (10 + k))
        new, old = nnx.state(model, nnx.Param), nnx.state(ema, nnx.Param)
        nnx.update(ema, optax.incremental_update(new, old, 1 - decay))
        return loss

    return step


class Nnx(Peer):
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(self, config: Config, params: Params, precision: str, place: Any, mode) -> None:
        self.config, self.precision, self.place, self.mode = config, precision, place, mode
        self.dtype = jnp.dtype(ARRAY_DTYPES[precision])
        compute = jnp.bfloat16 if precision == "bf16" else self.dtype
        tables = {
            key: table.astype(self.dtype) for key, table in reference.make_schedule(config).items()
        }
        warmup = max(1, config.warmup)
        adam = optax.adam(
            lambda k: config.learning_rate * jnp.minimum(1.0, (k + 1) / warmup),
            b1=0.9,
            b2=0.999,
            eps=1e-8,
        )
        if config.max_grad_norm:
            adam = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)
        with jax.default_device(place):
            self.model = nnx.eval_shape(lambda: UNet(config, self.dtype, compute))
            self._load(params)
            self.optimizer = nnx.Optimizer(self.model, adam, wrt=nnx.Param)
            self.ema = nnx.clone(self.model)
            run = nnx.jit(make_step(config, jax.tree.map(jnp.asarray, tables)))
        held = (self.model, self.optimizer, self.ema)
        cached = mode == "tuned"
        self.run = nnx.cached_partial(run, *held) if cached else lambda *batch: run(*held, *batch)
        self.forward = nnx.jit(lambda model, x, t, labels: model(x, t, labels))

    def train_step(self, x0, t, noise, labels=None, drop=None):
        with jax.default_device(self.place):
            return float(self.run(x0, t, noise, labels, drop))

    def predict(self, x, t, labels=None):
        with jax.default_device(self.place):
            return np.array(self.forward(self.model, x, t, labels))

    def synchronize(self):
        jax.block_until_ready(
            (nnx.state(self.model), nnx.state(self.optimizer), nnx.state(self.ema))
        )

    def params(self):
        return self._arrays(nnx.state(self.model, nnx.Param))

    def state(self) -> State:
        (adam,) = [
            part
            for part in jax.tree.leaves(self.optimizer.opt_state, is_leaf=_is_adam)
            if _is_adam(part)
        ]
        parts = {"m": adam.mu, "v": adam.nu, "ema": nnx.state(self.ema, nnx.Param)}
        trees = {key: self._arrays(tree) for key, tree in parts.items()}
        return {"step": int(self.optimizer.step[...]), "params": self.params(), **trees}

    def describe(self):
        return {
            "name": name,
            "framework": f"jax {jax.__version__}, flax {flax.__version__}",
            "device": self.place.device_kind,
            "mode": self.mode,
            "dtype": self.precision,
            "threads": len(os.sched_getaffinity(0)),
            "parameters": sum(v.size for v in jax.tree.leaves(nnx.state(self.model, nnx.Param))),
            "checked": CHECKED,
        }

    def _load(self, params: Params) -> None:
        """Put parameters by canonical name into the model."""
        flat = []
        for path, variable in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            value = params[_canonical(path)]
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            value = value.T if value.ndim == 2 and path[-1] == "kernel" else value
            native = jnp.array(value.reshape(variable.shape), self.dtype)
            flat.append((path, variable.replace(native)))
        nnx.update(self.model, nnx.from_flat_state(flat))

    def _arrays(self, tree: Any) -> Params:
        """Native parameters -> arrays by canonical name, in the order in which the blocks run."""
        found, shapes = {}, parameter_shapes(self.config)
        for path, variable in nnx.to_flat_state(tree):
            key = _canonical(path)
            value, shape = np.asarray(variable[...]), shapes[key]
            if len(shape) == 4:
                value = value.transpose(3, 2, 0, 1)
            elif path[-1] == "kernel":
                value = value.reshape(shape[::-1]).T
            found[key] = np.array(value.reshape(shape), order="C")
        return {key: found[key] for key in shapes}


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def _canonical(path: tuple) -> str:
    """The canonical name of the parameter at ("layers", layer[, part of an attention], kind)."""
    _, key, *part, kind = (str(word) for word in path)
    names = {own: canonical for canonical, own in ATTENTION.items()}
    return ".".join([key, *(names[own] for own in part), "bias" if kind == "bias" else "weight"])
