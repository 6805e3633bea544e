"""Random signs and what else may stand for them: zero mean, identity covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Noise = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""``(key, shape, dtype) -> array`` of independent numbers with mean 0 and variance 1."""


def rademacher(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Independent signs ±1 with equal probability: of all unit-variance noises the one of least kurtosis.

    Example:

      >>> signs = rademacher(jax.random.key(0), (1000,), "float32")
      >>> sorted(set(signs.tolist())), bool(abs(signs.mean()) < 0.15)
      ([-1.0, 1.0], True)
    """
    # Each random word gives 32 signs: one for each of its bits.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    signs = 2 * bits.astype(jnp.int32) - 1
    return signs.reshape(-1)[:size].reshape(shape).astype(dtype)


def check_noise(owner: str, noise: Any) -> None:
    """A function, or a clear error."""
    if not callable(noise):
        raise TypeError(
            f"{owner}: `noise` must be a function (key, shape, dtype) -> array, not {type(noise).__name__}; "
            "leave it out for random signs"
        )


def draw_noise(owner: str, noise: Noise, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """One draw, of the shape that was asked for."""
    drawn = noise(key, shape, dtype)
    if getattr(drawn, "shape", None) != shape:
        raise ValueError(
            f"{owner}: `noise` returned shape {getattr(drawn, 'shape', None)} instead of {shape}; "
            "return noise(key, shape, dtype) of the shape that it is given"
        )
    return drawn.astype(dtype)
