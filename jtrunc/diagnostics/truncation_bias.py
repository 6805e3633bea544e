"""How biased a truncated gradient is, and the length that a tolerance needs: from gradient norms by lag.

Everything is a function of the curve log P̂[φₖ], k = 0 … R: its decay rate β̂, the part Ê(K) of the gradient
that BPTT(K, 1) leaves out, the same relative to the rest, Δ̂(K), and the first K for which that is tolerable.
Adaptive truncation paper (Aicher, Foti & Fox 2019), sections 3.2, 4.2 and 4.3, with errata 8 and 10 to 12.
Norms stay logarithms, so that none is too small for its dtype; −inf stands for a norm that is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree
from jtrunc.checks import check_key, check_size
from jtrunc.diagnostics.arguments import (
    check_choice,
    check_curve,
    check_fraction,
    check_lag,
    check_samples,
    check_tolerance,
)

METHODS = ("least_squares", "maximum", "quantile")
"""What may be fitted to a curve."""

RANGES = ("prefix", "window")
"""Over which lags the gradient is bounded from below: k ≤ K, or the whole window."""


class LengthEstimate(NamedTuple):
    """A truncation length and what it rests on; all scalars.

    Attributes:
      length: int32, κ̂: BPTT(κ̂, 1) has the lags 0 … κ̂, that is κ̂ + 1 states get a gradient.
      bounded: whether κ̂ was found. If not, β̂ ≥ 1 or no K reached the tolerance, and `length` is K_max.
      decay_rate: β̂; +inf where the norms are not all finite.
      relative_bias: Δ̂(κ̂); +inf where nothing bounds it.
    """

    length: jax.Array
    bounded: jax.Array
    decay_rate: jax.Array
    relative_bias: jax.Array


def mean_log_norms(log_norms: jax.Array) -> jax.Array:
    """The curve log P̂[φₖ] = log 1/N Σₛ φₖ(s), eq. 20: the logarithm of the mean, not the mean of logarithms.

    Args:
      log_norms: log φₖ of N samples, (N, R + 1).

    Returns:
      (R + 1,), float32 or wider.

    Raises:
      TypeError, ValueError: `log_norms` is no float array (N, R + 1) with N ≥ 1.

    Example:

      >>> curve = mean_log_norms(jnp.log(jnp.array([[4.0, 1.0], [2.0, 0.0]])))
      >>> jnp.exp(curve).round(4).tolist()
      [3.0, 0.5]
    """
    log_norms = check_samples("mean_log_norms", log_norms)
    return jax.nn.logsumexp(log_norms, axis=0) - math.log(len(log_norms))


def log_decay_rate(
    curve: jax.Array, fit_from: int, *, method: str = "least_squares", quantile: float = 0.9
) -> jax.Array:
    """log β̂: the slope of the curve from lag τ on, where (A-1) asks for E φₖ₊₁ ≤ β E φₖ.

    - ``"least_squares"``, eq. 22: the ordinary-least-squares slope on [τ, R] (errata 8). The default.
    - ``"maximum"``, eq. 21: the largest slope between two lags of [τ, R], which some two neighbours have. A
      bound for the sample, but with 50 noisy samples β̂ ≥ 1 where the truth is 0.85 to 0.97 (errata 8).
    - ``"quantile"``: that quantile of the slopes of all pairs, O((R − τ)²) memory.

    Lags whose norm is exactly 0 are left out of the fit, which can only slow the decay. With fewer than two
    others the rate is log 0 = −inf if there are such zeros, and log 1 = 0, no bound, if there are none: a
    single point has no slope. A curve with nan or +inf anywhere has the rate +inf, no bound either.

    Args:
      curve: log P̂[φₖ], (R + 1,); nats.
      fit_from: τ, a lag, 0 ≤ τ ≤ R; norms before it may do what they like.
      quantile: in (0, 1); 0.9 is exceeded by one pair in ten.

    Returns:
      scalar, nats per step.

    Raises:
      TypeError, ValueError: `curve` is no float vector, τ outside the window, unknown method, bad quantile.

    Example: a plateau of ten lags, then a decay of e^−0.3 a step.

      >>> curve = -0.3 * jnp.maximum(jnp.arange(21.0) - 10, 0)
      >>> [round(float(log_decay_rate(curve, fit_from)), 2) for fit_from in (10, 0)]
      [-0.3, -0.15]
    """
    curve = check_curve("log_decay_rate", curve)
    check_lag("log_decay_rate", fit_from, len(curve))
    check_choice("log_decay_rate", "method", method, METHODS)
    check_fraction("log_decay_rate", "quantile", quantile)
    window = curve[fit_from:]
    present = jnp.isfinite(window)
    heights = jnp.where(present, window, 0)
    if method == "least_squares":
        slope = _least_squares(heights, present)
    elif method == "maximum":
        slope = _largest_slope(heights, present)
    else:
        slope = _quantile_of_slopes(heights, present, quantile)
    alone = jnp.where(jnp.all(present), 0.0, -jnp.inf)
    slope = jnp.where(jnp.sum(present) >= 2, slope, alone)
    return jnp.where(_is_measured(curve), slope, jnp.inf).astype(curve.dtype)


def _least_squares(heights: jax.Array, present: jax.Array) -> jax.Array:
    weights = present.astype(heights.dtype)
    lags = jnp.arange(len(heights), dtype=heights.dtype)
    count = jnp.maximum(jnp.sum(weights), 1)
    lags = weights * (lags - jnp.sum(weights * lags) / count)
    heights = weights * (heights - jnp.sum(heights) / count)
    return jnp.sum(lags * heights) / jnp.maximum(jnp.sum(lags**2), 0.5)  # two lags have at least 0.5


def _largest_slope(heights: jax.Array, present: jax.Array) -> jax.Array:
    """Over neighbours among the lags that are present: any other slope is a mean of theirs."""
    lags = jnp.arange(len(heights))
    latest = jax.lax.cummax(jnp.where(present, lags, -1))
    before = jnp.concatenate([jnp.full_like(latest[:1], -1), latest[:-1]])
    slopes = (heights - heights[before]) / (lags - before).astype(heights.dtype)
    return jnp.max(jnp.where(present & (before >= 0), slopes, -jnp.inf))


def _quantile_of_slopes(heights: jax.Array, present: jax.Array, quantile: float) -> jax.Array:
    if len(heights) < 2:
        return jnp.zeros((), heights.dtype)  # not read: there is no pair
    first, second = np.triu_indices(len(heights), 1)
    slopes = (heights[second] - heights[first]) / (second - first)
    return jnp.nanquantile(jnp.where(present[first] & present[second], slopes, jnp.nan), quantile)


def log_absolute_bias(curve: jax.Array, log_decay: jax.Array, fit_from: int, max_length: int) -> jax.Array:
    """log (Ê(K)/M̂), K = 0 … K_max: a bound on what BPTT(K, 1) leaves out, in units of ‖∂h/∂θ‖ ≤ M̂.

        Ê(K)/M̂ = Σ_{k=K+1}^{τ−1} φₖ + φ_τ/(1 − β̂)   for K < τ,      φ_τ β̂^(K−τ)/(1 − β̂)   for K ≥ τ

    Eq. 23 as printed: the second branch lags one step behind the first, Ê(τ) = Ê(τ − 1), and is larger than
    the geometric tail by 1/β̂ (errata 10): still an upper bound. K may exceed R.

    Args:
      curve: log P̂[φₖ], (R + 1,); nats.
      log_decay: log β̂, scalar, as from `log_decay_rate`. β̂ ≥ 1 gives +inf everywhere (errata 12); so does a
        curve with nan or +inf, and one that is zero at τ and not zero after it, as no rate bounds that.
      fit_from: τ, 0 ≤ τ ≤ R.
      max_length: K_max ≥ 1.

    Returns:
      (K_max + 1,), nats.

    Raises:
      TypeError, ValueError: `curve` is no float vector, τ outside the window, K_max no positive integer.

    Example: φₖ = 2⁻ᵏ. The tail beyond K sums to 2⁻ᴷ.

      >>> curve = -jnp.log(2) * jnp.arange(5.0)
      >>> jnp.exp(log_absolute_bias(curve, -jnp.log(2), fit_from=2, max_length=5)).round(4).tolist()
      [1.0, 0.5, 0.5, 0.25, 0.125, 0.0625]
    """
    curve = check_curve("log_absolute_bias", curve)
    check_lag("log_absolute_bias", fit_from, len(curve))
    check_size("log_absolute_bias", "max_length", max_length)
    if jnp.shape(log_decay) != ():
        raise ValueError(
            f"log_absolute_bias: `log_decay` must be one rate, not {jnp.shape(log_decay)}; use vmap"
        )
    log_decay = jnp.asarray(log_decay, curve.dtype)
    decays = log_decay < 0
    log_decay = jnp.where(decays, log_decay, -1.0)  # the branch that is not taken stays finite
    tail = curve[fit_from] - jnp.log(-jnp.expm1(log_decay))
    terms = jnp.concatenate([curve[1:fit_from], tail[None]])
    before = jax.lax.cumlogsumexp(terms, reverse=True)[: min(fit_from, max_length + 1)]
    further = jnp.arange(1, max_length - fit_from + 1, dtype=curve.dtype)
    after = jnp.concatenate([tail[None], tail + further * log_decay])[: max(max_length - fit_from + 1, 0)]
    revived = jnp.isneginf(curve[fit_from]) & jnp.any(curve[fit_from:] > -jnp.inf)
    known = decays & ~revived & _is_measured(curve)
    return jnp.where(known, jnp.concatenate([before, after]), jnp.inf)


def relative_bias(curve: jax.Array, log_bias: jax.Array, *, over: str = "prefix") -> jax.Array:
    """Δ̂(K) = Ê(K) / maxₖ (M̂ Σ_{j≤k} φⱼ − Ê(k)), eq. 24 with the maximum where Theorem 1 has it (errata 11).

    The denominator stands for ‖g‖ ≥ ‖E ĝₖ‖ − E(k). Over the ``"prefix"``, k ≤ min(K, R), it uses the lags of
    BPTT(K, 1) alone; over the whole ``"window"``, k ≤ R, it is larger, the same for every K, and Δ̂ smaller.
    M̂ and the units of φ drop out.

    **No guaranteed bound**: Σφ is an upper stand-in for ‖ĝ‖/M, and where the terms of the gradient cancel the
    true relative bias may be any multiple of Δ̂. See `estimate_length` for how much cancellation is allowed.

    Args:
      curve: log P̂[φₖ], (R + 1,); nats.
      log_bias: log (Ê(K)/M̂), (K_max + 1,), as from `log_absolute_bias`; `over` = "window" needs K_max ≥ R.

    Returns:
      (K_max + 1,); +inf where the denominator is not positive or anything is not finite.

    Raises:
      TypeError, ValueError: no float vectors, an unknown range, or a `log_bias` too short for it.

    Example: φₖ = 3⁻ᵏ. Before τ what is left out is x = 3^−(K+1) of the whole, and Δ̂(K) = x/(1 − 2x).

      >>> curve = -jnp.log(3) * jnp.arange(5.0)
      >>> log_bias = log_absolute_bias(curve, -jnp.log(3), fit_from=3, max_length=4)
      >>> [round(float(bias), 3) for bias in relative_bias(curve, log_bias)]
      [1.0, 0.143, 0.04, 0.039, 0.013]
      >>> [round(float(bias), 3) for bias in relative_bias(curve, log_bias, over="window")]
      [0.339, 0.113, 0.038, 0.038, 0.013]
    """
    curve = check_curve("relative_bias", curve)
    log_bias = check_curve("relative_bias", log_bias, "log_bias")
    check_choice("relative_bias", "over", over, RANGES)
    if over == "window" and len(log_bias) < len(curve):
        raise ValueError(
            f"relative_bias: `log_bias` ends at K = {len(log_bias) - 1}, before the window does at "
            f"R = {len(curve) - 1}; raise `max_length` of log_absolute_bias, or use over='prefix'"
        )
    log_sums = jax.lax.cumlogsumexp(curve)[: len(log_bias)]
    log_share = log_bias[: len(curve)] - log_sums  # of what may be missing in what is there
    positive = log_share < 0
    log_rest = jnp.log(-jnp.expm1(jnp.where(positive, log_share, -1)))
    log_floor = jax.lax.cummax(jnp.where(positive, log_sums + log_rest, -jnp.inf))
    if over == "prefix":
        log_floor = log_floor[np.minimum(np.arange(len(log_bias)), len(log_floor) - 1)]
    else:
        log_floor = log_floor[-1]
    known = (log_floor > -jnp.inf) & _is_measured(curve)
    return jnp.where(known, jnp.exp(log_bias - jnp.where(known, log_floor, 0)), jnp.inf)


def estimate_length(
    log_norms: jax.Array,
    tolerance: float | jax.Array,
    *,
    fit_from: int,
    min_length: int,
    max_length: int,
    method: str = "least_squares",
    quantile: float = 0.9,
    over: str = "prefix",
) -> LengthEstimate:
    """κ̂(δ) = min {K in [K_min, K_max] : Δ̂(K) < δ}, eq. 25: the shortest truncation whose bias is tolerable.

    The inequality is strict. β̂ ≥ 1, or no such K, gives K_max and ``bounded=False``, never a small K
    (errata 12). Independent of the units of φ and of the size of the minibatch.

    What a tolerance buys. Let x be the share of the lags beyond K in Σφ, and a = ‖g‖/(M Σφ) ≤ 1 how well the
    terms of the gradient agree, so that the true relative bias is at most x/a. Over the prefix Δ̂ < δ means
    x < δ/(1 + 2δ), and if (A-1) holds with β̂ the true relative bias is below δ/(a (1 + 2δ)): within δ if

        a ≥ 1/(1 + 2δ):    0.36 for δ = 0.9,    0.5 for δ = 0.5,    0.83 for δ = 0.1.

    Over the window Δ̂ < δ means x < δ, with nothing to spare: the true relative bias is below δ/a, often a
    few per cent above δ. Where most of the gradient cancels either can be wrong by any factor (errata 11).

    What it costs, with one real eigenvalue β, where the true relative bias is β^(K+1): over the prefix
    κ̂ + 1 ≈ log(δ/(1 + 2δ))/log β states, 1 + log(1 + 2δ)/log(1/δ) times as many as are needed: 1.08 for δ =
    0.1, at most 2 for δ ≤ 0.5 (κ̂ ≤ 2 K + 1 in lags), but 10.8 for δ = 0.9. Over the window about as many as
    are needed, for any δ. Both count one lag too many where K ≥ τ (errata 10), and more than twice too many
    where the slowest mode itself cancels: φ is of longer memory than the gradient then.

    Args:
      log_norms: log φₖ of N samples, (N, R + 1), as from `log_gradient_norms`.
      tolerance: δ > 0, may be traced; δ < 1 for convergence (Theorem 2).
      fit_from: τ, a lag, 0 ≤ τ ≤ R; the paper takes 0.9 R.
      min_length: K_min ≥ 1, lags.
      max_length: K_max ≥ K_min, lags; may exceed R, where Ê is extrapolated.
      method, quantile: of `log_decay_rate`.
      over: of `relative_bias`.

    Returns:
      `LengthEstimate`. Time and memory O(N R + K_max).

    Raises:
      TypeError, ValueError: bad shapes, a tolerance not in (0, ∞), K_min > K_max, τ outside the window,
        unknown method or range, quantile outside (0, 1).

    Example: φₖ = 0.9ᵏ. 0.9^(K+1) ≤ 0.1 from K = 21 on; over the prefix 0.9^(K+1) < 0.1/1.2 is asked for.

      >>> log_norms = jnp.log(0.9) * jnp.arange(101.0)[None]
      >>> for over in ("prefix", "window"):
      ...     estimate = estimate_length(
      ...         log_norms, 0.1, fit_from=90, min_length=1, max_length=100, over=over
      ...     )
      ...     print(int(estimate.length), round(float(estimate.relative_bias), 3), bool(estimate.bounded))
      23 0.095 True
      21 0.098 True
    """
    owner = "estimate_length"
    log_norms = check_samples(owner, log_norms)
    check_tolerance(owner, tolerance)
    check_size(owner, "min_length", min_length)
    check_size(owner, "max_length", max_length)
    if min_length > max_length:
        raise ValueError(f"{owner}: `min_length` {min_length} exceeds `max_length` {max_length}; swap them")
    num_lags = log_norms.shape[1] - 1
    largest = jnp.max(log_norms)
    log_norms = log_norms - jnp.where(jnp.isfinite(largest), largest, 0)  # units in which rounding is least
    curve = mean_log_norms(log_norms)
    log_decay = log_decay_rate(curve, fit_from, method=method, quantile=quantile)
    log_bias = log_absolute_bias(curve, log_decay, fit_from, max(max_length, num_lags))
    bias = relative_bias(curve, log_bias, over=over)[min_length : max_length + 1]
    small = bias < tolerance
    bounded = jnp.any(small)
    index = jnp.where(bounded, jnp.argmax(small), max_length - min_length)
    length = (min_length + index).astype(jnp.int32)
    return LengthEstimate(length, bounded, jnp.exp(log_decay), bias[index])


def bootstrap_bands(
    key: jax.Array,
    log_norms: jax.Array,
    statistic: Callable[[jax.Array], PyTree],
    *,
    num_resamples: int = 200,
    level: float = 0.95,
) -> tuple[PyTree, PyTree]:
    """Percentile bands of any statistic of the minibatch: its rows are drawn anew, with replacement.

    Between the (1 ∓ level)/2 quantiles of the statistic over the resamples, rounded outwards to one that was
    drawn, so that +inf and integers stay what they are. Rows count as independent: neighbouring times of one
    stream are not, and make the bands too narrow. So does a small minibatch: bands of 95 % for P̂[φ] and β̂
    covered 87 and 89 % with 8 samples, 91 and 92 % with 16, 94 and 95 % from 64 on, for norms that spread by
    e^±½ (2000 simulated minibatches); with e^±1 those for P̂[φ] covered 79, 85 and 91 %.

    Args:
      key: typed key.
      log_norms: (N, R + 1).
      statistic: ``log_norms -> tree of arrays``, such as `mean_log_norms` or a partial `estimate_length`.
      num_resamples: how often to draw; time and compute grow with it, memory with the size of the results.
      level: in (0, 1).

    Returns:
      ``(lower, upper)``, two trees like the statistic's.

    Raises:
      TypeError, ValueError: no typed key, bad shapes or sizes, level outside (0, 1), no function.

    Example: the mean of 64 norms around 1.

      >>> log_norms = 0.1 * jax.random.normal(jax.random.key(0), (64, 1))
      >>> lower, upper = bootstrap_bands(jax.random.key(1), log_norms, mean_log_norms)
      >>> bool(lower[0] < mean_log_norms(log_norms)[0] < upper[0]), round(float(upper[0] - lower[0]), 2)
      (True, 0.05)
    """
    owner = "bootstrap_bands"
    check_key(owner, key, random=True)
    log_norms = check_samples(owner, log_norms)
    check_size(owner, "num_resamples", num_resamples)
    check_fraction(owner, "level", level)
    if not callable(statistic):
        raise TypeError(f"{owner}: `statistic` must be a function of log norms, not {statistic!r}")

    def resampled(key: jax.Array) -> PyTree:
        rows = jax.random.randint(key, (len(log_norms),), 0, len(log_norms))
        return statistic(log_norms[rows])

    values = jax.lax.map(resampled, jax.random.split(key, num_resamples))
    ordered = jax.tree.map(partial(jnp.sort, axis=0), values)
    first = math.floor((1 - level) / 2 * (num_resamples - 1))
    last = num_resamples - 1 - first
    return jax.tree.map(lambda leaf: leaf[first], ordered), jax.tree.map(lambda leaf: leaf[last], ordered)


def _is_measured(curve: jax.Array) -> jax.Array:
    """Whether no norm is nan or infinite: nan < inf is false. Not by max, which can drop nan on CPU."""
    return jnp.all(curve < jnp.inf)
