"""The design in JAX: Flax NNX modules, whole functions under jax.jit."""

from impl_jax.backend import modes, name, open

__all__ = ["modes", "name", "open"]
