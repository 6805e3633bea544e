"""aⁿbⁿ: count the a's, then write as many b's.

A stream is a chain of blocks, each with an n of its own, drawn uniformly from k … l:

    a … a ⏎ b … b ⏎      (n letters a, a newline, n letters b, a newline)

Who counts needs log₂(l − k + 1) bits a block of k + l + 2 characters on average, all of them for the a's:

    h = log₂(l − k + 1) / (k + l + 2)  bits a character.

Who knows the shape of a block, but not that the two numbers agree (the source aⁿbᵖ with n and p
independent), needs as many bits again for the b's: 2h. On [1; 32] that is 0.142857 and 0.285714.

Source: "Training recurrent networks online without backtracking" (2015), section 2, with [k; l] = [1; 32]
and about 10⁶ characters (errata 21).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.tasks.arguments import require_count, require_key
from jtrunc.tasks.text import Lanes, Vocabulary

VOCABULARY = Vocabulary("\nab")
"""Newline 0, a 1, b 2."""


def entropy_rate_bits(shortest: int = 1, longest: int = 32) -> float:
    """log₂(l − k + 1) / (k + l + 2), the least possible loss on aⁿbⁿ, in bits a character.

    Raises:
      TypeError: if k or l is not a whole number.
      ValueError: if k < 1 or l < k.

    Example:

      >>> from jtrunc.tasks import counting
      >>> round(counting.entropy_rate_bits(1, 32), 6), counting.entropy_rate_bits(5, 5)
      (0.142857, 0.0)
    """
    shortest, longest = _range(shortest, longest)
    return math.log2(longest - shortest + 1) / (shortest + longest + 2)


def independent_entropy_rate_bits(shortest: int = 1, longest: int = 32) -> float:
    """2 log₂(l − k + 1) / (k + l + 2): of aⁿbᵖ with independent n and p, in bits a character.

    Also the loss on aⁿbⁿ of the predictor that is best for aⁿbᵖ: it counts, but never compares.

      >>> from jtrunc.tasks import counting
      >>> round(counting.independent_entropy_rate_bits(1, 32), 6)
      0.285714
    """
    return 2.0 * entropy_rate_bits(shortest, longest)


def sequences(
    key: jax.Array, num_steps: int, num_streams: int = 1, *, shortest: int = 1, longest: int = 32
) -> Lanes:
    """Draws independent streams of aⁿbⁿ; a step's target is the next step's input.

    Every stream begins with a block; its last block is cut where the stream ends. Costs a few hundredths
    of a second for 10⁶ characters.

    Args:
      key: a typed key; the same key gives the same data, in float32 and with x64 alike.
      num_steps: T ≥ 1.
      num_streams: B ≥ 1.
      shortest: k ≥ 1, the least n.
      longest: l ≥ k, the greatest n.

    Returns:
      `Lanes`, a pair (inputs, targets), int32, (T, B), tokens of `VOCABULARY`.

    Raises:
      TypeError: if the key is not a typed key, or a count not a whole number.
      ValueError: if a count is below 1, or l < k.

    Example:

      >>> import jax
      >>> from jtrunc.tasks import counting
      >>> inputs, targets = counting.sequences(jax.random.key(0), 12, shortest=2, longest=2)
      >>> counting.VOCABULARY.decode(inputs[:, 0])
      'aa\\nbb\\naa\\nbb\\n'
    """
    shortest, longest = _range(shortest, longest)
    num_steps = require_count("num_steps", num_steps)
    num_streams = require_count("num_streams", num_streams)
    num_blocks = num_steps // (2 * shortest + 2) + 1
    shape = (num_streams, num_blocks)
    numbers = jax.random.randint(require_key(key), shape, shortest, longest + 1, jnp.int32)
    streams = np.stack([_write(row, num_steps + 1) for row in np.asarray(numbers)], axis=1)
    return Lanes(streams[:-1], streams[1:])


class Blocks(NamedTuple):
    """What a text of blocks is worth.

    Attributes:
      num_blocks: how many there are.
      num_in_shape: how many of them are some a's, a newline, some b's, a newline.
      num_well_formed: how many of those have as many b's as a's, a number from k to l.
    """

    num_blocks: int
    num_in_shape: int
    num_well_formed: int

    @property
    def fraction(self) -> float:
        """Of the blocks that are well formed; nan if there are no blocks."""
        return self.num_well_formed / self.num_blocks if self.num_blocks else math.nan


def score(text: str, *, shortest: int = 1, longest: int = 32) -> Blocks:
    """Counts the well-formed blocks of a text, say of a model's sample.

    A block begins where the text does and at each a after a newline, so that a fault spoils one block
    only. A last block that could still become well formed was cut, and is left out.

    Args:
      text: any characters; a sample that begins inside a block counts that one as malformed.
      shortest: k ≥ 1.
      longest: l ≥ k.

    Raises:
      TypeError: if k or l is not a whole number.
      ValueError: if k < 1 or l < k.

    Example: one good block, one with a b too many, one that is cut.

      >>> from jtrunc.tasks import counting
      >>> counting.score("aa\\nbb\\na\\nbb\\naaa\\nb")
      Blocks(num_blocks=2, num_in_shape=2, num_well_formed=1)
    """
    shortest, longest = _range(shortest, longest)
    blocks = re.split(r"(?<=\n)(?=a)", text)
    if _may_go_on(blocks[-1], shortest, longest):
        blocks.pop()
    shapes = [match for block in blocks if (match := re.fullmatch(r"(a+)\n(b+)\n", block))]
    lengths = [(len(match[1]), len(match[2])) for match in shapes]
    good = sum(n == p and shortest <= n <= longest for n, p in lengths)
    return Blocks(len(blocks), len(shapes), good)


def _write(numbers: np.ndarray, num_tokens: int) -> np.ndarray:
    """The first `num_tokens` tokens of the blocks with these n: int32."""
    ends = np.cumsum(2 * numbers.astype(np.int64) + 2)
    numbers = numbers[: np.searchsorted(ends, num_tokens) + 1]
    ones = np.ones_like(numbers)
    pieces = np.tile(VOCABULARY.encode("a\nb\n"), len(numbers))
    return np.repeat(pieces, np.stack([numbers, ones, numbers, ones], axis=1).ravel())[:num_tokens]


def _may_go_on(text: str, shortest: int, longest: int) -> bool:
    """Whether a text is a beginning, but not the whole, of a well-formed block."""
    match = re.fullmatch(r"(a*)(\n?)(b*)", text)
    if match is None:
        return False
    num_a, newline, num_b = len(match[1]), match[2], len(match[3])
    return num_a <= longest and (not num_b if not newline else shortest <= num_a and num_b <= num_a)


def _range(shortest: int, longest: int) -> tuple[int, int]:
    """(k, l) as integers with 1 ≤ k ≤ l, or an error."""
    shortest = require_count("shortest", shortest)
    return shortest, require_count("longest", longest, minimum=shortest)
