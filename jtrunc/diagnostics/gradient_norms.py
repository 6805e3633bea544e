"""How fast a gradient decays on its way back: its norm by lag, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Params, PyTree, System
from jtrunc.checks import check_size, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.trees import cotangent_tree, is_inexact, num_time_steps, partition_inexact, split_at

Parts = Callable[[PyTree], Mapping[str, PyTree]]
"""``tree -> {name: subtree}``: which norms to take apart."""


def gradient_norms(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    num_lags: int,
    *,
    num_times: int = 1,
    streams: bool = False,
    weighted: bool = False,
    parts: Parts | None = None,
) -> Any:
    """φₖ = ‖∂ℓₛ/∂hₛ₋ₖ‖ for the lags k = 0 … R; see `log_gradient_norms`, of which this is the exponential.

    A norm too small for its dtype is 0 here, and exact there.

    Example: hₜ = ½ hₜ₋₁ + xₜ, ℓₜ = 3 hₜ: φₖ = 3 · 2⁻ᵏ.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (3 * h, ()))
      >>> inputs = jnp.ones(4, jnp.float32)
      >>> norms = gradient_norms(system, Params(jnp.float32(0.5)), jnp.float32(0), inputs, num_lags=3)
      >>> norms.round(4).tolist()
      [[3.0, 1.5, 0.75, 0.375]]
    """
    logs = log_gradient_norms(
        system, params, hidden, inputs, num_lags,
        num_times=num_times, streams=streams, weighted=weighted, parts=parts,
    )  # fmt: skip
    return jax.tree.map(jnp.exp, logs)


def log_gradient_norms(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    num_lags: int,
    *,
    num_times: int = 1,
    streams: bool = False,
    weighted: bool = False,
    parts: Parts | None = None,
) -> Any:
    """log φₖ, φₖ = ‖∂ℓₛ/∂hₛ₋ₖ‖ for k = 0 … R, over a minibatch of times s and of streams.

        λₛ = ∂ℓₛ/∂hₛ,   λₜ₋₁ = (∂hₜ/∂hₜ₋₁)ᵀ λₜ,   φₖ = ‖λₛ₋ₖ‖

    BPTT(R, 1) of the adaptive truncation paper (Aicher, Foti & Fox 2019), eq. 16 and 18. φ₀ is the norm with
    respect to the state that the loss reads (errata 12). All times share one backward pass: their cotangents
    move through each step's Jacobian together. They are rescaled at every step, so that log φ stays exact
    where φ has long left the range of its dtype; a norm that is exactly 0 gives −inf.

    Args:
      hidden: the state before `inputs`; no gradient of it is taken beyond its first step.
      inputs: T ≥ R + num_times steps. The times are spread evenly from step R to the last.
      num_lags: R ≥ 1, steps.
      num_times: how many losses of the window to pull back, each R lags.
      streams: the leading axis of every float leaf of `hidden` is a batch of B streams that do not read each
        other; each is a sample of its own. Where the loss is a mean over the batch all norms are 1/B of a
        single stream's, which changes no decay, bias or truncation length. Without it the state is one
        vector, whatever its shape.
      weighted: ‖λᵀ ∂F/∂θ‖ instead, the size of what lag k adds to the gradient: components of the state that
        no parameter moves count for nothing (section 5.4 proposes such a norm). With `streams`, B times the
        cost.
      parts: a function from a tree like `hidden` (like ``params.recurrent`` if `weighted`) to a dict of
        trees, such as `by_leaf` and `by_layer`: norms of each that has float leaves, in a dict.

    Returns:
      (num_times · B, R + 1), a row a sample, or a dict of such arrays.

    Time O(T) forward steps and O(T · num_times) backward steps, memory O(T) hidden states.

    Raises:
      TypeError, ValueError: bad system, params or inputs; sizes that are no positive integers or a window
        that is too short for them; no common axis of streams; parts that are no mapping.

    Example: a shift register of three cells forgets exactly.

      >>> shift = System(lambda theta, h, x: jnp.append(x, h[:2]), lambda params, h, x: (h.sum(), ()))
      >>> inputs, hidden = jnp.ones(5, jnp.float32), jnp.zeros(3, jnp.float32)
      >>> norms = log_gradient_norms(shift, Params(()), hidden, inputs, num_lags=4, num_times=1)
      >>> jnp.exp(2 * norms).round(4).tolist()
      [[3.0, 2.0, 1.0, 0.0, 0.0]]
    """
    check_system("log_gradient_norms", system)
    length = check_step(system, params, hidden, inputs)
    check_size("log_gradient_norms", "num_lags", num_lags)
    check_size("log_gradient_norms", "num_times", num_times)
    if not _has_floats(hidden):
        raise ValueError(
            "log_gradient_norms: `hidden` has no float leaves, so that no gradient flows through it"
        )
    if length < num_lags + num_times:
        raise ValueError(
            f"log_gradient_norms: `inputs` has {length} steps, too few to follow {num_times} losses "
            f"{num_lags} lags back; give at least num_lags + num_times = {num_lags + num_times}"
        )
    num_streams = _num_streams(hidden) if streams else None
    anchored = anchor(params, hidden, inputs)
    params, hidden, inputs = vary((params, hidden, inputs), anchored)
    times = np.round(np.linspace(length - 1, num_lags, num_times)).astype(int)[::-1]
    first = int(times[0]) - num_lags
    hidden, inputs = _skip(system, params, hidden, inputs, first)
    measure = _Measure(num_streams, weighted, parts)
    logs = _pull_back(system, params, hidden, inputs, times - first, measure)

    def by_lag(rows: jax.Array) -> jax.Array:
        steps = (times - first)[:, None] - np.arange(num_lags + 1)
        samples = rows[steps, np.arange(len(times))[:, None]]  # (times, lags, streams)
        return samples.swapaxes(1, 2).reshape(-1, num_lags + 1)

    return jax.tree.map(by_lag, logs)


def by_leaf(tree: PyTree) -> dict[str, PyTree]:
    """Every float leaf by itself, named by its path: for ``parts``.

    >>> sorted(by_leaf({"cell": jnp.zeros(2), "output": jnp.zeros(2)}))
    ["['cell']", "['output']"]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_inexact(leaf)}


def by_layer(tree: PyTree) -> dict[str, PyTree]:
    """The first level of a tree, such as the layers of a stack: for ``parts``.

    >>> sorted(by_layer(({"cell": jnp.zeros(2), "output": jnp.zeros(2)}, jnp.zeros(3))))
    ['[0]', '[1]']
    """
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return {jax.tree_util.keystr(path): child for path, child in children}


class _Measure(NamedTuple):
    """Which norm is taken of a cotangent."""

    num_streams: int | None
    weighted: bool
    parts: Parts | None


def _num_streams(hidden: PyTree) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in partition_inexact(hidden)[0]}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"log_gradient_norms: `streams` is True, but the float leaves of `hidden` have leading axes "
            f"{sorted(sizes)}; all need the same axis of streams, or leave `streams` False"
        )
    return sizes.pop()[0]


def _skip(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, num_steps: int
) -> tuple[PyTree, PyTree]:
    """The state and the inputs from where the first loss's look-back begins."""
    skipped, rest = split_at(inputs, num_steps)

    def step(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, None]:
        return system.transition(params.recurrent, hidden, inputs_t), None

    return (jax.lax.scan(step, hidden, skipped)[0], rest) if num_steps else (hidden, rest)


def _pull_back(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, times: np.ndarray, measure: _Measure
) -> Any:
    """Log norms of all cotangents at every step: (T, times, streams), stale before a row's own loss."""

    def run(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        new = system.transition(params.recurrent, hidden, inputs_t)
        return new, (hidden, new)

    def loss_cotangent(hidden: PyTree, inputs_t: PyTree) -> list[jax.Array]:
        leaves, restore = partition_inexact(hidden)
        return jax.grad(lambda leaves: system.loss(params, restore(leaves), inputs_t)[0])(leaves)

    _, (before, after) = jax.lax.scan(run, hidden, inputs)
    starts = jax.vmap(loss_cotangent)(*jax.tree.map(lambda leaf: leaf[times], (after, inputs)))

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        rows, log_scale = carry
        index, before_t, inputs_t = xs
        begins = index == times
        rows = [jnp.where(_to(begins, new), new, row) for new, row in zip(starts, rows, strict=True)]
        rows, log_scale = _rescaled(rows, jnp.where(begins, 0.0, log_scale))
        leaves, restore = partition_inexact(before_t)

        def move(theta: PyTree, leaves: list[jax.Array]) -> list[jax.Array]:
            return partition_inexact(system.transition(theta, restore(leaves), inputs_t))[0]

        _, pull = jax.vjp(move, params.recurrent, leaves)
        norms = jax.vmap(lambda row: _log_norms(measure, before_t, row, pull))(rows)
        norms = jax.tree.map(lambda found: found + log_scale[:, None], norms)
        return (jax.vmap(lambda row: pull(row)[1])(rows), log_scale), norms

    zeros = ([jnp.zeros_like(row) for row in starts], jnp.zeros(len(times)))
    zeros = vary(zeros, anchor(params, hidden, inputs))
    indices = jnp.arange(num_time_steps(inputs))
    return jax.lax.scan(step, zeros, (indices, before, inputs), reverse=True)[1]


def _to(values: jax.Array, like: jax.Array) -> jax.Array:
    """One value a row, ready to broadcast against rows of any shape."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _rescaled(rows: list[jax.Array], log_scale: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Every row divided by its largest entry, whose logarithm moves into the scale."""
    largest = jnp.zeros_like(log_scale)
    for leaf in rows:
        entries = jnp.abs(leaf).reshape(leaf.shape[0], -1).astype(largest.dtype)
        largest = jnp.maximum(largest, jnp.max(entries, axis=1, initial=0.0))
    usable = (largest > 0) & jnp.isfinite(largest)
    largest = jnp.where(usable, largest, 1.0)
    rows = [leaf / _to(largest, leaf).astype(leaf.real.dtype) for leaf in rows]
    return rows, log_scale + jnp.log(largest)


def _log_norms(measure: _Measure, hidden: PyTree, row: list[jax.Array], pull: Any) -> Any:
    """Log norms of one row's cotangent, (streams,)."""
    streams = measure.num_streams
    if not measure.weighted:
        return _by_part(measure, cotangent_tree(hidden, row), batched=streams is not None)
    if streams is None:
        return _by_part(measure, pull(row)[0], batched=False)

    def one_stream(stream: jax.Array) -> Any:
        own = [jnp.where(_to(jnp.arange(streams) == stream, leaf), leaf, 0) for leaf in row]
        return _by_part(measure, pull(own)[0], batched=False)

    return jax.tree.map(lambda found: found[:, 0], jax.lax.map(one_stream, jnp.arange(streams)))


def _by_part(measure: _Measure, tree: PyTree, batched: bool) -> Any:
    if measure.parts is None:
        return _log_norm(tree, batched)
    parts = measure.parts(tree)
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"log_gradient_norms: `parts` must return a dict of trees by name, not {type(parts).__name__}; "
            "jtrunc.diagnostics.by_leaf and by_layer are two"
        )
    return {name: _log_norm(part, batched) for name, part in parts.items() if _has_floats(part)}


def _has_floats(tree: PyTree) -> bool:
    return any(is_inexact(leaf) for leaf in jax.tree.leaves(tree))


def _log_norm(tree: PyTree, batched: bool) -> jax.Array:
    """log ‖tree‖, (streams,) or (1,), by way of the largest entry so that no square underflows."""
    leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    rows = [leaf.reshape(leaf.shape[0] if batched else 1, -1).astype(float) for leaf in leaves]
    entries = jnp.concatenate(rows, axis=1)
    largest = jnp.max(entries, axis=1, initial=0.0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return jnp.log(scale) + 0.5 * jnp.log(jnp.sum(jnp.square(entries / scale[:, None]), axis=1))
