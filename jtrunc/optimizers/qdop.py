"""The quasi-diagonal outer-product approximation (QDOP) of a Kalman filter on the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtrunc.base import Params, PyTree
from jtrunc.optimizers import quasi_diagonal
from jtrunc.optimizers.layout import BiasOf, Layout
from jtrunc.optimizers.quasi_diagonal import Factors, QuasiDiagonal
from jtrunc.trees import is_concrete

Decay = float | jax.Array | Callable[[jax.Array], Any]
"""γ in [0, 1), or a schedule ``t -> γₜ``, t = 1, 2, …"""


class QdopState(NamedTuple):
    """State of `scale_by_qdop`.

    Attributes:
      count: int32, the t of the last update, 0 before the first.
      factors: J, in factors that stay positive (`quasi_diagonal.Factors`), over a tree like the parameters.
      prior: Λ, a tree like the parameters of scalars, or of arrays in their shapes.
    """

    count: jax.Array
    factors: Factors
    prior: PyTree


def inverse_square_root_decay(scale: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """The schedule γₜ = min(1, c/√t), t = 1, 2, …: the paper's choice with c = 1.

    With c = 1, γ₁ = 1 only drops J₀ = 0. J then weighs the last √t or so gradients.

    Args:
      scale: c ≥ 0.

    Example:

      >>> decay = inverse_square_root_decay()
      >>> [round(float(decay(t)), 4) for t in (1, 2, 100)]
      [1.0, 0.7071, 0.1]
    """

    def decay(timestep: jax.Array) -> jax.Array:
        steps = jnp.maximum(jnp.asarray(timestep, jnp.result_type(float)), 1)
        return jnp.minimum(1, scale / jnp.sqrt(steps))

    return decay


def qdop(
    prior: float | PyTree = 1.0,
    *,
    decay: Decay | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    bias_of: BiasOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Kalman-like descent with a quasi-diagonal outer-product matrix, for any gradient estimate g.

        J ← (1 − γₜ) J + MatrixReduce(g gᵀ),    θ ← θ − η (J + Λ)⁻¹ g,    J₀ = 0

    The step size is adapted by J: η = 1 in the paper, and 1/√t steps come from γₜ = 1/√t. `params.recurrent`
    and `params.readout` are treated alike. MatrixReduce keeps, for each unit, the diagonal and the products
    of the bias's gradient with those of the unit's weights (`jtrunc.optimizers.quasi_diagonal`). With Λ = 0
    the trajectory of the function that is learned does not depend on the scale and offset of each input; Λ
    is a Gaussian prior, and without it the first steps are large.

    Unbiased gradients give a step that is biased by as much as J moves with g: J contains g itself, as in
    the paper. Cost: four numbers a parameter and a few elementwise operations; state: two numbers a
    parameter, float32 or wider.

    Args:
      prior: Λ ≥ 0, a number, or a tree-prefix of the parameters, e.g. ``Params(20.0, 1.0)``, of numbers or of
        arrays in the parameters' shapes. The paper takes the number of units, dim h.
      decay: γ in [0, 1), or a schedule ``t -> γₜ``; default `inverse_square_root_decay()`.
      learning_rate: η, a number or a schedule of the count of updates.
      bias_of: ``path of a leaf -> path of the bias of its units, or None``, for parameters with names of
        your own; default: by the names "bias", "kernel", "X_kernel" (`layout.sibling_bias`). Leaves without a
        bias are treated diagonally.

    Returns:
      An optimiser that subtracts. t is the extra argument `timestep`, where it is passed (as
      `jtrunc.training` does: the last timestep of the window), else the count of updates. Complex gradients
      are taken as they come and not conjugated, as everywhere in optax.

    Raises:
      TypeError, ValueError: an argument out of range; at `init`, parameters that do not fit `bias_of` or
        `prior`; at `update`, gradients unlike the parameters.

    Example: one unit, whose bias and weight have the gradient (1, 2): (g gᵀ + 4·1)⁻¹ g = (1, 2)/9.

      >>> params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
      >>> tx = qdop(prior=4.0)
      >>> grads = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])}
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> round(9 * updates["bias"].item(), 5), round(9 * updates["kernel"].item(), 5)
      (-1.0, -2.0)

    Source: Ollivier, Tallec & Charpiat (2015), Algorithm 2, eq. 24–27 (errata 19: δθ = (Hv̄)w̄ + Σ Hᵢwᵢ).
    """
    if not callable(learning_rate):
        _check_number("qdop", "learning_rate", learning_rate)
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_qdop(prior, decay=decay, bias_of=bias_of), optax.scale_by_learning_rate(learning_rate)
        )
    )


def scale_by_qdop(
    prior: float | PyTree = 1.0, *, decay: Decay | None = None, bias_of: BiasOf | None = None
) -> optax.GradientTransformationExtraArgs:
    """(J + Λ)⁻¹ g, the part of `qdop` before the sign and the learning rate; arguments as there.

    Example: with a step size that falls with the timestep of the data,
    ``optax.chain(scale_by_qdop(20.0), scale_by_timestep_schedule(schedule), optax.scale(-1.0))``.
    """
    schedule = _schedule(decay)
    for leaf in jax.tree.leaves(prior):
        _check_number("qdop", "prior", leaf, scalar=False, low=0.0)

    def init(params: optax.Params) -> Any:
        factors = quasi_diagonal.zeros(params, bias_of)
        return QdopState(jnp.int32(0), factors, _full_prior(prior, factors.pivots))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        timestep: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        t = jnp.asarray(optax.safe_increment(state.count) if timestep is None else timestep, jnp.int32)
        factors = quasi_diagonal.accumulate(state.factors, updates, jnp.asarray(schedule(t)))
        # The prior anew: under inject_hyperparams or a vmap over priors it is data.
        state = QdopState(t, factors, _full_prior(prior, factors.pivots))
        solved = quasi_diagonal.solve(_metric(state), updates)
        return jax.tree.map(lambda step, leaf: step.astype(leaf.dtype), solved, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def metric_of(opt_state: optax.OptState) -> QuasiDiagonal:
    """(J + Λ)⁻¹ of the `QdopState` inside an optimiser's state, however it is nested.

    Args:
      opt_state: the state of `qdop`, or of a chain, mask, partition, … that contains one.

    Returns:
      A `QuasiDiagonal` over the tree that was optimised: for `Params`, ``metric.scales.recurrent`` is its
      part for θ.

    Raises:
      ValueError: none or several in it.

    Example:

      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), qdop(prior=4.0))
      >>> metric_of(tx.init({"bias": jnp.zeros(2)})).scales["bias"].tolist()
      [0.25, 0.25]
    """
    states = _qdop_states(opt_state)
    if len(states) != 1:
        raise ValueError(
            f"metric_of: `opt_state` contains {len(states)} states of qdop; it must be the state of an "
            "optimiser with exactly one jtrunc.optimizers.qdop in it"
        )
    return _metric(states[0])


def feed_metric(estimator_state: Any, opt_state: optax.OptState) -> Any:
    """Give an estimator that scales by the Kalman metric the optimiser's present (J + Λ)⁻¹ for θ.

    Call it once on the initial states and then after every update of the optimiser; an estimator without a
    metric is not touched. The types of the state stay as they are, so that it can be carried in a loop
    (after the first call, if `bias_of` is not the default).

    Args:
      estimator_state: any estimator's state; it wants a metric if its field `metric` is a `QuasiDiagonal`
        over ``params.recurrent``, possibly with leading axes (`per_stream`).
      opt_state: any optimiser's state, where it does; it was initialised with `Params`.

    Returns:
      The state with its new `metric`, or the very same state.

    Raises:
      ValueError: a metric is wanted and `opt_state` has no `qdop` over the same ``params.recurrent``, or
        several; or a recurrent weight's bias is in the readout.
    """
    wanted = getattr(estimator_state, "metric", None)
    if wanted is None:
        return estimator_state
    found = [
        metric
        for metric in map(_metric, _qdop_states(opt_state))
        if isinstance(metric.scales, Params)
        and jax.tree.structure(metric.scales.recurrent) == jax.tree.structure(wanted.scales)
    ]
    if len(found) != 1:
        raise ValueError(
            f"feed_metric: the estimator's state wants a metric, and `opt_state` contains {len(found)} "
            "states of qdop over the same `params.recurrent`; use one jtrunc.optimizers.qdop for all of it, "
            "initialised with jtrunc.Params, or an estimator with norms='euclidean'"
        )
    return estimator_state._replace(metric=_for_state(_recurrent(found[0]), wanted))


def _qdop_states(opt_state: Any) -> list[QdopState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, QdopState))
    return [node for node in nodes if isinstance(node, QdopState)]


def _metric(state: QdopState) -> QuasiDiagonal:
    return quasi_diagonal.inverse(state.factors, state.prior)


def _recurrent(metric: QuasiDiagonal) -> QuasiDiagonal:
    """The part of a metric over `Params` that is for θ, whose leaves come first."""
    slopes, scales = metric.slopes.recurrent, metric.scales.recurrent
    biases = metric.layout.biases[: len(jax.tree.leaves(scales))]
    if any(bias is not None and bias >= len(biases) for bias in biases):
        raise ValueError(
            "feed_metric: `bias_of` takes the bias of a recurrent weight from the readout; both must be in "
            "`params.recurrent`"
        )
    return QuasiDiagonal(slopes, scales, Layout(biases))


def _for_state(metric: QuasiDiagonal, wanted: QuasiDiagonal) -> QuasiDiagonal:
    """The metric in the dtypes of the one it replaces, repeated over the axes that this has in front."""

    def fit(leaf: jax.Array, scale: jax.Array, old_scale: jax.Array) -> jax.Array:
        front = old_scale.shape[: old_scale.ndim - scale.ndim]
        if (*front, *scale.shape) != old_scale.shape:
            raise ValueError(
                f"feed_metric: a parameter of shape {scale.shape} meets a metric of shape {old_scale.shape}; "
                "estimator and optimiser must be initialised with the same parameters"
            )
        dtype = jnp.promote_types(old_scale.dtype, "complex64") if jnp.iscomplexobj(leaf) else old_scale.dtype
        return jnp.broadcast_to(leaf, (*front, *leaf.shape)).astype(dtype)

    return QuasiDiagonal(
        jax.tree.map(fit, metric.slopes, metric.scales, wanted.scales),
        jax.tree.map(fit, metric.scales, metric.scales, wanted.scales),
        metric.layout,
    )


def _schedule(decay: Decay | None) -> Callable[[jax.Array], Any]:
    if decay is None:
        return inverse_square_root_decay()
    if callable(decay):
        return decay
    _check_number("qdop", "decay", decay, low=0.0, below=1.0)
    return lambda timestep: decay


def _full_prior(prior: PyTree, pivots: PyTree) -> PyTree:
    """Λ with one leaf for each parameter, real and as wide as its pivots."""
    try:
        full = jax.tree.broadcast(prior, pivots)
    except ValueError as error:
        raise ValueError(
            f"qdop: `prior` has structure {jax.tree.structure(prior)}, which is no prefix of that of the "
            f"parameters, {jax.tree.structure(pivots)}; pass a number, or e.g. Params(20.0, 1.0)"
        ) from error

    def fit(diagonal: Any, pivot: jax.Array) -> jax.Array:
        if np.shape(diagonal) not in ((), pivot.shape):
            raise ValueError(
                f"qdop: `prior` has a leaf of shape {np.shape(diagonal)} for a parameter of shape "
                f"{pivot.shape}; pass a number or an array of that shape"
            )
        return jnp.asarray(diagonal, pivot.dtype)

    return jax.tree.map(fit, full, pivots)


def _check_number(
    owner: str, name: str, value: Any, *, scalar: bool = True, low: float = -np.inf, below: float = np.inf
) -> None:
    """A real number (or array of them) in [low, below), as far as it is known at trace time."""
    is_number = isinstance(value, (int, float, np.ndarray, np.generic, jax.Array))
    if not is_number or isinstance(value, bool) or jnp.iscomplexobj(value):
        raise TypeError(f"{owner}: `{name}` must be a real number, not {value!r} ({type(value).__name__})")
    if scalar and np.shape(value) != ():
        raise ValueError(
            f"{owner}: `{name}` must be one number, not an array of shape {np.shape(value)}; "
            "use jax.vmap for many"
        )
    if is_concrete(value) and not np.all((np.asarray(value) >= low) & (np.asarray(value) < below)):
        raise ValueError(f"{owner}: `{name}` must lie in [{low}, {below}), not {value}")
