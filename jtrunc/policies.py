"""Estimators from estimators: averages of replicas, one for each group, shadows, clipped estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree
from jtrunc.checks import check_choice, check_key, check_positive, check_size
from jtrunc.trees import clip_to_norm, inner_product, is_concrete


class PolicyState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: the state that all members have reached.
      members: the states of the members: by name, or with a leading axis of replicas.
    """

    hidden: PyTree
    members: Any


def replicas(estimator: GradientEstimator, count: int) -> GradientEstimator:
    """The mean of R independent estimates from the same steps.

        g = 1/R · Σ_r g^r

    Unbiased wherever `estimator` is, with 1/R of its variance, at R times its memory and work in one program.
    NoBackTrack's `rank` does the same with one hidden state.

    Args:
      estimator: a random one that consumes a number of steps that does not depend on chance.
      count: R ≥ 1.

    Returns:
      A `GradientEstimator`; `init` needs a key, which is split. Diagnostics are means over the replicas.

    Raises:
      TypeError, ValueError: a count that is no positive integer; no key; at trace time, replicas that would
        consume different numbers of steps (`online_artbp`).

    Example: one random cut less in two; the mean of four estimates.

      >>> import jtrunc
      >>> system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = replicas(jtrunc.artbp(system, jtrunc.truncation.constant(0.5)), 4)
      >>> state = estimator.init(params, jnp.float32(0), jax.random.key(0))
      >>> float(estimator.update(params, state, inputs)[0].loss)
      4.25
    """
    check_size("replicas", "count", count)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> PolicyState:
        check_key("replicas", key, random=True)
        assert key is not None
        members = jax.vmap(lambda key: estimator.init(params, hidden, key))(jax.random.split(key, count))
        return PolicyState(_first(members.hidden), members)

    def update(params: Params, state: PolicyState, inputs: PyTree) -> tuple[Estimate, PolicyState]:
        num_steps: list[Any] = []

        def one(member: Any) -> tuple[Any, Any]:
            estimate, member = estimator.update(params, member, inputs)
            num_steps.append(estimate.num_steps)
            return estimate._replace(num_steps=()), member

        estimates, members = jax.vmap(one)(state.members)
        _check_same_steps("replicas", num_steps)
        mean = jax.tree.map(
            lambda leaf: jnp.mean(leaf, axis=0, dtype=_mean_dtype(leaf)),
            (estimates.loss, estimates.grads, estimates.aux.diagnostics),
        )
        aux = Aux(_first(estimates.aux.loss), mean[2])
        return Estimate(mean[0], mean[1], num_steps[0], aux), PolicyState(_first(members.hidden), members)

    return GradientEstimator(init, update)


def by_group(
    estimators: Mapping[str, GradientEstimator], labels: PyTree | Callable[[Params], PyTree]
) -> GradientEstimator:
    """A different estimator for each group of parameters, in one update.

    The gradient of a group is that of its estimator, so a group is unbiased where its own is. All members run
    on the same steps; what their gradients of other groups cost is left out by the compiler where it can be.

    Args:
      estimators: by name, of the same system; each consumes the same, fixed number of steps.
      labels: names in the structure of `Params`, or of a part of its branches (a prefix), as for
        `optax.partition`; or a function ``params -> names``.

    Returns:
      A `GradientEstimator`. Loss and its aux are the first member's; diagnostics are named ``member/name``.

    Raises:
      ValueError: no estimator, a label without one, or one without a label; members that consume different
        numbers of steps.

    Example: the recurrent weight by full BPTT, the weight of the input cut at every step.

      >>> import jtrunc
      >>> system = jtrunc.System(lambda th, h, x: th["w"] * h + th["u"] * x, lambda params, h, x: (h, ()))
      >>> params = Params({"w": jnp.float32(0.5), "u": jnp.float32(1)})
      >>> members = {"exact": jtrunc.bptt(system), "cut": jtrunc.truncated_bptt(system, 1)}
      >>> estimator = by_group(members, Params({"w": "exact", "u": "cut"}))
      >>> state = estimator.init(params, jnp.float32(0))
      >>> estimate, state = estimator.update(params, state, jnp.ones(3, jnp.float32))
      >>> float(estimate.grads.recurrent["w"]), float(estimate.grads.recurrent["u"])
      (3.0, 3.0)
    """
    members = _Members("by_group", estimators)

    def update(params: Params, state: PolicyState, inputs: PyTree) -> tuple[Estimate, PolicyState]:
        names = jax.tree.broadcast(labels(params) if callable(labels) else labels, params)
        members.check_labels(set(jax.tree.leaves(names)))
        estimates, state = members.update(params, state, inputs)
        found = {name: estimate.grads for name, estimate in estimates.items()}
        order = list(found)
        grads = jax.tree.map(lambda name, *leaves: leaves[order.index(name)], names, *found.values())
        first = next(iter(estimates.values()))
        aux = first.aux._replace(diagnostics=_named_diagnostics(estimates))
        return first._replace(grads=grads, aux=aux), state

    return GradientEstimator(members.init, update)


def with_shadows(estimator: GradientEstimator, shadows: Mapping[str, GradientEstimator]) -> GradientEstimator:
    """An estimator, and others on the same stream that are watched beside it: how well do they agree?

    Everything but the diagnostics is that of `estimator` alone (with the first key of a split, if any).

        cosine = Re⟨g, g′⟩ / (‖g‖ ‖g′‖),   ratio = ‖g′‖ / ‖g‖

    Args:
      estimator: the one that trains.
      shadows: by name, of the same system; each consumes as many steps, a fixed number.

    Returns:
      A `GradientEstimator` with the further diagnostics ``cosine/name`` and ``ratio/name`` over all
      parameters (nan where a gradient is 0), and those of the shadows as ``name/diagnostic``.

    Raises:
      ValueError: no shadow; at trace time, shadows that consume another number of steps.

    Example: a short window beside the exact gradient.

      >>> import jtrunc
      >>> system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = with_shadows(jtrunc.bptt(system), {"cut": jtrunc.truncated_bptt(system, 2)})
      >>> estimate, _ = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.grads.recurrent), round(float(estimate.aux.diagnostics["ratio/cut"]), 4)
      (3.0, 0.8333)
    """
    if not shadows:
        raise ValueError(f"with_shadows: `shadows` must name at least one estimator, not {shadows!r}")
    members = _Members("with_shadows", {"": estimator, **shadows})

    def update(params: Params, state: PolicyState, inputs: PyTree) -> tuple[Estimate, PolicyState]:
        estimates, state = members.update(params, state, inputs)
        main = estimates.pop("")
        diagnostics = {**main.aux.diagnostics, **_named_diagnostics(estimates)}
        length = jnp.sqrt(inner_product(main.grads, main.grads))
        for name, shadow in estimates.items():
            shadow_length = jnp.sqrt(inner_product(shadow.grads, shadow.grads))
            along = inner_product(main.grads, shadow.grads)
            diagnostics[f"cosine/{name}"] = along / (length * shadow_length)
            diagnostics[f"ratio/{name}"] = shadow_length / length
        return main._replace(aux=main.aux._replace(diagnostics=diagnostics)), state

    return GradientEstimator(members.init, update)


def clipped(
    estimator: GradientEstimator, max_norm: float, *, by: Literal["all", "leaf"] = "all"
) -> GradientEstimator:
    """Estimates that are scaled down to a norm of at most c.

        ĝ ← ĝ · min(1, c / ‖ĝ‖)

    Biased wherever it clips, towards 0: E of the clipped is not the clipped E, and large estimates are where
    an unbiased one makes up for its many small ones. `jtrunc.audit` measures by how much. Clip the mean of
    `replicas` rather than each: it is clipped less often. With ``by="leaf"`` the direction changes too. In an
    optimiser the same is `optax.clip_by_global_norm`; here the estimate itself is another, to be audited or
    to be one member of `by_group`.

    Args:
      max_norm: c > 0, in units of the gradient: sums over the window, whose length it should follow.
      by: "all" scales all parameters together, "leaf" each array by its own norm.

    Returns:
      A `GradientEstimator` with the further diagnostic ``clipped``: 1 where an estimate was scaled down; the
      share of arrays by "leaf". NaN and infinities pass.

    Raises:
      TypeError, ValueError: a `max_norm` that is no positive finite number, another `by`.

    Example: the gradient 3 clipped to 2.

      >>> import jtrunc
      >>> system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = clipped(jtrunc.bptt(system), 2.0)
      >>> estimate, _ = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> round(float(estimate.grads.recurrent), 5), float(estimate.aux.diagnostics["clipped"])
      (2.0, 1.0)
    """
    check_positive("clipped", "max_norm", max_norm)
    check_choice("clipped", "by", by, Literal["all", "leaf"])

    def update(params: Params, state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
        estimate, state = estimator.update(params, state, inputs)
        leaves, treedef = jax.tree.flatten(estimate.grads)
        parts = [[leaf] for leaf in leaves] if by == "leaf" else [leaves]
        done = [clip_to_norm(part, max_norm) for part in parts]
        grads = jax.tree.unflatten(treedef, [leaf for part, _ in done for leaf in part])
        share = jnp.mean(jnp.stack([clips for _, clips in done]), dtype=jnp.float32)
        aux = estimate.aux._replace(diagnostics={**estimate.aux.diagnostics, "clipped": share})
        return estimate._replace(grads=grads, aux=aux), state

    return GradientEstimator(estimator.init, update)


class _Members:
    """Estimators by name that walk along one stream together."""

    def __init__(self, owner: str, estimators: Mapping[str, GradientEstimator]) -> None:
        if not isinstance(estimators, Mapping) or not estimators:
            raise ValueError(f"{owner}: give at least one estimator by name, not {estimators!r}")
        for name, estimator in estimators.items():
            if not isinstance(estimator, GradientEstimator):
                raise TypeError(f"{owner}: {name!r} must be a GradientEstimator, not {estimator!r}")
        self.owner, self.estimators = owner, dict(estimators)

    def init(self, params: Params, hidden: PyTree, key: jax.Array | None = None) -> PolicyState:
        count = len(self.estimators)
        keys = [None] * count if key is None else list(jax.random.split(key, count))
        pairs = zip(self.estimators.items(), keys, strict=True)
        members = {name: estimator.init(params, hidden, key) for (name, estimator), key in pairs}
        return PolicyState(next(iter(members.values())).hidden, members)

    def update(
        self, params: Params, state: PolicyState, inputs: PyTree
    ) -> tuple[dict[str, Estimate], PolicyState]:
        done = {
            name: estimator.update(params, state.members[name], inputs)
            for name, estimator in self.estimators.items()
        }
        estimates = {name: estimate for name, (estimate, _) in done.items()}
        _check_same_steps(self.owner, [estimate.num_steps for estimate in estimates.values()])
        members = {name: member for name, (_, member) in done.items()}
        return estimates, PolicyState(next(iter(members.values())).hidden, members)

    def check_labels(self, labels: set[Any]) -> None:
        known = set(self.estimators)
        if labels != known:
            raise ValueError(
                f"{self.owner}: the labels are {sorted(map(str, labels))}, the estimators {sorted(known)}; "
                "give an estimator for every label, and use every estimator"
            )


def _check_same_steps(owner: str, num_steps: list[Any]) -> None:
    if not all(is_concrete(steps) for steps in num_steps):
        raise ValueError(
            f"{owner}: a member consumes a number of steps that is data (random or adaptive windows); "
            "all must consume the same, known number"
        )
    known = {int(np.asarray(steps)) for steps in num_steps}
    if len(known) != 1:
        raise ValueError(f"{owner}: the members consume {sorted(known)} steps; all must consume as many")


def _named_diagnostics(estimates: Mapping[str, Estimate]) -> dict[str, jax.Array]:
    return {
        f"{name}/{label}": value
        for name, estimate in estimates.items()
        for label, value in estimate.aux.diagnostics.items()
    }


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _mean_dtype(leaf: jax.Array) -> Any:
    return leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else None
