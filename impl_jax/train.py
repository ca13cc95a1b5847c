"""S8, S9: the loss and its gradients, Adam, EMA, one train step, and the loop."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from impl_jax.diffusion import q_sample, target
from spec.noise import Draws

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam; epsilon stands outside the root


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """All that training goes on from: the model, Adam's moments, the EMA, the steps done.

    The model is in two parts, which nnx.merge puts together where a step is compiled: an nnx.Module
    that came from call to call would be taken apart in Python each time, 7 to 12 ms on a CPU.
    """

    model: tuple  # its nnx.GraphDef, and its parameters in nested dicts
    m: dict  # nested as the parameters are, as are v and ema
    v: dict
    ema: dict
    step: jax.Array


def init_state(model):
    """The state before the first step: m = v = 0, and the EMA is the parameters."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in "mv")
    ema = jax.tree.map(jnp.copy, params)
    return State((nnx.graphdef(model), params), m, v, ema, step=jnp.zeros((), jnp.int32))


def loss_and_grads(model, tables, config, x0, t, noise, labels=None, drop=None):
    """The mean squared error over x0 [B, H, W, C] and its gradient by every parameter."""
    if drop is not None:  # S6
        labels = jnp.where(drop, config.num_classes, labels)
    x_t = q_sample(tables, x0, t, noise)  # S8

    def loss_of(model):
        out = model(x_t, t, labels)
        return jnp.mean((out - target(tables, config, x0, t, noise)) ** 2)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    return loss, nnx.to_pure_dict(grads)


def clip_by_global_norm(grads, max_norm):
    """The gradients, scaled down together where their norm is above max_norm; 0 is off."""
    if not max_norm:  # S9
        return grads
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * (max_norm / jnp.maximum(norm, max_norm)), grads)


def learning_rate(config, step):
    """The rate of step k = 0, 1, ...: a linear warm-up, then constant."""
    if not config.warmup:  # S9
        return config.learning_rate
    return config.learning_rate * jnp.minimum(1.0, (step + 1) / config.warmup)


def adam_update(params, grads, m, v, lr, step):
    """One step of Adam: the new params, m and v; step counts from 0."""
    # 1 - beta^k, which in float32 would lose its digits: beta^k is near 1
    correct1, correct2 = (-jnp.expm1((step + 1) * math.log(b)) for b in (BETA1, BETA2))  # S9
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, grads)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, grads)

    def move(p, m, v):
        return p - lr * (m / correct1) / (jnp.sqrt(v / correct2) + EPS)

    return jax.tree.map(move, params, m, v), m, v


def ema_update(ema, params, ema_decay, step):
    """The EMA moved towards params; the decay grows with the step."""
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))  # S9
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def apply_gradients(state, config, grads):
    """The state after one update: clip, Adam, EMA, and the step is counted."""
    graph, params = state.model
    grads = clip_by_global_norm(grads, config.max_grad_norm)  # S9
    step = state.step.astype(params["conv_in"]["bias"].dtype)  # integers would divide in float32
    lr = learning_rate(config, step)
    params, m, v = adam_update(params, grads, state.m, state.v, lr, step)
    ema = ema_update(state.ema, params, config.ema_decay, step)
    return State((graph, params), m, v, ema, state.step + 1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(state, tables, config, x0, t, noise, labels=None, drop=None):
    """One update on a batch x0 [B, H, W, C]: the new state, and the loss before it."""
    model = nnx.merge(*state.model)
    loss, grads = loss_and_grads(model, tables, config, x0, t, noise, labels, drop)
    return apply_gradients(state, config, grads), loss


def draw_batch(config, count, generator):
    """What one step draws: rows of `count` images, times, noise, label dropout, each [B, ...]."""
    batch, keys = (config.batch_size,), jax.random.split(generator, 4)
    return Draws(
        rows=jax.random.randint(keys[0], batch, 0, count),
        t=jax.random.randint(keys[1], batch, 0, config.timesteps),
        noise=jax.random.normal(keys[2], (*batch, *config.image_shape)),
        drop=jax.random.uniform(keys[3], batch) < config.label_dropout,
    )


def train(state, tables, config, images, labels, draws, update):
    """Train on images [N, H, W, C] and labels [N], an update for each draw.

    Yields the state and the loss of every step.
    """
    for rows, t, noise, drop in draws:
        x0, noise = images[rows], noise.astype(images.dtype)
        if config.num_classes:
            state, loss = update(state, tables, config, x0, t, noise, labels[rows], drop)
        else:
            state, loss = update(state, tables, config, x0, t, noise)
        yield state, loss
