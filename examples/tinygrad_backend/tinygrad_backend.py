"""The specification in tinygrad: network and gradients there, tables and state in NumPy.

Written from SPEC.md and the protocol alone, with the starter of `python -m conformance new`.
"""

import itertools
import os
from importlib.metadata import version

os.environ.setdefault("DEV", "CPU")  # before tinygrad looks for devices

import numpy as np
from tinygrad import Tensor

from spec.backend import check_open
from spec.params import blocks, find_block, initial_params

name = "tinygrad_backend"
modes = ("eager",)
dtypes = ("float64", "float32")


def open(config, params=None, *, seed=0, dtype="float32", device="auto", mode="eager"):
    """A Model with these parameters, or with those of the seed; on the CPU."""
    params = check_open(config, params, dtype, device, mode, dtypes)
    if device == "cuda":
        raise ValueError("device = 'cuda': this example is for the CPU; use 'cpu' or 'auto'")
    return Model(config, initial_params(config, seed) if params is None else params, dtype)


def make_schedule(c):
    """The tables, each [T], in float64 (S1)."""
    betas = np.linspace(c.beta_start, c.beta_end, c.timesteps)
    if c.schedule == "cosine":
        f = np.cos((np.arange(c.timesteps + 1) / c.timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    prev = np.append(1.0, bar[:-1])
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": betas * (1 - prev) / (1 - bar),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - bar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(alphas) / (1 - bar),
    }


class Network:
    """S7 on tensors [B, C, H, W]; p holds the parameters by name."""

    def __init__(self, config, dtype):
        self.config, self.p = config, {}
        half = config.channels[0] // 2
        angles = np.arange(config.timesteps)[:, None] * np.exp(
            -np.log(10000) * np.arange(half) / (half - 1)
        )
        self.table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(dtype)
        self.classes = np.eye(config.num_classes + 1, dtype=dtype)

    def conv(self, name, x, **more):
        return x.conv2d(self.p[f"{name}.weight"], self.p[f"{name}.bias"], **more)

    def linear(self, name, x):
        return x @ self.p[f"{name}.weight"].transpose() + self.p[f"{name}.bias"]

    def norm(self, name, x):
        grouped = x.reshape(x.shape[0], self.config.groups, -1)
        centred = grouped - grouped.mean(axis=2, keepdim=True)
        variance = (centred * centred).mean(axis=2, keepdim=True)
        scale, shift = (
            self.p[f"{name}.{part}"].reshape(1, -1, 1, 1) for part in ("weight", "bias")
        )
        return (centred / (variance + 1e-6).sqrt()).reshape(x.shape) * scale + shift

    def block(self, block, x=None, emb=None, t=None, labels=None):
        """The output of one block; t and labels are NumPy's."""
        return getattr(self, block.kind)(
            block.name, *(v for v in (x, emb, t, labels) if v is not None)
        )

    def time_proj(self, name, t):
        return Tensor(self.table[t])

    def emb(self, name, t, labels=None):
        h = self.linear("time_embedding.linear_1", self.time_proj(name, t)).silu()
        h = self.linear("time_embedding.linear_2", h)
        # A product with rows of the identity, so that classes that are not there get a zero.
        return (
            h
            if labels is None
            else h + Tensor(self.classes[labels]) @ self.p["class_embedding.weight"]
        )

    def conv_in(self, name, x):
        return self.conv(name, x, padding=1)

    def resnet(self, name, x, emb):
        h = self.conv(f"{name}.conv1", self.norm(f"{name}.norm1", x).silu(), padding=1)
        h = h + self.linear(f"{name}.time_emb_proj", emb.silu()).reshape(*h.shape[:2], 1, 1)
        h = self.conv(f"{name}.conv2", self.norm(f"{name}.norm2", h).silu(), padding=1)
        short = f"{name}.conv_shortcut"
        return h + (self.conv(short, x) if f"{short}.weight" in self.p else x)

    def attention(self, name, x):
        rows, channels = x.shape[:2]
        n = self.norm(f"{name}.group_norm", x).reshape(rows, channels, -1).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{part}", n) for part in ("to_q", "to_k", "to_v"))
        out = (q @ k.transpose(1, 2) / channels**0.5).softmax(axis=-1) @ v
        out = self.linear(f"{name}.to_out.0", out)
        return x + out.transpose(1, 2).reshape(x.shape)

    def downsample(self, name, x):
        return self.conv(f"{name}.conv", x.pad((0, 1, 0, 1)), stride=2)

    def upsample(self, name, x):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return self.conv(f"{name}.conv", x, padding=1)

    def conv_out(self, name, x):
        return self.conv(name, self.norm("conv_norm_out", x).silu(), padding=1)

    def __call__(self, x, t, labels=None, taps=None):
        """The output; that of every block goes into `taps`."""
        h, emb, skips, taps = x, None, [], {} if taps is None else taps
        for block in blocks(self.config):
            if block.name.startswith("up_") and block.kind == "resnet":
                h = h.cat(skips.pop(), dim=1)
            given = {"x": h, "emb": emb, "t": t, "labels": labels}
            out = self.block(block, **{key: given[key] for key in block.inputs})
            taps[block.name] = out
            if block.kind == "time_proj":
                continue
            if block.kind == "emb":
                emb = out
                continue
            h = out
            if block.name.startswith("down_") and block.kind == "attention":
                skips[-1] = h
            elif block.name.startswith(("conv_in", "down_")):
                skips.append(h)
        return h


class Model:
    """The protocol of spec/backend.py; every array that leaves is one of its own."""

    def __init__(self, config, params, dtype):
        self.config, self.dtype = config, np.dtype(dtype)
        self.exact = make_schedule(config)
        self.tables = {key: value.astype(dtype) for key, value in self.exact.items()}
        self.net = Network(config, dtype)
        zeros = {key: np.zeros_like(value) for key, value in params.items()}
        self.load_state({"step": 0, "params": params, "m": zeros, "v": zeros, "ema": params})

    def at(self, table, t):
        return self.tables[table][t][:, None, None, None]

    def schedule(self):
        return {key: value.copy() for key, value in self.tables.items()}

    def q_sample(self, x0, t, noise):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return a * x0 + b * noise

    def target(self, x0, t, noise):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        if self.config.prediction == "v":
            return a * noise - b * x0
        return (noise if self.config.prediction == "eps" else x0).copy()

    def predict_x0_eps(self, x_t, t, out):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        if self.config.prediction == "eps":
            x0, eps = (x_t - b * out) / a, out.copy()
        elif self.config.prediction == "x0":
            x0, eps = out.copy(), (x_t - a * out) / b
        else:
            x0, eps = a * x_t - b * out, a * out + b * x_t
        if self.config.clip:
            x0 = x0.clip(-1, 1)
            eps = (x_t - a * x0) / b
        return x0, eps

    def ddpm_step(self, x_t, t, out, noise):
        x0, _ = self.predict_x0_eps(x_t, t, out)
        variance = "posterior_variance" if self.config.variance == "small" else "betas"
        sigma = np.sqrt(self.at(variance, t)) * (t > 0)[:, None, None, None]
        mean = self.at("posterior_mean_coef1", t) * x0 + self.at("posterior_mean_coef2", t) * x_t
        return mean + sigma * noise

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        x0, eps = self.predict_x0_eps(x_t, t, out)
        bar = self.exact["alphas_cumprod"]
        a, b = bar[t], np.where(t_prev < 0, 1.0, bar[t_prev])
        sigma = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        parts = np.sqrt(b), np.sqrt(np.maximum(1 - b - sigma**2, 0)), sigma
        k0, k1, k2 = (part.astype(self.dtype)[:, None, None, None] for part in parts)
        return k0 * x0 + k1 * eps + k2 * noise

    def guide(self, out_null, out_label, guidance_scale):
        return out_null + guidance_scale * (out_label - out_null)

    def tensor(self, a):
        return Tensor(np.ascontiguousarray(np.moveaxis(a, -1, 1)) if a.ndim == 4 else a)

    def array(self, tensor):
        a = tensor.numpy()
        return (np.moveaxis(a, 1, -1) if a.ndim == 4 else a).copy()

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        x, emb = (None if a is None else self.tensor(a) for a in (x, emb))
        return self.array(self.net.block(find_block(self.config, name), x, emb, t, labels))

    def predict(self, x, t, labels=None):
        return self.array(self.net(self.tensor(x), t, labels))

    def taps(self, x, t, labels=None):
        taps = {}
        self.net(self.tensor(x), t, labels, taps)
        Tensor.realize(*taps.values())
        return {key: self.array(value) for key, value in taps.items()}

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        if drop is not None:
            labels = np.where(drop, self.config.num_classes, labels)
        out = self.net(self.tensor(self.q_sample(x0, t, noise)), t, labels)
        error = out - self.tensor(self.target(x0, t, noise))
        loss = (error * error).mean()
        grads = loss.gradient(*self.net.p.values())
        Tensor.realize(loss, *grads)
        named = zip(self.net.p, grads, strict=True)
        return float(loss.item()), {key: grad.numpy().copy() for key, grad in named}

    def apply_gradients(self, grads):
        c, k, s = self.config, self.step, self.trees
        norm = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
        scale = c.max_grad_norm / max(norm, c.max_grad_norm) if c.max_grad_norm else 1.0
        rate = c.learning_rate * (min(1, (k + 1) / c.warmup) if c.warmup else 1)
        d = min(c.ema_decay, (1 + k) / (10 + k))
        for key, value in grads.items():
            g = value * scale
            s["m"][key] = 0.9 * s["m"][key] + 0.1 * g
            s["v"][key] = 0.999 * s["v"][key] + 0.001 * g * g
            m, v = s["m"][key] / (1 - 0.9 ** (k + 1)), s["v"][key] / (1 - 0.999 ** (k + 1))
            s["params"][key] = s["params"][key] - rate * m / (np.sqrt(v) + 1e-8)
            s["ema"][key] = d * s["ema"][key] + (1 - d) * s["params"][key]
        self.step += 1
        self.put()

    def train_step(self, x0, t, noise, labels=None, drop=None):
        loss, grads = self.loss_and_grads(x0, t, noise, labels, drop)
        self.apply_gradients(grads)
        return loss

    def sample(
        self, x, noise=None, labels=None, *, method="ddpm", steps=None, eta=0.0, guidance_scale=None
    ):
        T = self.config.timesteps
        steps = steps or T
        times = [*(T - 1 - i * T // steps for i in range(steps)), -1]
        bar = [self.exact["alphas_cumprod"][v] if v >= 0 else 1.0 for v in times]
        log = [0.5 * np.log(a / (1 - a)) if a < 1 else np.inf for a in bar]
        trajectory, before = [], None
        for i, (now, then) in enumerate(itertools.pairwise(times)):
            t, t_prev = np.full(len(x), now), np.full(len(x), then)
            if guidance_scale is None:
                out = self.predict(x, t, labels)
            else:
                both = np.concatenate([np.full_like(labels, self.config.num_classes), labels])
                out = self.predict(np.concatenate([x, x]), np.concatenate([t, t]), both)
                out = self.guide(*np.split(out, 2), guidance_scale)
            z = np.zeros_like(x) if noise is None else noise[i]
            if method == "ddpm":
                x = self.ddpm_step(x, t, out, z)
            elif method == "ddim":
                x = self.ddim_step(x, t, t_prev, out, z, eta)
            else:  # S13
                x0, _ = self.predict_x0_eps(x, t, out)
                h, data = log[i + 1] - log[i], x0
                if 0 < i < steps - 1:
                    data = x0 + (x0 - before) * float(h / (2 * (log[i] - log[i - 1])))
                keep, new = ((1 - bar[i + 1]) / (1 - bar[i])) ** 0.5, -np.expm1(-h)
                x, before = float(keep) * x + float(bar[i + 1] ** 0.5 * new) * data, x0
            trajectory.append(x)
        return np.stack(trajectory)

    def put(self):
        """Give the network the parameters as they are now."""
        self.net.p = {key: Tensor(value) for key, value in self.trees["params"].items()}

    def params(self):
        return {key: value.copy() for key, value in self.trees["params"].items()}

    def state(self):
        copied = {
            part: {key: value.copy() for key, value in tree.items()}
            for part, tree in self.trees.items()
        }
        return {"step": self.step, **copied}

    def load_state(self, state):
        self.step = state["step"]
        self.trees = {
            part: {key: np.array(value, self.dtype) for key, value in state[part].items()}
            for part in ("params", "m", "v", "ema")
        }
        self.put()

    def synchronize(self):
        """Nothing to wait for: what a method gives has been computed."""

    def describe(self):
        return {
            "name": name,
            "framework": "tinygrad",
            "version": version("tinygrad"),
            "device": "cpu",
            "mode": "eager",
            "dtype": str(self.dtype),
            "threads": 1,
        }
