"""What general compressors reach on a text, in bits a character: gzip, and context-tree weighting (CTW).

Context-tree weighting predicts with a Bayesian mixture over all tree sources of bounded depth: trees whose
leaves are contexts (the last few tokens, the latest first), each with a distribution of its own and a KT
(Dirichlet) prior on it. A tree with I inner nodes and L leaves above the largest depth has the prior
2^−(I + L). The sum over all trees, of which there are doubly exponentially many, is exact, by

    P_w(s) = P_e(s)                              at the largest depth,
    P_w(s) = ½ P_e(s) + ½ Πₓ P_w(x s)            above it,

with P_e(s) the KT probability of the tokens that followed the context s. The code length of a text is
−log₂ P_w of the empty context. Here it is computed online: every token is predicted before it is read.

Sources: Willems, Shtarkov & Tjalkens, "The context-tree weighting method: basic properties" (1995); the
decomposition into binary decisions: Begleiter, El-Yaniv & Yona, "On prediction using variable order Markov
models" (2004), the context-tree weighting that the NoBackTrack paper (2015) compares with.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jtrunc.tasks.arguments import require_count


def gzip_bits(text: str) -> float:
    """Bits a character of ``gzip -9`` on the UTF-8 bytes of a text, its 18 bytes of header included.

    Raises:
      ValueError: if the text is empty.

    Example:

      >>> from jtrunc.tasks import compression
      >>> compression.gzip_bits("ab" * 5000) < 0.05
      True
    """
    if not text:
        raise ValueError("text is empty; bits a character need at least one character")
    return 8 * len(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0)) / len(text)


def context_tree_weighting(
    tokens: np.ndarray | Sequence[int],
    num_symbols: int,
    depth: int,
    *,
    decomposed: bool = True,
    pseudo_count: float = 0.5,
) -> np.ndarray:
    """The code length of every token, given those before it, under context-tree weighting.

    The sum of the first n is the code length of the first n tokens, whatever follows them; bits a token
    against tokens read are ``np.cumsum(bits) / np.arange(1, len(bits) + 1)``. A context is the last
    `depth` tokens; the place before the first token counts as a context symbol of its own.

    - ``decomposed=True``: a token is the ⌈log₂ A⌉ bits of its number, the highest first. Each bit, after
      each value of the higher ones, has a context tree of its own: A − 1 binary trees.
    - ``decomposed=False``: one tree with P_e(x) = (nₓ + ½)/(n + A/2). For A = 2 the same; for large A
      slower to learn, as the prior of every context weighs as much as A/2 tokens.

    Time O(A-ary: T D log T; decomposed: log₂ A times as much), memory O(T D): 10⁵ characters of 61 kinds
    at depth 10 take 0.3 s, or 2 s decomposed, and 10⁶ ten to twenty times as long, with 0.2 GB.

    Args:
      tokens: integers from 0 to A − 1, (T,), T ≥ 1.
      num_symbols: A ≥ 2, known in advance.
      depth: D ≥ 0, the length of the longest context.
      decomposed: into binary decisions, as is usual for text.
      pseudo_count: of the Dirichlet prior, in each of its A (or 2) entries; ½ is the KT estimator.

    Returns:
      bits, float64, (T,).

    Raises:
      TypeError: if the tokens are not integers, or a count is not a whole number.
      ValueError: if there are no tokens, or some out of range, or more than one axis; if a count is too
        small; if `pseudo_count` is not positive and finite.

    Example: KT predicts a constant with 1/2, 3/4, 5/6, …

      >>> from jtrunc.tasks import compression
      >>> (2.0 ** -compression.context_tree_weighting([0, 0, 0], num_symbols=2, depth=0)).round(6).tolist()
      [0.5, 0.75, 0.833333]
    """
    tokens, num_symbols, depth = _check(tokens, num_symbols, depth, pseudo_count)
    contexts = _contexts(tokens, num_symbols, depth)
    if not decomposed:
        return _code_lengths(contexts, tokens, num_symbols, pseudo_count)
    bits = np.zeros(len(tokens))
    for place in range((num_symbols - 1).bit_length()):
        decision, bit = tokens >> (place + 1), tokens >> place & 1
        # Where no token of the alphabet has a one here, the zero is no decision.
        is_open = (2 * decision + 1) << place < num_symbols
        trees = [(context * num_symbols + decision)[is_open] for context in contexts]
        bits[is_open] += _code_lengths(trees, bit[is_open], 2, pseudo_count)
    return bits


def _contexts(tokens: np.ndarray, num_symbols: int, depth: int) -> list[np.ndarray]:
    """The number of the node, at each depth from 0 to D, in which each token is counted: (T,) each."""
    padded = np.concatenate([np.full(depth, num_symbols), tokens])
    nodes = [np.zeros(len(tokens), np.int64)]
    for back in range(1, depth + 1):
        latest = padded[depth - back : len(padded) - back]
        longer = nodes[-1] * (num_symbols + 1) + latest
        nodes.append(np.unique(longer, return_inverse=True)[1])
    return nodes


def _code_lengths(nodes: list[np.ndarray], symbols: np.ndarray, num_symbols: int, prior: float) -> np.ndarray:
    """−log₂ P(xₜ | x₁ … xₜ₋₁), (T,), for all t at once, from the deepest nodes up.

    With β = P_e / Πₓ P_w(child x), both of the symbols counted in a node before t, the node predicts

      P_w(xₜ) = (β P_e(xₜ) + P_w,child(xₜ)) / (β + 1).

    Only the child in which xₜ is counted changes: β takes the factor P_e(xₜ) / P_w,child(xₜ).
    """
    log_weighted = None
    for node in reversed(nodes):
        groups = _group(node)
        num_before = _count_before(groups)
        num_alike = _count_before(_group(node * num_symbols + symbols))
        log_estimate = np.log((num_alike + prior) / (num_before + num_symbols * prior))
        if log_weighted is None:
            log_weighted = log_estimate
            continue
        log_beta = _sum_before(groups, log_estimate - log_weighted)
        log_weighted = np.logaddexp(log_beta + log_estimate, log_weighted) - np.logaddexp(log_beta, 0.0)
    assert log_weighted is not None
    return -log_weighted / math.log(2.0)


class _Groups(NamedTuple):
    """Entries ordered by group, in a group by time, and for each place where its group begins: (T,)."""

    order: np.ndarray
    first: np.ndarray


def _group(numbers: np.ndarray) -> _Groups:
    """Groups the entries that have the same number."""
    order = np.argsort(numbers, kind="stable")
    ordered, places = numbers[order], np.arange(len(numbers))
    begins = np.append(True, ordered[1:] != ordered[:-1])[: len(numbers)]
    return _Groups(order, np.maximum.accumulate(np.where(begins, places, 0)))


def _count_before(groups: _Groups) -> np.ndarray:
    """How many entries of the same group came before each, (T,)."""
    counts = np.empty_like(groups.order)
    counts[groups.order] = np.arange(len(counts)) - groups.first
    return counts


def _sum_before(groups: _Groups, values: np.ndarray) -> np.ndarray:
    """The sum of the values of the same group that came before each, (T,)."""
    total = np.append(0.0, np.cumsum(values[groups.order]))
    sums = np.empty_like(values)
    sums[groups.order] = total[:-1] - total[groups.first]
    return sums


def _check(
    tokens: np.ndarray | Sequence[int], num_symbols: int, depth: int, pseudo_count: float
) -> tuple[np.ndarray, int, int]:
    """The arguments of `context_tree_weighting` as integers, or an error."""
    tokens = np.asarray(tokens)
    num_symbols = require_count("num_symbols", num_symbols, minimum=2)
    depth = require_count("depth", depth, minimum=0)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}; encode the text first")
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens must be one sequence of at least one, got shape {tokens.shape}; pass (T,)")
    if tokens.min() < 0 or tokens.max() >= num_symbols:
        raise ValueError(
            f"tokens must lie from 0 to {num_symbols - 1}, got {tokens.min()} to {tokens.max()};"
            " is num_symbols the size of their vocabulary?"
        )
    if not 0.0 < pseudo_count < math.inf:
        raise ValueError(f"pseudo_count must be positive and finite, got {pseudo_count}; pass e.g. 0.5")
    return tokens.astype(np.int64), num_symbols, depth
