"""S8, S9: the loss and its gradients, Adam, EMA, one train step, and the loop."""

import dataclasses
import math

import torch

from impl_torch.diffusion import q_sample, target
from impl_torch.unet import UNet
from spec.noise import Draws

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam; epsilon stands outside the root


@dataclasses.dataclass
class State:
    """All that training goes on from: the model, Adam's moments, the EMA, the steps done."""

    model: UNet
    m: dict  # by parameter name, as are v and ema
    v: dict
    ema: dict
    step: int


def init_state(model):
    """The state before the first step: m = v = 0, and the EMA is the parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in "mv")
    ema = {name: p.clone() for name, p in params.items()}
    return State(model, m, v, ema, step=0)


def loss_and_grads(model, tables, config, x0, t, noise, labels=None, drop=None):
    """The mean squared error over x0 [B, C, H, W] and its gradient by every parameter."""
    if drop is not None:  # S6
        labels = torch.where(drop, config.num_classes, labels)
    x_t = q_sample(tables, x0, t, noise)  # S8
    out = model(x_t, t, labels)
    loss = torch.mean((out - target(tables, config, x0, t, noise)) ** 2)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, params.values())
    return loss.detach(), dict(zip(params, grads, strict=True))


def clip_by_global_norm(grads, max_norm):
    """The gradients, scaled down together where their norm is above max_norm; 0 is off."""
    if not max_norm:  # S9
        return grads
    norm = math.sqrt(sum(float(torch.sum(g * g)) for g in grads.values()))
    return {name: g * (max_norm / max(norm, max_norm)) for name, g in grads.items()}


def learning_rate(config, step):
    """The rate of step k = 0, 1, ...: a linear warm-up, then constant."""
    if not config.warmup:  # S9
        return config.learning_rate
    return config.learning_rate * min(1.0, (step + 1) / config.warmup)


@torch.no_grad()
def adam_update(params, grads, m, v, lr, step):
    """One step of Adam on params, m and v in place; step counts from 0.

    Each torch._foreach call is for all tensors at once, as in torch.optim.
    """
    correct1, correct2 = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)  # S9
    p, g, m, v = ([tree[name] for name in grads] for tree in (params, grads, m, v))
    torch._foreach_lerp_(m, g, 1 - BETA1)
    torch._foreach_mul_(v, BETA2)
    torch._foreach_addcmul_(v, g, g, value=1 - BETA2)
    root = torch._foreach_sqrt(torch._foreach_div(v, correct2))
    torch._foreach_add_(root, EPS)
    torch._foreach_addcdiv_(p, m, root, value=-lr / correct1)


@torch.no_grad()
def ema_update(ema, params, ema_decay, step):
    """Move the EMA towards params in place; the decay grows with the step."""
    decay = min(ema_decay, (1 + step) / (10 + step))  # S9
    torch._foreach_lerp_([ema[name] for name in params], list(params.values()), 1 - decay)


def apply_gradients(state, config, grads):
    """One update of the state in place: clip, Adam, EMA, and the step is counted."""
    params = {name: p.detach() for name, p in state.model.named_parameters()}
    grads = clip_by_global_norm(grads, config.max_grad_norm)  # S9
    lr = learning_rate(config, state.step)
    adam_update(params, grads, state.m, state.v, lr, state.step)
    ema_update(state.ema, params, config.ema_decay, state.step)
    state.step += 1


def train_step(state, tables, config, x0, t, noise, labels=None, drop=None):
    """One update of the state on a batch x0 [B, C, H, W]; gives the loss before it."""
    loss, grads = loss_and_grads(state.model, tables, config, x0, t, noise, labels, drop)
    apply_gradients(state, config, grads)
    return loss


def draw_batch(config, count, generator):
    """What one step draws: rows of `count` images, times, noise, label dropout, each [B, ...]."""
    batch, device = (config.batch_size,), generator.device
    height, width, channels = config.image_shape
    shape = (*batch, channels, height, width)
    return Draws(
        rows=torch.randint(count, batch, generator=generator, device=device),
        t=torch.randint(config.timesteps, batch, generator=generator, device=device),
        noise=torch.randn(shape, generator=generator, device=device),
        drop=torch.rand(batch, generator=generator, device=device) < config.label_dropout,
    )


def train(state, tables, config, images, labels, draws, update):
    """Train on images [N, C, H, W] and labels [N], an update for each draw; yields the losses."""
    for rows, t, noise, drop in draws:
        x0, noise = images[rows], noise.to(images.dtype)
        if config.num_classes:
            yield update(state, tables, config, x0, t, noise, labels[rows], drop)
        else:
            yield update(state, tables, config, x0, t, noise)
