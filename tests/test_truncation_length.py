"""Steps and clipping by the truncation length: the numbers, their place in optax, and bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtrunc.optimizers import clip_by_truncation_length, scale_by_truncation_length


def step(tx: Any, gradient: Any, length: Any = None) -> Any:
    extra = {} if length is None else {"truncation_length": length}
    return optax.with_extra_args_support(tx).update(gradient, tx.init(gradient), gradient, **extra)[0]


@pytest.mark.parametrize("power", [0.5, 1.0, 0.0, -1.0])
def test_steps_scale_with_a_power_of_the_length_that_is_passed(power: float) -> None:
    traces = []

    @jax.jit
    def scaled(length: jax.Array) -> Any:
        traces.append(1)
        gradient = {"a": jnp.full(2, 3.0, jnp.bfloat16), "b": jnp.float32(1.0), "c": jnp.array(1.0 + 2.0j)}
        return step(scale_by_truncation_length(power), gradient, length)

    for length in (1, 4, 100):
        updates = scaled(jnp.int32(length))
        factor = float(length) ** power
        np.testing.assert_allclose(updates["b"], factor, rtol=1e-6)
        np.testing.assert_allclose(updates["c"], factor * (1 + 2j), rtol=1e-12)
        np.testing.assert_allclose(updates["a"].astype(float), 3 * factor, rtol=1e-2)
        assert updates["a"].dtype == jnp.bfloat16 and updates["b"].dtype == jnp.float32
    assert len(traces) == 1


def test_a_fixed_length_needs_none_and_goes_before_the_one_that_is_passed() -> None:
    for tx, expected in (
        (scale_by_truncation_length(length=9), 3.0),
        (clip_by_truncation_length(length=9), 1 / 9),
    ):
        for length in (None, 4):
            np.testing.assert_allclose(step(tx, jnp.float64(1.0), length), expected, rtol=1e-12)


@pytest.mark.slow
def test_they_chain_with_optimisers_that_know_nothing_of_lengths() -> None:
    tx = optax.chain(clip_by_truncation_length(0.8), optax.sgd(1.0), scale_by_truncation_length())
    update = step(tx, jnp.array([3.0, -4.0]), jnp.int32(4))
    np.testing.assert_allclose(update, [-0.12 * 2, 0.16 * 2], rtol=1e-12)  # norm 0.8 / 4, then √4


def test_only_norms_above_the_limit_are_clipped_and_over_all_leaves_together() -> None:
    tx = clip_by_truncation_length(10.0)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([[4.0j]])}
    for length, norm in ((1, 5.0), (2, 5.0), (4, 2.5)):
        clipped = step(tx, gradient, length)
        np.testing.assert_allclose(clipped["a"], 3 * norm / 5, rtol=1e-12)
        np.testing.assert_allclose(clipped["b"], 4j * norm / 5, rtol=1e-12)


@pytest.mark.slow
def test_clipping_at_the_ends_of_a_dtype() -> None:
    """Squares of 1e30 overflow float32, those of 1e-30 vanish; neither may change what comes out."""
    tx = clip_by_truncation_length(1.0, length=2)
    huge = step(tx, jnp.array([3e30, 4e30], jnp.float32))
    np.testing.assert_allclose(huge, [0.3, 0.4], rtol=1e-6)
    tiny = jnp.array([3e-30, 4e-30], jnp.float32)
    np.testing.assert_array_equal(step(tx, tiny), tiny)
    np.testing.assert_allclose(
        step(clip_by_truncation_length(1e-30, length=2), tiny), [3e-31, 4e-31], rtol=1e-6
    )
    low = step(tx, jnp.full(4, 200.0, jnp.float16))  # whose squares overflow float16
    assert low.dtype == jnp.float16
    np.testing.assert_allclose(low.astype(float), 0.25, rtol=1e-3)
    np.testing.assert_array_equal(step(tx, jnp.zeros(3)), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_and_is_seen(bad: float) -> None:
    for tx in (clip_by_truncation_length(length=5), scale_by_truncation_length(length=5)):
        many = jnp.zeros(1000, jnp.float32).at[500].set(bad)
        assert not np.isfinite(np.asarray(jax.jit(lambda g, tx=tx: step(tx, g))(many))).all()


def test_bad_arguments_say_what_to_do() -> None:
    for make in (scale_by_truncation_length, clip_by_truncation_length):
        with pytest.raises(ValueError, match=r"`truncation_length` is missing.*adaptive_bptt"):
            step(make(), jnp.ones(2))
        with pytest.raises(ValueError, match=r"must be one number, not an array of shape \(3,\)"):
            step(make(), jnp.ones(2), jnp.ones(3))
        with pytest.raises(ValueError, match="`length` must be at least 1, not 0"):
            make(length=0)
        with pytest.raises(TypeError, match="`length` must be a positive integer, not"):
            make(length=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`power` must be a number"):
        scale_by_truncation_length("half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`power` must be finite, not inf"):
        scale_by_truncation_length(np.inf)
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="`max_norm` must be positive and finite"):
            clip_by_truncation_length(bad)
    with pytest.raises(TypeError, match="`max_norm` must be a positive number"):
        clip_by_truncation_length(True)
