"""Errors of the diagnostics that name the argument, the value and the remedy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.trees import is_concrete, wide_dtype


def check_samples(owner: str, log_norms: Any) -> jax.Array:
    """Log norms of samples, (N, R + 1), or a clear error."""
    log_norms = check_float(owner, "log_norms", log_norms)
    if log_norms.ndim != 2 or 0 in log_norms.shape:
        raise ValueError(
            f"{owner}: `log_norms` must be (samples, R + 1), at least one of each, not {log_norms.shape}; "
            "a single curve is curve[None]"
        )
    return log_norms


def check_curve(owner: str, curve: Any, name: str = "curve") -> jax.Array:
    """One value for each lag, (R + 1,), or a clear error."""
    curve = check_float(owner, name, curve)
    if curve.ndim != 1 or len(curve) == 0:
        raise ValueError(
            f"{owner}: `{name}` must be one value for each lag, at least one, not {curve.shape}; "
            "average samples with mean_log_norms"
        )
    return curve


def check_float(owner: str, name: str, value: Any) -> jax.Array:
    """A floating array, at least 32 bits wide, or a clear error."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        shown = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{owner}: `{name}` must be a floating array of logarithms, not {shown}")
    return jnp.asarray(value, wide_dtype(value))


def check_lag(owner: str, fit_from: Any, count: int) -> None:
    """An integer lag inside the window, or a clear error."""
    if isinstance(fit_from, bool) or not isinstance(fit_from, (int, np.integer)):
        raise TypeError(
            f"{owner}: `fit_from` must be a lag, an integer, not {fit_from!r} ({type(fit_from).__name__})"
        )
    if not 0 <= fit_from < count:
        raise ValueError(f"{owner}: `fit_from` must lie in the window [0, {count - 1}], not {fit_from}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of the known words, or a clear error."""
    if value not in choices:
        raise ValueError(f"{owner}: `{name}` must be one of {', '.join(choices)}, not {value!r}")


def check_fraction(owner: str, name: str, value: Any) -> None:
    """A number in (0, 1), or a clear error."""
    if isinstance(value, bool) or not isinstance(value, (float, int, np.floating)):
        raise TypeError(f"{owner}: `{name}` must be a number, not {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{owner}: `{name}` must lie in (0, 1), not {value}")


def check_tolerance(owner: str, tolerance: Any) -> None:
    """A positive number; a traced one is taken on trust."""
    number = isinstance(tolerance, (float, int)) or getattr(tolerance, "shape", None) == ()
    if isinstance(tolerance, bool) or not number:
        raise TypeError(f"{owner}: `tolerance` must be a real number, not {tolerance!r}")
    if is_concrete(tolerance) and not 0 < float(tolerance) < math.inf:
        raise ValueError(
            f"{owner}: `tolerance` must lie in (0, inf), not {tolerance}; 0.1 to 0.9 are usual, 1 is no bound"
        )
