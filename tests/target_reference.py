"""The oracle of target propagation: plain loops over blocks and steps, written from the paper's equations.

It shares no code with jtrunc. The objective is a Python loop, `jax.grad` of it (float64) gives its
gradients, and everything that an update does beside is a loop over blocks that keeps one record for each.
States, gradients and multipliers are real vectors (`reference.to_vector`): a complex leaf counts as its
real and its imaginary parts, integer and key leaves carry no multiplier.

Source: "Training language models using target-propagation" (2017), eq. 4 to 8 and section 3, with errata
23 to 26: unscaled multipliers y = λu, and the residual rule for the dual step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.reference import from_vector, steps_of, to_vector


def blocks_of(inputs: Any, block_length: int) -> list[list[Any]]:
    """The steps of a window in blocks of B; a ragged block is the first in time."""
    steps = steps_of(inputs)
    first = len(steps) % block_length or block_length
    return [steps[i:j] for i, j in pairwise([0, *range(first, len(steps) + 1, block_length)])]


def forward_states(system: Any, params: Any, start: Any, inputs: Any, block_length: int) -> list[Any]:
    """The true recurrence (eq. 1) from `start`, at the ends of the blocks."""
    return _recurrence(system, block_length)(params, start, inputs)


@cache
def _recurrence(system: Any, block_length: int) -> Callable[..., list[Any]]:
    """Compiled, like all loops here that run many times."""

    @jax.jit
    def ends_of(params: Any, start: Any, inputs: Any) -> list[Any]:
        ends, hidden = [], start
        for block in blocks_of(inputs, block_length):
            for x in block:
                hidden = system.transition(params.recurrent, hidden, x)
            ends.append(hidden)
        return ends

    return ends_of


# Constraint functions C(ĥ, h) of one block.


def quadratic(params: Any, predicted: Any, free: Any) -> jax.Array:
    return 0.5 * jnp.sum((to_vector(free) - to_vector(predicted)) ** 2)


def kullback_leibler(logits: Callable[[Any, Any], jax.Array]) -> Callable[..., jax.Array]:
    """Section 4.3: Σ p log(p / q), p = softmax(logits at ĥ), q = softmax(logits at h)."""

    def constraint(params: Any, predicted: Any, free: Any) -> jax.Array:
        p, q = (jnp.exp(logits(params, state)) for state in (predicted, free))
        p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
        return jnp.sum(p * (jnp.log(p) - jnp.log(q)))

    return constraint


class Objective(NamedTuple):
    """L(H, θ, y) and its parts.

    Attributes:
      value: L = Σ ℓ + Σ ⟨y, h − ĥ⟩ + λ Σ C.
      loss, constraint: Σ ℓ and Σ C.
      predicted: ĥ at the end of each block.
      residual: (N, n) h − ĥ.
      losses: ℓₜ of each step.
      aux: what the loss returned beside, a list over time.
    """

    value: Any
    loss: Any
    constraint: Any
    predicted: list[Any]
    residual: Any
    losses: list[Any]
    aux: list[Any]


def objective(
    system: Any,
    params: Any,
    start: Any,
    free: list[Any],
    inputs: Any,
    *,
    block_length: int,
    penalty: Any,
    multipliers: Any = None,
    constraint: Callable[..., Any] = quadratic,
    loss_on: str = "predicted",
) -> Objective:
    """Eq. 6 (`loss_on` "predicted") or 8 ("free"), with multipliers (N, n) as in eq. 7 (errata 23 and 25)."""
    losses, aux, predicted, residuals, violations = [], [], [], [], []
    for b, block in enumerate(blocks_of(inputs, block_length)):
        hidden = start if b == 0 else free[b - 1]
        for step, x in enumerate(block):
            hidden = system.transition(params.recurrent, hidden, x)
            at_the_end = step == len(block) - 1
            value, extra = system.loss(params, free[b] if at_the_end and loss_on == "free" else hidden, x)
            losses.append(value)
            aux.append(extra)
        predicted.append(hidden)
        residuals.append(to_vector(free[b]) - to_vector(hidden))
        violations.append(constraint(params, hidden, free[b]))
    residual, loss, violation = jnp.stack(residuals), sum(losses), sum(violations)
    value = loss + penalty * violation
    if multipliers is not None:
        value = value + jnp.sum(jnp.asarray(multipliers) * residual)
    return Objective(value, loss, violation, predicted, residual, losses, aux)


class Gradients(NamedTuple):
    """∇L at one point, as real vectors.

    Attributes:
      at: the `Objective` there.
      params: (p + q,).
      free: (N, n).
    """

    at: Objective
    params: np.ndarray
    free: np.ndarray


@cache
def _differentiated(system: Any, block_length: int, constraint: Any, loss_on: str) -> Callable[..., Any]:
    """Compiled, because the same loop is differentiated many times."""

    @jax.jit
    def gradients(
        params: Any, start: Any, free: list[Any], inputs: Any, penalty: Any, multipliers: Any
    ) -> Any:
        def by_vectors(theta: jax.Array, rows: list[jax.Array]) -> Any:
            states = [from_vector(row, like) for row, like in zip(rows, free, strict=True)]
            terms = objective(
                system, from_vector(theta, params), start, states, inputs, block_length=block_length,
                penalty=penalty, multipliers=multipliers, constraint=constraint, loss_on=loss_on,
            )  # fmt: skip
            return terms.value, terms

        rows = [to_vector(state) for state in free]
        (_, terms), bars = jax.value_and_grad(by_vectors, (0, 1), has_aux=True)(to_vector(params), rows)
        return terms, bars

    return gradients


def gradients(
    system: Any,
    params: Any,
    start: Any,
    free: list[Any],
    inputs: Any,
    *,
    block_length: int,
    penalty: Any,
    multipliers: Any,
    constraint: Any = quadratic,
    loss_on: str = "predicted",
) -> Gradients:
    """∂L/∂params and ∂L/∂H; ∂L/∂y is the residual."""
    differentiated = _differentiated(system, block_length, constraint, loss_on)
    terms, (theta, rows) = differentiated(params, start, free, inputs, penalty, jnp.asarray(multipliers))
    return Gradients(terms, np.asarray(theta), np.stack(rows))


# The whole update.


class Settings(NamedTuple):
    """What one run of target propagation is made of; optimisers are optax's, on real vectors.

    Attributes:
      penalty: ``count of updates -> λ``.
      forget: a wrong one: multipliers begin at zero in every window.
    """

    block_length: int
    penalty: Callable[[int], float]
    method: str = "admm"
    hidden_steps: int = 1
    hidden_optimizer: Any = optax.sgd(0.1)
    dual_optimizer: Any = optax.sgd(1.0)
    constraint: Any = quadratic
    loss_on: str = "predicted"
    initial: str = "forward"
    num_blocks: int | None = None
    forget: bool = False


@dataclass
class Block:
    """What is kept of one block of the data set."""

    free: Any
    multiplier: np.ndarray
    hidden_optimizer: Any
    dual_optimizer: Any
    visited: bool = False


class Result(NamedTuple):
    """What one update returns; `grads` in jax's convention for complex leaves."""

    loss: float
    grads: Any
    primal_residual: float
    dual_residual: float
    constraint: float
    penalty: float


class TargetPropagation:
    """One learner: `update` walks through the data set, window by window."""

    def __init__(self, system: Any, settings: Settings, hidden: Any) -> None:
        self.system, self.settings = system, settings
        self.first, self.hidden = hidden, hidden
        self.count, self.position = 0, 0
        self.blocks = [self._fresh() for _ in range(settings.num_blocks or 0)]

    def _fresh(self) -> Block:
        zeros = to_vector(self.first) * 0
        optimizers = self.settings.hidden_optimizer, self.settings.dual_optimizer
        return Block(self.first, np.asarray(zeros), *(optimizer.init(zeros) for optimizer in optimizers))

    def update(self, params: Any, inputs: Any) -> Result:
        settings = self.settings
        window, true_end = self._window(params, inputs)
        penalty = float(settings.penalty(self.count))
        forward, joint = settings.initial == "forward", settings.method == "augmented_lagrangian"
        has_duals = settings.method != "penalty" and settings.num_blocks is not None
        for _ in range(settings.hidden_steps - joint):
            self._hidden_step(window, self._gradients(params, window, inputs, penalty))
        if has_duals and not forward:  # H is kept: the cycle H, θ, y, entered at y
            now = self._gradients(params, window, inputs, penalty)
            self._dual_step(window, penalty, np.asarray(now.at.residual))
        last = self._gradients(params, window, inputs, penalty)
        after = last
        if joint and settings.hidden_steps:
            self._hidden_step(window, last)
            after = self._gradients(params, window, inputs, penalty)
        if has_duals and forward and settings.hidden_steps:
            self._dual_step(window, penalty, np.asarray(after.at.residual))
        self._leave(window, after.at, true_end)
        return Result(
            loss=float(last.at.loss),
            grads=from_vector(last.params, params, conjugate=True),
            primal_residual=float(np.sqrt(np.sum(np.asarray(last.at.residual) ** 2))),
            dual_residual=float(np.sqrt(np.sum(last.free**2))),
            constraint=float(last.at.constraint),
            penalty=penalty,
        )

    def _window(self, params: Any, inputs: Any) -> tuple[list[Block], Any]:
        """The blocks of this window with the H that the update begins at, and the true state at its end."""
        settings = self.settings
        ends = forward_states(self.system, params, self.hidden, inputs, settings.block_length)
        if settings.num_blocks is None:
            window = [self._fresh() for _ in ends]
        else:
            window = self.blocks[self.position : self.position + len(ends)]
        for block, end in zip(window, ends, strict=True):
            if settings.initial == "forward" or not block.visited:
                block.free = end
            if settings.initial == "forward":  # H is new, and so is what its optimiser knows
                block.hidden_optimizer = settings.hidden_optimizer.init(to_vector(end))
            if settings.forget:
                block.multiplier = block.multiplier * 0
            block.visited = True
        return window, ends[-1]

    def _gradients(self, params: Any, window: list[Block], inputs: Any, penalty: float) -> Gradients:
        settings = self.settings
        free, multipliers = [b.free for b in window], [b.multiplier for b in window]
        return gradients(
            self.system, params, self.hidden, free, inputs, block_length=settings.block_length,
            penalty=penalty, multipliers=np.stack(multipliers), constraint=settings.constraint,
            loss_on=settings.loss_on,
        )  # fmt: skip

    def _hidden_step(self, window: list[Block], at: Gradients) -> None:
        """Gradient descent on every free state, each with the optimiser's state of its own block."""
        for block, gradient in zip(window, at.free, strict=True):
            old = to_vector(block.free)
            optimizer = self.settings.hidden_optimizer
            step, block.hidden_optimizer = optimizer.update(gradient, block.hidden_optimizer, old)
            block.free = from_vector(old + step, block.free)

    def _dual_step(self, window: list[Block], penalty: float, residual: np.ndarray) -> None:
        """y ← y + dual step of λ r (errata 25): an optimiser descends, so it is given −λ r."""
        for block, row in zip(window, residual, strict=True):
            optimizer, old = self.settings.dual_optimizer, block.multiplier
            step, block.dual_optimizer = optimizer.update(-penalty * row, block.dual_optimizer, old)
            block.multiplier = np.asarray(old + step)

    def _leave(self, window: list[Block], last: Objective, true_end: Any) -> None:
        """Moves on to the next window; at the end of the data set, to its beginning."""
        self.count += 1
        if self.settings.initial == "predicted":
            for block, predicted in zip(window, last.predicted, strict=True):
                block.free = predicted
        self.hidden = true_end if self.settings.initial == "forward" else window[-1].free
        if self.settings.num_blocks is not None:
            self.position = (self.position + len(window)) % self.settings.num_blocks
            if self.position == 0:
                self.hidden = self.first
