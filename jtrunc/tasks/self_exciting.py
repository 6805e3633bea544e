"""A self-exciting (Hawkes) process with marks: events that make events likelier, and a known likelihood.

With baseline rates μ, branching matrix A and decay β, marks m of past events (tⱼ, yⱼ) have intensity

    λₘ(t) = μₘ + Σ_{tⱼ < t} A[m, yⱼ] β e^{−β (t − tⱼ)}

An event of mark k causes A[m, k] events of mark m on average, 1/β later on average. The process is
stationary where the largest |eigenvalue| of A is below 1; its mean rates are then (I − A)⁻¹ μ. The sums
decay together, so they are one vector that follows the events: simulation is exact and the likelihood is
O(N), both without a list of the past.

The negative log likelihood of the process itself on its own data is the least that a learner can reach on
average, as an entropy rate is for symbols; a network sees gaps and marks and has to remember the sums.

Source: Hawkes, "Spectra of some self-exciting and mutually exciting point processes" (1971); exact gaps by
Dassios & Zhao, "Exact simulation of Hawkes process with exponentially decaying intensity" (2013).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.tasks.arguments import require_count, require_key
from jtrunc.tasks.events import Event, Lanes, Target
from jtrunc.tasks.point_process import Parts


class Process(NamedTuple):
    """The parameters of a self-exciting process with M marks.

    Attributes:
      baseline: μ, (M,), events of each mark per unit of time that no other event causes.
      branching: A, (M, M): A[m, k] events of mark m are caused by one of mark k.
      decay: β, per unit of time.
    """

    baseline: Any
    branching: Any
    decay: Any


MUTUAL = Process(baseline=(0.1, 0.4), branching=((0.2, 0.6), (0.4, 0.3)), decay=1.0)
"""Two marks that excite each other more than themselves: mean rates 0.969 and 1.125, largest eigenvalue
0.742. Its own loss is 0.705 ± 0.004 nats an event, that of a constant rate 0.951."""


def mean_rates(process: Process = MUTUAL) -> np.ndarray:
    """(I − A)⁻¹ μ, the stationary rate of each mark: (M,), float64.

    Raises:
      ValueError: parameters that describe no stationary process (see `sequences`).

    Example:

      >>> mean_rates().round(4).tolist()
      [0.9688, 1.125]
    """
    baseline, branching, _ = _checked(process)
    return np.linalg.solve(np.eye(len(baseline)) - branching, baseline)


def sequences(key: jax.Array, num_steps: int, num_streams: int = 1, *, process: Process = MUTUAL) -> Lanes:
    """Draws independent streams of events, exactly; a step's target is the next step's event.

    Every stream begins at time 0 with an empty past. A gap is the least of two: an exponential one of the
    baseline, and one of the decaying sums, which may never come. Compiled; O(1) memory a step.

    Args:
      key: a typed key; the same key gives the same data, in float32 and with x64 alike.
      num_steps: T ≥ 1.
      num_streams: B ≥ 1.
      process: the parameters.

    Returns:
      `events.Lanes`, leaves (T, B), marks int32, gaps and times float32, of T + 1 events a stream.

    Raises:
      TypeError: if the key is not a typed key, or a count not a whole number.
      ValueError: if a count is below 1; if baseline or branching have negative entries or other shapes than
        (M,) and (M, M), all baselines are 0, the decay is not positive, or an eigenvalue of A is 1 or more.

    Example:

      >>> streams = sequences(jax.random.key(0), 5, num_streams=2)
      >>> streams.events.gap.shape, bool((streams.events.gap[1:] == streams.targets.gap[:-1]).all())
      ((5, 2), True)
    """
    parameters = _parameters(process, jnp.float32)
    num_steps = require_count("num_steps", num_steps)
    num_streams = require_count("num_streams", num_streams)
    return _simulate(require_key(key), parameters, num_steps, num_streams)


@partial(jax.jit, static_argnums=(2, 3))
def _simulate(key: jax.Array, process: Process, num_steps: int, num_streams: int) -> Lanes:
    """`num_steps` + 1 events of every stream, as steps."""
    num_marks = process.baseline.shape[0]

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
        sums, time = carry
        keys = jax.random.split(key, 3)
        gap = _draw_gap(keys[0], keys[1], process, sums)
        sums = sums * jnp.exp(-process.decay * gap)[:, None]
        mark = jax.random.categorical(keys[2], jnp.log(process.baseline[None] + sums)).astype(jnp.int32)
        time = time + gap
        return (sums + _jumps(process, mark), time), Event(mark, gap, time)

    sums, time = jnp.zeros((num_streams, num_marks), jnp.float32), jnp.zeros(num_streams, jnp.float32)
    _, drawn = jax.lax.scan(step, (sums, time), jax.random.split(key, num_steps + 1))
    resets = jnp.zeros((num_steps, num_streams), bool).at[0].set(True)
    events = jax.tree.map(lambda leaf: leaf[:-1], drawn)
    return Lanes(resets, events, Target(drawn.mark[1:], drawn.gap[1:]))


def _draw_gap(key: jax.Array, other: jax.Array, process: Process, sums: jax.Array) -> jax.Array:
    """The time to the next event, (B,): the first of the baseline's and of the decaying sums'."""
    shape, total = sums.shape[:1], jnp.sum(sums, axis=1)
    baseline = jax.random.exponential(key, shape, sums.dtype) / jnp.sum(process.baseline)
    # The sums' compensator, total (1 − e^−βd) / β, reaches an exponential number at last, or never.
    share = (
        process.decay * jax.random.exponential(other, shape, sums.dtype) / jnp.where(total > 0, total, 1.0)
    )
    comes = (total > 0) & (share < 1.0)
    excited = -jnp.log1p(-jnp.where(comes, share, 0.0)) / process.decay
    return jnp.where(comes, jnp.minimum(baseline, excited), baseline)


def _jumps(process: Process, mark: jax.Array) -> jax.Array:
    """What an event adds to the sums: β A[:, mark], (B, M)."""
    return process.decay * process.branching.T[mark]


class Residuals(NamedTuple):
    """How a process sees each target; leaves (T, B).

    Attributes:
      parts: −log likelihood of mark and of gap given all before, nats.
      compensator: Λ, the events that were expected in the gap: independent, exponential with mean 1, where
        the process is the true one (time-rescaling theorem).
    """

    parts: Parts
    compensator: jax.Array


def residuals(streams: Lanes, process: Process = MUTUAL) -> Residuals:
    """Runs a process along events; each target's likelihood and compensator, in O(T).

        Λ = d Σ μₘ + (1 − e^{−βd}) / β · Σ sumₘ

    The past is empty before a reset. Events that are no target (the first of a sequence) are read, and not
    scored.

    Args:
      streams: from `sequences`, or `events.lanes` of any data.
      process: the parameters, those of the data or others.

    Raises:
      ValueError: parameters as in `sequences`.
    """
    dtype = jnp.result_type(jnp.float32, streams.targets.gap)
    return _residuals(jax.tree.map(jnp.asarray, streams), _parameters(process, dtype))


@jax.jit
def _residuals(streams: Lanes, process: Process) -> Residuals:
    def step(sums: jax.Array, streams: Lanes) -> tuple[jax.Array, Residuals]:
        _, (mark, gap, _), target = streams
        decayed = sums * jnp.exp(-process.decay * gap.astype(sums.dtype))[:, None]
        sums = jnp.where(streams.resets[:, None], 0.0, decayed) + _jumps(process, mark)
        gap = target.gap.astype(sums.dtype)
        mean = -jnp.expm1(-process.decay * gap) / process.decay
        compensator = gap * jnp.sum(process.baseline) + mean * jnp.sum(sums, axis=1)
        rates = process.baseline[None] + sums * jnp.exp(-process.decay * gap)[:, None]
        total = jnp.log(jnp.sum(rates, axis=1))
        chosen = jnp.log(jnp.take_along_axis(rates, target.mark[:, None], axis=1)[:, 0])
        return sums, Residuals(Parts(total - chosen, compensator - total), compensator)

    start = jnp.zeros((streams.resets.shape[1], process.baseline.shape[0]), process.baseline.dtype)
    return jax.lax.scan(step, start, streams)[1]


def negative_log_likelihood(streams: Lanes, process: Process = MUTUAL) -> float:
    """−log likelihood of the targets under a process, in nats an event: exact, averaged over all of them.

    For the process that made the data this is the bound: no predictor has less on average.
    """
    mark, time = residuals(streams, process).parts
    return float(np.mean(np.asarray(mark + time), dtype=np.float64))


def _parameters(process: Process, dtype: Any) -> Process:
    """Checked parameters as arrays."""
    return Process(*(jnp.asarray(leaf, dtype) for leaf in _checked(process)))


def _checked(process: Process) -> tuple[np.ndarray, np.ndarray, float]:
    """μ, A and β in float64, or a clear error."""
    baseline, branching = np.asarray(process.baseline, float), np.asarray(process.branching, float)
    decay = float(process.decay)
    if baseline.ndim != 1 or branching.shape != 2 * baseline.shape:
        raise ValueError(
            f"process.baseline has shape {baseline.shape} and process.branching {branching.shape}; give (M,)"
            " and (M, M) for M marks"
        )
    if not (baseline >= 0).all() or not baseline.sum() > 0 or not (branching >= 0).all():
        raise ValueError(
            f"process.baseline {baseline.tolist()} and process.branching {branching.tolist()} must not be"
            " negative, and one baseline must be positive; an event only ever excites"
        )
    if not 0.0 < decay < float("inf"):
        raise ValueError(f"process.decay must be positive and finite, got {decay}; pass e.g. 1.0")
    radius = float(np.abs(np.linalg.eigvals(branching)).max())
    if not radius < 1.0:
        raise ValueError(
            f"process.branching has an eigenvalue of size {radius:.4g}, so that events multiply without end;"
            f" scale it by less than {1.0 / radius:.4g}"
        )
    return baseline, branching, decay
