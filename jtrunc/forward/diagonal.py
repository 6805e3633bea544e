"""Exact influence of elementwise recurrences."""

from __future__ import annotations

import jax

from jtrunc.base import GradientEstimator, PyTree, System
from jtrunc.checks import check_system
from jtrunc.forward.influence import forward_estimator
from jtrunc.forward.local import direct_propagator, local_representation
from jtrunc.forward.structured import Units


def diagonal_rtrl(system: System) -> GradientEstimator:
    """Real-time recurrent learning of an elementwise recurrence: exact, and n-fold cheaper than dense.

        hₜ,ᵢ = combineᵢ(e, hₜ₋₁,ᵢ, xₜ, p(xₜ)),   Jᵢ ← Eᵢ Jᵢ + Iᵢ,   gₜ = ∂ℓₜ/∂θ + ∂ℓₜ/∂hₜ · J

    Where each unit reads its own past alone (linear recurrent units, leaky integrators), D is diagonal by
    units, and a parameter only ever moves its own unit. Unbiased: the very gradient of `rtrl`. Memory s |θ|
    and cost s² |θ| a step for s real numbers of state a unit (2 for a complex one).

    Args:
      system: with a `Structure` none of whose maps reads the hidden state, on one stream.

    Returns:
      A `GradientEstimator`; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system; at trace time, no such structure, bad params or inputs.

    Example: the state is complex, so that two numbers a unit remember each parameter.

      >>> from jtrunc import cells
      >>> net = cells.model(cells.linear_recurrent(2, 3), 2, cells.softmax_cross_entropy)
      >>> estimator = diagonal_rtrl(net.system)
      >>> state = estimator.init(net.init(jax.random.key(0)), net.initial_hidden())
      >>> {name: rows.shape for name, rows in state.influence.maps.items()}
      {'imaginary': (2, 2, 3), 'real': (2, 2, 3)}

    Source: Mozer (1989), Gori, Bengio & De Mori (1989); for linear recurrent units Zucchet et al. (2023).
    """
    check_system("diagonal_rtrl", system)

    def check(units: Units, theta: PyTree) -> None:
        affine = jax.eval_shape(units.structure.affine, theta)
        reading = [name for name, weights in affine.items() if weights.hidden_kernel is not None]
        if reading:
            raise ValueError(
                f"diagonal_rtrl: map {reading[0]!r} of `system.structure` reads the hidden state, so that "
                "units influence each other and the result would be biased; take `rtrl`, or `snap`"
            )

    representation = local_representation("diagonal_rtrl", system, direct_propagator, check=check)
    return forward_estimator("diagonal_rtrl", system, representation)
