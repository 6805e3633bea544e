"""Adaptive truncation: the length of BPTT(2K, K) follows from a tolerated bias, while training."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.parts import window_parts
from jtrunc.backward.window import Boundaries, dynamic_window
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_size, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.diagnostics.gradient_norms import log_gradient_norms
from jtrunc.diagnostics.truncation_bias import LengthEstimate, estimate_length
from jtrunc.trees import num_time_steps, split_at, strongly_typed


class AdaptiveBpttState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h where the next window begins.
      look_back: int32, how many steps behind `hidden` were scored already: K + 1 once a window was full.
      chosen: the present K, and what the last estimate said of it (`LengthEstimate`).
      countdown: int32, updates or steps until the next estimate.
    """

    hidden: PyTree
    look_back: jax.Array
    chosen: LengthEstimate
    countdown: jax.Array


class _Options(NamedTuple):
    """The checked options of `adaptive_bptt`: how often K is estimated, from what, and how."""

    estimate_every: int
    unit: str
    num_lags: int
    num_times: int
    initial_length: int | None
    max_length: int
    average: bool
    measure: dict[str, Any]
    fit: dict[str, Any]


def adaptive_bptt(
    system: System,
    tolerance: Any,
    *,
    num_lags: int = 100,
    min_length: int = 1,
    max_length: int = 100,
    initial_length: int | None = None,
    estimate_every: int = 1000,
    unit: Literal["updates", "steps"] = "updates",
    fit_from: int | None = None,
    method: Literal["least_squares", "maximum", "quantile"] = "least_squares",
    quantile: float = 0.9,
    over: Literal["prefix", "window"] = "prefix",
    num_times: int = 1,
    streams: bool = False,
    weighted: bool = False,
    average: bool = True,
) -> GradientEstimator:
    """BPTT(2K, K) with the smallest K whose estimated relative bias is below a tolerance δ.

        φₖ = ‖∂ℓₛ/∂hₛ₋ₖ‖,   Ê(K) = Σ_{k>K} φₖ, by β̂ beyond the window,   Ĝ(k) = Σ_{j≤k} φⱼ
        K = min {K : Ê(K) / max_{k≤K} (Ĝ(k) − Ê(k)) < δ}

    Algorithm 1 of the adaptive truncation paper (Aicher, Foti & Fox 2019), eq. 18 to 25 with errata 8 to 12.
    K is data: it is estimated anew every `estimate_every` updates (or steps of the stream: an epoch is
    ``estimate_every=len(data), unit="steps"``) inside the compiled program, which is compiled once for all K.
    Where the norms do not decay (β̂ ≥ 1), are all zero, or no K satisfies δ, K is `max_length` and `unbounded`
    is 1. A reset within the window ends the memory there, as it ends the gradient's. `per_stream` runs every
    estimate at every update and selects: for B streams put the batch axis inside the system, and `streams`.

    Biased, by less than δ of the gradient as far as the estimate goes: Ĝ stands for the gradient's norm and
    is an upper stand-in, so δ is a target and no guarantee (errata 11). `jtrunc.diagnostics` has the pieces.

    Each update reads a look-ahead of N ≥ max(2 max_length + 1, num_lags + num_times) steps from
    ``state.hidden`` on, scores the K losses that follow the last one scored, pulls them back through the
    2K + 1 states of the window, and consumes ``num_steps`` steps, K when K rests: windows overlap. At the
    start of a stream and where K grows a window scores up to 2K + 1 losses, so that each is scored once.
    Gradients are divided by the number of scored losses (eq. 15), `loss` is their sum. A longer window is a
    better estimate: `optimizers.scale_by_truncation_length` takes the step √K times as long (section 4.1).

    Memory: states of N steps and residuals of 128; time O(2K) an update, and O(R) for an estimate.

    Args:
      tolerance: δ > 0, the tolerated relative bias; 0.1 to 0.9 in the paper.
      num_lags: R, how far back norms are measured, steps; more than the memory that is to be learned.
      min_length, max_length: the range of K, steps.
      initial_length: K₀ until the first estimate, after `estimate_every`; None estimates at once.
      estimate_every: how long K rests, in `unit`.
      fit_from: τ, the lag from which on the decay is fitted; None: 0.9 R.
      method, quantile: how β̂ is fitted, see `diagnostics.log_decay_rate`.
      over: the maximum over k ≤ K (the paper's) or over the whole window (closer where δ is large), see
        `diagnostics.relative_bias`.
      num_times: losses that an estimate follows back, spread over the look-ahead; for a single stream, or a
        loss that is zero at most steps, take more than one, and a longer look-ahead.
      streams: whether the leading axis of `hidden` is a batch of streams, each a sample of its own.
      weighted: norms weighted by ∂F/∂θ, see `diagnostics.log_gradient_norms`.
      average: False leaves the sum of the gradients.

    Returns:
      A `GradientEstimator`. Diagnostics: `truncation_length` (K); `relative_bias` (Δ̂, inf where there is no
      bound) and `decay_rate` (β̂), both nan before the first estimate; `unbounded`; `num_scored`; and
      `estimation_steps`, the steps of the stream that an estimate has read in this update (0 in most).

    Raises:
      TypeError, ValueError: δ ≤ 0, sizes that are no positive integers or out of order, an unknown method, a
        look-ahead that is too short, or bad system, params or inputs.

    Example: hₜ = ½ hₜ₋₁ + xₜ forgets half at every step; a tenth of bias takes K = 3 or more.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(21, jnp.float32)
      >>> estimator = adaptive_bptt(system, tolerance=0.1, num_lags=20, max_length=10)
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> int(state.chosen.length), int(estimate.num_steps), int(estimate.aux.diagnostics["num_scored"])
      (3, 3, 7)
      >>> estimate, state = estimator.update(params, state, inputs)
      >>> int(estimate.num_steps), int(estimate.aux.diagnostics["num_scored"])
      (3, 3)
    """
    check_system("adaptive_bptt", system)
    fit = {"tolerance": tolerance, "min_length": min_length, "max_length": max_length, "method": method,
           "quantile": quantile, "over": over}  # fmt: skip
    options = _Options(
        estimate_every, unit, num_lags, num_times, initial_length, max_length, average,
        measure={"num_times": num_times, "streams": streams, "weighted": weighted},
        fit=fit | {"fit_from": int(0.9 * num_lags) if fit_from is None else fit_from},
    )  # fmt: skip
    _check(options)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> AdaptiveBpttState:
        check_params(params)
        check_key("adaptive_bptt", key, random=False)
        return _first_state(options, hidden)

    def update(
        params: Params, state: AdaptiveBpttState, inputs: PyTree
    ) -> tuple[Estimate, AdaptiveBpttState]:
        return _update(system, options, params, state, inputs)

    return GradientEstimator(init, update)


def _check(options: _Options) -> None:
    """A wrong option is an error where the estimator is made, not at its first update."""
    sizes = {
        "num_lags": options.num_lags,
        "min_length": options.fit["min_length"],
        "max_length": options.max_length,
        "estimate_every": options.estimate_every,
        "num_times": options.num_times,
    }
    for name, value in sizes.items():
        check_size("adaptive_bptt", name, value)
    if options.unit not in ("updates", "steps"):
        raise ValueError(f'adaptive_bptt: `unit` must be "updates" or "steps", not {options.unit!r}')
    first, least, most = options.initial_length, options.fit["min_length"], options.max_length
    if first is not None and not least <= check_size("adaptive_bptt", "initial_length", first) <= most:
        raise ValueError(
            f"adaptive_bptt: `initial_length` {first} lies outside `min_length` {least} … `max_length` {most}"
        )
    estimate_length(jnp.zeros((1, options.num_lags + 1)), **options.fit)


def _first_state(options: _Options, hidden: PyTree) -> AdaptiveBpttState:
    unknown = LengthEstimate(
        length=jnp.int32(options.initial_length or options.max_length),
        bounded=jnp.asarray(True),
        decay_rate=jnp.full((), jnp.nan, float),
        relative_bias=jnp.full((), jnp.nan, float),
    )
    countdown = jnp.int32(0 if options.initial_length is None else options.estimate_every)
    return AdaptiveBpttState(strongly_typed(hidden), jnp.int32(0), unknown, countdown)


def _update(
    system: System, options: _Options, params: Params, state: AdaptiveBpttState, inputs: PyTree
) -> tuple[Estimate, AdaptiveBpttState]:
    look_ahead = check_step(system, params, state.hidden, inputs)
    needed = max(2 * options.max_length + 1, options.num_lags + options.num_times)
    if look_ahead < needed:
        raise ValueError(
            f"adaptive_bptt: `inputs` has {look_ahead} steps; an update reads a look-ahead of "
            f"max(2 max_length + 1, num_lags + num_times) = {needed}, whatever K is"
        )
    anchored = anchor(params, state, inputs)
    params, pull_vary = jax.vjp(lambda params: vary(params, anchored), params)
    state, inputs = vary((state, inputs), anchored)
    chosen, estimation_steps = _choose(system, options, params, state, inputs)
    boundaries = _window_of(chosen.length, state.look_back, look_ahead)
    parts = window_parts(system, params, state.hidden, inputs)
    window = dynamic_window(parts, state.hidden, inputs, vary(boundaries, anchored))
    num_scored, grads = boundaries.stop - state.look_back, window.grads
    if options.average:  # before devices are summed, which may each have a K of their own
        grads = jax.tree.map(lambda grad: grad / num_scored.astype(grad.real.dtype), grads)
    (grads,) = pull_vary(grads)
    diagnostics = {
        "truncation_length": chosen.length,
        "relative_bias": chosen.relative_bias,
        "decay_rate": chosen.decay_rate,
        "unbounded": (~chosen.bounded).astype(jnp.int32),
        "num_scored": num_scored,
        "estimation_steps": estimation_steps,
    }
    num_steps: jax.Array = boundaries.mark  # pyright: ignore[reportAssignmentType]
    refill = jnp.where(estimation_steps > 0, options.estimate_every, 0)
    new_state = AdaptiveBpttState(
        hidden=window.hidden,
        look_back=boundaries.stop - num_steps,
        chosen=chosen,
        countdown=state.countdown + refill - (num_steps if options.unit == "steps" else 1),
    )
    return Estimate(window.loss, grads, num_steps, Aux(window.aux, diagnostics)), new_state


def _window_of(length: jax.Array, look_back: jax.Array, look_ahead: int) -> Boundaries:
    """BPTT(2K, K) after `look_back` steps that are scored: where it begins, scores, ends and goes on."""
    num_states = 2 * length + 1
    stop = jnp.maximum(look_back + length, num_states)
    # Where K has shrunk the window begins behind `hidden`: no gradient reaches the steps before it.
    reaches_back = jnp.arange(look_ahead) != stop - num_states
    mark = stop - (length + 1)
    return Boundaries((), stop, reaches_back, first_scored=look_back, mark=mark)


def _choose(
    system: System, options: _Options, params: Params, state: AdaptiveBpttState, inputs: PyTree
) -> tuple[LengthEstimate, jax.Array]:
    """K for this update, from a new estimate when one is due, and the steps that it has read."""
    # One loss needs no more than its own look-back; several are spread over all of the look-ahead.
    num_steps = options.num_lags + 1 if options.num_times == 1 else num_time_steps(inputs)
    like = state.chosen

    def estimate() -> tuple[LengthEstimate, jax.Array]:
        window, _ = split_at(inputs, num_steps)
        norms = log_gradient_norms(system, params, state.hidden, window, options.num_lags, **options.measure)
        found = estimate_length(norms, **options.fit)
        found = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), found, like)
        return found, jnp.int32(num_steps)

    anchored = anchor(params, state, inputs)
    return jax.lax.cond(
        state.countdown <= 0,
        lambda: vary(estimate(), anchored),
        lambda: vary((like, jnp.int32(0)), anchored),
    )
