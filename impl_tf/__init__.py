"""The design in TensorFlow: Keras layers and models, whole functions under tf.function."""

from impl_tf.backend import dtypes, modes, name, open

__all__ = ["dtypes", "modes", "name", "open"]
