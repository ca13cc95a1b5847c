"""S8, S9: the loss and its gradients, Adam, EMA, one train step, and the loop."""

import dataclasses
import math

import numpy as np

from impl_numpy.diffusion import q_sample, target
from impl_numpy.unet import UNet
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
    params = model.params
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in "mv")
    ema = {name: p.copy() for name, p in params.items()}
    return State(model, m, v, ema, step=0)


def loss_and_grads(model, tables, config, x0, t, noise, labels=None, drop=None):
    """The mean squared error over x0 [B, H, W, C] and its gradient by every parameter."""
    if drop is not None:  # S6
        labels = np.where(drop, config.num_classes, labels)
    x_t = q_sample(tables, x0, t, noise)  # S8
    out, back = model.forward(x_t, t, labels)
    error = out - target(tables, config, x0, t, noise)
    loss = np.mean(error**2)
    grads = {}
    back(error * (2 / error.size), grads)
    return loss, grads


def clip_by_global_norm(grads, max_norm):
    """The gradients, scaled down together where their norm is above max_norm; 0 is off."""
    if not max_norm:  # S9
        return grads
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
    return {name: g * (max_norm / max(norm, max_norm)) for name, g in grads.items()}


def learning_rate(config, step):
    """The rate of step k = 0, 1, ...: a linear warm-up, then constant."""
    if not config.warmup:  # S9
        return config.learning_rate
    return config.learning_rate * min(1.0, (step + 1) / config.warmup)


def adam_update(params, grads, m, v, lr, step):
    """One step of Adam on params, m and v in place; step counts from 0."""
    correct1, correct2 = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)  # S9
    for name, g in grads.items():
        m[name] *= BETA1
        m[name] += (1 - BETA1) * g
        v[name] *= BETA2
        v[name] += (1 - BETA2) * g * g
        params[name] -= lr * (m[name] / correct1) / (np.sqrt(v[name] / correct2) + EPS)


def ema_update(ema, params, ema_decay, step):
    """Move the EMA towards params in place; the decay grows with the step."""
    decay = min(ema_decay, (1 + step) / (10 + step))  # S9
    for name, p in params.items():
        ema[name] *= decay
        ema[name] += (1 - decay) * p


def apply_gradients(state, config, grads):
    """One update of the state in place: clip, Adam, EMA, and the step is counted."""
    params = state.model.params
    grads = clip_by_global_norm(grads, config.max_grad_norm)  # S9
    lr = learning_rate(config, state.step)
    adam_update(params, grads, state.m, state.v, lr, state.step)
    ema_update(state.ema, params, config.ema_decay, state.step)
    state.step += 1


def train_step(state, tables, config, x0, t, noise, labels=None, drop=None):
    """One update of the state on a batch x0 [B, H, W, C]; gives the loss before it."""
    loss, grads = loss_and_grads(state.model, tables, config, x0, t, noise, labels, drop)
    apply_gradients(state, config, grads)
    return loss


def draw_batch(config, count, generator):
    """What one step draws: rows of `count` images, times, noise, label dropout, each [B, ...]."""
    batch = config.batch_size
    return Draws(
        rows=generator.integers(count, size=batch),
        t=generator.integers(config.timesteps, size=batch),
        noise=generator.standard_normal((batch, *config.image_shape)),
        drop=generator.random(batch) < config.label_dropout,
    )


def train(state, tables, config, images, labels, draws, update):
    """Train on images [N, H, W, C] and labels [N], an update for each draw; yields the losses."""
    for rows, t, noise, drop in draws:
        x0, noise = images[rows], noise.astype(images.dtype)
        if config.num_classes:
            yield update(state, tables, config, x0, t, noise, labels[rows], drop)
        else:
            yield update(state, tables, config, x0, t, noise)
