"""Systems from systems, estimators from estimators: resets, Euler steps of a rate, batches of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jtrunc.base import Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_positive, check_same_state, check_system
from jtrunc.structure import Stack, Structure, Wrapper, transition_of, wrap_structure, wrap_transition
from jtrunc.trees import is_concrete, partition_inexact, strongly_typed


def with_resets(system: System, initial_hidden: PyTree) -> System:
    """The system on inputs ``(reset, x)``: a reset starts a new sequence before its step.

        h̃ₜ₋₁ = initial_hidden where resetₜ else hₜ₋₁,   hₜ = F(xₜ, h̃ₜ₋₁, θ)

    A reset cuts state, gradient and influence alike: ∂hₜ/∂hₜ₋₁ is exactly 0 there, for every leaf and every
    layer of a stack. The loss sees x. Integer and key leaves start anew too: noise drawn from a key in the
    state is the same after every reset.

    Args:
      initial_hidden: a constant state like `hidden` (no gradient flows into it).

    Returns:
      A `System` whose `inputs` are pairs: `reset`, a boolean per step () or per stream (B,), which is
      matched with the leading axes of every leaf of the state, and the former inputs.

    Raises:
      TypeError, ValueError: no `System`; at trace time, a state unlike `initial_hidden`.

    Example: a counter that starts anew at its third step.

      >>> system = System(lambda theta, h, x: h + x, lambda params, h, x: (h, ()))
      >>> counter = with_resets(system, jnp.float32(0))
      >>> inputs = (jnp.array([False, False, True]), jnp.ones(3, jnp.float32))
      >>> from jtrunc import unroll
      >>> unroll(counter, Params(()), jnp.float32(0), inputs)[1][0].tolist()
      [1.0, 2.0, 1.0]
    """
    check_system("with_resets", system)
    initial_hidden = jax.lax.stop_gradient(strongly_typed(initial_hidden))

    def starting_at(initial: PyTree) -> Wrapper:
        def before(reset: jax.Array, hidden: PyTree) -> PyTree:
            check_same_state("with_resets: `initial_hidden`, against `hidden`,", hidden, initial)
            return jax.tree.map(lambda new, old: _where_rows(reset, new, old), initial, hidden)

        return Wrapper(before=before)

    def starting_layer(depth: int | None) -> Wrapper:
        return starting_at(initial_hidden if depth is None else initial_hidden[depth])

    return System(
        transition=wrap_transition(system.transition, starting_at(initial_hidden)),
        loss=lambda params, hidden, inputs: system.loss(params, hidden, inputs[1]),
        structure=wrap_structure(system.structure, starting_layer),
    )


def _where_rows(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    condition = jnp.asarray(condition, dtype=bool)
    condition = jnp.expand_dims(condition, tuple(range(condition.ndim, on_false.ndim)))
    return jnp.where(condition, on_true, on_false)


def continuous_time(system: System, time_step: float) -> System:
    """Euler steps of a rate: from dh/dt = F(x, h, θ) to hₜ₊δₜ = hₜ + δt · F(xₜ, hₜ, θ).

    Eq. 47 of the NoBackTrack paper (Ollivier, Tallec & Charpiat 2015): f = Id + δt·F. The error of the state
    at a fixed time is O(δt). The loss is still a sum over steps; for an integral over time, put δt into it.

    Integer and key leaves have no rate: for them F returns the new value. The layers of a stack step one
    after the other, each reading the new state of the one below, as in eq. 39–42. Resets go around this:
    ``with_resets(continuous_time(system, time_step), initial_hidden)``.

    Args:
      system: its transition returns dh/dt in the structure of `hidden`; its loss reads the new state.
      time_step: δt > 0, in the unit of time of the rate.

    Returns:
      A `System` on the same inputs, with a structure where `system` has one.

    Raises:
      TypeError, ValueError: no `System`, or a time step that is no positive finite number; at trace time, a
        rate unlike the state.

    Example: exponential decay, two steps of half a time constant.

      >>> decay = System(lambda theta, h, x: -theta * h, lambda params, h, x: (h, ()))
      >>> from jtrunc import unroll
      >>> one = jnp.float32(1)
      >>> unroll(continuous_time(decay, 0.5), Params(one), one, jnp.zeros(2))[1][0].tolist()
      [0.5, 0.25]
    """
    check_system("continuous_time", system)
    # As a Python number: one of NumPy would widen the state.
    time_step = check_positive("continuous_time", "time_step", time_step)

    def advance(hidden: PyTree, rate: PyTree) -> PyTree:
        check_same_state("continuous_time: the rate", hidden, rate)
        slopes, restore = partition_inexact(rate)
        return restore([h + time_step * slope for h, slope in zip(_floats(hidden), slopes, strict=True)])

    if isinstance(system.structure, Stack):
        layers = tuple(_advancing(layer, advance) for layer in system.structure.layers)
        stack = system.structure._replace(layers=layers)
        return System(transition_of(stack), system.loss, stack)
    return System(
        transition=lambda theta, hidden, inputs: advance(hidden, system.transition(theta, hidden, inputs)),
        loss=system.loss,
        structure=None if system.structure is None else _advancing(system.structure, advance),
    )


def _floats(tree: PyTree) -> list[jax.Array]:
    return partition_inexact(tree)[0]


def _advancing(structure: Structure, advance: Callable[[PyTree, PyTree], PyTree]) -> Structure:
    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        return advance(hidden, structure.combine(elementwise, hidden, inputs, p))

    return structure._replace(combine=combine)


def per_stream(
    estimator: GradientEstimator,
    *,
    noise: Literal["independent", "shared"] = "independent",
    mesh: Mesh | None = None,
    axis_name: str = "data",
) -> GradientEstimator:
    """B streams, `estimator` for each; loss and gradient averaged.

        g = 1/B · Σ_b g^b,   loss = 1/B · Σ_b loss^b

    Unbiased for the mean loss wherever `estimator` is unbiased for one stream's. For the backward family a
    batch axis inside the system is about twice as fast; take this one where the streams must be cut apart.

    Args:
      estimator: on one stream, without a batch axis.
      noise: "independent" splits the key, one for each stream. "shared" gives all streams the same, so that
        they draw the same noise, or are cut at the same steps: as unbiased, but the errors no longer average
        out, and the variance is up to B times as large.
      mesh: split the streams over its axis `axis_name` by `jax.shard_map`: each device runs its own, and
        only loss and gradient travel. None: the compiler follows the layout of state and inputs.
      axis_name: of the mesh axis; its size must divide B.

    Returns:
      A `GradientEstimator`: `init` takes `hidden` with leading axis B and one key; `update` takes `inputs`
      with axes (T, B, ...). The state has leading axis B; `num_steps` is one number where every stream
      consumes the same, else (B,); `aux` has axis B in front.

    Raises:
      ValueError: another `noise`, an axis that `mesh` lacks, leaves of `hidden` without a common leading
        axis, or inputs without a second one.
    """
    if mesh is not None and axis_name not in mesh.axis_names:
        raise ValueError(f"per_stream: `mesh` has the axes {mesh.axis_names}, none is {axis_name!r}")
    if noise not in ("independent", "shared"):
        raise ValueError(f'per_stream: `noise` must be "independent" or "shared", not {noise!r}')

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> Any:
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(hidden)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                f"per_stream: leaves of `hidden` have leading axes {sorted(sizes)}; "
                "all need the same axis of streams"
            )
        if key is None:
            return jax.vmap(lambda hidden: estimator.init(params, hidden))(hidden)
        check_key("per_stream", key, random=True)
        if noise == "shared":
            return jax.vmap(lambda hidden: estimator.init(params, hidden, key))(hidden)
        keys = jax.random.split(key, next(iter(sizes))[0])
        return jax.vmap(lambda hidden, key: estimator.init(params, hidden, key))(hidden, keys)

    def update(params: Params, state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
        num_steps: list[Any] = []

        def streams(params: Params, state: Any, inputs: PyTree) -> tuple[Any, tuple[Estimate, Any]]:
            def one(state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
                estimate, state = estimator.update(params, state, inputs)
                num_steps.append(estimate.num_steps)
                return estimate, state

            estimates, states = jax.vmap(one, in_axes=(0, 1))(state, inputs)
            mean = jax.tree.map(_mean_over_streams, (estimates.loss, estimates.grads))
            return mean, (estimates._replace(loss=(), grads=()), states)

        for leaf in jax.tree.leaves(inputs):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    "per_stream: every leaf of `inputs` needs axes (time, streams, ...), "
                    f"not shape {jnp.shape(leaf)}"
                )
        run = streams if mesh is None else _on_devices(streams, mesh, axis_name)
        (loss, grads), (estimates, states) = run(params, state, inputs)
        # One that is known stays so, though it has been through `vmap`.
        steps = num_steps[0] if is_concrete(num_steps[0]) else estimates.num_steps
        return Estimate(loss, grads, steps, estimates.aux), states

    return GradientEstimator(init, update)


def _on_devices(streams: Callable[..., Any], mesh: Mesh, axis_name: str) -> Callable[..., Any]:
    """`streams` on every device with its share; what it returns first is averaged."""

    def on_device(params: Params, state: Any, inputs: PyTree) -> tuple[Any, Any]:
        mean, own = streams(params, state, inputs)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name), mean), own

    # With shard_map's checks, gradients of replicated parameters would be sums over devices already, and the
    # system's own loops would have to know about devices.
    whole, by_stream = PartitionSpec(), PartitionSpec(axis_name)
    specs = (whole, by_stream, PartitionSpec(None, axis_name))
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(whole, by_stream), check_vma=False)


def _mean_over_streams(leaf: jax.Array) -> jax.Array:
    """The mean over the leading axis as a product: a fused sum would recompute its terms stream by stream."""
    count = leaf.shape[0]
    if count == 1:
        return leaf[0]
    weights = jnp.full((count,), 1 / count, leaf.dtype)
    return jnp.tensordot(weights, leaf, axes=1)
