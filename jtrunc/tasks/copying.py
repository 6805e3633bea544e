"""The copy task: read m symbols, then write them.

A stream is a chain of blocks of 2m steps. With data symbols d₁ … d_m, blank − and recall #:

    x = d₁ … d_m # − … −      (m symbols, the recall symbol, m − 1 blanks)
    y = − … − d₁ … d_m        (m blanks, the symbols)

m is fixed, or drawn anew for every block. A reader that counts the symbols before # knows m, so yₜ is a
function of x₁ … xₜ for fixed and for variable m alike: the optimal perplexity is 1.0. Without memory of
the symbols, but with the phase known, it is √6 = 2.449 for 6 symbols (`memoryless_perplexity`).

Source: "Adaptively truncating backpropagation through time to control gradient bias" (2019), section 5.1,
with m = 10 or m uniform on 5 … 10, six symbols, training streams of 256,000 steps in all, 64,000 for
validation and 64,000 for test. The published data of variable length break their own rule in some per
cent of the targets; these do not (errata 14).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from jtrunc.tasks.arguments import require_count, require_key

OPTIMAL_PERPLEXITY = 1.0
"""exp of the mean loss (nats) of the best predictor, for any law of m."""


def num_classes(num_symbols: int = 6) -> int:
    """How many tokens there are: the data symbols 0 … I − 1, the blank I and the recall symbol I + 1."""
    return require_count("num_symbols", num_symbols) + 2


def memoryless_perplexity(num_symbols: int = 6) -> float:
    """√I: knows the phase, guesses the symbols (half of the targets), whatever the law of m."""
    return math.sqrt(require_count("num_symbols", num_symbols))


def sequences(
    key: jax.Array,
    num_steps: int,
    num_streams: int,
    *,
    length: int | tuple[int, int] = 10,
    num_symbols: int = 6,
) -> tuple[jax.Array, jax.Array]:
    """Draws independent streams of the copy task.

    Every stream begins with a block; its last block is cut where the stream ends. Two calls do not
    continue each other unless the first ends on a block's end: draw a stream in one call.

    Args:
      key: a typed key; the same key gives the same data.
      num_steps: T ≥ 1.
      num_streams: B ≥ 1.
      length: m, or (smallest, largest) for an m drawn uniformly for every block.
      num_symbols: I ≥ 1, the data symbols.

    Returns:
      (inputs, targets), each int32 of shape (T, B), tokens below `num_classes`.

    Raises:
      TypeError: if the key is not a typed key, or a count not a whole number.
      ValueError: if a count is below 1, or the smallest m above the largest.

    Example: two symbols 0 and 1, blank 2, recall 3.

      >>> import jax
      >>> from jtrunc.tasks import copying
      >>> inputs, targets = copying.sequences(jax.random.key(0), 8, 1, length=2, num_symbols=2)
      >>> inputs[2:4, 0].tolist(), targets[:2, 0].tolist()
      ([3, 2], [2, 2])
      >>> inputs[:2, 0].tolist() == targets[2:4, 0].tolist()
      True
    """
    shortest, longest = _length_range(length)
    num_steps = require_count("num_steps", num_steps)
    num_symbols = require_count("num_symbols", num_symbols)
    keys = jax.random.split(require_key(key), require_count("num_streams", num_streams))
    return _streams(keys, num_steps, shortest, longest, num_symbols)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _streams(
    keys: jax.Array, num_steps: int, shortest: int, longest: int, num_symbols: int
) -> tuple[jax.Array, jax.Array]:
    """`_stream` for each key, side by side: (T, B) each."""
    return jax.vmap(lambda key: _stream(key, num_steps, shortest, longest, num_symbols), out_axes=1)(keys)


def _stream(
    key: jax.Array, num_steps: int, shortest: int, longest: int, num_symbols: int
) -> tuple[jax.Array, jax.Array]:
    """One stream, (T,) each: the block and the phase of every step, then what is read and written there."""
    key_lengths, key_symbols = jax.random.split(key)
    num_blocks = -(-num_steps // (2 * shortest))
    lengths = jax.random.randint(key_lengths, (num_blocks,), shortest, longest + 1, jnp.int32)
    ends = jnp.cumsum(2 * lengths, dtype=jnp.int32)
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    block = jnp.searchsorted(ends, steps, side="right")
    length = lengths[block]
    phase = steps - (ends[block] - 2 * length)

    symbols = jax.random.randint(key_symbols, (num_steps,), 0, num_symbols, jnp.int32)
    blank, recall = jnp.int32(num_symbols), jnp.int32(num_symbols + 1)
    writing = phase >= length
    inputs = jnp.where(writing, jnp.where(phase == length, recall, blank), symbols)
    # The symbol to write at step t was read at t − m; the index is only out of range where it is unused.
    targets = jnp.where(writing, symbols[jnp.maximum(steps - length, 0)], blank)
    return inputs, targets


def _length_range(length: int | tuple[int, int]) -> tuple[int, int]:
    """(smallest m, largest m) of the argument `length`."""
    if not isinstance(length, tuple):
        fixed = require_count("length", length)
        return fixed, fixed
    if len(length) != 2:
        raise ValueError(f"length must be m or (smallest, largest), got {length!r}; pass e.g. (5, 10)")
    shortest = require_count("length[0]", length[0])
    longest = require_count("length[1]", length[1])
    if shortest > longest:
        raise ValueError(f"length = {length!r} has its smallest above its largest; pass (smallest, largest)")
    return shortest, longest
