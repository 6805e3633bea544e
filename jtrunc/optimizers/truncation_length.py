"""Step sizes and clipping that follow the truncation length K of the window that gave the gradient."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jtrunc.checks import check_positive, check_size
from jtrunc.trees import clip_to_norm


def scale_by_truncation_length(
    power: float = 0.5, *, length: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by Kᵖ, K = the truncation length of the window that gave the gradient.

        θₙ₊₁ = θₙ − γₙ · √Kₙ · ĝ(θₙ),   ĝ = BPTT(2Kₙ, Kₙ), divided by Kₙ

    p = ½ is Algorithm 1 of the adaptive-truncation paper (Aicher et al. 2019, section 4.1): an average over K
    losses has about 1/K of the variance of one, so that √K times longer steps are as noisy, and a long window
    makes up for the updates that it leaves out. p = 1 undoes the division by K: a sum over the window.

    `jtrunc.training` passes ``truncation_length`` to the optimiser wherever the estimator's diagnostics have
    it (`adaptive_bptt`); a loop of your own does so by ``tx.update(grads, state, params,
    truncation_length=K)``. Put it behind all that normalises a gradient: ``optax.chain(optax.sgd(1.0),
    scale_by_truncation_length())`` and ``optax.chain(optax.adam(1e-3), scale_by_truncation_length())`` both
    lengthen steps; in front of Adam it would nearly cancel. It does not flip the sign, and never changes the
    direction of a step.

    Args:
      power: p, finite; 0 changes nothing.
      length: a fixed K ≥ 1 in steps, for estimators that report none, such as ``windowed_bptt(system, 30,
        15)`` with ``length=15``; the published experiments scale fixed truncation too (errata 13). It is
        taken in place of a `truncation_length` that is passed.

    Raises:
      TypeError, ValueError: a `power` that is no finite number, a `length` that is no positive integer; at
        `update`, if there is neither a `length` nor a scalar `truncation_length`.

    Example: K = 16 makes a step of 0.5 four times as long.

      >>> tx = optax.chain(optax.sgd(0.5), scale_by_truncation_length())
      >>> params = jnp.float32(0.0)
      >>> updates, _ = tx.update(jnp.float32(1.0), tx.init(params), params, truncation_length=jnp.int32(16))
      >>> float(updates)
      -2.0
    """
    owner = "scale_by_truncation_length"
    if isinstance(power, bool) or not isinstance(power, Real):
        raise TypeError(f"{owner}: `power` must be a number such as 0.5, not {power!r}")
    if not math.isfinite(power):
        raise ValueError(f"{owner}: `power` must be finite, not {power}; 0.5 is the square root")
    fixed = None if length is None else check_size(owner, "length", length)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        truncation_length: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        factor = _length(owner, fixed, truncation_length) ** float(power)
        return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(_no_state, update)


def clip_by_truncation_length(
    max_norm: float = 1.0, *, length: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale updates down to a global norm of at most c / K, K = the truncation length.

        g ← g · min(1, (c / K) / ‖g‖),   ‖g‖ over all leaves together

    The published experiments of the adaptive-truncation paper (Aicher et al. 2019) clip so, with c = 1
    (errata 13; the text does not say it). Biased wherever it clips: the mean of clipped estimates is not the
    clipped gradient, and unbiased estimators lose what they were taken for. Without it, training is that of
    the printed Algorithm 1.

    Put it in front: ``optax.chain(clip_by_truncation_length(), optax.sgd(1.0),
    scale_by_truncation_length())``. NaN and infinities pass, so that the training loop notices them; finite
    gradients are clipped however large they are, also where their squares overflow. Leaves keep their dtype;
    norms are computed in float32 or wider. K reaches it as in `scale_by_truncation_length`.

    Args:
      max_norm: c > 0, finite, in units of the gradient (nats per unit of the parameters).
      length: a fixed K ≥ 1 in steps, in place of a `truncation_length` that is passed.

    Raises:
      TypeError, ValueError: a `max_norm` that is no positive finite number, a `length` that is no positive
        integer; at `update`, if there is neither a `length` nor a scalar `truncation_length`.

    Example: (3, 4) has the norm 5, and 1/K = 0.1.

      >>> tx = clip_by_truncation_length(length=10)
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(x), 6) for x in updates]
      [0.06, 0.08]
    """
    owner = "clip_by_truncation_length"
    max_norm = check_positive(owner, "max_norm", max_norm)
    fixed = None if length is None else check_size(owner, "length", length)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        truncation_length: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        limit = max_norm / _length(owner, fixed, truncation_length)
        return clip_to_norm(updates, limit)[0], state

    return optax.GradientTransformationExtraArgs(_no_state, update)


def _no_state(params: optax.Params) -> optax.EmptyState:
    return optax.EmptyState()


def _length(owner: str, fixed: int | None, truncation_length: Any) -> jax.Array:
    """K as a float scalar, or an error that says where it could come from."""
    length = truncation_length if fixed is None else fixed
    if length is None:
        raise ValueError(
            f"{owner}: `truncation_length` is missing: the estimator reports none; use adaptive_bptt, give a "
            "fixed `length`, or pass tx.update(grads, state, params, truncation_length=K)"
        )
    if jnp.ndim(length) != 0:
        raise ValueError(
            f"{owner}: `truncation_length` must be one number, not an array of shape {jnp.shape(length)}; "
            "streams that share one window go inside the system, not into per_stream"
        )
    return jnp.asarray(length, jnp.result_type(float))
