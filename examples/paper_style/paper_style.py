"""DDPM in one file of PyTorch: schedule, network, diffusion, training, samplers.

Written as such scripts are, then mended until the checker of Diffusion Rosetta had nothing left to
say; docs/tutorial.md is the log of that. The last class is what the checker talks to.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from spec.backend import check_open
from spec.params import initial_params

name = "paper_style"
modes = ("eager",)
dtypes = ("float64", "float32")


def open(config, params=None, *, seed=0, dtype="float32", device="auto", mode="eager"):
    """A Model with these parameters, or with those of the seed; on the CPU."""
    params = check_open(config, params, dtype, device, mode, dtypes)
    if device == "cuda":
        raise ValueError("device = 'cuda': this example is for the CPU; use 'cpu' or 'auto'")
    return Model(config, initial_params(config, seed) if params is None else params, dtype)


# Schedule


def make_schedule(c):
    """The tables, each [T], in float64 (S1)."""
    if c.schedule == "linear":
        betas = torch.linspace(c.beta_start, c.beta_end, c.timesteps, dtype=torch.float64)
    else:
        x = torch.linspace(0, c.timesteps, c.timesteps + 1, dtype=torch.float64)
        f = torch.cos((x / c.timesteps + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    alphas = 1 - betas
    bar = torch.cumprod(alphas, dim=0)
    prev = F.pad(bar[:-1], (1, 0), value=1.0)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": betas * (1 - prev) / (1 - bar),
        "posterior_mean_coef1": betas * prev.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - prev) * alphas.sqrt() / (1 - bar),
    }


# Network; the modules have the names of S7, so that its state dict is the parameters


def time_table(c):
    """Row t is [sin, cos] of t times the frequencies; [T, channels[0]] in float64."""
    half = c.channels[0] // 2
    i = torch.arange(half, dtype=torch.float64)
    freqs = torch.exp(-np.log(10000) * i / (half - 1))
    angles = torch.arange(c.timesteps)[:, None] * freqs[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(groups, channels):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, groups, cin, cout, width):
        super().__init__()
        self.norm1 = norm(groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, cout)
        self.norm2 = norm(groups, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, groups, channels):
        super().__init__()
        self.group_norm = norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        b, c, h, w = x.shape
        n = self.group_norm(x).reshape(b, c, h * w).transpose(1, 2)
        scores = self.to_q(n) @ self.to_k(n).transpose(1, 2) / c**0.5
        out = self.to_out[0](scores.softmax(dim=-1) @ self.to_v(n))
        return x + out.transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Resnets, each followed by an attention or not; then a change of resolution, or none."""

    def __init__(self, groups, ways, width, attend, after=None):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(groups, i, o, width) for i, o in ways])
        self.attentions = nn.ModuleList([Attention(groups, o) for _, o in ways if attend])
        for key, module in (after or {}).items():
            setattr(self, key, nn.ModuleList([module]))


class UNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        n, g, last = c.layers_per_block, c.groups, c.levels - 1
        width, emb = c.channels[0], 4 * c.channels[0]
        self.register_buffer("table", time_table(c), persistent=False)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(width, emb), "linear_2": nn.Linear(emb, emb)}
        )
        if c.num_classes:
            self.class_embedding = nn.Embedding(c.num_classes + 1, emb)
        self.conv_in = nn.Conv2d(c.in_channels, width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for level, out in enumerate(c.channels):
            ways = [(width if i == 0 else out, out) for i in range(n)]
            after = {"downsamplers": Downsample(out)} if level < last else {}
            self.down_blocks.append(Level(g, ways, emb, level in c.attention_levels, after))
            skips += [out] * (n + len(after))
            width = out
        self.mid_block = Level(g, [(width, width)] * 2, emb, False)
        self.mid_block.attentions = nn.ModuleList([Attention(g, width)])
        for level in reversed(range(c.levels)):
            out, ways = c.channels[level], []
            for _ in range(n + 1):
                ways.append((width + skips.pop(), out))
                width = out
            after = {"upsamplers": Upsample(out)} if level > 0 else {}
            self.up_blocks.append(Level(g, ways, emb, level in c.attention_levels, after))
        self.conv_norm_out = norm(g, width)
        self.conv_out = nn.Conv2d(width, c.in_channels, 3, padding=1)

    def block(self, name, x=None, emb=None, t=None, labels=None):
        """One block on inputs of its own."""
        if name == "time_proj":
            return self.table[t]
        if name == "emb":
            first, second = self.time_embedding.values()
            emb = second(F.silu(first(self.table[t])))
            return emb if labels is None else emb + self.class_embedding(labels)
        if name == "conv_out":
            return self.conv_out(F.silu(self.conv_norm_out(x)))
        module = self.get_submodule(name)
        return module(x, emb) if isinstance(module, ResBlock) else module(x)

    def forward(self, x, t, labels=None, taps=None):
        """The output [B, C, H, W]; that of every block goes into `taps`."""
        taps = {} if taps is None else taps

        def run(name, **inputs):
            taps[name] = self.block(name, **inputs)
            return taps[name]

        run("time_proj", t=t)
        emb = run("emb", t=t, labels=labels)
        h = run("conv_in", x=x)
        skips = [h]

        def layer(h, level, i):
            h = run(f"{level}.resnets.{i}", x=h, emb=emb)
            name = f"{level}.attentions.{i}"
            return run(name, x=h) if i < len(self.get_submodule(level).attentions) else h

        for k, level in enumerate(self.down_blocks):
            for i in range(len(level.resnets)):
                h = layer(h, f"down_blocks.{k}", i)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = run(f"down_blocks.{k}.downsamplers.0", x=h)
                skips.append(h)
        for i in range(2):
            h = layer(h, "mid_block", i)
        for k, level in enumerate(self.up_blocks):
            for i in range(len(level.resnets)):
                h = layer(torch.cat([h, skips.pop()], dim=1), f"up_blocks.{k}", i)
            if hasattr(level, "upsamplers"):
                h = run(f"up_blocks.{k}.upsamplers.0", x=h)
        return run("conv_out", x=h)


# Diffusion and training


class Diffusion:
    """Everything around the network, on tensors [B, C, H, W]."""

    def __init__(self, c, params, dtype):
        self.c, self.dtype = c, dtype
        exact = make_schedule(c)
        self.exact = exact["alphas_cumprod"]
        self.tables = {k: v.to(dtype) for k, v in exact.items()}
        self.net = UNet(c).to(dtype)
        for key, value in self.net.named_parameters():
            value.data = params[key]
        self.ema = {k: v.detach().clone() for k, v in self.net.named_parameters()}
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=c.learning_rate)
        self.step = 0

    def at(self, table, t):
        return self.tables[table][t][:, None, None, None]

    def q_sample(self, x0, t, noise):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return a * x0 + b * noise

    def target(self, x0, t, noise):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return {"eps": noise, "x0": x0, "v": a * noise - b * x0}[self.c.prediction]

    def predict_x0_eps(self, x_t, t, out):
        a, b = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        if self.c.prediction == "eps":
            x0, eps = (x_t - b * out) / a, out
        elif self.c.prediction == "x0":
            x0, eps = out, (x_t - a * out) / b
        else:
            x0, eps = a * x_t - b * out, a * out + b * x_t
        if self.c.clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - a * x0) / b
        return x0, eps

    def ddpm_step(self, x_t, t, out, noise):
        x0, _ = self.predict_x0_eps(x_t, t, out)
        mean = self.at("posterior_mean_coef1", t) * x0 + self.at("posterior_mean_coef2", t) * x_t
        variance = "posterior_variance" if self.c.variance == "small" else "betas"
        sigma = self.at(variance, t).sqrt() * (t > 0)[:, None, None, None]
        return mean + sigma * noise

    def ddim_step(self, x_t, t, t_prev, out, noise, eta):
        x0, eps = self.predict_x0_eps(x_t, t, out)
        a, a_prev = self.exact[t], torch.where(t_prev < 0, 1.0, self.exact[t_prev])
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        parts = a_prev.sqrt(), (1 - a_prev - sigma**2).clamp(min=0).sqrt(), sigma
        k0, k1, k2 = (p.to(self.dtype)[:, None, None, None] for p in parts)
        return k0 * x0 + k1 * eps + k2 * noise

    def guide(self, out_null, out_label, s):
        return out_null + s * (out_label - out_null)

    def loss(self, x0, t, noise, labels, drop):
        if drop is not None:
            labels = torch.where(drop, self.c.num_classes, labels)
        out = self.net(self.q_sample(x0, t, noise), t, labels)
        return F.mse_loss(out, self.target(x0, t, noise))

    def update(self):
        """Clip by the norm of all gradients, Adam, then the moving average (S9)."""
        c = self.c
        if c.max_grad_norm:
            grads = [p.grad for p in self.net.parameters()]
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for g in grads:
                g.mul_(c.max_grad_norm / norm.clamp(min=c.max_grad_norm))
        warm = min(1, (self.step + 1) / c.warmup) if c.warmup else 1
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * warm
        self.optimizer.step()
        decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
        for key, value in self.net.named_parameters():
            self.ema[key].lerp_(value.detach(), 1 - decay)
        self.step += 1

    @torch.no_grad()
    def ask(self, x, t, labels, scale):
        """The network's output, guided unless scale is None."""
        if scale is None:
            return self.net(x, t, labels)
        null = torch.full_like(labels, self.c.num_classes)
        out = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, labels]))
        return self.guide(*out.chunk(2), scale)

    def sample(self, x, noise, labels, method, steps, eta, scale):
        """The trajectory [S, B, C, H, W]."""
        T = self.c.timesteps
        steps = steps or T
        times = [*(T - 1 - i * T // steps for i in range(steps)), -1]
        trajectory, before = [], None
        for i, (now, then) in enumerate(itertools.pairwise(times)):
            t, t_prev = torch.full((len(x),), now), torch.full((len(x),), then)
            out = self.ask(x, t, labels, scale)
            z = torch.zeros_like(x) if noise is None else noise[i]
            if method == "ddpm":
                x = self.ddpm_step(x, t, out, z)
            elif method == "ddim":
                x = self.ddim_step(x, t, t_prev, out, z, eta)
            else:
                x0, _ = self.predict_x0_eps(x, t, out)
                x, before = self.dpmpp_step(x, x0, before, times, i), x0
            trajectory.append(x)
        return torch.stack(trajectory)

    def dpmpp_step(self, x, x0, before, times, i):
        """x at times[i + 1] from x0 now and, but in the first and last step, x0 before (S13)."""
        bar = [self.exact[v].item() if v >= 0 else 1.0 for v in times]
        lam = [0.5 * np.log(a / (1 - a)) if a < 1 else np.inf for a in bar]
        h = lam[i + 1] - lam[i]
        if 0 < i < len(times) - 2:
            x0 = x0 + (x0 - before) * h / (2 * (lam[i] - lam[i - 1]))
        keep = ((1 - bar[i + 1]) / (1 - bar[i])) ** 0.5
        return keep * x - bar[i + 1] ** 0.5 * float(np.expm1(-h)) * x0


# What the checker talks to: NumPy in and out, images [B, H, W, C]


class Model:
    """The protocol of spec/backend.py; every array that leaves is a copy."""

    def __init__(self, config, params, dtype):
        self.dtype = getattr(torch, dtype)
        self.d = Diffusion(config, {k: self.tensor(v) for k, v in params.items()}, self.dtype)

    def tensor(self, a):
        if a is None:
            return None
        a = torch.from_numpy(np.array(a))
        return a.to(self.dtype) if a.is_floating_point() else a

    def image(self, a):
        a = self.tensor(a)
        return a if a is None or a.ndim < 4 else a.movedim(-1, -3).contiguous()

    def array(self, a):
        a = a.detach()
        return (a.movedim(-3, -1) if a.ndim >= 4 else a).numpy().copy()

    def schedule(self):
        return {k: v.numpy() for k, v in self.d.tables.items()}

    def q_sample(self, x0, t, noise):
        return self.array(self.d.q_sample(*map(self.image, (x0, t, noise))))

    def target(self, x0, t, noise):
        return self.array(self.d.target(*map(self.image, (x0, t, noise))))

    def predict_x0_eps(self, x_t, t, out):
        return tuple(map(self.array, self.d.predict_x0_eps(*map(self.image, (x_t, t, out)))))

    def ddpm_step(self, x_t, t, out, noise):
        return self.array(self.d.ddpm_step(*map(self.image, (x_t, t, out, noise))))

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        return self.array(self.d.ddim_step(*map(self.image, (x_t, t, t_prev, out, noise)), eta))

    def guide(self, out_null, out_label, guidance_scale):
        return self.array(self.d.guide(self.image(out_null), self.image(out_label), guidance_scale))

    def run_block(self, name, x=None, emb=None, t=None, labels=None):
        return self.array(self.d.net.block(name, *map(self.image, (x, emb, t, labels))))

    def predict(self, x, t, labels=None):
        return self.array(self.d.net(*map(self.image, (x, t, labels))))

    def taps(self, x, t, labels=None):
        taps = {}
        self.d.net(*map(self.image, (x, t, labels)), taps=taps)
        return {k: self.array(v) for k, v in taps.items()}

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        loss = self.d.loss(*map(self.image, (x0, t, noise, labels, drop)))
        self.d.optimizer.zero_grad()
        loss.backward()
        grads = {k: v.grad.numpy() for k, v in self.d.net.named_parameters()}
        return loss.item(), grads

    def apply_gradients(self, grads):
        for key, value in self.d.net.named_parameters():
            value.grad = self.tensor(grads[key])
        self.d.update()

    def train_step(self, x0, t, noise, labels=None, drop=None):
        loss, _ = self.loss_and_grads(x0, t, noise, labels, drop)
        self.d.update()
        return loss

    def sample(
        self,
        x,
        noise=None,
        labels=None,
        *,
        method="ddpm",
        steps=None,
        eta=0.0,
        guidance_scale=None,
    ):
        x, noise, labels = map(self.image, (x, noise, labels))
        return self.array(self.d.sample(x, noise, labels, method, steps, eta, guidance_scale))

    def params(self):
        return {k: v.detach().numpy().copy() for k, v in self.d.net.named_parameters()}

    def state(self):
        adam = self.d.optimizer.state
        zero = {k: np.zeros_like(v) for k, v in self.params().items()}
        m, v = dict(zero), dict(zero)
        for key, value in self.d.net.named_parameters():
            if value in adam:
                m[key] = adam[value]["exp_avg"].numpy().copy()
                v[key] = adam[value]["exp_avg_sq"].numpy().copy()
        ema = {k: v.numpy().copy() for k, v in self.d.ema.items()}
        return {"step": self.d.step, "params": self.params(), "m": m, "v": v, "ema": ema}

    def load_state(self, state):
        self.d.step = state["step"]
        for key, value in self.d.net.named_parameters():
            value.data = self.tensor(state["params"][key])
            self.d.ema[key] = self.tensor(state["ema"][key])
            self.d.optimizer.state[value] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": self.tensor(state["m"][key]),
                "exp_avg_sq": self.tensor(state["v"][key]),
            }

    def synchronize(self):
        """Nothing to wait for: PyTorch on a CPU has finished when a call returns."""

    def describe(self):
        return {
            "name": name,
            "framework": "torch",
            "version": torch.__version__,
            "device": "cpu",
            "mode": "eager",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
