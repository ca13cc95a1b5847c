"""The design in TensorFlow: Keras layers and models, whole functions under tf.function."""

from impl_tf.backend import modes, name, open

__all__ = ["modes", "name", "open"]
