"""The protocol of spec/backend.py for NumPy; arguments are checked there, blocks reached here."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from impl_numpy import diffusion, train, unet
from impl_numpy.layers import conv
from impl_numpy.params import from_tree, load_params, read_params, to_tree
from impl_numpy.schedule import make_schedule
from spec.backend import Checked, check_open, keep_freed_memory, nearest_mode
from spec.config import Config
from spec.noise import training_draws
from spec.params import find_block, initial_params

name = "numpy"
dtypes = ("float64", "float32")  # NumPy has no bfloat16
modes = ("eager", "parallel")  # parallel: a slice of the batch for each thread


def open(config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
    """A Model with these parameters, or those that the seed gives."""
    params = check_open(config, params, dtype, device, mode, dtypes)
    keep_freed_memory()
    if device == "cuda":
        raise ValueError("device = 'cuda': NumPy runs on the CPU; use device='cpu' or 'auto'")
    params = initial_params(config, seed) if params is None else params
    mode = nearest_mode(mode, modes)
    return Checked(NumpyModel(config, params, seed, dtype, mode), config, dtype)


def threads() -> int:
    """Threads of a product: as many as the environment says, else one for each core."""
    if pinned := int(os.environ.get("OPENBLAS_NUM_THREADS", 0)):
        return pinned
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class NumpyModel:
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(self, config: Config, params, seed: int, dtype: str, mode: str) -> None:
        self.config, self.seed, self.dtype = config, seed, np.dtype(dtype)
        self.mode = mode
        self.tables = make_schedule(config)
        model = unet.UNet(config, self.dtype)
        load_params(model, params)
        self._state = train.init_state(model)
        self._loss_and_grads, self._train_step = train.loss_and_grads, train.train_step
        if mode == "parallel":
            from impl_numpy import parallel

            workers = parallel.Workers(ThreadPoolExecutor(threads()), threads())
            self._loss_and_grads = functools.partial(parallel.loss_and_grads, workers)
            self._train_step = functools.partial(parallel.train_step, workers)

    @property
    def _model(self) -> unet.UNet:
        return self._state.model

    def schedule(self):
        return {key: table.astype(self.dtype) for key, table in self.tables.items()}

    def q_sample(self, x0, t, noise):
        return diffusion.q_sample(self.tables, x0, t, noise)

    def target(self, x0, t, noise):
        return diffusion.target(self.tables, self.config, x0, t, noise).copy()

    def predict_x0_eps(self, x_t, t, out):
        x0, eps = diffusion.predict_x0_eps(self.tables, self.config, x_t, t, out)
        return x0.copy(), eps.copy()

    def ddpm_step(self, x_t, t, out, noise):
        return diffusion.ddpm_step(self.tables, self.config, x_t, t, out, noise)

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        coefficients = diffusion.ddim_coefficients(self.tables, t, t_prev, eta)
        return diffusion.ddim_step(self.tables, self.config, x_t, t, out, noise, coefficients)

    def guide(self, out_null, out_label, guidance_scale):
        return diffusion.guide(out_null, out_label, guidance_scale)

    def predict(self, x, t, labels=None):
        return self._model(x, t, labels)

    def taps(self, x, t, labels=None):
        seen = {}

        def tap(key, value):
            seen[key] = value.copy()
            return value

        self._model(x, t, labels, tap)
        return seen

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        p, groups, kind = self._model.params, self.config.groups, find_block(self.config, name).kind
        if kind == "time_proj":
            return self._model.time_table[t]
        if kind == "emb":
            return unet.embed(p, self._model.time_table[t], labels)[0]
        if kind == "resnet":
            return unet.res_block(p, name, x, emb, groups)[0]
        if kind == "attention":
            return unet.attention(p, name, x, groups)[0]
        if kind == "conv_in":
            return conv(p, name, x)[0]
        if kind == "conv_out":
            return unet.head(p, x, groups)[0]
        return {"downsample": unet.downsample, "upsample": unet.upsample}[kind](p, name, x)[0]

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        loss, grads = self._loss_and_grads(
            self._model, self.tables, self.config, x0, t, noise, labels, drop
        )
        return float(loss), from_tree({key: grads[key] for key in self._model.params})

    def apply_gradients(self, grads):
        train.apply_gradients(self._state, self.config, to_tree(self._model, grads))

    def train_step(self, x0, t, noise, labels=None, drop=None):
        batch = (x0, t, noise, labels, drop)
        return float(self._train_step(self._state, self.tables, self.config, *batch))

    def fit(self, images, labels, steps, shared_noise=False):
        """Train for `steps` steps on images [N, H, W, C] and labels [N]; yields each step's loss.

        Native randomness is keyed by (seed, step), so a run goes on where its state stopped.
        """

        def draws():
            for step in range(self._state.step, self._state.step + steps):
                if shared_noise:
                    yield training_draws(self.config, len(images), self.seed, step)
                else:
                    generator = np.random.default_rng([self.seed, step])
                    yield train.draw_batch(self.config, len(images), generator)

        images = images.astype(self.dtype)
        run = (self._state, self.tables, self.config, images, labels, draws(), self._train_step)
        for loss in train.train(*run):
            yield float(loss)

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        noise = np.zeros((steps, 1, 1, 1, 1), x.dtype) if noise is None else noise
        inputs = (x, noise, labels, guidance_scale, method, steps, eta)
        return diffusion.sample(self._model, self.tables, self.config, *inputs)

    def params(self):
        return read_params(self._model)

    def state(self):
        trees = {part: from_tree(getattr(self._state, part)) for part in ("m", "v", "ema")}
        return {"step": self._state.step, "params": self.params(), **trees}

    def load_state(self, state):
        load_params(self._model, state["params"])
        trees = (to_tree(self._model, state[part]) for part in ("m", "v", "ema"))
        self._state = train.State(self._model, *trees, step=state["step"])

    def synchronize(self):
        """NumPy has finished when it returns."""

    def describe(self):
        return {
            "name": name,
            "framework": f"numpy {np.__version__}",
            "device": "cpu",
            "mode": self.mode,
            "dtype": str(self.dtype),
            "threads": threads(),
        }
