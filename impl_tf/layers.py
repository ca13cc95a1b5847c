"""The layers with every default of the framework written out; each is built at once."""

import keras
import numpy as np
import tensorflow as tf

from spec.params import parameter_shapes

EPS = 1e-6  # of every GroupNorm (S7); the framework's default is 1e-3


def time_table(timesteps, width):
    """[T, width] in float64: the sines of every time, then the cosines."""
    half = width // 2  # S7
    frequencies = np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
    angles = np.arange(timesteps)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def built(layer, *shape):
    """The layer with its parameters made, for inputs of this shape."""
    layer.build(shape)
    return layer


def linear(fan_in, fan_out, dtype):
    """x [..., I] -> [..., O]."""
    return built(keras.layers.Dense(fan_out, use_bias=True, dtype=dtype), None, fan_in)


def embedding(rows, width, dtype):
    """Row numbers [B] -> [B, O]."""
    return built(keras.layers.Embedding(rows, width, mask_zero=False, dtype=dtype), None)


def conv(fan_in, fan_out, dtype, size=3, stride=1, pad="same"):
    """x [B, H, W, I] -> [B, H', W', O]; "same" pads a stride of 1 alike on all four sides."""
    layer = keras.layers.Conv2D(
        fan_out, size, stride, pad, data_format="channels_last", use_bias=True, dtype=dtype
    )
    return built(layer, None, None, None, fan_in)


class GroupNorm(keras.layers.GroupNormalization):
    """x [B, H, W, C], normalised over H, W and neighbouring channels, a group each, then scaled.

    The framework's own call takes its sums over the channels of a group and the pixels in one; over
    the pixels first, along whole rows of memory, they take half the time.
    """

    def call(self, x):
        _, h, w, c = x.shape
        rows = tf.cast(tf.reshape(x, [-1, h * w, c]), self.gamma.dtype)

        def mean(values):  # [B, H*W, C] -> [B, 1, C]: of a channel's group, for each channel
            means = tf.reshape(tf.reduce_mean(values, 1), [-1, self.groups, c // self.groups])
            return tf.repeat(tf.reduce_mean(means, -1), c // self.groups, axis=1)[:, None]

        rows -= mean(rows)  # two passes: no cancellation
        scale = self.gamma * tf.math.rsqrt(mean(rows * rows) + self.epsilon)
        return tf.cast(tf.reshape(rows * scale + self.beta, tf.shape(x)), x.dtype)


def group_norm(groups, width, dtype):
    """The layer above with the design's epsilon."""
    layer = GroupNorm(groups, axis=-1, epsilon=EPS, dtype=dtype)
    return built(layer, None, None, None, width)


def silu(x):
    """x * sigmoid(x)."""
    return tf.nn.silu(x)


def attend(q, k, v):
    """q, k, v [B, N, C] -> [B, N, C]: softmax over keys of q.k / sqrt(C), applied to v."""
    scores = tf.matmul(q, k, transpose_b=True) * q.shape[-1] ** -0.5  # [B, queries, keys]
    return tf.matmul(tf.nn.softmax(scores, axis=-1), v)


def nearest(x):
    """x [B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
    return tf.repeat(tf.repeat(x, 2, axis=1), 2, axis=2)


def named_parameters(model):
    """Canonical name -> the variable that holds it; PyTorch gives this by itself."""
    variables = {}
    for name in parameter_shapes(model.config):
        *path, part = name.split(".")
        layer = model
        for word in path:
            if isinstance(layer, dict):
                layer = layer[word]
            else:
                layer = layer[int(word)] if word.isdigit() else getattr(layer, word)
        if isinstance(layer, keras.layers.GroupNormalization):
            variable = layer.gamma if part == "weight" else layer.beta
        elif isinstance(layer, keras.layers.Embedding):
            variable = layer.embeddings
        else:
            variable = layer.kernel if part == "weight" else layer.bias
        variables[name] = variable.value
    return variables
