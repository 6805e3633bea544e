"""Online training of a network of 20 units, one stream, many seeds in one program: the runs of the figures.

What the NoBackTrack paper leaves open is settled here, for all algorithms alike:

- σ is the sigmoid, its running example; θ starts as in `cells.preactivation`, h at 0.
- α of a leaky network is uniform on `FEEDBACK`, drawn anew for each unit and each seed, and fixed.
- The loss of the paper is in bits, so its learning rates are for gradients in bits: estimators give nats, and
  the optimiser sees them times 1/ln 2 (errata 20).
- Truncated BPTT waits for its T characters and makes one update with the sum of their gradients
  (footnote 13), at the rate of its last character.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtrunc import cells
from jtrunc.base import GradientEstimator, System
from jtrunc.experiments.report import progress
from jtrunc.training import TrainState, init_state, train_step
from jtrunc.training.stream import circular, window_at

WIDTH = 20
"""Units."""
FEEDBACK = (0.5, 1.0)
"""α of a leaky unit: a memory of two characters or more."""
POINTS_PER_DECADE = 8
FIRST_POINT = 300
LAST_PART = 0.1
"""The final loss is the average over this last part of the run."""
_CHUNK = 20_000
_PER_SEED: Any = TrainState(*(0, 0, 0, None, None, None))  # type: ignore[arg-type]


class Method(NamedTuple):
    """An algorithm of a figure.

    Attributes:
      label: in tables and legends.
      estimator: ``system -> estimator``.
      optimizer: of gradients in bits; it gets the timestep in characters.
      window: characters that one update reads.
    """

    label: str
    estimator: Callable[[System], GradientEstimator]
    optimizer: optax.GradientTransformation
    window: int = 1


class Text(NamedTuple):
    """What is learned: a file that is read in a circle.

    Attributes:
      name: for the reader.
      tokens: int32, (N,).
      num_symbols: how many different tokens there are.
      levels: bits a character of the source and of compressors, by label.
      leaky: whether the units keep a part of themselves.
    """

    name: str
    tokens: np.ndarray
    num_symbols: int
    levels: Mapping[str, float]
    leaky: bool = False


class Curve(NamedTuple):
    """The runs of one method, P points of S seeds.

    Attributes:
      label: of the method.
      characters: read up to each point, int64, (P,).
      bits: a character, average since the point before, float64, (P, S); nan once a run is not finite.
      microseconds: of one run, a character.
    """

    label: str
    characters: np.ndarray
    bits: np.ndarray
    microseconds: float

    @property
    def cumulative(self) -> np.ndarray:
        """Bits a character, average since the first character, (P, S)."""
        sizes = np.diff(self.characters, prepend=0)[:, None]
        return np.cumsum(sizes * self.bits, axis=0) / self.characters[:, None]

    @property
    def final(self) -> np.ndarray:
        """Bits a character in the last tenth of the run, (S,); inf where it is not finite."""
        start = int(np.argmin(np.abs(self.characters[:-1] - (1 - LAST_PART) * self.characters[-1])))
        sizes, bits = np.diff(self.characters)[start:], self.bits[start + 1 :]
        return finite_or_inf(np.average(bits, axis=0, weights=sizes))

    def median_at(self, characters: float) -> float:
        """The median over seeds at a number of characters, interpolated."""
        median = np.median(finite_or_inf(self.bits), axis=1)
        return float(np.interp(math.log(characters), np.log(self.characters), median))


def finite_or_inf(bits: np.ndarray) -> np.ndarray:
    """A run that is not finite counts as worse than all others."""
    return np.where(np.isfinite(bits), bits, np.inf)


def network(num_symbols: int, feedback: jax.Array | None) -> cells.Model:
    """The paper's network on characters (eq. 31, or 37 with feedback α), with a softmax readout.

    Args:
      num_symbols: A; inputs are pairs of integers (character, next character).
      feedback: α, (20,), or None. Unlike that of `cells.preactivation` it may be traced: seeds that share a
        program have an α each.
    """
    cell = cells.preactivation(num_symbols, WIDTH, activation="sigmoid")
    if feedback is not None:
        structure: Any = cell.structure

        def combine(elementwise: Any, hidden: jax.Array, inputs: Any, p: dict[str, jax.Array]) -> jax.Array:
            return feedback * hidden + p["units"]

        cell = cell._replace(structure=structure._replace(combine=combine))
    return cells.model(cell, num_symbols, cells.softmax_cross_entropy)


class Program(NamedTuple):
    """A method on a text, compiled for S seeds.

    Attributes:
      states: before the first character.
      advance: ``(states, updates) -> (states, loss)``, the sum over the updates, nats, float32, (S,).
      window: characters that one update reads.
    """

    states: TrainState
    advance: Callable[[TrainState, int], tuple[TrainState, jax.Array]]
    window: int


def compile_program(method: Method, text: Text, seeds: Sequence[int]) -> Program:
    """Compiles the online training of a method for all seeds side by side."""
    optimizer = optax.chain(optax.scale(1 / math.log(2)), method.optimizer)
    stream = circular((text.tokens, np.roll(text.tokens, -1)), method.window)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    feedback = jax.vmap(partial(_feedback, text.leaky))(keys)

    def init(key: jax.Array, alpha: jax.Array | None) -> TrainState:
        model = network(text.num_symbols, alpha)
        return init_state(method.estimator(model.system), optimizer, model.init, model.initial_hidden(), key)

    def advance(states: TrainState, alphas: Any, rows: Any, num_updates: jax.Array) -> Any:
        def one(state: TrainState, alpha: jax.Array | None) -> tuple[TrainState, jax.Array]:
            estimator = method.estimator(network(text.num_symbols, alpha).system)

            def update(_: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
                state, total = carry
                inputs = window_at(rows, state.cursor, method.window)
                state, metrics = train_step(estimator, optimizer, state, inputs)
                return state._replace(cursor=state.cursor % stream.length), total + metrics.loss

            return jax.lax.fori_loop(0, num_updates, update, (state, jnp.float32(0)))

        return jax.vmap(one, in_axes=(_PER_SEED, 0), out_axes=(_PER_SEED, 0))(states, alphas)

    states = jax.jit(jax.vmap(init))(keys, feedback)
    shared = {name: getattr(states, name)[0] for name in ("cursor", "update", "timestep")}
    states = states._replace(**shared)
    compiled = jax.jit(advance).lower(states, feedback, stream.rows, jnp.int32(1)).compile()
    return Program(states, lambda s, n: compiled(s, feedback, stream.rows, jnp.int32(n)), method.window)


def _feedback(leaky: bool, key: jax.Array) -> jax.Array | None:
    if not leaky:
        return None
    low, high = FEEDBACK
    return jax.random.uniform(jax.random.fold_in(key, 1), (WIDTH,), minval=low, maxval=high)


def points(steps: int, window: int) -> np.ndarray:
    """Where a curve has its points: characters, spread over their logarithm, whole windows; int64, (P,).

    >>> points(1000, 15)[[0, 1, -2, -1]].tolist()
    [300, 405, 900, 1005]
    """
    count = max(2, round(POINTS_PER_DECADE * math.log10(steps / FIRST_POINT)) + 1)
    spread = np.append(np.geomspace(FIRST_POINT, steps, count), (1 - LAST_PART) * steps)
    return np.unique(np.round(spread / window).astype(np.int64)) * window


def run(program: Program, label: str, steps: int, microseconds: float) -> Curve:
    """Trains for `steps` characters, rounded to whole windows; a run that blows up goes on as nan."""
    states, ends = program.states, points(steps, program.window)
    bits, read = [], 0
    with progress(int(ends[-1]), label, "characters") as advance:
        for end in ends:
            total: Any = 0.0
            size = int(end) - read
            while read < end:
                now = min(int(end) - read, _CHUNK // program.window * program.window)
                states, loss = program.advance(states, now // program.window)
                total = total + np.asarray(loss, np.float64)
                read += now
                advance(now)
            bits.append(total / size / math.log(2))
    return Curve(label, ends, np.array(bits), microseconds)


def measure(programs: Mapping[str, Program], seconds: float = 0.1, rounds: int = 5) -> dict[str, float]:
    """Microseconds of processor time a character: the median of rounds, in which all programs take turns."""
    updates = {name: 1 + 200 // program.window for name, program in programs.items()}
    for name, program in programs.items():
        _time(program, updates[name])
        one = _time(program, updates[name])
        updates[name] = max(1, round(updates[name] * seconds / max(one, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            taken = _time(program, updates[name]) / (updates[name] * program.window)
            found[name].append(1e6 * taken)
    return {name: float(np.median(values)) for name, values in found.items()}


def _time(program: Program, num_updates: int) -> float:
    start = time.process_time()
    jax.block_until_ready(program.advance(program.states, num_updates))
    return time.process_time() - start
