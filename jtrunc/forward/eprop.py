"""Eligibility propagation, and random feedback local online learning."""

from __future__ import annotations

from jtrunc.base import GradientEstimator, PyTree, System
from jtrunc.checks import check_system
from jtrunc.forward.influence import forward_estimator
from jtrunc.forward.local import Signal, direct_propagator, local_representation
from jtrunc.forward.structured import Units


def eprop(system: System, *, learning_signal: Signal | None = None) -> GradientEstimator:
    """Eligibility propagation: each unit remembers what its own parameters did to its own state.

        Jₜ = E Jₜ₋₁ + Iₜ,   E = ∂combine/∂hₜ₋₁ at fixed preactivations,   gₜ = ∂ℓₜ/∂θ + Lₜ Jₜ

    Biased: whatever reaches the loss through another unit, or through a unit's own recurrent weight, at a
    later step is dropped. Unbiased where no map reads the hidden state (elementwise recurrences). Memory
    s · |θ| and cost O(s² |θ|) for s numbers of state a unit, independent of time.

    Args:
      system: with a `Structure` (one layer), on one stream.
      learning_signal: ``(params, hidden, inputs) -> L``, a cotangent of the new hidden state; default: the
        exact ∂ℓₜ/∂hₜ (symmetric e-prop). Random feedback goes here.

    Returns:
      A `GradientEstimator`; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system or learning signal; at trace time, a system without a `Structure`
        on one row of state, bad params or inputs.

    Example: a leaky integrator is an elementwise recurrence only in its leak.

      >>> import jax, jax.numpy as jnp
      >>> from jtrunc import cells
      >>> net = cells.model(cells.leaky(2, 3, rate=0.5), 2, cells.softmax_cross_entropy)
      >>> estimator = eprop(net.system)
      >>> params = net.init(jax.random.key(0))
      >>> state = estimator.init(params, net.initial_hidden())
      >>> state.influence.maps["units"].shape
      (1, 6, 3)

    Source: Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons"
    (2020), e-prop 1.
    """
    check_system("eprop", system)
    _check_signal("eprop", learning_signal)
    representation = local_representation("eprop", system, direct_propagator, learning_signal=learning_signal)
    return forward_estimator("eprop", system, representation)


def rflo(system: System, *, learning_signal: Signal | None = None) -> GradientEstimator:
    """Random feedback local online learning: e-prop's memory for networks with one number of state a unit.

        Pₜ = (1 − a) Pₜ₋₁ + Iₜ,   gₜ = ∂ℓₜ/∂θ + Lₜ Pₜ

    for leaky units hₜ = (1 − a) hₜ₋₁ + a φ(p). Biased as `eprop`, and further by the random feedback that
    replaces ∂ℓₜ/∂hₜ; with the default signal only the recurrent paths are dropped. Memory and cost O(|θ|).

    Args:
      system: with a `Structure` of one real number a unit, on one stream.
      learning_signal: ``(params, hidden, inputs) -> L``, a cotangent of the new hidden state, e.g. the
        output error times a fixed random matrix; default: the exact ∂ℓₜ/∂hₜ.

    Raises:
      TypeError, ValueError: as `eprop`; a unit with more than one number of state.

    Source: Murray, "Local online learning in recurrent networks with random feedback" (2019), eq. 5 and 6.
    """
    check_system("rflo", system)
    _check_signal("rflo", learning_signal)

    def check(units: Units, theta: PyTree) -> None:
        if units.parts != 1:
            raise ValueError(
                f"rflo: `system` has {units.parts} numbers of state a unit, but it is a rule for leaky units "
                "with one; take `eprop`"
            )

    representation = local_representation(
        "rflo", system, direct_propagator, learning_signal=learning_signal, check=check
    )
    return forward_estimator("rflo", system, representation)


def _check_signal(owner: str, learning_signal: Signal | None) -> None:
    if learning_signal is not None and not callable(learning_signal):
        raise TypeError(
            f"{owner}: `learning_signal` must be a function (params, hidden, inputs) -> cotangent of hidden, "
            f"not {type(learning_signal).__name__}"
        )
