"""Keras as it is meant to be used: its own layers, `compile`, `train_on_batch`, its Adam and EMA.

`auto` is as it comes, which compiles by XLA; `graph` is `jit_compile=False`.

The network is that of S7 with the weights of this repository, and gives its output (see
tests/test_bench_peers.py). Adam is Keras' own, with its epsilon where v is not yet corrected, and
so is the EMA, of a constant decay: so its state is not S9's, and only its loss can be watched.
The noise is mixed in by NumPy, as a data pipeline would.
"""

import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from conformance.bench.peers import Peer, opened_with
from conformance.bench.peers.network import unet
from spec import reference
from spec.backend import ARRAY_DTYPES, Params
from spec.config import Config
from spec.params import parameter_count

name = "keras"
modes = ("auto", "graph")
dtypes = ("float64", "float32", "tf32", "bf16")
EPS = 1e-6  # of every GroupNorm (S7)


def open(
    config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="auto"
) -> "Keras":
    """A model with these parameters, or with those that the seed gives."""
    params = opened_with(config, params, seed, dtype, device, mode, dtypes, modes)
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus and (device == "cuda" or dtype == "tf32"):
        raise ValueError(
            f"device = {device!r}, dtype = {dtype!r}: TensorFlow sees no GPU here; use "
            "device='cpu' and another dtype"
        )
    tf.config.experimental.enable_tensor_float_32_execution(dtype == "tf32")
    on_gpu = bool(gpus) and device != "cpu"
    with tf.device("/GPU:0" if on_gpu else "/CPU:0"):
        return Keras(config, params, dtype, mode, on_gpu)


class Layers:
    """Makes the layers of Keras while the functional network is put together."""

    def __init__(self, config: Config, policy: str) -> None:
        self.config, self.policy = config, policy
        self.made: dict[str, Any] = {}

    def _make(self, key: str, kind: Any, *arguments: Any, **named: Any) -> Any:
        self.made[key] = kind(*arguments, **named, name=key, dtype=self.policy)
        return self.made[key]

    def times(self, t):
        every = np.arange(self.config.timesteps)
        table = reference.time_proj(self.config, every)
        layer = keras.layers.Embedding(
            *table.shape, weights=[table], trainable=False, dtype=self.policy
        )
        return layer(t)

    def classes(self, labels):
        rows, width = self.config.num_classes + 1, self.config.time_width
        return self._make("class_embedding", keras.layers.Embedding, rows, width)(labels)

    def linear(self, name, x, width):
        return self._make(name, keras.layers.Dense, width)(x)

    def conv(self, name, x, width, size=3):
        return self._make(name, keras.layers.Conv2D, width, size, padding="same")(x)

    def half(self, name, x, width):
        x = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), dtype=self.policy)(x)
        return self._make(name, keras.layers.Conv2D, width, 3, strides=2)(x)

    def double(self, x):
        return keras.layers.UpSampling2D(2, interpolation="nearest", dtype=self.policy)(x)

    def norm(self, name, x):
        kind = keras.layers.GroupNormalization
        return self._make(name, kind, self.config.groups, epsilon=EPS)(x)

    def silu(self, x):
        return keras.layers.Activation("silu", dtype=self.policy)(x)

    def attend(self, name, x):
        height, width, channels = x.shape[1:]
        h = keras.layers.Reshape((height * width, channels), dtype=self.policy)(x)
        h = self._make(name, keras.layers.MultiHeadAttention, 1, channels)(h, h)
        return keras.layers.Reshape((height, width, channels), dtype=self.policy)(h)

    def everywhere(self, x, emb):
        return x + keras.layers.Reshape((1, 1, emb.shape[-1]), dtype=self.policy)(emb)

    def join(self, x, skip):
        return keras.layers.Concatenate(dtype=self.policy)([x, skip])


class Keras(Peer):
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(
        self, config: Config, params: Params, precision: str, mode: str, on_gpu: bool
    ) -> None:
        self.config, self.precision, self.mode, self.on_gpu = config, precision, mode, on_gpu
        self.dtype = ARRAY_DTYPES[precision]
        self.tables = reference.make_schedule(config)
        policy = "mixed_bfloat16" if precision == "bf16" else self.dtype
        layers = Layers(config, policy)
        inputs = [keras.Input(config.image_shape, dtype=self.dtype), keras.Input((), dtype="int32")]
        if config.num_classes:
            inputs.append(keras.Input((), dtype="int32"))
        out = unet(config, layers, *inputs)
        out = keras.layers.Activation("linear", dtype=self.dtype)(out)
        self.network, self.layers = keras.Model(inputs, out), layers.made
        self._load(params)
        self.network.compile(
            keras.optimizers.Adam(
                WarmUp(config.learning_rate, config.warmup)
                if config.warmup
                else config.learning_rate,
                beta_1=0.9,
                beta_2=0.999,
                epsilon=1e-8,
                global_clipnorm=config.max_grad_norm or None,
                use_ema=True,
                ema_momentum=config.ema_decay,
            ),
            loss="mean_squared_error",
            jit_compile="auto" if mode == "auto" else False,
        )

    def _load(self, params: Params) -> None:
        """Put parameters by canonical name into the layers."""
        for key, layer in self.layers.items():
            layer.set_weights(_to_keras(key, layer, params))

    def params(self) -> Params:
        found: Params = {}
        for key, layer in self.layers.items():
            found |= _from_keras(key, layer)
        return {n: np.array(v, order="C") for n, v in found.items()}

    def train_step(self, x0, t, noise, labels=None, drop=None):
        x = reference.q_sample(self.tables, x0, t, noise).astype(self.dtype)
        target = reference.target(self.config, self.tables, x0, t, noise).astype(self.dtype)
        inputs = [x, t]
        if self.config.num_classes:
            inputs.append(reference.drop_labels(self.config, labels, drop))
        return float(self.network.train_on_batch(inputs, target))

    def predict(self, x, t, labels=None):
        inputs = [x, t] if labels is None else [x, t, labels]
        return np.array(self.network.predict_on_batch(inputs), self.dtype)

    def synchronize(self):
        tf.test.experimental.sync_devices()

    def describe(self):
        parameters = sum(int(np.prod(w.shape)) for w in self.network.trainable_weights)
        return {
            "name": name,
            "framework": f"tensorflow {tf.__version__}, keras {keras.__version__}",
            "device": "gpu" if self.on_gpu else "cpu",
            "mode": self.mode,
            "dtype": self.precision,
            "threads": tf.config.threading.get_intra_op_parallelism_threads()
            or len(os.sched_getaffinity(0)),
            "parameters": parameters,
            "checked": (
                f"the same network, of Keras' layers: {parameters:,} parameters (here "
                f"{parameter_count(self.config):,}), the same output; its Adam and EMA are not S9's"
            ),
        }


@keras.saving.register_keras_serializable("conformance")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """lr * min(1, (k + 1) / warmup) for step k = 0, 1, ... (S9)."""

    def __init__(self, rate: float, warmup: int) -> None:
        self.rate, self.warmup = rate, warmup

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        return self.rate * keras.ops.minimum(1.0, (step + 1) / self.warmup)

    def get_config(self):
        return {"rate": self.rate, "warmup": self.warmup}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # in the order of the layer's weights


def _to_keras(key: str, layer: Any, params: Params) -> list[np.ndarray]:
    """The weights of a layer in its own order and layouts."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        shapes = [weight.shape for weight in layer.weights]
        flat = [
            value
            for part in ATTENTION
            for value in (params[f"{key}.{part}.weight"].T, params[f"{key}.{part}.bias"])
        ]
        return [value.reshape(shape) for value, shape in zip(flat, shapes, strict=True)]
    if isinstance(layer, keras.layers.Embedding):
        return [params[f"{key}.weight"]]
    weight, bias = params[f"{key}.weight"], params[f"{key}.bias"]
    if weight.ndim == 4:
        weight = weight.transpose(2, 3, 1, 0)
    return [weight.T if weight.ndim == 2 else weight, bias]


def _from_keras(key: str, layer: Any) -> Params:
    """The same back, by canonical name."""
    weights = layer.get_weights()
    if isinstance(layer, keras.layers.MultiHeadAttention):
        width = weights[-1].shape[0]
        found = {}
        for i, part in enumerate(ATTENTION):
            found[f"{key}.{part}.weight"] = weights[2 * i].reshape(width, width).T
            found[f"{key}.{part}.bias"] = weights[2 * i + 1].reshape(width)
        return found
    if isinstance(layer, keras.layers.Embedding):
        return {f"{key}.weight": weights[0]}
    weight, bias = weights
    if weight.ndim == 4:
        weight = weight.transpose(3, 2, 0, 1)
    return {f"{key}.weight": weight.T if weight.ndim == 2 else weight, f"{key}.bias": bias}
