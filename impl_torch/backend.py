"""The protocol of spec/backend.py for PyTorch; images are permuted, blocks reached here."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from impl_torch import diffusion, graph, parallel, train, unet
from impl_torch.params import from_tree, load_params, read_params, to_tree
from impl_torch.schedule import make_schedule
from spec.backend import ARRAY_DTYPES, Checked, check_open, keep_freed_memory, nearest_mode
from spec.config import Config
from spec.noise import training_draws
from spec.params import find_block, initial_params

name = "torch"
dtypes = ("float64", "float32", "tf32", "bf16")
modes = (
    *("eager", "compiled", "parallel", "contiguous"),
    *("graph", "reduce-overhead", "max-autotune"),
)


def open(config: Config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
    """A Model with these parameters, or those that the seed gives.

    parallel: eager, a slice of the batch for each thread; on a GPU the whole batch.
    contiguous: eager, with images in memory as [B, C, H, W]; else they lie as [B, H, W, C].
    compiled, reduce-overhead, max-autotune: torch.compile, in its mode of that name.
    graph: compiled, and on a GPU the loss and its gradients are one launch.
    """
    params, mode = (
        check_open(config, params, dtype, device, mode, dtypes),
        nearest_mode(mode, modes),
    )
    keep_freed_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': PyTorch sees no GPU here; use device='cpu' or 'auto'")
    if dtype == "tf32" and device == "cpu":
        raise ValueError("dtype = 'tf32' is a mode of NVIDIA GPUs, and PyTorch sees none here")
    # float32 means float32: convolutions would use TF32 on a GPU by default
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    params = initial_params(config, seed) if params is None else params
    model = TorchModel(config, params, seed, dtype, torch.device(device), mode)
    return Checked(model, config, dtype)


class TorchModel:
    """See spec.backend.Model for what each method takes and gives."""

    def __init__(self, config, params, seed: int, precision: str, device, mode: str) -> None:
        self.config, self.seed, self.precision = config, seed, precision
        self.dtype = getattr(torch, ARRAY_DTYPES[precision])
        self.device, self.mode = device, mode
        self.tables = {key: table.to(device) for key, table in make_schedule(config).items()}
        self.layout = torch.contiguous_format if mode == "contiguous" else torch.channels_last
        model = unet.UNet(config).to(device, self.dtype, memory_format=self.layout)
        load_params(model, params)
        if precision == "bf16":
            model.forward = self._in_precision(model.forward)
        self._state = train.init_state(model)
        self._loss_and_grads, self._train_step = train.loss_and_grads, train.train_step
        if mode == "parallel":
            count = torch.get_num_threads() if device.type == "cpu" else 1
            one_each = {"initializer": torch.set_num_threads, "initargs": (1,)}
            workers = parallel.Workers(ThreadPoolExecutor(count, **one_each), count)
            self._loss_and_grads = functools.partial(parallel.loss_and_grads, workers)
            self._train_step = functools.partial(parallel.train_step, workers)
        elif mode not in ("eager", "contiguous"):
            model.compile(mode=None if mode in ("compiled", "graph") else mode)
        if mode == "graph" and device.type == "cuda":
            graphs = {}
            self._loss_and_grads = functools.partial(graph.loss_and_grads, graphs)
            self._train_step = functools.partial(graph.train_step, graphs)

    @property
    def _model(self) -> unet.UNet:
        return self._state.model

    def _in_precision(self, function):
        """The function, its products in bfloat16 where that was asked for; float32 comes back."""
        if self.precision != "bf16":
            return function

        def run(*inputs):
            with torch.autocast(self.device.type, torch.bfloat16):
                return function(*inputs).to(self.dtype)

        return run

    def _native(self, value):
        """A tensor on the device; images [..., H, W, C] become [..., C, H, W]."""
        if value is None:
            return None
        tensor = torch.from_numpy(value.copy()).to(self.device)
        tensor = tensor.movedim(-1, -3) if value.ndim > 3 else tensor
        return tensor.contiguous() if self.mode == "contiguous" else tensor

    def _natives(self, *values):
        return [self._native(value) for value in values]

    def _numpy(self, tensor) -> np.ndarray:
        """The same back, as an array of its own."""
        tensor = tensor.detach()
        tensor = tensor.to(self.dtype) if tensor.dtype == torch.bfloat16 else tensor
        tensor = tensor.movedim(-3, -1) if tensor.ndim > 3 else tensor
        return np.array(tensor.cpu().numpy(), order="C")

    def schedule(self):
        return {key: self._numpy(table.to(self.dtype)) for key, table in self.tables.items()}

    def q_sample(self, x0, t, noise):
        return self._numpy(diffusion.q_sample(self.tables, *self._natives(x0, t, noise)))

    def target(self, x0, t, noise):
        return self._numpy(diffusion.target(self.tables, self.config, *self._natives(x0, t, noise)))

    def predict_x0_eps(self, x_t, t, out):
        inputs = self._natives(x_t, t, out)
        x0, eps = diffusion.predict_x0_eps(self.tables, self.config, *inputs)
        return self._numpy(x0), self._numpy(eps)

    def ddpm_step(self, x_t, t, out, noise):
        inputs = self._natives(x_t, t, out, noise)
        return self._numpy(diffusion.ddpm_step(self.tables, self.config, *inputs))

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        x_t, t, t_prev, out, noise = self._natives(x_t, t, t_prev, out, noise)
        coefficients = diffusion.ddim_coefficients(self.tables, t, t_prev, eta)
        x = diffusion.ddim_step(self.tables, self.config, x_t, t, out, noise, coefficients)
        return self._numpy(x)

    def guide(self, out_null, out_label, guidance_scale):
        return self._numpy(diffusion.guide(*self._natives(out_null, out_label), guidance_scale))

    @torch.no_grad()
    def predict(self, x, t, labels=None):
        return self._numpy(self._model(*self._natives(x, t, labels)))

    @torch.no_grad()
    def taps(self, x, t, labels=None):
        seen = {}

        def tap(key, value):
            seen[key] = self._numpy(value)
            return value

        self._model.forward(*self._natives(x, t, labels), tap)
        return seen

    @torch.no_grad()
    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        kind, (x, emb, t, labels) = (
            find_block(self.config, name).kind,
            self._natives(x, emb, t, labels),
        )
        if kind == "time_proj":
            return self._numpy(self._model.time_table[t])
        if kind == "emb":
            embed = self._in_precision(self._model.embed)
            return self._numpy(embed(self._model.time_table[t], labels))
        block = self._model.head if kind == "conv_out" else self._model.get_submodule(name)
        block = self._in_precision(block)
        return self._numpy(block(x, emb) if kind == "resnet" else block(x))

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        inputs = self._natives(x0, t, noise, labels, drop)
        loss, grads = self._loss_and_grads(self._model, self.tables, self.config, *inputs)
        return float(loss), from_tree(grads)

    def apply_gradients(self, grads):
        train.apply_gradients(self._state, self.config, to_tree(self._model, grads))

    def train_step(self, x0, t, noise, labels=None, drop=None):
        inputs = self._natives(x0, t, noise, labels, drop)
        return float(self._train_step(self._state, self.tables, self.config, *inputs))

    def fit(self, images, labels, steps, shared_noise=False):
        """Train for `steps` steps on images [N, H, W, C] and labels [N]; yields each step's loss.

        Native randomness is keyed by (seed, step), so a run goes on where its state stopped.
        """

        def draws():
            generator = torch.Generator(self.device)
            for step in range(self._state.step, self._state.step + steps):
                if shared_noise:
                    yield self._natives(*training_draws(self.config, len(images), self.seed, step))
                else:
                    # mixed into 32 bits: a generator of the CPU reads no more of its seed
                    mixed = np.random.SeedSequence([self.seed, step]).generate_state(1)
                    generator.manual_seed(int(mixed[0]))
                    yield train.draw_batch(self.config, len(images), generator)

        images, labels = self._natives(images, labels)
        images = images.to(self.dtype)
        run = (self._state, self.tables, self.config, images, labels, draws(), self._train_step)
        for loss in train.train(*run):
            yield float(loss)

    @torch.no_grad()
    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        noise = np.zeros((steps, 1, 1, 1, 1), x.dtype) if noise is None else noise
        x, noise, labels = self._natives(x, noise, labels)
        inputs = (x, noise, labels, guidance_scale, method, steps, eta)
        return self._numpy(diffusion.sample(self._model, self.tables, self.config, *inputs))

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
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self):
        on_gpu = self.device.type == "cuda"
        return {
            "name": name,
            "framework": f"torch {torch.__version__}",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "mode": self.mode,
            "dtype": self.precision,
            "threads": torch.get_num_threads(),
        }
