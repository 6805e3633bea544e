"""Comparisons of trees of arrays, in NumPy: a jitted max on CPU can drop a NaN, a NumPy one cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.reference import to_vector


def assert_close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    """Same structure, everything finite, and equal to `rtol` of the largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual, expected = np.asarray(to_vector(actual)), np.asarray(to_vector(expected))
    assert np.isfinite(actual).all(), actual
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=0.0))


def relative_distance(actual: Any, expected: Any) -> float:
    """max |actual − expected| / max |expected|; not finite where an entry is not."""
    actual, expected = np.asarray(to_vector(actual)), np.asarray(to_vector(expected))
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def differ(actual: Any, expected: Any, by: float = 1e-3) -> bool:
    """Both finite, and apart by more than a rounding error could explain."""
    distance = relative_distance(actual, expected)
    return np.isfinite(distance) and distance > by


def add(*trees: Any) -> Any:
    """The sum of trees of the same structure."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def python_calls(function: Callable[[], Any]) -> int:
    """How many calls the interpreter makes meanwhile: what a loop over the data would make many of."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
