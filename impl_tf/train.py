"""S8, S9: the loss and its gradients, Adam, EMA, one train step, and the loop."""

import dataclasses
import math

import tensorflow as tf

from impl_tf.diffusion import q_sample, target
from impl_tf.layers import named_parameters
from impl_tf.unet import UNet
from spec.noise import Draws

# Adam as in the paper; Keras' own optimiser puts its epsilon where v is not yet corrected
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # epsilon stands outside the root


@dataclasses.dataclass(eq=False)  # a tf.function tells states apart by identity
class State:
    """All that training goes on from: the model, Adam's moments, the EMA, the steps done."""

    model: UNet
    m: dict  # by parameter name, as are v and ema
    v: dict
    ema: dict
    step: tf.Variable


def init_state(model):
    """The state before the first step: m = v = 0, and the EMA is the parameters."""
    params = named_parameters(model)
    m, v = ({name: tf.Variable(tf.zeros_like(p)) for name, p in params.items()} for _ in "mv")
    ema = {name: tf.Variable(p) for name, p in params.items()}
    return State(model, m, v, ema, step=tf.Variable(0, dtype=tf.int64))


def loss_and_grads(model, tables, config, x0, t, noise, labels=None, drop=None):
    """The mean squared error over x0 [B, H, W, C] and its gradient by every parameter."""
    if drop is not None:  # S6
        labels = tf.where(drop, tf.cast(config.num_classes, labels.dtype), labels)
    x_t = q_sample(tables, x0, t, noise)  # S8
    params = named_parameters(model)
    with tf.GradientTape() as tape:
        out = model(x_t, t, labels)
        loss = tf.reduce_mean((out - target(tables, config, x0, t, noise)) ** 2)
    grads = tape.gradient(loss, params)
    return loss, {name: tf.convert_to_tensor(g) for name, g in grads.items()}


def clip_by_global_norm(grads, max_norm):
    """The gradients, scaled down together where their norm is above max_norm; 0 is off."""
    if not max_norm:  # S9
        return grads
    norm = tf.sqrt(sum(tf.reduce_sum(g * g) for g in grads.values()))
    return {name: g * (max_norm / tf.maximum(norm, max_norm)) for name, g in grads.items()}


def learning_rate(config, step):
    """The rate of step k = 0, 1, ...: a linear warm-up, then constant."""
    if not config.warmup:  # S9
        return config.learning_rate
    return config.learning_rate * tf.minimum((step + 1) / config.warmup, 1.0)  # tensor first


def adam_update(params, grads, m, v, lr, step):
    """One step of Adam on params, m and v in place; step counts from 0."""
    # 1 - beta^k, which in float32 would lose its digits: beta^k is near 1
    correct1, correct2 = (-tf.math.expm1((step + 1) * math.log(b)) for b in (BETA1, BETA2))  # S9
    for name, g in grads.items():
        m[name].assign(BETA1 * m[name] + (1 - BETA1) * g)
        v[name].assign(BETA2 * v[name] + (1 - BETA2) * g * g)
        params[name].assign_sub(lr * (m[name] / correct1) / (tf.sqrt(v[name] / correct2) + EPS))


def ema_update(ema, params, ema_decay, step):
    """Move the EMA towards params in place; the decay grows with the step."""
    decay = tf.minimum((1 + step) / (10 + step), ema_decay)  # S9
    for name, p in params.items():
        ema[name].assign(decay * ema[name] + (1 - decay) * p)


def apply_gradients(state, config, grads):
    """One update of the state in place: clip, Adam, EMA, and the step is counted."""
    params = named_parameters(state.model)
    grads = clip_by_global_norm(grads, config.max_grad_norm)  # S9
    step = tf.cast(state.step, state.model.dtype)  # a whole number would not multiply a float
    lr = learning_rate(config, step)
    adam_update(params, grads, state.m, state.v, lr, step)
    ema_update(state.ema, params, config.ema_decay, step)
    state.step.assign_add(1)


@tf.function
def train_step(state, tables, config, x0, t, noise, labels=None, drop=None):
    """One update of the state on a batch x0 [B, H, W, C]; gives the loss before it."""
    loss, grads = loss_and_grads(state.model, tables, config, x0, t, noise, labels, drop)
    apply_gradients(state, config, grads)
    return loss


def draw_batch(config, count, generator):
    """What one step draws: rows of `count` images, times, noise, label dropout, each [B, ...]."""
    batch = [config.batch_size]
    return Draws(
        rows=generator.uniform(batch, 0, count, tf.int64),
        t=generator.uniform(batch, 0, config.timesteps, tf.int64),
        noise=generator.normal([*batch, *config.image_shape]),
        drop=generator.uniform(batch) < config.label_dropout,
    )


def train(state, tables, config, images, labels, draws, update):
    """Train on images [N, H, W, C] and labels [N], an update for each draw; yields the losses."""
    for rows, t, noise, drop in draws:
        x0, noise = tf.gather(images, rows), tf.cast(noise, images.dtype)
        if config.num_classes:
            yield update(state, tables, config, x0, t, noise, tf.gather(labels, rows), drop)
        else:
            yield update(state, tables, config, x0, t, noise)
