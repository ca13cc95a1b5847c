"""The first source of the goldens: diffusers' UNet2DModel and schedulers, and torch autograd.

A generator's module: the rule that `spec` imports no framework does not hold for it. Nothing that
a backend imports imports this. It never sees one of the four implementations.

With dtype float64 the definitions are diffusers' and torch's own wherever they coincide with the
clauses, and written out where they do not. With dtype float32, under `spec.floor`, the same network
gives the noise floor; schedule arithmetic and Adam are then written out, in one of several orders
that a correct implementation may choose.
"""

import contextlib
import math
import random
import unittest.mock
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from spec.config import Config
from spec.noise import training_draws
from spec.params import blocks, parameter_shapes
from spec.reference import ddim_times
from spec.tables import exact_tables

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        UNet2DModel,
    )
    from diffusers.models.attention_processor import Attention, AttnProcessor

Tree = dict[str, np.ndarray]
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def unet_arguments(config: Config) -> dict[str, object]:
    """The arguments of UNet2DModel that stand for a config (S7)."""

    def kind(level: int, where: str) -> str:
        return f"Attn{where}Block2D" if level in config.attention_levels else f"{where}Block2D"

    levels = range(config.levels)
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "down_block_types": tuple(kind(level, "Down") for level in levels),
        "up_block_types": tuple(kind(level, "Up") for level in reversed(levels)),
        "attention_head_dim": None,
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "resnet_time_scale_shift": "default",
        "dropout": 0.0,
    }


def planes(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] as contiguous [B, C, H, W].

    On channels_last memory torch's GroupNorm takes the variance in one pass on a CPU: at mean 100
    it is then off by 7e-12 in float64 and by 1e-3 in float32.
    """
    return x.permute(0, 3, 1, 2).contiguous()


class TimeTable(torch.nn.Module):
    """The sin/cos table of S7, built in float64 and cast once, in place of diffusers' float32."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        half = config.channels[0] // 2
        rate = -math.log(10000.0) / (half - 1)
        frequencies = torch.exp(rate * torch.arange(half, dtype=torch.float64))
        angles = torch.outer(torch.arange(config.timesteps, dtype=torch.float64), frequencies)
        self.table = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.table[t]


class Oracle:
    """One config with its parameters; `run` answers every call of the golden cases.

    `choose` picks among legitimate formulations: None is the first of each.
    """

    def __init__(
        self,
        config: Config,
        params: Tree | None,
        dtype: torch.dtype = torch.float64,
        choose: random.Random | None = None,
    ) -> None:
        self.config, self.dtype, self.choose = config, dtype, choose
        self.tables = exact_tables(config)
        self.plain = choose is not None  # schedule arithmetic and Adam written out
        self.in_network = contextlib.nullcontext  # entered where the network computes
        self.entering = lambda x: x  # what becomes of an activation that enters it
        if params is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = UNet2DModel(**unet_arguments(config))
            torch.nn.Module.to(self.model, dtype)  # past diffusers' own, which warns
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())
                    module.upcast_softmax = False  # it would round float64 scores to float32
            self.model.time_proj = TimeTable(config, dtype)
            self.set_params(params)

    # arrays in and out

    def tensor(self, value: np.ndarray) -> torch.Tensor:
        """A tensor of the oracle's dtype; integers and booleans stay what they are."""
        tensor = torch.from_numpy(np.array(value))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def set_params(self, params: Tree) -> None:
        """Put these parameters, all of them and no other, into the network."""
        self.model.load_state_dict({name: self.tensor(value) for name, value in params.items()})

    def params(self) -> dict[str, torch.Tensor]:
        """The network's parameters by canonical name, in the order in which the blocks run."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in parameter_shapes(self.config)}

    def way(self, count: int) -> int:
        """Which of `count` formulations to take now."""
        return 0 if self.choose is None else self.choose.randrange(count)

    def coefficient(self, value: np.ndarray) -> torch.Tensor:
        """Float64 numbers, one a row, cast once, as [B, 1, 1, 1]."""
        return torch.from_numpy(np.asarray(value)).to(self.dtype)[:, None, None, None]

    def row(self, name: str, t: np.ndarray) -> torch.Tensor:
        """A table at the times t, as [B, 1, 1, 1]."""
        return self.coefficient(self.tables[name][t])

    # S2 to S6, images [B, H, W, C]

    def q_sample(self, x0, t, noise):
        return (
            self.row("sqrt_alphas_cumprod", t) * x0
            + self.row("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def target(self, x0, t, noise):
        if self.config.prediction == "v":
            return (
                self.row("sqrt_alphas_cumprod", t) * noise
                - self.row("sqrt_one_minus_alphas_cumprod", t) * x0
            )
        return noise if self.config.prediction == "eps" else x0

    def predict_x0_eps(self, x_t, t, out):
        signal = self.row("sqrt_alphas_cumprod", t)
        sigma = self.row("sqrt_one_minus_alphas_cumprod", t)
        recip = self.row("sqrt_recip_alphas_cumprod", t)
        recipm1 = self.row("sqrt_recipm1_alphas_cumprod", t)
        way = self.way(2)
        if self.config.prediction == "eps":
            x0 = recip * x_t - recipm1 * out if way else (x_t - sigma * out) / signal
            eps = out
        elif self.config.prediction == "x0":
            x0 = out
            eps = (recip * x_t - x0) / recipm1 if way else (x_t - signal * x0) / sigma
        else:
            x0, eps = signal * x_t - sigma * out, signal * out + sigma * x_t
        if self.config.clip:
            x0 = x0.clamp(-1, 1)
            eps = (recip * x_t - x0) / recipm1 if way else (x_t - signal * x0) / sigma
        return x0, eps

    def ddpm_step(self, x_t, t, out, noise):
        x0, _ = self.predict_x0_eps(x_t, t, out)
        name = "posterior_variance" if self.config.variance == "small" else "betas"
        sigma = np.sqrt(self.tables[name][t]) * (t > 0)
        mean = self.row("posterior_mean_coef1", t) * x0 + self.row("posterior_mean_coef2", t) * x_t
        return mean + self.coefficient(sigma) * noise

    def ddim_step(self, x_t, t, t_prev, out, noise, eta):
        x0, eps = self.predict_x0_eps(x_t, t, out)
        now = self.tables["alphas_cumprod"][t]
        then = np.append(self.tables["alphas_cumprod"], 1.0)[t_prev]
        sigma = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        toward = np.sqrt(np.maximum(1 - then - sigma**2, 0))
        x = self.coefficient(np.sqrt(then)) * x0 + self.coefficient(toward) * eps
        return x + self.coefficient(sigma) * noise

    def dpmpp_step(self, x_t, times, i, out, before):
        """x after step i, and x0; `before` is the x0 of the step before it."""
        t = np.full(len(x_t), times[i])
        x0, eps = self.predict_x0_eps(x_t, t, out)
        ratio = self.tables["sqrt_recipm1_alphas_cumprod"]  # sigma / alpha
        lambdas = [-math.log(ratio[time]) for time in times]
        if i == len(times) - 1:
            return x0, x0
        alpha = self.tables["sqrt_alphas_cumprod"][times[i + 1]]
        sigma = self.tables["sqrt_one_minus_alphas_cumprod"]
        sigma, sigma_now = sigma[times[i + 1]], sigma[times[i]]
        h = lambdas[i + 1] - lambdas[i]
        half = h / (lambdas[i] - lambdas[i - 1]) / 2 if i else 0.0  # 1 / (2 r)
        gain = -alpha * math.expm1(-h)

        def factor(value):
            return self.coefficient(np.full(len(x_t), value))

        way = self.way(3)
        if way == 0:
            data = factor(1 + half) * x0 - factor(half) * before if i else x0
            return factor(sigma / sigma_now) * x_t + factor(gain) * data, x0
        if way == 1:
            x = factor(sigma / sigma_now) * x_t + factor(gain * (1 + half)) * x0
            return x - factor(gain * half) * before if i else x, x0
        x = factor(alpha) * x0 + factor(sigma) * eps
        return x + factor(gain * half) * (x0 - before) if i else x, x0

    def guide(self, out_null, out_label, guidance_scale):
        if self.way(2):
            return (1 - guidance_scale) * out_null + guidance_scale * out_label
        return out_null + guidance_scale * (out_label - out_null)

    # the same by diffusers' schedulers, float64 only, row by row

    def _scheduler(self, kind, gap: int):
        arguments = {"variance_type": f"fixed_{self.config.variance}"}
        scheduler = kind(
            num_train_timesteps=gap,
            prediction_type=PREDICTION[self.config.prediction],
            clip_sample=self.config.clip,
            **(arguments if kind is DDPMScheduler else {}),
        )
        # Its own tables are float32; at T = 4000 that is an error of 1e-4 in 1 - alphas_cumprod.
        scheduler.alphas_cumprod = torch.from_numpy(self.tables["alphas_cumprod"])
        scheduler.final_alpha_cumprod = scheduler.one = torch.ones((), dtype=torch.float64)
        return scheduler

    def scheduler_ddpm_step(self, x_t, t, out, noise):
        scheduler, rows = self._scheduler(DDPMScheduler, 1), []
        for i, time in enumerate(t.tolist()):
            with unittest.mock.patch(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=noise[i]
            ):
                rows.append(scheduler.step(out[i], time, x_t[i]).prev_sample)
        return torch.stack(rows)

    def scheduler_ddim_step(self, x_t, t, t_prev, out, noise, eta):
        rows = []
        for i, (time, before) in enumerate(zip(t.tolist(), t_prev.tolist(), strict=True)):
            scheduler = self._scheduler(DDIMScheduler, time - before)
            scheduler.num_inference_steps = 1  # one step over the whole gap
            given = {"variance_noise": noise[i]} if eta else {}
            rows.append(
                scheduler.step(
                    out[i], time, x_t[i], eta=eta, use_clipped_model_output=True, **given
                ).prev_sample
            )
        return torch.stack(rows)

    def scheduler_dpmpp(self, times):
        """A step that goes once over the times, step by step, as `dpmpp_step` does.

        diffusers' solver chooses the order of every step and takes it. It has no clip: it is given
        the x0 that another scheduler read, as a prediction of kind "sample".
        """
        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=self.config.timesteps,
            prediction_type="sample",
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            final_sigmas_type="zero",
        )
        solver.set_timesteps(timesteps=times)
        # Its own are float32, of its own betas.
        ratio = self.tables["sqrt_recipm1_alphas_cumprod"][times]
        solver.sigmas = torch.from_numpy(np.append(ratio, 0.0))

        def step(x_t, _times, i, out, _before):
            x0 = self.scheduler_x0(x_t, np.full(len(x_t), times[i]), out)
            # its step casts x to float32, and only there is float32 named
            with unittest.mock.patch.object(torch, "float32", torch.float64):
                return solver.step(x0, times[i], x_t).prev_sample, x0

        return step

    def scheduler_x0(self, x_t, t, out):
        scheduler = self._scheduler(DDPMScheduler, 1)
        rows = zip(out, t.tolist(), x_t, strict=True)
        steps = [scheduler.step(o, time, x).pred_original_sample for o, time, x in rows]
        return torch.stack(steps)

    # S7

    def network(self, x, t, labels):
        """The network on x [B, H, W, C]; t and labels are integer tensors."""
        with self.in_network():
            out = self.model(planes(self.entering(x)), t, class_labels=labels).sample
        return out.permute(0, 2, 3, 1)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[str, torch.Tensor]]:
        """Fills the dict with the output of every block that runs, by name."""
        seen: dict[str, torch.Tensor] = {}

        def keep(name):
            def hook(_module, _inputs, output):
                seen[name] = output

            return hook

        def keep_emb(_module, _inputs, named):
            seen["emb"] = named["temb"]

        modules = dict(self.model.named_modules())
        handles = [
            modules[block.name].register_forward_hook(keep(block.name))
            for block in blocks(self.config)
            if block.kind != "emb"
        ]
        handles.append(
            self.model.down_blocks[0].register_forward_pre_hook(keep_emb, with_kwargs=True)
        )
        yield seen
        for handle in handles:
            handle.remove()

    def run_block(self, name, x, emb, t, labels):
        """The output of one block alone."""
        with self.in_network():
            return self._run_block(name, x, emb, t, labels)

    def _run_block(self, name, x, emb, t, labels):
        if name == "emb":
            whole = self.model.time_embedding(self.model.time_proj(t))
            return whole if labels is None else whole + self.model.class_embedding(labels)
        module = self.model.get_submodule(name)
        if name == "time_proj":
            return module(t)
        x, emb = planes(self.entering(x)), None if emb is None else self.entering(emb)
        if name == "conv_out":
            x = self.model.conv_act(self.model.conv_norm_out(x))
        out = module(x) if emb is None else module(x, emb)
        return out.permute(0, 2, 3, 1)

    # S8

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        """Loss and gradient by name, tensors."""
        if drop is not None:
            labels = torch.where(drop, self.config.num_classes, labels)
        self.model.zero_grad()
        out = self.network(self.q_sample(x0, t.numpy(), noise), t, labels)
        difference = out - self.target(x0, t.numpy(), noise)
        loss = (difference * difference).mean()
        with self.in_network():
            loss.backward()
        return loss.detach(), {name: p.grad.detach() for name, p in self.params().items()}

    # S9

    def start(self, step: int = 0, m: Tree | None = None, v: Tree | None = None) -> None:
        """A training state from the present parameters."""
        params = {name: p.detach().clone() for name, p in self.params().items()}
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        self.step, self.ema = step, params
        self.m = zeros if m is None else {n: self.tensor(m[n]) for n in params}
        self.v = dict(zeros) if v is None else {n: self.tensor(v[n]) for n in params}
        self.flat: list[torch.Tensor] | None = None  # params, m, v, EMA, where written out

    def update(self, grads: dict[str, torch.Tensor]) -> None:
        """Clip, Adam, EMA."""
        if self.plain:
            return self._update_written_out(grads)
        config, k = self.config, self.step
        if config.max_grad_norm:
            norm = torch.sqrt(sum((g * g).sum() for g in grads.values()))
            scale = config.max_grad_norm / norm.clamp(min=config.max_grad_norm)
            grads = {name: g * scale for name, g in grads.items()}
        rate = config.learning_rate * (min(1, (k + 1) / config.warmup) if config.warmup else 1)
        self._adam(grads, rate)
        decay = min(config.ema_decay, (1 + k) / (10 + k))
        for name, p in self.params().items():
            self.ema[name] = decay * self.ema[name] + (1 - decay) * p.detach()
        self.step = k + 1
        return None

    def _adam(self, grads: dict[str, torch.Tensor], rate: float) -> None:
        params = self.params()
        adam = torch.optim.Adam(
            params.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, foreach=False
        )
        for name, p in params.items():
            p.grad = grads[name].clone()
            adam.state[p] = {
                "step": torch.tensor(float(self.step), dtype=torch.float64),
                "exp_avg": self.m[name].clone(),
                "exp_avg_sq": self.v[name].clone(),
            }
        adam.step()
        for name, p in params.items():
            self.m[name], self.v[name] = adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]

    def _joined(self, tree: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tree[name].detach().reshape(-1) for name in self.params()])

    def _parted(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        params = self.params()
        pieces = flat.split([p.numel() for p in params.values()])
        parts = zip(params.items(), pieces, strict=True)
        return {name: piece.reshape(p.shape) for (name, p), piece in parts}

    def _update_written_out(self, grads: dict[str, torch.Tensor]) -> None:
        """The same update in one of the orders that an implementation may choose.

        All tensors are joined into one: the arithmetic is the same, the operations are fewer.
        """
        config, k = self.config, self.step
        if self.flat is None:
            self.flat = [self._joined(t) for t in (self.params(), self.m, self.v, self.ema)]
        g, (p, m, v, ema) = self._joined(grads), self.flat
        if config.max_grad_norm:
            norm = torch.sqrt((g * g).sum())
            if self.way(2):
                g = g * (config.max_grad_norm / norm.clamp(min=config.max_grad_norm))
            else:
                g = g * config.max_grad_norm / norm.clamp(min=config.max_grad_norm)
        rate = config.learning_rate * (min(1, (k + 1) / config.warmup) if config.warmup else 1)
        m = m + 0.1 * (g - m) if self.way(2) else 0.9 * m + 0.1 * g
        v = 0.999 * v + (0.001 * g) * g if self.way(2) else 0.999 * v + 0.001 * (g * g)
        one, two, way = 1 - 0.9 ** (k + 1), 1 - 0.999 ** (k + 1), self.way(3)
        if way == 0:
            moved = rate * ((m / one) / (torch.sqrt(v / two) + 1e-8))
        elif way == 1:
            moved = (rate / one) * (m / (torch.sqrt(v) / math.sqrt(two) + 1e-8))
        else:
            root = math.sqrt(two)
            moved = (rate * root / one) * (m / (torch.sqrt(v) + 1e-8 * root))
        p = p - moved
        decay = min(config.ema_decay, (1 + k) / (10 + k))
        ema = ema + (1 - decay) * (p - ema) if self.way(2) else decay * ema + (1 - decay) * p
        self.flat, self.step = [p, m, v, ema], k + 1
        params = self.params()
        with torch.no_grad():
            for name, value in self._parted(p).items():
                params[name].copy_(value)

    def gather_state(self) -> None:
        """Part m, v and the EMA by name again, where an update has joined them."""
        if self.flat is not None:
            self.m, self.v, self.ema = (self._parted(part) for part in self.flat[1:])

    def moved(self, before: Tree, prefix: str = "") -> Tree:
        """delta, m, v and ema_delta by name, against the parameters before."""
        self.gather_state()
        result: Tree = {}
        for name, p in self.params().items():
            start = self.tensor(before[name]).double()
            parts = {
                "delta": p.detach().double() - start,
                "m": self.m[name],
                "v": self.v[name],
                "ema_delta": self.ema[name].double() - start,
            }
            result |= {f"{prefix}{part}/{name}": value for part, value in parts.items()}
        return {key: value.double().numpy().copy() for key, value in result.items()}

    # the calls of the golden cases

    def sample(self, x, noise, labels, method, steps=None, eta=0.0, guidance_scale=None):
        """The whole trajectory [S, B, H, W, C]."""
        total = self.config.timesteps
        times = list(reversed(range(total))) if method == "ddpm" else ddim_times(total, steps)
        trajectory, x0 = [], None
        ddpm = self.ddpm_step if self.plain else self.scheduler_ddpm_step
        ddim = self.ddim_step if self.plain else self.scheduler_ddim_step
        dpmpp = self.dpmpp_step if self.plain or method != "dpmpp" else self.scheduler_dpmpp(times)
        for i, time in enumerate(times):
            t = np.full(len(x), time)
            if guidance_scale is None:
                out = self.network(x, torch.from_numpy(t), labels)
            else:
                null = torch.full_like(labels, self.config.num_classes)
                both = torch.cat([null, labels])
                out = self.network(torch.cat([x, x]), torch.from_numpy(np.tile(t, 2)), both)
                out = self.guide(out[: len(x)], out[len(x) :], guidance_scale)
            z = torch.zeros_like(x) if noise is None else noise[i]
            if method == "ddpm":
                x = ddpm(x, t, out, z)
            elif method == "dpmpp":
                x, x0 = dpmpp(x, times, i, out, x0)
            else:
                following = times[i + 1] if i + 1 < len(times) else -1
                x = ddim(x, t, np.full(len(x), following), out, z, eta)
            trajectory.append(x)
        return torch.stack(trajectory)

    def run(self, call: str, inputs: dict, options: dict) -> Tree:
        """The results of one golden case, by key, NumPy float64."""
        trees = {name: v for name, v in inputs.items() if isinstance(v, dict)}
        given = {n: self.tensor(v) for n, v in inputs.items() if n not in trees}
        results = getattr(self, f"_run_{call}")(given, trees, options)
        return {
            name: value.detach().double().numpy().copy() if torch.is_tensor(value) else value
            for name, value in results.items()
        }

    def _run_q_sample(self, given, _trees, _options):
        return {"out": self.q_sample(given["x0"], given["t"].numpy(), given["noise"])}

    def _run_target(self, given, _trees, _options):
        return {"out": self.target(given["x0"], given["t"].numpy(), given["noise"])}

    def _run_predict_x0_eps(self, given, _trees, _options):
        x_t, t, out = given["x_t"], given["t"].numpy(), given["out"]
        x0, eps = self.predict_x0_eps(x_t, t, out)
        return {"x0": x0 if self.plain else self.scheduler_x0(x_t, t, out), "eps": eps}

    def _run_ddpm_step(self, given, _trees, _options):
        step = self.ddpm_step if self.plain else self.scheduler_ddpm_step
        return {"out": step(given["x_t"], given["t"].numpy(), given["out"], given["noise"])}

    def _run_ddim_step(self, given, _trees, options):
        step = self.ddim_step if self.plain else self.scheduler_ddim_step
        t, t_prev = given["t"].numpy(), given["t_prev"].numpy()
        return {"out": step(given["x_t"], t, t_prev, given["out"], given["noise"], options["eta"])}

    def _run_guide(self, given, _trees, options):
        return {"out": self.guide(given["out_null"], given["out_label"], options["guidance_scale"])}

    def _run_run_block(self, given, _trees, options):
        with torch.no_grad():
            named = {key: given.get(key) for key in ("x", "emb", "t", "labels")}
            return {"out": self.run_block(options["name"], **named)}

    def _run_predict(self, given, _trees, _options):
        with torch.no_grad():
            return {"out": self.network(given["x"], given["t"], given.get("labels"))}

    def _run_taps(self, given, _trees, _options):
        with torch.no_grad(), self.recorded() as seen:
            self.network(given["x"], given["t"], given.get("labels"))
        order = [block.name for block in blocks(self.config)]
        return {n: seen[n].permute(0, 2, 3, 1) if seen[n].ndim == 4 else seen[n] for n in order}

    def _run_loss_and_grads(self, given, _trees, _options):
        loss, grads = self.loss_and_grads(**given)
        return {"loss": loss} | {f"grads/{name}": g for name, g in grads.items()}

    def _run_apply_gradients(self, _given, trees, options):
        before = {name: p.detach().numpy().copy() for name, p in self.params().items()}
        self.start(options.get("step", 0), trees.get("m"), trees.get("v"))
        for key in options["sequence"]:
            self.update({n: self.tensor(g) for n, g in trees[f"grads/{key}"].items()})
        return self.moved(before)

    def _run_train_steps(self, given, _trees, options):
        before = {name: p.detach().numpy().copy() for name, p in self.params().items()}
        self.start()
        losses, results = [], {}
        for i in range(len(given["t"])):
            loss, grads = self.loss_and_grads(**{name: v[i] for name, v in given.items()})
            self.update(grads)
            losses.append(loss)
            if i + 1 in options["record"]:
                results |= self.moved(before, f"{i + 1}/")
        return {"loss": torch.stack(losses)} | results

    def _run_train_run(self, given, _trees, options):
        """S10's run: the batches, times, noise and label dropout of every step from the stream."""
        self.start()
        losses, images, classes = [], given["images"], given["classes"]
        for step in range(options["steps"]):
            draws = training_draws(self.config, len(images), options["seed"], step)
            rows, t, noise, drop = (self.tensor(value) for value in draws)
            loss, grads = self.loss_and_grads(images[rows], t, noise, classes[rows], drop)
            self.update(grads)
            losses.append(loss)
        self.gather_state()
        with torch.no_grad():
            params = self.params()
            for name, value in self.ema.items():
                params[name].copy_(value)
            asked = {"noise": None, **options["sample"]}
            trajectory = self.sample(given["x"], labels=given["labels"], **asked)
        return {"loss": torch.stack(losses), "samples": trajectory[-1]}

    def _run_sample(self, given, _trees, options):
        with torch.no_grad():
            noise, labels = given.get("noise"), given.get("labels")
            return {"trajectory": self.sample(given["x"], noise, labels, **options)}
