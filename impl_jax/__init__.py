"""The design in JAX: Flax NNX modules, whole functions under jax.jit."""

from impl_jax.backend import dtypes, modes, name, open

__all__ = ["dtypes", "modes", "name", "open"]
