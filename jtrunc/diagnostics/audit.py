"""Bias, variance and cost of estimators on a user's own system and data, against the exact gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_count, check_key, check_size, check_step, check_system
from jtrunc.diagnostics.arguments import check_fraction
from jtrunc.diagnostics.cost import Cost
from jtrunc.diagnostics.errors import (
    Interval,
    mean_interval,
    ratio_interval,
    relative_bias,
    relative_noise,
)
from jtrunc.diagnostics.passes import (
    Pass,
    exact_gradient,
    flags,
    gradients,
    lag_moments,
    make_pass,
    scoring,
    scoring_one_lag,
)
from jtrunc.diagnostics.plan import Claim, Make, claim_of, cost_of, with_windows
from jtrunc.diagnostics.timing import seconds_per_step
from jtrunc.trees import is_key


class Lag(NamedTuple):
    """What becomes of the influence of θ on losses k steps later.

    Attributes:
      arrived: ⟨E ĝ_k, g_k⟩ / ‖g_k‖², on average over the losses: 1 is all of it, 0 nothing.
      noise: root mean square of ‖ĝ_k − g_k‖, over that of ‖g_k‖.
    """

    arrived: Interval
    noise: float


class Finding(NamedTuple):
    """One estimator, audited.

    Attributes:
      claim: what its gradient is said to be.
      bias: ‖E ĝ − g‖ / ‖g‖; an interval from 0 says that no bias was found.
      arrived: ⟨E ĝ, g⟩ / ‖g‖².
      noise: √(tr Cov ĝ) / ‖g‖ of one pass over the scored steps; 0 where nothing is random. The variance of
        the average of m passes is 1/m of its square.
      cosine: of ĝ and g, its mean over the draws.
      signal_to_noise: by group of parameters, ‖g‖ / √(tr Cov ĝ); inf where nothing is random, nan where both
        are 0.
      by_lag: `Lag` by k; empty where none was asked for, None where the estimator needs a structure.
      seconds_per_step: median time of an update, over the steps that it consumes; nan if not timed.
      cost: of one update, by the compiler.
      num_draws: passes; 1 where nothing is random.
    """

    claim: Claim
    bias: Interval
    arrived: Interval
    noise: float
    cosine: Interval
    signal_to_noise: dict[str, float]
    by_lag: dict[int, Lag] | None
    seconds_per_step: float
    cost: Cost
    num_draws: int


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
      exact: the gradient of the scored losses through all of the stream.
      num_scored: steps whose losses count.
      confidence: of all intervals.
      findings: by name, in the order given.
    """

    exact: Params
    num_scored: int
    confidence: float
    findings: dict[str, Finding]


def audit(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    estimators: Mapping[str, Make | tuple[Make, int]],
    *,
    key: jax.Array,
    num_draws: int = 200,
    warm_up: int = 0,
    lags: Sequence[int] = (),
    lag_draws: int = 32,
    streams: int | None = None,
    confidence: float = 0.95,
    timed: bool = True,
) -> Audit:
    """Measures estimators on a stream of the user's, at fixed parameters.

        g = ∇ Σ_{t > warm_up} ℓₜ through all of the stream,   ĝ = Σ of the estimates of one pass over it

    Every estimator walks along the stream from `hidden`, update by update as in training, but the parameters
    stay. The losses of the first steps do not count, so that the others have a past. What an estimate does to
    the gradient of `readout` counts too. g is computed by backpropagation through the whole stream: memory
    O(T). A random estimator is drawn `num_draws` times (one whose windows have known lengths, 32 at once).

    A loss that does not count is 0 to the estimator, so those that measure losses (`adaptive_bptt`,
    `adaptive_artbp`) would choose other windows than in training: audit them with ``warm_up=0``, or give them
    an `initial_length` (`initial`) and an `estimate_every` beyond the stream; for `lags` always the latter.

    Estimators that average over their losses (`windowed_bptt`, `adaptive_bptt`) are to be made with
    ``average=False``: all others are sums.

    Args:
      system: the user's.
      params, hidden: where to measure. At initial parameters memories are short: train first.
      inputs: leaves (T, ...), some hundred steps.
      estimators: constructors by name, ``system -> estimator``, or pairs of one and the steps that its
        updates are given (all of `inputs` by default: one update a pass; a look-ahead may be longer). They
        are called with `system` itself and with versions of it of which some losses do not count.
      key: a typed key.
      num_draws: passes of a random estimator, at least 2.
      warm_up: steps whose losses do not count; at least what `windowed_bptt` looks back.
      lags: k ≥ 0, each at most `warm_up`, for which to measure what arrives of θ's influence on losses k
        steps later (lag 0: of the same step), through the system without its structure.
      lag_draws: passes for each lag, each for the loss of one step that is chosen at random; at least 2.
      streams: B where an estimator is `per_stream`, whose inputs have axes (T, B, ...).
      confidence: of the intervals, in (0, 1).
      timed: whether to measure seconds; medians of alternated rounds.

    Returns:
      An `Audit`.

    Raises:
      TypeError, ValueError: bad system, params, inputs or counts; a constructor that is an estimator; a
        window that looks back beyond `warm_up`; a gradient that is zero or not finite.

    Example: hₜ = θ hₜ₋₁ + xₜ with θ = ½, ℓₜ = hₜ: a cut every two steps loses 3/8 of the gradient.

      >>> import jtrunc
      >>> system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> found = audit(
      ...     system, Params(jnp.float32(0.5)), jnp.float32(0), jnp.ones(64, jnp.float32),
      ...     {"cut": lambda system: jtrunc.truncated_bptt(system, 2), "exact": jtrunc.rtrl},
      ...     key=jax.random.key(0), warm_up=32, timed=False)
      >>> {name: round(finding.bias.value, 3) for name, finding in found.findings.items()}
      {'cut': 0.375, 'exact': 0.0}
    """
    setting = _setting(
        system, params, hidden, inputs, key, (num_draws, lag_draws), warm_up, tuple(lags), streams, confidence
    )
    chosen = with_windows("audit", estimators, setting.length)
    keys = jax.random.split(key, len(chosen))
    findings = {
        name: _finding(setting, name, make, window, key)
        for (name, (make, window)), key in zip(chosen.items(), keys, strict=True)
    }
    if timed:
        pairs = {name: (make(system), window) for name, (make, window) in chosen.items()}
        seconds = seconds_per_step(pairs, params, hidden, inputs)
        findings = {name: found._replace(seconds_per_step=seconds[name]) for name, found in findings.items()}
    return Audit(setting.exact, setting.length - warm_up, confidence, findings)


class _Setting(NamedTuple):
    """What all estimators have in common."""

    system: System
    params: Params
    hidden: PyTree
    inputs: PyTree
    exact: Params
    length: int
    num_draws: tuple[int, int]
    warm_up: int
    lags: tuple[int, ...]
    streams: int | None
    confidence: float

    @property
    def scored(self) -> PyTree:
        """The inputs of `scoring` systems."""
        return flags(jnp.arange(self.length) >= self.warm_up, self.streams), self.inputs


def _setting(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    key: Any,
    num_draws: tuple[int, int],
    warm_up: int,
    lags: tuple[int, ...],
    streams: int | None,
    confidence: float,
) -> _Setting:
    """The checked setting, with its exact gradient."""
    check_system("audit", system)
    check_key("audit", key, random=True)
    check_fraction("audit", "confidence", confidence)
    for name, count in zip(("num_draws", "lag_draws"), num_draws, strict=True):
        if check_size("audit", name, count) < 2:
            raise ValueError(f"audit: `{name}` must be at least 2, not 1; a variance needs two")
    if streams is None:
        length = check_step(system, params, hidden, inputs)
    else:
        check_size("audit", "streams", streams)
        length = check_step(system, params, _one_of(hidden, 0), _one_of(inputs, 1))
    if check_count("audit", "warm_up", warm_up) >= length:
        raise ValueError(f"audit: `warm_up` is {warm_up}, but `inputs` has {length} steps; give more of them")
    for lag in lags:
        if check_count("audit", "lags", lag) > warm_up:
            raise ValueError(
                f"audit: `lags` has {lag}, beyond `warm_up` = {warm_up}; the first losses that count have no "
                "such past, so raise `warm_up`"
            )
    setting = _Setting(
        system, params, hidden, inputs, params, length, num_draws, warm_up, lags, streams, confidence
    )
    exact = jax.jit(exact_gradient, static_argnums=(0, 4))(
        scoring(system), params, hidden, setting.scored, streams
    )
    vector = _vector(exact)
    if not np.isfinite(vector).all() or not vector.any():
        raise ValueError(
            f"audit: the exact gradient of steps {warm_up} to {length - 1} is zero or not finite, so that "
            "nothing can be measured against it; choose other `params` or `inputs`"
        )
    return setting._replace(exact=exact)


def _one_of(tree: PyTree, axis: int) -> PyTree:
    """The shapes of one stream."""
    return jax.eval_shape(lambda: jax.tree.map(lambda leaf: jnp.take(leaf, 0, axis), tree))


def _finding(setting: _Setting, name: str, make: Make, window: int, key: jax.Array) -> Finding:
    system, params, hidden = setting[:3]
    draws_key, lags_key = jax.random.split(key)
    plain = make(system)
    along = make_pass(make(scoring(system)), window, params, hidden, setting.scored)
    _check_look_back(name, along, setting.warm_up)
    keys = jax.random.split(draws_key, setting.num_draws[0])
    first = jax.device_get(gradients(along, params, hidden, setting.scored, keys[:2]))
    # Two draws may agree by chance, where cuts are rare: whatever keeps a key is drawn.
    if _differ(first) or _keeps_a_key(along.estimator, params, hidden):
        first = jax.device_get(gradients(along, params, hidden, setting.scored, keys))
    count = setting.num_draws[0] if _differ(first) else 1
    errors = jax.tree.map(
        lambda leaf, exact: np.asarray(leaf[:count], _wide(leaf)) - np.asarray(exact), first, setting.exact
    )
    exact, rows = _vector(setting.exact), _rows(errors)
    norm, shares = float(np.linalg.norm(exact)), rows @ exact / (exact @ exact)
    lengths = np.linalg.norm(rows + exact, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = (1 + shares) * norm / lengths
    return Finding(
        claim=claim_of(name, make, plain),
        bias=relative_bias(rows, norm, setting.confidence),
        arrived=mean_interval(1 + shares, setting.confidence),
        noise=relative_noise(rows, norm),
        cosine=mean_interval(cosines, setting.confidence),
        signal_to_noise=_by_group(errors, setting.exact),
        by_lag=_by_lag(setting, make, window, lags_key),
        seconds_per_step=float("nan"),
        cost=cost_of(name, plain, params, hidden, setting.inputs, window),
        num_draws=count,
    )


def _differ(draws: Params) -> bool:
    return any((leaf != leaf[:1]).any() for leaf in jax.tree.leaves(draws))


def _keeps_a_key(estimator: GradientEstimator, params: Params, hidden: PyTree) -> bool:
    """Whether its state has keys beside those of the hidden state, which every draw shares."""
    state = jax.eval_shape(lambda: estimator.init(params, hidden, jax.random.key(0)))
    return sum(map(is_key, jax.tree.leaves(state))) > sum(map(is_key, jax.tree.leaves(hidden)))


def _check_look_back(name: str, along: Pass, warm_up: int) -> None:
    unscored = 0 if along.num_steps is None else along.window - along.num_steps
    if unscored > warm_up:
        raise ValueError(
            f"audit: the first window of {name!r} scores none of its first {unscored} steps; give a "
            f"`warm_up` of at least as many, not {warm_up}"
        )


def _by_group(errors: Params, exact: Params) -> dict[str, float]:
    """Signal to noise of every leaf, by its path."""

    def ratio(errors: np.ndarray, exact: jax.Array) -> float:
        signal = float(np.linalg.norm(np.asarray(exact)))
        noise = relative_noise(_rows(errors), 1.0)
        return signal / noise if noise else float("inf") if signal else float("nan")

    groups = jax.tree_util.tree_leaves_with_path(errors)
    pairs = zip(groups, jax.tree.leaves(exact), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): ratio(leaf, of) for (path, leaf), of in pairs
    }


def _by_lag(setting: _Setting, make: Make, window: int, key: jax.Array) -> dict[int, Lag] | None:
    if not setting.lags:
        return {}
    system = scoring_one_lag(setting.system)
    params, hidden, streams = setting.params, setting.hidden, setting.streams
    marks = (flags(jnp.arange(setting.length) < 0, streams),) * 2
    try:
        along = make_pass(make(system), window, params, hidden, (marks, setting.inputs))
    except (TypeError, ValueError) as error:
        if "structure" in str(error):
            return None
        raise
    times_key, draws_key = jax.random.split(key)
    keys = jax.random.split(draws_key, setting.num_draws[1])
    times = jax.random.randint(times_key, keys.shape, setting.warm_up, setting.length)
    found = {}
    for lag in setting.lags:
        moments = lag_moments(
            along, system, streams, params, hidden, setting.inputs, jnp.int32(lag), (times, keys)
        )
        arrived, exact, error = (np.asarray(leaf, np.float64) for leaf in moments)
        if not exact.any():  # no influence reaches so far: nothing can be lost
            continue
        interval = ratio_interval(arrived, exact, setting.confidence)
        found[lag] = Lag(interval, float(np.sqrt(error.sum() / exact.sum())))
    return found


def _vector(tree: PyTree) -> np.ndarray:
    return _rows(jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree))[0]


def _rows(tree: PyTree) -> np.ndarray:
    """All leaves (R, ...) as real vectors (R, p) in float64; a complex entry counts as two."""

    def real(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf, _wide(leaf)).reshape(len(leaf), -1)
        return np.concatenate([leaf.real, leaf.imag], axis=1) if np.iscomplexobj(leaf) else leaf

    return np.concatenate([real(leaf) for leaf in jax.tree.leaves(tree)], axis=1)


def _wide(leaf: Any) -> Any:
    return np.complex128 if np.iscomplexobj(leaf) else np.float64
