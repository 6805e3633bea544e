"""The parts that the command line knows by name: tasks, cells, estimators, optimisers.

Keyword-only parameters are the options of a name: ``lstm:width=256,layers=2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import optax

import jtrunc
from jtrunc import cells, optimizers
from jtrunc.experiments.token_tasks import TASKS as TASKS
from jtrunc.experiments.token_tasks import Tokens as Tokens
from jtrunc.optimizers import inverse_square_root_decay

HIT_PROBABILITY = 1e-5
"""A default look-ahead is so long that a window of ARTBP is longer with this probability."""


def _stacked(layers: int, make: Callable[[int], Any], input_size: int, width: int) -> Any:
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    sizes = [input_size] + [width] * (layers - 1)
    return make(input_size) if layers == 1 else cells.stack([make(size) for size in sizes])


def tanh(input_size: int, *, width: int = 128, layers: int = 1) -> Any:
    """h = tanh(W h + U x + b)."""
    return _stacked(layers, lambda size: cells.tanh(size, width), input_size, width)


def leaky(input_size: int, *, width: int = 128, rate: float = 0.1, layers: int = 1) -> Any:
    """A tanh unit that moves by a fraction `rate` towards its new value."""
    return _stacked(layers, lambda size: cells.leaky(size, width, rate), input_size, width)


def gru(input_size: int, *, width: int = 128, layers: int = 1) -> Any:
    """Gated recurrent unit."""
    return _stacked(layers, lambda size: cells.gru(size, width), input_size, width)


def lstm(input_size: int, *, width: int = 128, forget_bias: float = 1.0, layers: int = 1) -> Any:
    """Long short-term memory."""
    return _stacked(layers, lambda size: cells.lstm(size, width, forget_bias), input_size, width)


def linear_recurrent(input_size: int, *, width: int = 128, min_radius: float = 0.9) -> Any:
    """Linear recurrent unit: complex, diagonal; `diagonal-rtrl` is exact for it."""
    return cells.linear_recurrent(input_size, width, min_radius=min_radius)


class Windowed(NamedTuple):
    """An estimator, and how it is fed.

    Attributes:
      estimator: the estimator.
      window: how many steps of data an update is given.
      consumed: how many of them it consumes, on average where that is random.
    """

    estimator: jtrunc.GradientEstimator
    window: int
    consumed: int


def bptt(system: jtrunc.System, *, window: int = 100) -> Windowed:
    """Backpropagation through the whole of each window; windows do not overlap."""
    return Windowed(jtrunc.bptt(system), window, window)


def truncated_bptt(system: jtrunc.System, *, length: int = 50) -> Windowed:
    """Backpropagation cut every `length` steps: cheap, and biased towards short influences."""
    return Windowed(jtrunc.truncated_bptt(system, length), length, length)


def windowed_bptt(
    system: jtrunc.System, *, backward_steps: int = 50, loss_steps: int = 10, average: bool = True
) -> Windowed:
    """BPTT(K1, K2): scores the last K2 = loss_steps, looks back K1 = backward_steps; windows overlap."""
    estimator = jtrunc.windowed_bptt(system, backward_steps, loss_steps, average=average)
    return Windowed(estimator, backward_steps + 1, loss_steps)


def artbp(
    system: jtrunc.System, *, mean_length: float = 50, alpha: float = 4.0, window: int = 500
) -> Windowed:
    """Unbiased within windows of `window` steps: random cuts inside, reweighted by 1/(1-c)."""
    law = jtrunc.truncation.polynomial(mean_length, alpha)
    return Windowed(jtrunc.artbp(system, law), window, window)


def online_artbp(
    system: jtrunc.System, *, mean_length: float = 50, alpha: float = 4.0, look_ahead: int = 0
) -> Windowed:
    """Unbiased on the whole stream: one random, reweighted window an update (look-ahead 0: long enough)."""
    law = jtrunc.truncation.polynomial(mean_length, alpha)
    estimator = jtrunc.online_artbp(system, law)
    return Windowed(estimator, look_ahead or long_enough(mean_length, alpha), max(1, round(mean_length)))


def adaptive_bptt(
    system: jtrunc.System,
    *,
    tolerance: float = 0.5,
    num_lags: int = 100,
    min_length: int = 2,
    max_length: int = 100,
    initial_length: int = 15,
    estimate_every: int = 4000,
    fit_share: float = 0.9,
    num_times: int = 1,
    method: str = "least_squares",
    weighted: bool = False,
    average: bool = True,
) -> Windowed:
    """BPTT(2K, K), K measured every `estimate_every` steps; --steps / initial-length updates, whatever K is.

    K is the least whose estimated relative bias is below `tolerance`; the decay is fitted on the lags from
    `fit_share` of `num_lags` on. The gradient is a mean over the window: see sgd:length-power=0.5.
    """
    if not 0 <= fit_share < 1:
        raise ValueError(f"fit_share must lie in [0, 1), got {fit_share}")
    estimator = jtrunc.adaptive_bptt(
        system,
        tolerance,
        num_lags=num_lags,
        min_length=min_length,
        max_length=max_length,
        initial_length=initial_length,
        estimate_every=estimate_every,
        unit="steps",
        fit_from=round(fit_share * num_lags),
        method=cast(Any, method),
        num_times=num_times,
        streams=True,
        weighted=weighted,
        average=average,
    )
    return Windowed(estimator, max(2 * max_length + 1, num_lags + num_times), initial_length)


def adaptive_artbp(
    system: jtrunc.System,
    *,
    mean_length: float = 50,
    num_lags: int = 100,
    estimate_every: int = 4000,
    num_times: int = 8,
    look_ahead: int = 0,
    weighted: bool = False,
) -> Windowed:
    """online-artbp with the law of least variance for gradient norms measured every `estimate_every` steps.

    look_ahead 0: as for online-artbp with alpha=4, which is the first law; measured laws may need a longer
    one: see the diagnostic look_ahead_hits.
    """
    estimator = jtrunc.adaptive_artbp(
        system,
        mean_length,
        num_lags=num_lags,
        estimate_every=estimate_every,
        unit="steps",
        num_times=num_times,
        weighted=weighted,
    )
    window = look_ahead or max(long_enough(mean_length, 4.0), num_lags + num_times)
    return Windowed(estimator, window, max(1, round(mean_length)))


def target_propagation(
    system: jtrunc.System,
    *,
    block_length: int = 10,
    blocks: int = 4,
    penalty: float = 0.1,
    method: str = "admm",
    hidden_steps: int = 1,
    hidden_rate: float = 0.1,
    dual_rate: float = 1.0,
    initial: str = "forward",
    loss_on: str = "predicted",
    num_blocks: int = 0,
) -> Windowed:
    """States between blocks are variables: Adagrad on them, multipliers kept for num_blocks (0: for none).

    A window is `blocks` blocks; num_blocks is the length of a stream / block-length, and a multiple of it.
    The penalty is a sum over the streams, the loss a mean: λ is the penalty times the streams.
    """
    estimator = jtrunc.target_propagation(
        system,
        block_length,
        penalty,
        cast(Any, method),
        hidden_steps,
        hidden_optimizer=adagrad(hidden_rate),
        dual_optimizer=optax.sgd(dual_rate),
        initial=cast(Any, initial),
        loss_on=cast(Any, loss_on),
        num_blocks=num_blocks or None,
    )
    window = block_length * blocks
    return Windowed(estimator, window, window)


def _forward(estimator: jtrunc.GradientEstimator, window: int) -> Windowed:
    """A forward estimator follows one stream: each stream gets its own, and their gradients are averaged."""
    return Windowed(jtrunc.per_stream(estimator), window, window)


def rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Real-time recurrent learning: the exact influence of all the past, carried forward."""
    return _forward(jtrunc.rtrl(system), window)


def nobacktrack(
    system: jtrunc.System,
    *,
    rank: int = 1,
    norms: str = "euclidean",
    split: bool = False,
    window: int = 1,
) -> Windowed:
    """Unbiased rank-K influence, scaled unit by unit; norms=kalman goes with the optimiser qdop."""
    return _forward(jtrunc.nobacktrack(system, rank, norms=cast(Any, norms), split=split), window)


def uoro(system: jtrunc.System, *, memory: int = 1, window: int = 0) -> Windowed:
    """Unbiased rank-one influence with one scale; exact inside `memory` steps (window 0: as many)."""
    return _forward(jtrunc.uoro(system, memory=memory), window or memory)


def diagonal_rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Exact influence of an elementwise recurrence (cell linear-recurrent), cheap."""
    return _forward(jtrunc.diagonal_rtrl(system), window)


def kf_rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Unbiased Kronecker-factored influence: little variance, n³ a step."""
    return _forward(jtrunc.kf_rtrl(system), window)


def optimal_kronecker_sum(system: jtrunc.System, *, terms: int = 1, window: int = 1) -> Windowed:
    """Unbiased sum of Kronecker products, reduced with the least variance."""
    return _forward(jtrunc.optimal_kronecker_sum(system, terms), window)


def snap(system: jtrunc.System, *, order: int = 1, window: int = 1) -> Windowed:
    """Influence on the entries that `order` steps can fill: cheap for order 1, and biased."""
    return _forward(jtrunc.snap(system, order), window)


def eprop(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Eligibility traces within each unit: the cheapest, and biased."""
    return _forward(jtrunc.eprop(system), window)


def long_enough(mean_length: float, alpha: float, probability: float = HIT_PROBABILITY) -> int:
    """A look-ahead N that an ARTBP window exceeds with at most `probability`.

    P(window > N) = Π_{k≤N} (1 − (α−1)/((α−2) L₀ + k)) ≤ (1 + N/((α−2) L₀))^−(α−1), solved for N.

      >>> long_enough(16, 6.0)
      577
    """
    scale = (alpha - 2) * mean_length
    return math.ceil(scale * (probability ** (-1 / (alpha - 1)) - 1))


def sgd(
    learning_rate: Any, *, momentum: float = 0.0, length_power: float = 0.0
) -> optax.GradientTransformation:
    """Gradient descent; gradients that are sums over the window take longer steps where it is longer.

    Those of adaptive-bptt are means: length_power=0.5 makes steps longer by the root of the length.
    """
    descent = optax.sgd(learning_rate, momentum or None)
    if not length_power:
        return descent
    return optax.chain(descent, optimizers.scale_by_truncation_length(length_power))


def adam(learning_rate: Any, *, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Adam; the scale of the gradient, and so the window's length, cancels."""
    return optax.adam(learning_rate, b1, b2)


def rmsprop(learning_rate: Any, *, decay: float = 0.9) -> optax.GradientTransformation:
    """RMSProp."""
    return optax.rmsprop(learning_rate, decay)


def adagrad(learning_rate: Any, *, initial: float = 0.0) -> optax.GradientTransformation:
    """Adagrad; the scale of the gradient cancels, but for `initial`, with which the sums of squares begin."""
    return optax.adagrad(learning_rate, initial_accumulator_value=initial, eps=1e-10)


def qdop(
    learning_rate: Any, *, prior: float = 20.0, decay: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Quasi-diagonal Kalman step: --learning-rate 1, prior about the units, memory of √t/decay gradients."""
    schedule = inverse_square_root_decay(decay)
    return optimizers.qdop(prior, decay=schedule, learning_rate=learning_rate)


CELLS = {"lstm": lstm, "gru": gru, "tanh": tanh, "leaky": leaky, "linear-recurrent": linear_recurrent}
ESTIMATORS = {
    "truncated-bptt": truncated_bptt,
    "online-artbp": online_artbp,
    "adaptive-artbp": adaptive_artbp,
    "artbp": artbp,
    "windowed-bptt": windowed_bptt,
    "adaptive-bptt": adaptive_bptt,
    "bptt": bptt,
    "target-propagation": target_propagation,
    "rtrl": rtrl,
    "nobacktrack": nobacktrack,
    "uoro": uoro,
    "diagonal-rtrl": diagonal_rtrl,
    "kf-rtrl": kf_rtrl,
    "optimal-kronecker-sum": optimal_kronecker_sum,
    "snap": snap,
    "eprop": eprop,
}
OPTIMIZERS = {"adam": adam, "sgd": sgd, "rmsprop": rmsprop, "adagrad": adagrad, "qdop": qdop}
