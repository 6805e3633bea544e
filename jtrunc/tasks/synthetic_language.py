"""A small language whose entropy rate is known exactly.

A `Language` is a finite-state source whose next state follows from the state and the symbol. It starts in
a known state, so whoever has read x₁ … xₜ knows the state, and the best possible loss is the entropy rate

    h = Σₛ π(s) H(P(· | s)),   π the stationary distribution (nats a symbol).

`brackets` is one: nested brackets of several kinds up to a depth, with letters in between that depend on
the innermost bracket. What closes a bracket, and which letters are likely after it, is known from an
arbitrarily distant past: a model without memory cannot reach h.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.tasks.arguments import require_count, require_key, require_probability

_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))
_LETTERS = "abc"


class Language(NamedTuple):
    """A finite-state source with S states and A symbols.

    Attributes:
      symbols: A characters; token i stands for ``symbols[i]``.
      probabilities: (S, A), of the next symbol in a state; rows sum to one.
      successors: (S, A) integers, the next state; unread where the probability is 0.
      initial: the state in which every stream starts.
    """

    symbols: str
    probabilities: np.ndarray
    successors: np.ndarray
    initial: int = 0

    def decode(self, tokens: np.ndarray | jax.Array) -> str:
        """The text of tokens (N,)."""
        return "".join(self.symbols[int(token)] for token in np.asarray(tokens))


def brackets(
    depth: int = 3,
    kinds: int = 2,
    open_probability: float = 0.1,
    close_probability: float = 0.15,
    agreement: float = 0.9,
) -> Language:
    """Nested brackets with letters: the state is the stack of open brackets.

    At each step a bracket opens (with `open_probability`, its kind uniform; never below `depth`), the
    innermost one closes (with `close_probability`), or a letter comes: the one that belongs to the
    innermost bracket with probability `agreement`, else another; any of them outside all brackets.

    Raises:
      TypeError: if `depth` or `kinds` is not a whole number.
      ValueError: if `depth` < 1, `kinds` is not 2 or 3, a probability is not strictly between 0 and 1, or
        opening and closing leave no room for letters.

    Example:

      >>> from jtrunc.tasks import synthetic_language
      >>> language = synthetic_language.brackets(depth=1)
      >>> language.symbols, language.probabilities.shape
      ('([)]ab', (3, 6))
      >>> round(synthetic_language.entropy_rate(language), 6)
      0.89055
    """
    depth, kinds = require_count("depth", depth), require_count("kinds", kinds, minimum=2)
    if kinds > len(_BRACKETS):
        raise ValueError(f"kinds must be 2 or 3, got {kinds}; there are three pairs of brackets")
    opening = require_probability("open_probability", open_probability)
    closing = require_probability("close_probability", close_probability)
    agreement = require_probability("agreement", agreement)
    if opening + closing >= 1.0:
        raise ValueError(
            f"open_probability + close_probability = {opening + closing} leaves no letters; keep it below 1"
        )
    stacks = [stack for n in range(depth + 1) for stack in itertools.product(range(kinds), repeat=n)]
    index = {stack: i for i, stack in enumerate(stacks)}
    probabilities = np.zeros((len(stacks), 3 * kinds))
    successors = np.repeat(np.arange(len(stacks), dtype=np.int32)[:, None], 3 * kinds, axis=1)
    for i, stack in enumerate(stacks):
        if len(stack) < depth:
            probabilities[i, :kinds] = opening / kinds
            successors[i, :kinds] = [index[(*stack, kind)] for kind in range(kinds)]
        letters = np.full(kinds, 1.0 / kinds)
        if stack:
            probabilities[i, kinds + stack[-1]] = closing
            successors[i, kinds + stack[-1]] = index[stack[:-1]]
            letters = np.full(kinds, (1.0 - agreement) / (kinds - 1))
            letters[stack[-1]] = agreement
        probabilities[i, 2 * kinds :] = (1.0 - probabilities[i].sum()) * letters
    pairs = _BRACKETS[:kinds]
    symbols = "".join(left for left, _ in pairs) + "".join(right for _, right in pairs) + _LETTERS[:kinds]
    return Language(symbols, probabilities, successors)


def stationary_distribution(language: Language) -> np.ndarray:
    """π with π P = π, Σ π = 1: how often each state is visited in the long run; float64, (S,).

    Raises:
      ValueError: if the language is malformed, or if π is not unique.
    """
    _check(language)
    num_states = len(language.probabilities)
    transition = np.zeros((num_states, num_states))
    for symbol in range(len(language.symbols)):
        np.add.at(
            transition,
            (np.arange(num_states), language.successors[:, symbol]),
            language.probabilities[:, symbol],
        )
    # The equations π (P − 1) = 0 add up to 0 = 0: one of them makes room for Σ π = 1.
    equations = transition.T - np.eye(num_states)
    equations[-1] = 1.0
    if np.linalg.cond(equations, 1) > 1e12:
        raise ValueError("the language has several separate parts; join them so that one π exists")
    return np.linalg.solve(equations, np.eye(num_states)[-1])


def entropy_rate(language: Language) -> float:
    """h = Σₛ π(s) H(P(· | s)), the least possible loss, in nats a symbol.

    A stream starts in a known state and not in the stationary distribution, so the expected loss of its
    first steps differs from h; the difference fades geometrically.
    """
    return float(stationary_distribution(language) @ _entropy(language.probabilities))


def entropy_rate_bits(language: Language) -> float:
    """`entropy_rate` in bits a symbol."""
    return entropy_rate(language) / math.log(2.0)


def memoryless_entropy(language: Language) -> float:
    """The entropy of one symbol on its own, in nats: the least loss of a predictor that reads nothing."""
    return float(_entropy(stationary_distribution(language) @ language.probabilities))


def sequences(
    key: jax.Array, num_steps: int, num_streams: int, *, language: Language | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws independent streams; a step's target is the next step's input.

    Args:
      key: a typed key; the same key gives the same data, in float32 and with x64 alike.
      num_steps: T ≥ 1.
      num_streams: B ≥ 1.
      language: the source; `brackets()` by default.

    Returns:
      (inputs, targets), each int32 of shape (T, B).

    Raises:
      TypeError: if the key is not a typed key, or a count not a whole number.
      ValueError: if a count is below 1, or the language is malformed.

    Example:

      >>> import jax
      >>> from jtrunc.tasks import synthetic_language
      >>> inputs, targets = synthetic_language.sequences(jax.random.key(0), 40, 2)
      >>> inputs.shape, bool((inputs[1:] == targets[:-1]).all())
      ((40, 2), True)
    """
    language = brackets() if language is None else language
    _check(language)
    num_steps = require_count("num_steps", num_steps)
    num_streams = require_count("num_streams", num_streams)
    with np.errstate(divide="ignore"):
        logits = np.log(language.probabilities).astype(np.float32)
    states = np.full(num_streams, language.initial, np.int32)
    tokens = _draw(require_key(key), logits, language.successors.astype(np.int32), states, num_steps + 1)
    return tokens[:-1], tokens[1:]


@partial(jax.jit, static_argnames="num_tokens")
def _draw(
    key: jax.Array, logits: jax.Array, successors: jax.Array, states: jax.Array, num_tokens: int
) -> jax.Array:
    """Tokens (num_tokens, B), int32; a symbol of probability 0 has logit −∞ and never comes."""

    def step(states: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        symbols = jax.random.categorical(key, logits[states]).astype(jnp.int32)
        return successors[states, symbols], symbols

    return jax.lax.scan(step, states, jax.random.split(key, num_tokens))[1]


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """−Σ p log p over the last axis, nats, with 0 log 0 = 0."""
    return -np.sum(probabilities * np.log(np.where(probabilities > 0.0, probabilities, 1.0)), axis=-1)


def _check(language: Language) -> None:
    """Raises a ValueError if the parts of a language do not fit together."""
    probabilities, successors = language.probabilities, language.successors
    shape = (len(probabilities), len(language.symbols))
    if probabilities.shape != shape or successors.shape != shape or 0 in shape:
        raise ValueError(
            f"probabilities {probabilities.shape} and successors {successors.shape} must both be"
            f" (states, symbols) with {shape[1]} symbols"
        )
    if not (np.all(probabilities >= 0.0) and np.allclose(probabilities.sum(axis=1), 1.0, rtol=0, atol=1e-9)):
        raise ValueError("the rows of probabilities must be non-negative and sum to one; normalise them")
    within = np.all((successors >= 0) & (successors < shape[0]))
    if not (within and np.issubdtype(successors.dtype, np.integer)):
        raise ValueError(f"successors must be integers from 0 to {shape[0] - 1}, the indices of the states")
    if not 0 <= language.initial < shape[0]:
        raise ValueError(f"initial must be a state from 0 to {shape[0] - 1}, got {language.initial}")
