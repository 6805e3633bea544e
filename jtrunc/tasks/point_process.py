"""Marked events in continuous time, and the recurrent point process that predicts when the next one comes.

A sequence is events at times t₁ < t₂ < … with marks y₁, y₂, …. After event j a network whose state is hⱼ
says which mark comes next, by a softmax, and when, by the conditional intensity

    λ*(tⱼ + d) = exp(a + w d),   a = vᵀhⱼ + b                                         (Du et al., eq. 11)

of a gap d. Its compensator, survival function and density are

    Λ(d) = ∫₀ᵈ λ* = e^a (e^{w d} − 1) / w,   S(d) = e^{−Λ(d)},   f*(d) = λ*(tⱼ + d) S(d)    (eq. 12).

w = 0 is a Poisson process between events: Λ = e^a d. For w > 0 the next event is certain. For w < 0 the
intensity dies away, and with probability exp(e^a / w) there is none: f* is defective, its integral is
1 − exp(e^a / w). All formulas here are smooth in w through 0.

A likelihood of times depends on their unit: in a unit c times as long, a gap is d / c and its negative log
density is smaller by log c.

Source: Du et al., "Recurrent marked temporal point processes" (2016), eq. 11–13; "Adaptively truncating
backpropagation through time to control gradient bias" (2019), section C.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Params, PyTree, System
from jtrunc.cells.cell import Cell, variance_scaled
from jtrunc.cells.model import Model, reading_first, softmax_cross_entropy
from jtrunc.checks import check_size
from jtrunc.structure import Affine, Stack, Structure, transition_of
from jtrunc.tasks.arguments import require_count
from jtrunc.tasks.events import Event, Lanes, Target

NUM_TIME_FEATURES = 2
"""The network reads [tⱼ − tⱼ₋₁, tⱼ] beside the mark's embedding."""


class Intensity(NamedTuple):
    """log λ*(tⱼ + d) = a + w d.

    Attributes:
      level: a, log intensity just after the last event (log of events per unit of time).
      slope: w, per unit of time; broadcast against the level.
    """

    level: jax.Array
    slope: jax.Array


def log_intensity(intensity: Intensity, gap: jax.Array) -> jax.Array:
    """log λ*(tⱼ + d) = a + w d.

    Args:
      intensity: a and w.
      gap: d ≥ 0, time since the last event.
    """
    return intensity.level + intensity.slope * gap


def compensator(intensity: Intensity, gap: jax.Array) -> jax.Array:
    """Λ(d) = e^a (e^{w d} − 1) / w, how many events were expected by then; e^a d for w = 0.

    Nothing overflows before Λ itself does.

      >>> round(float(compensator(Intensity(jnp.log(3.0), 0.0), 2.0)), 4)
      6.0
    """
    exponent = intensity.slope * gap
    # e^x − 1 = e^x (1 − e^−x): e^a and a large e^x meet inside one exponential.
    shift = jnp.where(exponent > 1.0, exponent, jnp.zeros_like(exponent))
    return gap * jnp.exp(intensity.level + shift) * _mean_exponential(exponent - 2.0 * shift)


def log_survival(intensity: Intensity, gap: jax.Array) -> jax.Array:
    """log S(d) = −Λ(d): that no event has come by then."""
    return -compensator(intensity, gap)


def log_density(intensity: Intensity, gap: jax.Array) -> jax.Array:
    """log f*(d) = a + w d − Λ(d), in nats (eq. 12 of Du et al.).

    Args:
      intensity: a and w.
      gap: d ≥ 0.

    Returns:
      The log density, per unit of time; −inf only where Λ(d) is beyond the range of its dtype.

    Example: rate 3 without slope: log 3 − 3 · 2.

      >>> round(float(log_density(Intensity(jnp.log(3.0), 0.0), 2.0)), 4)
      -4.9014
    """
    return log_intensity(intensity, gap) - compensator(intensity, gap)


def log_probability_of_none(intensity: Intensity) -> jax.Array:
    """log S(∞): e^a / w for w < 0, where there may never be another event; −inf for w ≥ 0."""
    decays = intensity.slope < 0
    slope = jnp.where(decays, intensity.slope, -jnp.ones_like(intensity.slope))
    return jnp.where(decays, jnp.exp(intensity.level) / slope, -jnp.inf)


def expected_gap(intensity: Intensity, *, num_nodes: int = 64) -> jax.Array:
    """E[d], the mean time to the next event (eq. 13 of Du et al.), given that there is one.

    Gauss–Legendre quadrature in units of e^−a, with r = w e^−a. For w ≥ 0 it integrates S over the times
    until S < e⁻⁴⁰; for w < 0, with C = 1/|r| the most that Λ can reach, it integrates by u = Λ(d):

        w ≥ 0:  e^a E[d] = ∫₀^∞ S ds
        w < 0:  e^a E[d] = ∫₀^C (e^−u − e^−C) / (1 − u/C) du / (1 − e^−C)

    Both integrands are entire functions. For w < 0 the mean over all cases is infinite: this is the mean
    given that an event comes. To 1e-9 for r < 10⁴ in float64. Costs `num_nodes` exponentials an entry: for
    evaluation, not for training.

    Raises:
      TypeError, ValueError: a number of nodes that is no positive integer.

    Example: no slope, rate 4; then an intensity that doubles in a unit of time.

      >>> [round(float(expected_gap(Intensity(jnp.log(4.0), w))), 4) for w in (0.0, jnp.log(2.0))]
      [0.25, 0.2169]
    """
    nodes, weights = np.polynomial.legendre.leggauss(require_count("num_nodes", num_nodes))
    level, slope = jnp.broadcast_arrays(jnp.asarray(intensity.level), jnp.asarray(intensity.slope))
    nodes = jnp.expand_dims(jnp.asarray(0.5 * (nodes + 1.0), level.dtype), tuple(range(level.ndim)))
    weights = jnp.asarray(0.5 * weights, level.dtype)
    ratio = (slope * jnp.exp(-level))[..., None]
    growing, decaying = _mean_growing(jnp.maximum(ratio, 0.0), nodes), _mean_decaying(ratio, nodes)
    return jnp.exp(-level) * (jnp.where(ratio < 0, decaying, growing) @ weights)


_NEGLIGIBLE = 40.0
"""e⁻⁴⁰ is nothing beside 1."""


def _mean_growing(ratio: jax.Array, nodes: jax.Array) -> jax.Array:
    """Values whose weighted sum is ∫₀^∞ S ds for a = 0 and w = r ≥ 0."""
    reach = jnp.maximum(_NEGLIGIBLE * ratio, jnp.finfo(ratio.dtype).tiny)
    end = _NEGLIGIBLE * jnp.log1p(reach) / reach  # Λ(end) = 40
    return end * jnp.exp(-compensator(Intensity(jnp.zeros_like(ratio), ratio), end * nodes))


def _mean_decaying(ratio: jax.Array, nodes: jax.Array) -> jax.Array:
    """Values whose weighted sum is the mean gap given an event, for a = 0 and w = r < 0."""
    most = 1.0 / jnp.maximum(-ratio, jnp.finfo(ratio.dtype).tiny)  # C
    end = jnp.minimum(most, _NEGLIGIBLE)
    expected = end * nodes  # u
    # (e^−u − e^−C) / (1 − u/C) / (1 − e^−C), with the differences inside two means of exponentials.
    rests = _mean_exponential(expected - most) / _mean_exponential(-most)
    return end * jnp.exp(-expected) * rests


def _mean_exponential(x: jax.Array) -> jax.Array:
    """(e^x − 1) / x, 1 at x = 0: the mean of e^y over y from 0 to x; smooth, with accurate derivatives."""
    x = jnp.asarray(x)
    near = jnp.abs(x) < 0.5
    series = jnp.ones_like(x)
    small = jnp.where(near, x, jnp.zeros_like(x))
    for n in range(14, 1, -1):
        series = 1.0 + small / n * series
    far = jnp.where(near, jnp.ones_like(x), x)
    return jnp.where(near, series, jnp.expm1(far) / far)


class Prediction(NamedTuple):
    """What the network says of the next event.

    Attributes:
      logits: (..., marks).
      intensity: `Intensity`, its level (...), its slope one number.
    """

    logits: jax.Array
    intensity: Intensity


class Parts(NamedTuple):
    """The two terms of the loss, in nats an event, averaged over the batch."""

    mark: jax.Array
    time: jax.Array


class Scores(NamedTuple):
    """What is reported of a prediction; each averaged over the batch.

    Attributes:
      mark: −log p(mark), nats.
      time: −log f*(gap), nats.
      mark_error: 1 where the most probable mark is another one, else 0.
      squared_error: (E[d] − gap)², whose mean's root is the RMSE of the time.
    """

    mark: jax.Array | float
    time: jax.Array | float
    mark_error: jax.Array | float
    squared_error: jax.Array | float


def negative_log_likelihood(prediction: Prediction, target: Target) -> tuple[jax.Array, Parts]:
    """−log p(mark) − log f*(gap), in nats an event, averaged over the batch; with its two `Parts`."""
    mark = softmax_cross_entropy(prediction.logits, target.mark)
    time = -jnp.mean(log_density(prediction.intensity, target.gap))
    return mark + time, Parts(mark, time)


def score(prediction: Prediction, target: Target) -> tuple[jax.Array, Scores]:
    """`negative_log_likelihood` with all `Scores`: for evaluation, since E[d] costs a quadrature an event."""
    loss, parts = negative_log_likelihood(prediction, target)
    mark_error = jnp.mean((jnp.argmax(prediction.logits, axis=-1) != target.mark).astype(loss.dtype))
    residual = expected_gap(prediction.intensity) - target.gap
    return loss, Scores(parts.mark, parts.time, mark_error, jnp.mean(jnp.square(residual)))


def model(
    cell: Cell,
    num_marks: int,
    embedding_size: int,
    *,
    loss: Callable[[Prediction, Target], tuple[jax.Array, PyTree]] = negative_log_likelihood,
) -> Model:
    """A recurrent marked temporal point process: embedding, cell, and readouts for mark and intensity.

        xₜ = [E[markₜ], gapₜ, timeₜ],   hₜ = F(xₜ, hₜ₋₁, θ)
        logits = output(hₜ) W + b′,     log λ* = vᵀ output(hₜ) + b + w d

    ``params.recurrent`` is {"embedding": (num_marks, embedding_size), "cell": θ}; for a stack the tuple of
    its layers' θ, the lowest of which is this dict. ``params.readout`` is {"mark": {"kernel", "bias"},
    "time": {"kernel": (width,), "bias": (), "slope": ()}}; w and the biases start at 0, E from a standard
    normal law. The declared structure folds E into the input kernel, E U, so that a step reads a one-hot
    mark: it is a product of parameters, not a rearrangement of them.

    Args:
      cell: from `jtrunc.cells`, of input size ``embedding_size + 2``.
      num_marks: how many marks there are.
      embedding_size: columns of E; the paper has 128.
      loss: `negative_log_likelihood`, or `score` for evaluation: same parameters, same loss, more aux.

    Returns:
      A `Model` whose inputs are ``(Event, Target)``, leaves (...), and whose loss has `Parts` (or `Scores`)
      as aux. ``predict(params, hidden)`` is a `Prediction`.

    Raises:
      TypeError, ValueError: a size that is not a positive integer; when parameters are made, a cell of
        another input size.

    Example:

      >>> from jtrunc import cells
      >>> net = model(cells.lstm(4 + 2, 8), num_marks=3, embedding_size=4)
      >>> params, hidden = net.init(jax.random.key(0)), net.initial_hidden()
      >>> event, target = Event(jnp.int32(2), 0.5, 1.5), Target(jnp.int32(0), 2.0)
      >>> loss, parts = net.system.loss(params, hidden, (event, target))
      >>> [round(float(value), 4) for value in (loss, *parts)]  # h = 0: log 3, and a rate of 1
      [3.0986, 1.0986, 2.0]
    """
    check_size("point_process.model", "num_marks", num_marks)
    check_size("point_process.model", "embedding_size", embedding_size)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> Params:
        embedding_key, cell_key, mark_key, time_key = jax.random.split(key, 4)
        embedding = jax.random.normal(embedding_key, (num_marks, embedding_size), dtype)
        mark = variance_scaled(mark_key, (cell.width, num_marks), dtype)
        time = variance_scaled(time_key, (cell.width, 1), dtype)[:, 0]
        readout = {
            "mark": {"kernel": mark, "bias": jnp.zeros(num_marks, dtype)},
            "time": {"kernel": time, "bias": jnp.zeros((), dtype), "slope": jnp.zeros((), dtype)},
        }
        theta = cell.init(cell_key, dtype)
        _check_input_size(cell, theta, embedding_size + NUM_TIME_FEATURES)
        return Params(_with_embedding(cell, embedding, theta), readout)

    def predict(params: Params, hidden: PyTree) -> Prediction:
        output = cell.output(hidden)
        mark, time = params.readout["mark"], params.readout["time"]
        bias = jnp.expand_dims(mark["bias"], tuple(range(output.ndim - 1)))
        level = output @ time["kernel"] + time["bias"]
        return Prediction(output @ mark["kernel"] + bias, Intensity(level, time["slope"]))

    def system_loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        return loss(predict(params, hidden), Target(*inputs[1]))

    structure = reading_first(_reading_events(cell.structure, num_marks))
    system = System(transition_of(structure), system_loss, structure)
    return Model(system, init, cell.initial_hidden, cast(Any, predict))


def constant_rate(train: Lanes, test: Lanes) -> Scores:
    """What a predictor without memory of times reaches: the measure that a network has to beat.

    Gaps are exponential with the mean gap of the training part, marks follow from the mark before by the
    (add-one) frequencies of the training part.

    Returns:
      `Scores` on the test part, Python floats, averaged over all its events.

    Example: gaps of 1 and 3 have mean 2; marks alternate.

      >>> from jtrunc.tasks.events import EventSequence, lanes
      >>> streams = lanes([EventSequence(np.array([0.0, 1.0, 4.0]), np.array([0, 1, 0]))], 1)
      >>> [round(value, 4) for value in constant_rate(streams, streams)]  # log 3/2; 1 + log 2; 0; 1
      [0.4055, 1.6931, 0.0, 1.0]
    """
    num_marks = 1 + max(
        int(leaf.max()) for part in (train, test) for leaf in (part.events[0], part.targets[0])
    )
    counts = np.ones((num_marks, num_marks))
    np.add.at(counts, (train.events.mark, train.targets.mark), 1.0)
    law = counts / counts.sum(axis=1, keepdims=True)
    mean_gap = np.mean(train.targets.gap, dtype=np.float64)
    gaps = np.asarray(test.targets.gap, np.float64)
    scores = (
        -np.log(law[test.events.mark, test.targets.mark]),
        np.log(mean_gap) + gaps / mean_gap,
        law.argmax(axis=1)[test.events.mark] != test.targets.mark,
        np.square(mean_gap - gaps),
    )
    return Scores(*(float(np.mean(values)) for values in scores))


def _with_embedding(cell: Cell, embedding: jax.Array, theta: PyTree) -> PyTree:
    """θ of the cell, or of the lowest of a stack, together with E."""
    if isinstance(cell.structure, Stack):
        return ({"embedding": embedding, "cell": theta[0]}, *theta[1:])
    return {"embedding": embedding, "cell": theta}


def _reading_events(structure: Structure | Stack, num_marks: int) -> Structure | Stack:
    """The structure on inputs `Event`, with E folded into the input kernels of its (lowest) layer."""
    if isinstance(structure, Stack):
        bottom, *above = structure.layers
        return structure._replace(layers=(_reading_events(bottom, num_marks), *above))

    def affine(theta: PyTree) -> dict[str, Affine]:
        maps = structure.affine(theta["cell"])
        return {name: _folded(theta["embedding"], weights) for name, weights in maps.items()}

    return structure._replace(
        affine=affine,
        input_features=lambda event: structure.input_features(_features(event, num_marks)),
        elementwise=lambda theta: structure.elementwise(theta["cell"]),
    )


def _features(event: Event, num_marks: int) -> jax.Array:
    """[one-hot mark, gap, time], (..., num_marks + 2)."""
    mark, gap, time = event
    gap, time = jnp.asarray(gap), jnp.asarray(time)
    one_hot = jax.nn.one_hot(mark, num_marks, dtype=gap.dtype)
    return jnp.concatenate([one_hot, gap[..., None], time[..., None].astype(gap.dtype)], axis=-1)


def _folded(embedding: jax.Array, weights: Affine) -> Affine:
    """A map of [E[mark], gap, time] as one of [one-hot mark, gap, time]."""
    kernel = weights.input_kernel
    if kernel is None:
        return weights
    size = embedding.shape[1]
    return weights._replace(input_kernel=jnp.concatenate([embedding @ kernel[:size], kernel[size:]]))


def _check_input_size(cell: Cell, theta: PyTree, expected: int) -> None:
    """The (lowest) cell reads as many features as there are, or a clear error."""
    layer = cell.structure
    if isinstance(layer, Stack):
        layer, theta = layer.layers[0], theta[0]
    for weights in layer.affine(theta).values():
        if weights.input_kernel is not None and weights.input_kernel.shape[0] != expected:
            raise ValueError(
                f"point_process.model: the cell has input size {weights.input_kernel.shape[0]}, but it reads"
                f" {expected} features, the embedding and [gap, time]; make the (lowest) cell with {expected}"
            )
