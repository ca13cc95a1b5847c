"""The protocol of spec/backend.py for TensorFlow: functions are compiled, blocks reached here."""

import contextlib
import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it reports every GPU library it lacks

import keras
import numpy as np
import tensorflow as tf

from impl_tf import diffusion, parallel, train, unet
from impl_tf.params import from_tree, load_params, read_params, to_tree
from impl_tf.schedule import make_schedule
from spec.backend import ARRAY_DTYPES, Checked, check_open, keep_freed_memory, nearest_mode
from spec.config import Config
from spec.noise import training_draws
from spec.params import find_block, initial_params

name = "tensorflow"
dtypes = ("float64", "float32", "tf32", "bf16")
modes = ("compiled", "eager", "parallel", "xla")


def open(config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
    """A Model with these parameters, or those that the seed gives.

    compiled: tf.function; xla: its train step through XLA; parallel: a slice of the batch for each
    core, side by side in one tf.function.
    """
    params, mode = (
        check_open(config, params, dtype, device, mode, dtypes),
        nearest_mode(mode, modes),
    )
    keep_freed_memory()
    if mode == "parallel":
        split_cores()
    gpus = tf.config.list_logical_devices("GPU")
    if device == "cuda" and not gpus:
        raise ValueError("device = 'cuda': TensorFlow sees no GPU here; use device='cpu' or 'auto'")
    place = "/GPU:0" if gpus and device != "cpu" else "/CPU:0"
    if dtype == "tf32" and "CPU" in place:
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs, and TensorFlow sees none here")
    # float32 means float32: products would use TF32 on a GPU by default
    tf.config.experimental.enable_tensor_float_32_execution(dtype == "tf32")
    params = initial_params(config, seed) if params is None else params
    return Checked(TensorFlowModel(config, params, seed, dtype, place, mode), config, dtype)


def threads() -> int:
    """Threads that may work at a time: as many as the environment says, else one for each core."""
    if pinned := int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0)):
        return pinned
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def split_cores() -> None:
    """One thread within an operation, and as many operations at a time as there are threads.

    Raises ValueError where TensorFlow has begun otherwise, which cannot be changed any more.
    """
    wanted = (1, threads())
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(wanted[0])
        tf.config.threading.set_inter_op_parallelism_threads(wanted[1])
    began = (
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.config.threading.get_inter_op_parallelism_threads(),
    )
    if began != wanted:
        raise ValueError(
            "mode = 'parallel': TensorFlow began in another mode and cannot change its threads; "
            "open this mode first in its process"
        )


class TensorFlowModel:
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(
        self, config: Config, params, seed: int, precision: str, place: str, mode: str
    ) -> None:
        self.config, self.seed, self.precision = config, seed, precision
        self.dtype = ARRAY_DTYPES[precision]
        self.place, self.mode = place, mode
        policy = "mixed_bfloat16" if precision == "bf16" else self.dtype  # Keras' own name for it
        with self._placed():
            self.tables = make_schedule(config)
            model = unet.UNet(config, policy)
            load_params(model, params)
            self._state = train.init_state(model)
            self._network = self._function(model)
            loss_and_grads, self._train_step = train.loss_and_grads, train.train_step
            if mode == "xla":
                self._train_step = self._function(train.train_step.python_function)
            if mode == "parallel":
                workers = threads() if "CPU" in place else 1
                loss_and_grads = functools.partial(parallel.loss_and_grads, workers)
                self._train_step = functools.partial(parallel.train_step, workers)
            self._loss_and_grads = self._function(loss_and_grads)

    def _function(self, function):
        return tf.function(function, jit_compile=True if self.mode == "xla" else None)

    @property
    def _model(self) -> unet.UNet:
        return self._state.model

    @contextlib.contextmanager
    def _placed(self):
        """Tensors made here live on the device; in eager mode no tf.function is traced."""
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(self.mode == "eager")
        try:
            with tf.device(self.place):
                yield
        finally:
            tf.config.run_functions_eagerly(before)

    def _call(self, function, *inputs):
        """function(*inputs) on tensors of these arrays; NumPy arrays of its own."""
        with self._placed():
            inputs = (tf.constant(i) if isinstance(i, np.ndarray) else i for i in inputs)
            return tf.nest.map_structure(self._numpy, function(*inputs))

    def _numpy(self, value) -> np.ndarray:
        """An array of its own, of a dtype that NumPy has."""
        return np.array(value, self.dtype if value.dtype == tf.bfloat16 else None)

    def schedule(self):
        return {key: table.numpy().astype(self.dtype) for key, table in self.tables.items()}

    def q_sample(self, x0, t, noise):
        return self._call(diffusion.q_sample, self.tables, x0, t, noise)

    def target(self, x0, t, noise):
        return self._call(diffusion.target, self.tables, self.config, x0, t, noise)

    def predict_x0_eps(self, x_t, t, out):
        return self._call(diffusion.predict_x0_eps, self.tables, self.config, x_t, t, out)

    def ddpm_step(self, x_t, t, out, noise):
        return self._call(diffusion.ddpm_step, self.tables, self.config, x_t, t, out, noise)

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        def step(x_t, t, t_prev, out, noise):
            factors = diffusion.ddim_coefficients(self.tables, t, t_prev, eta)
            return diffusion.ddim_step(self.tables, self.config, x_t, t, out, noise, factors)

        return self._call(step, x_t, t, t_prev, out, noise)

    def guide(self, out_null, out_label, guidance_scale):
        return self._call(diffusion.guide, out_null, out_label, guidance_scale)

    def predict(self, x, t, labels=None):
        return self._call(self._network, x, t, labels)

    def taps(self, x, t, labels=None):
        seen = {}

        def tap(key, value):
            seen[key] = value
            return value

        def record(x, t, labels):
            self._model(x, t, labels, tap=tap)
            return seen

        taps = self._call(record, x, t, labels)
        return {key: taps[key] for key in seen}

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        kind, model = find_block(self.config, name).kind, self._model

        def run(x, emb, t, labels):
            if kind == "time_proj":
                return tf.gather(model.time_table, t)
            if kind == "emb":
                return model.embed(tf.gather(model.time_table, t), labels)
            if kind == "conv_out":
                return model.head(x)
            block = model
            for part in name.split("."):
                block = block[int(part)] if part.isdigit() else getattr(block, part)
            return block(x, emb) if kind == "resnet" else block(x)

        return self._call(run, x, emb, t, labels)

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        inputs = (self._model, self.tables, self.config, x0, t, noise, labels, drop)
        loss, grads = self._call(self._loss_and_grads, *inputs)
        return float(loss), from_tree(grads)

    def apply_gradients(self, grads):
        with self._placed():
            train.apply_gradients(self._state, self.config, to_tree(self._model, grads))

    def train_step(self, x0, t, noise, labels=None, drop=None):
        inputs = (self._state, self.tables, self.config, x0, t, noise, labels, drop)
        return float(self._call(self._train_step, *inputs))

    def fit(self, images, labels, steps, shared_noise=False):
        """Train for `steps` steps on images [N, H, W, C] and labels [N]; yields each step's loss.

        Native randomness is keyed by (seed, step), so a run goes on where its state stopped.
        """

        def draws():
            first = int(self._state.step)
            for step in range(first, first + steps):
                if shared_noise:
                    drawn = training_draws(self.config, len(images), self.seed, step)
                    yield [tf.constant(value) for value in drawn]
                else:
                    # the step counts in the high word: in the low one, steps would overlap
                    counter = [0, step]
                    generator = tf.random.Generator.from_key_counter(self.seed, counter, "philox")
                    yield train.draw_batch(self.config, len(images), generator)

        with self._placed():
            images = tf.constant(images.astype(self.dtype))
            labels = None if labels is None else tf.constant(labels)
            run = (self._state, self.tables, self.config, images, labels, draws(), self._train_step)
            losses = train.train(*run)
        while True:  # no scope stays open while the caller has its turn
            with self._placed():
                loss = next(losses, None)
            if loss is None:
                return
            yield float(loss)

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        def run(x, noise, labels):
            inputs = (x, noise, labels, guidance_scale, method, steps, eta)
            return diffusion.sample(self._network, self.tables, self.config, *inputs)

        noise = np.zeros((steps, 1, 1, 1, 1), x.dtype) if noise is None else noise
        return self._call(run, x, noise, labels)

    def params(self):
        return read_params(self._model)

    def state(self):
        trees = {part: from_tree(getattr(self._state, part)) for part in ("m", "v", "ema")}
        return {"step": int(self._state.step), "params": self.params(), **trees}

    def load_state(self, state):
        load_params(self._model, state["params"])
        for part in ("m", "v", "ema"):
            for key, value in to_tree(self._model, state[part]).items():
                getattr(self._state, part)[key].assign(value)
        self._state.step.assign(state["step"])

    def synchronize(self):
        """Wait for the device: reading one value of the state ends all that came before it."""
        tf.test.experimental.sync_devices()

    def describe(self):
        return {
            "name": name,
            "framework": f"tensorflow {tf.__version__}, keras {keras.__version__}",
            "device": "cpu" if "CPU" in self.place else "gpu",
            "mode": self.mode,
            "dtype": self.precision,
            "threads": threads(),
        }
