"""How long the updates of several estimators take, in turns, so that a slow phase of a machine hits all."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import numpy as np

from jtrunc.base import GradientEstimator, Params, PyTree

_ROUNDS, _SECONDS = 5, 0.05


def seconds_per_step(
    estimators: Mapping[str, tuple[GradientEstimator, int]], params: Params, hidden: PyTree, inputs: PyTree
) -> dict[str, float]:
    """Wall time of a jitted update over the steps that it consumes: medians of five alternated rounds.

    An update is a call of its own, as in a loop in Python: for small systems most of it is the call.

    Args:
      estimators: by name, with the steps that an update is given.
      params, hidden, inputs: `inputs` is read from its first step by every update, in a circle.
    """

    def steps(window: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[np.arange(window) % len(leaf)], inputs)

    turns = {
        name: _Turn(estimator, params, hidden, steps(window))
        for name, (estimator, window) in estimators.items()
    }
    seconds = [{name: turn.run() for name, turn in turns.items()} for _ in range(_ROUNDS)]
    return {name: float(np.median([taken[name] for taken in seconds])) for name in turns}


class _Turn:
    """Updates of one estimator, each from the state that the last one left."""

    def __init__(self, estimator: GradientEstimator, params: Params, hidden: PyTree, inputs: PyTree) -> None:
        self.params, self.inputs = params, inputs
        self.state = estimator.init(params, hidden, jax.random.key(0))
        self.update = jax.jit(estimator.update)
        self._update()

    def run(self) -> float:
        """Seconds a step, over a twentieth of a second or more."""
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS:
            steps += self._update()
        return (time.perf_counter() - start) / steps

    def _update(self) -> int:
        estimate, self.state = self.update(self.params, self.state, self.inputs)
        jax.block_until_ready((estimate.grads, self.state))
        return int(estimate.num_steps)
