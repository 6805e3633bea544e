"""The protocol: a system is a transition and a loss; an estimator is a pair (init, update)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any
"""Any nesting of tuples, dicts, NamedTuples and registered classes whose leaves are arrays."""

Transition = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``(theta, hidden, inputs) -> hidden``."""

Loss = Callable[["Params", PyTree, PyTree], tuple[jax.Array, PyTree]]
"""``(params, hidden, inputs) -> (scalar, aux)``."""


class Params(NamedTuple):
    """The parameters of a system, in two groups.

    Attributes:
      recurrent: θ, the parameters that the transition reads; gradients reach them through time.
      readout: the parameters that only the loss reads. Their gradient is never truncated nor
        reweighted (errata 4): it is the plain sum of the immediate terms.
    """

    recurrent: PyTree
    readout: PyTree = ()


class System(NamedTuple):
    """A recurrent dynamical system: two pure functions, and what is known of their structure.

    Attributes:
      transition: ``(theta, hidden, inputs) -> hidden``, hₜ = F(xₜ, hₜ₋₁, θ). Any pytrees; the hidden
        state that comes out has the structure, shapes and dtypes of the one that goes in. Integer and
        key leaves are carried along; no gradient flows through them.
      loss: ``(params, hidden, inputs) -> (scalar, aux)``, ℓₜ of the *new* hₜ, in nats where it is a log
        likelihood. `inputs` carries xₜ and the target. It sees all of `Params`, so tied weights work.
        `aux` is any pytree of arrays; ``()`` will do.
      structure: a `jtrunc.structure.Structure` (or `Stack`) that `transition` was derived from, or
        None. It lets the engines run faster and changes no result beyond rounding. They read the
        structure instead of `transition`, so replace both together, or set ``structure=None``.

    Example: a leaky integrator that is asked to follow its input.

      >>> import jax.numpy as jnp, jtrunc
      >>> system = jtrunc.System(
      ...     transition=lambda theta, hidden, inputs: theta * hidden + inputs,
      ...     loss=lambda params, hidden, inputs: (0.5 * (hidden - inputs) ** 2, ()),
      ... )
      >>> params, inputs = jtrunc.Params(recurrent=jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> hidden, (losses, _) = jtrunc.unroll(system, params, jnp.float32(0.0), inputs)
      >>> [float(loss) for loss in losses]
      [0.0, 0.125, 0.28125]
    """

    transition: Transition
    loss: Loss
    structure: Any = None


NO_DIAGNOSTICS: dict[str, jax.Array] = {}


class Aux(NamedTuple):
    """What an estimate carries beside loss and gradient.

    Attributes:
      loss: the `aux` of the system's loss, stacked over the scored steps (rows beyond a window whose
        length is data are zero).
      diagnostics: named scalars of the estimator, e.g. ``{"look_ahead_hits": 0}``; empty for most.
    """

    loss: PyTree = ()
    diagnostics: dict[str, jax.Array] = NO_DIAGNOSTICS


class Estimate(NamedTuple):
    """One estimate of a gradient.

    Attributes:
      loss: scalar, the sum of ℓₜ over the scored steps (nats), float32 or wider.
      grads: the (estimate of the) gradient of that sum, in the structure and dtypes of `params`:
        straight into `tx.update`.
      num_steps: int32, how many steps of `inputs` were consumed.
      aux: `Aux`.
    """

    loss: jax.Array
    grads: Params
    num_steps: jax.Array
    aux: Aux = Aux()


class Init(Protocol):
    """``init(params, hidden, key=None) -> state``; the state is a NamedTuple with a field `hidden`."""

    def __call__(self, params: Params, hidden: PyTree, key: jax.Array | None = None) -> Any: ...


class Update(Protocol):
    """``update(params, state, inputs) -> (Estimate, state)``; leading axis of `inputs` = time."""

    def __call__(self, params: Params, state: Any, inputs: PyTree) -> tuple[Estimate, Any]: ...


class GradientEstimator(NamedTuple):
    """A gradient estimator: two pure functions, as in optax.

    Attributes:
      init: ``init(params, hidden, key=None) -> state``. Everything that must survive from update to
        update is in the state: hidden, key, phase, position of the last cut.
      update: ``update(params, state, inputs) -> (Estimate, state)``. One step at a time is online
        learning; a whole sequence is offline.
    """

    init: Init
    update: Update
