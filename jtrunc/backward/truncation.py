"""Truncation laws: where the backward pass is cut, and with which probability.

A law looks at the boundary between step i and step i + 1 and says whether it is cut and with which
probability c it could have been. The edge across it then has the weight w = 0 if cut, else 1/(1 − c).
Laws are parts: `artbp`, `online_artbp` and `scan` take any of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.optimal import correlated, optimal_probabilities, uncorrelated
from jtrunc.base import PyTree
from jtrunc.checks import check_size
from jtrunc.trees import is_concrete


class Boundary(NamedTuple):
    """What a law may look at.

    Attributes:
      index: int32, the step i of the present `inputs` after which the boundary lies.
      elapsed: int32, steps since the last cut, step i included (δt of eq. 14; errata 2): at least 1.
      hidden: hₜ after step i, or None for laws that do not read it.
    """

    index: jax.Array
    elapsed: jax.Array
    hidden: PyTree = None


class Truncation(NamedTuple):
    """A law of truncation; make one with the functions of this module.

    Attributes:
      probability: ``Boundary -> c``, the compensated probability of a cut.
      cut: ``(Boundary, c, uniform) -> bool``, the decision, given one uniform draw on [0, 1).
      random: whether `cut` reads the draw, so that a key is needed.
      reads_hidden: whether `probability` or `cut` reads the hidden state.
      length: how many boundaries the law is given for, or None for any number.
    """

    probability: Callable[[Boundary], jax.Array]
    cut: Callable[[Boundary, jax.Array, jax.Array], jax.Array]
    random: bool
    reads_hidden: bool = False
    length: int | None = None


def never() -> Truncation:
    """No cut: w = 1, exact backpropagation through time."""
    return Truncation(_zero, lambda boundary, c, uniform: jnp.asarray(False), random=False)


def every(length: int) -> Truncation:
    """A cut whenever `length` steps have passed since the last: truncated BPTT. Biased: no compensation.

    Args:
      length: L ≥ 1, steps.

    Raises:
      TypeError, ValueError: `length` is not a positive integer.
    """
    check_size("truncation.every", "length", length)
    return Truncation(_zero, lambda boundary, c, uniform: boundary.elapsed >= length, random=False)


def constant(c: float) -> Truncation:
    """A cut with the same probability c at each boundary: mean length 1/c (ARTBP paper, section 4).

    The weights 1/(1 − c) compound exponentially, so the variance stays bounded only where the transition
    contracts faster than 1 − c; see `polynomial`.

    Raises:
      ValueError: c outside [0, 1).
    """
    if _is_number("truncation.constant", "c", c) and not 0.0 <= c < 1.0:
        raise ValueError(
            f"truncation.constant: `c` must lie in [0, 1), not {c}; a certain cut cannot be compensated"
        )
    return _random(lambda boundary: jnp.asarray(c, dtype=float))


def polynomial(mean_length: float, alpha: float) -> Truncation:
    """c = (α − 1) / ((α − 2) L₀ + δt): window lengths fall off like L^(−α) (ARTBP paper, eq. 14).

    δt counts the steps since the last cut, 1 on the first step after it, with a cut before the first step
    (errata 2). The mean length is then exactly L₀; the variance is finite for α > 3.

    Args:
      mean_length: L₀ > 1, steps.
      alpha: α > 2; larger means fewer long windows and larger weights.

    Raises:
      ValueError: L₀ ≤ 1 or α ≤ 2.

    Example:

      >>> law = polynomial(mean_length=16, alpha=6)
      >>> round(float(law.probability(Boundary(jnp.int32(0), jnp.int32(1)))), 4)
      0.0769
    """
    check_mean_length("truncation.polynomial", mean_length)
    if _is_number("truncation.polynomial", "alpha", alpha) and not alpha > 2.0:
        raise ValueError(
            f"truncation.polynomial: `alpha` must exceed 2, not {alpha}; else no mean length exists"
        )
    return _random(lambda boundary: (alpha - 1.0) / ((alpha - 2.0) * mean_length + boundary.elapsed))


def optimal(gradient_norms: Any, mean_length: float, *, products: Any = None) -> Truncation:
    """The law of least variance at mean length L₀, for gradients that decay by lag as φ_k does.

        minimise  V = Σ_k φ_k² (Σᵢ G(i)² / G(i + k) / ΣG − 1)   over G decreasing, G(1) = 1, ΣG = L₀

    G(i) is the probability that a window reaches its i-th step, and V the variance that the cuts add to the
    gradient, a step of the stream, if the contributions of the losses at different lags are uncorrelated
    (derived in `jtrunc.backward.optimal`; not in the papers). `products` adds their correlations. Any φ
    leaves the gradient unbiased; a φ that is wrong only leaves the variance higher than it could be.
    Contributions do correlate: on trained LSTMs V is two to three times what φ alone predicts, under every
    law, and the law fitted to φ alone still has 0.3 to 0.6 of the constant law's variance at L₀ = 16
    (``benchmarks/papers/optimal_truncation.py``).

    Typically the law cuts most windows after their first step and lets the others run on for long: the
    factor that a gradient pays is then paid at the few steps before them. Choose a look-ahead with
    `survival`. Windows beyond N = max(3 (R + 1), 32) steps end at the constant rate c_N.

    Cost: up to 250 evaluations of V, O(N R) each, once; 0.03 s in float32 at R = 100 on one core, 0.1 s in
    float64. V is within 1e-4 of its minimum.

    Args:
      gradient_norms: φ_k for k = 0 … R, (R + 1,), or (samples, R + 1) of which the root mean square is
        taken; in any unit. ‖λᵀ ∂F/∂θ‖, see `jtrunc.diagnostics.gradient_norms` with ``weighted=True``, is
        what the variance of the gradient is made of; ‖λ‖ is cheaper and close to proportional.
      mean_length: L₀ > 1, steps.
      products: Q (D, R + 1) of `jtrunc.diagnostics.lag_products`, or None. It takes the place of φ_k², which
        are part of it.

    Raises:
      ValueError: norms that are not (R + 1,) or (samples, R + 1), negative, not finite or all zero, L₀ ≤ 1,
        or products of another shape or not finite.

    Example: for a memory of one lag the constant law is the best; for one of two it pays to cut after the
    first step, hardly ever after the second, and so on in turns.

      >>> [round(c, 2) for c in probabilities(optimal([1.0, 1.0], 4.0), 4).tolist()]
      [0.25, 0.25, 0.25, 0.25]
      >>> [round(c, 2) for c in probabilities(optimal([1.0, 1.0, 1.0], 4.0), 4).tolist()]
      [0.45, 0.02, 0.28, 0.17]
    """
    check_optimal_length("truncation.optimal", mean_length)
    norms = check_norms("truncation.optimal", gradient_norms)
    if products is None:
        found = uncorrelated(log_mean_square(norms))
    else:
        found = correlated(check_products("truncation.optimal", products, norms.shape[1]))
    table = optimal_probabilities(found, jnp.asarray(mean_length, norms.dtype))
    # Traced norms could not be refused: a law of nan shows in the gradient.
    return tabulated(jnp.where(jnp.all(jnp.isfinite(norms) & (norms >= 0)), table, jnp.nan))


def log_mean_square(norms: jax.Array) -> jax.Array:
    """log of the mean of φ² over samples, (R + 1,), in any unit: squares neither underflow nor overflow."""
    return jax.nn.logsumexp(2 * jnp.log(norms), axis=0) - math.log(norms.shape[0])


def tabulated(probabilities: Any) -> Truncation:
    """A cut with c = probabilities[δt − 1], δt steps after the last; the last of them ever after.

    Args:
      probabilities: (N,) in [0, 1), N ≥ 1. A traced value outside turns the gradient into nan.

    Raises:
      ValueError: not one axis, no entry, or a value outside [0, 1).

    Example: windows of at least two steps, which then end with probability 1/2.

      >>> [round(g, 3) for g in survival(tabulated([0.0, 0.5]), 4).tolist()]
      [1.0, 0.5, 0.25, 0.125]
    """
    table = jnp.asarray(probabilities, dtype=float)
    if table.ndim != 1 or table.shape[0] == 0:
        raise ValueError(
            f"truncation.tabulated: `probabilities` must have shape (N,), N ≥ 1, not {table.shape}"
        )
    if is_concrete(table) and not bool(((table >= 0) & (table < 1)).all()):
        raise ValueError(f"truncation.tabulated: `probabilities` must lie in [0, 1), not {table}")
    return _random(lambda boundary: table[jnp.minimum(boundary.elapsed, table.shape[0]) - 1])


def given(cuts: Any, probabilities: Any) -> Truncation:
    """Cuts drawn elsewhere: cuts[i] = 1 cuts between step i and step i + 1, drawn with c = probabilities[i].

    i counts the steps of `inputs`. Unbiased if and only if the cuts were drawn with those probabilities, each
    given the ones before it.

    Args:
      cuts: (T,) zeros and ones, or booleans.
      probabilities: (T,) in [0, 1).

    Raises:
      ValueError: not one axis, unequal or zero lengths, values outside [0, 1) or other than 0 and 1.
    """
    cuts, probabilities = jnp.asarray(cuts), jnp.asarray(probabilities, dtype=float)
    for name, values in (("cuts", cuts), ("probabilities", probabilities)):
        if values.ndim != 1 or values.shape[0] == 0:
            raise ValueError(
                f"truncation.given: `{name}` must have shape (T,) with T ≥ 1, not {values.shape}"
            )
    if cuts.shape != probabilities.shape:
        raise ValueError(
            f"truncation.given: `cuts` {cuts.shape} and `probabilities` {probabilities.shape} "
            "must be equally long"
        )
    if is_concrete(cuts) and not bool(((cuts == 0) | (cuts == 1)).all()):
        raise ValueError(f"truncation.given: `cuts` must be zeros and ones, not {cuts}")
    if is_concrete(probabilities) and not bool(((probabilities >= 0) & (probabilities < 1)).all()):
        raise ValueError(f"truncation.given: `probabilities` must lie in [0, 1), not {probabilities}")
    return Truncation(
        probability=lambda boundary: probabilities[boundary.index],
        cut=lambda boundary, c, uniform: cuts[boundary.index] != 0,
        random=False,
        length=cuts.shape[0],
    )


def from_probability(fn: Callable[..., Any]) -> Truncation:
    """A cut with your own probability: ``fn(elapsed) -> c`` or ``fn(elapsed, hidden) -> c``.

    `elapsed` is int32, the steps since the last cut (1 on the first step after it); `hidden` is hₜ after
    the step. c is one scalar for the whole state. A value outside [0, 1) turns the gradient into nan.

    Raises:
      TypeError: `fn` is no function of one or two arguments.
    """
    if not callable(fn):
        raise TypeError(f"truncation.from_probability: `fn` must be a function, not {fn!r}")
    parameters = inspect.signature(fn).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]  # a default is a constant, bound early
    reads_hidden = len(required) >= 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if not (positional or reads_hidden) or len(required) > 2:
        raise TypeError("truncation.from_probability: `fn` must take (elapsed) or (elapsed, hidden)")

    def probability(boundary: Boundary) -> jax.Array:
        value = fn(boundary.elapsed, boundary.hidden) if reads_hidden else fn(boundary.elapsed)
        c = jnp.asarray(value, dtype=float)
        if c.shape != ():
            raise ValueError(f"truncation.from_probability: `fn` must return a scalar, not shape {c.shape}")
        return jax.lax.stop_gradient(c)

    return _random(probability, reads_hidden)


def edge_weight(cut: jax.Array, c: jax.Array) -> jax.Array:
    """w = 0 where the boundary is cut, else 1/(1 − c)  (ARTBP paper, eq. 11)."""
    return jnp.where(cut, 0.0, 1.0 / (1.0 - jnp.asarray(c, dtype=float)))


def entering_edges(weights: jax.Array) -> jax.Array:
    """From the weight of the boundary after each step to that of the edge that enters each step."""
    return jnp.concatenate([jnp.ones(1, weights.dtype), weights[:-1]])


def _random(probability: Callable[[Boundary], jax.Array], reads_hidden: bool = False) -> Truncation:
    def guarded(boundary: Boundary) -> jax.Array:
        c = probability(boundary)
        return jnp.where((c >= 0.0) & (c < 1.0), c, jnp.nan)

    return Truncation(guarded, lambda boundary, c, uniform: uniform < c, True, reads_hidden)


def _zero(boundary: Boundary) -> jax.Array:
    return jnp.zeros((), dtype=float)


def _is_number(owner: str, name: str, value: Any) -> bool:
    """Whether a parameter can be checked now; traced scalars are taken on trust."""
    if isinstance(value, bool) or not (jnp.isscalar(value) or getattr(value, "shape", None) == ()):
        raise TypeError(f"{owner}: `{name}` must be a real number, not {value!r}")
    return is_concrete(value)


def probabilities(law: Truncation, num_steps: int) -> jax.Array:
    """c at the first `num_steps` boundaries of a window that begins just after a cut, (num_steps,).

    Raises:
      ValueError: the law reads the hidden state, so that c is not known in advance.
    """
    if law.reads_hidden:
        raise ValueError(
            "truncation.probabilities: the law reads the hidden state, so c is known only on the way"
        )
    index = jnp.arange(num_steps)
    return jax.vmap(lambda i: jnp.asarray(law.probability(Boundary(i, i + 1)), dtype=float))(index)


def survival(law: Truncation, num_steps: int) -> jax.Array:
    """G(i), the probability that a window is not cut at its first i boundaries, i = 1 … num_steps.

    G(i) = Π_{k ≤ i} (1 − cₖ). Use it to choose a look-ahead: G(N) is how often a window reaches it.

    Raises:
      ValueError: the law reads the hidden state.

    Example: how often a window of L₀ = 16, α = 6 outlasts 1,000 steps.

      >>> float(survival(polynomial(16, 6), 1000)[-1]) < 1e-6
      True
    """
    return jnp.exp(jnp.cumsum(jnp.log1p(-probabilities(law, num_steps))))


def check_mean_length(owner: str, mean_length: Any) -> None:
    """A number above 1, or a clear error; a traced one is taken on trust."""
    if _is_number(owner, "mean_length", mean_length) and not 1.0 < mean_length < float("inf"):
        raise ValueError(
            f"{owner}: `mean_length` must be finite and exceed 1, not {mean_length}; at 1 every step is cut"
        )


def check_optimal_length(owner: str, mean_length: Any) -> None:
    """A mean length that the minimisation can keep in the present precision, or a clear error."""
    check_mean_length(owner, mean_length)
    most = 1e-3 / float(jnp.finfo(jnp.result_type(float)).eps)
    if is_concrete(mean_length) and mean_length > most:
        raise ValueError(
            f"{owner}: `mean_length` {mean_length} exceeds {most:.3g}, beyond which rounding decides in "
            "this precision; enable 64 bits, or take truncation.polynomial"
        )


def check_norms(owner: str, gradient_norms: Any) -> jax.Array:
    """φ as (samples, R + 1), or a clear error."""
    norms = jnp.asarray(gradient_norms, dtype=float)
    if norms.ndim not in (1, 2) or norms.size == 0:
        raise ValueError(
            f"{owner}: `gradient_norms` must have shape (R + 1,) or (samples, R + 1), not {norms.shape}"
        )
    if is_concrete(norms) and not bool((jnp.isfinite(norms) & (norms >= 0)).all()):
        raise ValueError(f"{owner}: `gradient_norms` must be finite and not negative, not {norms}")
    if is_concrete(norms) and not bool((norms > 0).any()):
        raise ValueError(f"{owner}: `gradient_norms` are all zero, so that every law is as good")
    return norms.reshape(-1, norms.shape[-1])


def check_products(owner: str, products: Any, num_lags: int) -> jax.Array:
    """Q as (D, R + 1), or a clear error."""
    products = jnp.asarray(products, dtype=float)
    if products.ndim != 2 or products.shape[0] == 0 or products.shape[1] != num_lags:
        raise ValueError(
            f"{owner}: `products` must have shape (D, {num_lags}), one column for each of the "
            f"`gradient_norms`, not {products.shape}; measure both over the same lags"
        )
    if is_concrete(products) and not bool(jnp.isfinite(products).all()):
        raise ValueError(f"{owner}: `products` must be finite, not {products}")
    return products


def check_law(owner: str, law: Any, num_steps: int | None = None) -> Truncation:
    """A `Truncation`, given for exactly `num_steps` boundaries where it is given, or a clear error."""
    if not isinstance(law, Truncation):
        raise TypeError(
            f"{owner}: `truncation` must be a law, e.g. jtrunc.truncation.polynomial(16, 6), not {law!r}"
        )
    if num_steps is not None and law.length is not None and law.length != num_steps:
        raise ValueError(
            f"{owner}: `truncation.given` holds {law.length} boundaries, but `inputs` has {num_steps} steps; "
            "give one cut and one probability a step"
        )
    return law
