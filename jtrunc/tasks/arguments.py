"""Errors that the tasks share: each names the argument, the value and the remedy."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp


def require_count(name: str, value: Any, minimum: int = 1) -> int:
    """Returns `value` as an int that is at least `minimum`.

    Raises:
      TypeError: if it is not a whole number (a bool is none).
      ValueError: if it is below `minimum`.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}; pass an int") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}; pass an int")
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}; pass {minimum} or more")
    return count


def require_probability(name: str, value: Any) -> float:
    """Returns `value` as a float strictly between 0 and 1; otherwise a ValueError."""
    probability = float(value)
    if not 0.0 < probability < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}; pass e.g. 0.1")
    return probability


def require_key(key: Any) -> jax.Array:
    """Returns `key` if it is one typed key.

    Raises:
      TypeError: for anything else: a seed, a legacy ``uint32`` key.
      ValueError: for an array of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key, got {key!r}; make one with jax.random.key(seed)")
    if key.shape != ():
        raise ValueError(f"key must be a single key, got an array of keys of shape {key.shape}; pass one")
    return key
