"""Context-tree weighting against the sum over all tree sources, and as a code; gzip."""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib

import numpy as np
import pytest

from jtrunc.tasks import compression, counting
from jtrunc.tasks.compression import context_tree_weighting
from tests.compare import python_calls


def tree_sources(num_branches: int, depth: int) -> list[tuple[float, list[tuple[int, ...]]]]:
    """Every tree up to a depth: its prior 2^−(nodes above that depth), and its leaves, latest token first."""
    if depth == 0:
        return [(1.0, [()])]
    trees: list[tuple[float, list[tuple[int, ...]]]] = [(0.5, [()])]
    for children in itertools.product(tree_sources(num_branches, depth - 1), repeat=num_branches):
        prior = 0.5 * math.prod(p for p, _ in children)
        trees.append((prior, [(b, *leaf) for b, (_, leaves) in enumerate(children) for leaf in leaves]))
    return trees


def dirichlet(symbols: list[int], num_symbols: int, pseudo_count: float) -> float:
    """∫ Π θ(xₜ) Dirichlet(dθ) in closed form, by the Gamma function."""
    total = math.lgamma(num_symbols * pseudo_count)
    total -= math.lgamma(len(symbols) + num_symbols * pseudo_count)
    for symbol in range(num_symbols):
        total += math.lgamma(symbols.count(symbol) + pseudo_count) - math.lgamma(pseudo_count)
    return math.exp(total)


def mixture(tokens, events, num_symbols: int, num_branches: int, depth: int, pseudo_count: float) -> float:
    """Σ over trees of prior × Π over leaves of the Dirichlet probability of what was seen there.

    `events` are pairs (t, symbol): what is predicted after the context x₁ … xₜ₋₁ of `tokens`.
    """
    begin = num_branches - 1

    def seen(leaf: tuple[int, ...]) -> list[int]:
        past = [begin] * depth + list(tokens)
        return [x for t, x in events if all(past[depth + t - 1 - i] == c for i, c in enumerate(leaf))]

    probability = functools.cache(lambda leaf: dirichlet(seen(leaf), num_symbols, pseudo_count))
    trees = tree_sources(num_branches, depth)
    return sum(prior * math.prod(map(probability, leaves)) for prior, leaves in trees)


def test_there_are_as_many_trees_as_there_should_be() -> None:
    """T(D) = 1 + T(D − 1)^branches, and the priors are a distribution."""
    assert [len(tree_sources(3, depth)) for depth in range(4)] == [1, 2, 9, 730]
    assert abs(sum(prior for prior, _ in tree_sources(3, 3)) - 1) < 1e-12


CASES = [(2, 3, 9, 0.5), (2, 1, 14, 0.5), (3, 2, 12, 0.5), (3, 2, 12, 0.1), (4, 2, 8, 0.5), (2, 0, 7, 0.5)]


@pytest.mark.parametrize(("num_symbols", "depth", "length", "pseudo_count"), CASES)
def test_code_length_is_that_of_the_mixture_over_all_trees(num_symbols, depth, length, pseudo_count) -> None:
    tokens = random.Random(4).choices(range(num_symbols), k=length)
    bits = context_tree_weighting(tokens, num_symbols, depth, decomposed=False, pseudo_count=pseudo_count)
    for n in range(1, length + 1):
        events = list(enumerate(tokens[:n]))
        expected = mixture(tokens, events, num_symbols, num_symbols + 1, depth, pseudo_count)
        assert abs(bits[:n].sum() + math.log2(expected)) < 1e-10


def differences() -> dict[str, np.ndarray]:
    """Code lengths of one text that are not those of `context_tree_weighting(TEXT, 3, 2)`."""
    weigh = functools.partial(context_tree_weighting, decomposed=False)
    other = {"depth 1": weigh(TEXT, 3, 1), "depth 3": weigh(TEXT, 3, 3), "alphabet of 4": weigh(TEXT, 4, 2)}
    other["Laplace"] = weigh(TEXT, 3, 2, pseudo_count=1.0)
    other["decomposed"] = context_tree_weighting(TEXT, 3, 2)
    return other


TEXT = [0, 0, 1, 2, 0, 1, 2, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("change", list(differences()))
def test_another_model_gives_another_code_length(change: str) -> None:
    bits = context_tree_weighting(TEXT, 3, 2, decomposed=False)
    assert abs(bits.sum() - differences()[change].sum()) > 1e-3


@pytest.mark.parametrize("num_symbols", [3, 4, 5])
def test_decomposed_is_a_mixture_for_each_binary_decision(num_symbols: int) -> None:
    """The decisions are listed here from the intervals of the alphabet that they cut in two."""
    tokens = random.Random(1).choices(range(num_symbols), k=10)
    bits = context_tree_weighting(tokens, num_symbols, 2)
    expected = 0.0
    intervals, num_decisions = [(0, 8)], 0
    for low, high in intervals:
        middle = (low + high) // 2
        intervals += [(low, middle), (middle, high)] if high - low > 2 else []
        if middle < num_symbols:
            num_decisions += 1
            events = [(t, int(x >= middle)) for t, x in enumerate(tokens) if low <= x < high]
            expected -= math.log2(mixture(tokens, events, 2, num_symbols + 1, 2, 0.5))
    assert num_decisions == num_symbols - 1
    assert abs(bits.sum() - expected) < 1e-10


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("num_symbols", [2, 3, 5])
def test_it_is_a_code(num_symbols: int, decomposed: bool) -> None:
    """The probabilities of all strings of a length sum to one; what follows does not change a prefix."""
    weigh = functools.partial(context_tree_weighting, num_symbols=num_symbols, depth=2, decomposed=decomposed)
    strings = list(itertools.product(range(num_symbols), repeat=4))
    assert abs(sum(2.0 ** -weigh(string).sum() for string in strings) - 1) < 1e-12
    tokens = np.random.default_rng(0).integers(0, num_symbols, 300)
    np.testing.assert_allclose(weigh(tokens)[:100], weigh(tokens[:100]), rtol=1e-10)


def test_decomposition_of_two_symbols_is_nothing() -> None:
    tokens = np.random.default_rng(0).integers(0, 2, 200)
    plain = context_tree_weighting(tokens, 2, 4, decomposed=False)
    np.testing.assert_allclose(context_tree_weighting(tokens, 2, 4), plain, rtol=1e-12)


def redundancy_bound(num_steps: int) -> float:
    """Bits above a source of 4 leaves at depth 2: ½ log₂ n + 1 for a leaf, 1 for every node, 1 at the start.

    The tree has 3 inner nodes, 4 leaves that are used, and 3 for what came before the first two tokens.
    """
    return 4 * (0.5 * math.log2(num_steps / 4) + 1) + 10 + 2


def test_redundancy_of_a_tree_source_keeps_the_bound_of_willems() -> None:
    """P(1 | last two bits) = 0.9, 0.2, 0.6, 0.05: holds for every sequence, whatever is drawn."""
    law, generator = [0.9, 0.2, 0.6, 0.05], np.random.default_rng(0)
    tokens, ideal = [0, 0], [0.0, 0.0]
    for uniform in generator.random(20_000):
        p = law[2 * tokens[-1] + tokens[-2]]
        tokens.append(int(uniform < p))
        ideal.append(-math.log2(p if tokens[-1] else 1 - p))
    redundancy = np.cumsum(context_tree_weighting(tokens, 2, 8) - ideal)
    assert redundancy[-1] < redundancy_bound(20_000)
    shallow = np.cumsum(context_tree_weighting(tokens, 2, 1) - ideal)
    assert shallow[-1] > 10 * redundancy_bound(20_000)


def test_counting_needs_more_than_a_short_context(key) -> None:
    """aⁿbⁿ: no code is 30 bits shorter than the source's own but with probability 2⁻³⁰."""
    tokens = counting.sequences(key, 30_000, longest=6).inputs[:, 0]
    num_blocks = counting.score(counting.VOCABULARY.decode(tokens), longest=6).num_well_formed
    ideal = num_blocks * math.log2(6)
    shallow, deep = (context_tree_weighting(tokens, 3, depth).sum() for depth in (3, 14))
    assert ideal - 30 < deep < 1.1 * ideal
    assert shallow > 1.5 * ideal


def test_a_hundred_thousand_characters_are_coded_without_a_loop_over_them() -> None:
    tokens = np.minimum(np.random.default_rng(0).geometric(0.08, 100_000) - 1, 64)
    assert np.isfinite(context_tree_weighting(tokens, 65, 6)).all()
    few, many = (
        python_calls(lambda n=n: context_tree_weighting(tokens[:n], 65, 6)) for n in (1_000, 100_000)
    )
    assert many == few


def test_gzip() -> None:
    """The deflate stream, of the highest level, and 18 bytes around it; UTF-8 counts bytes."""
    text = "".join(random.Random(0).choices("abcdé\n", k=20_000))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = len(squeeze.compress(text.encode()) + squeeze.flush())
    assert compression.gzip_bits(text) == 8 * (size + 18) / 20_000
    assert math.log2(6) < compression.gzip_bits(text) < 8


ERRORS = [
    (lambda: compression.gzip_bits(""), ValueError, "text is empty"),
    (lambda: context_tree_weighting([], 2, 3), TypeError, "tokens must be integers, got float64"),
    (lambda: context_tree_weighting(np.zeros(0, int), 2, 3), ValueError, r"got shape \(0,\)"),
    (lambda: context_tree_weighting(np.zeros((3, 2), int), 2, 3), ValueError, r"got shape \(3, 2\)"),
    (lambda: context_tree_weighting([0, 2], 2, 3), ValueError, "from 0 to 1, got 0 to 2"),
    (lambda: context_tree_weighting([0, -1], 2, 3), ValueError, "from 0 to 1, got -1 to 0"),
    (lambda: context_tree_weighting([0], 1, 3), ValueError, "num_symbols must be at least 2, got 1"),
    (lambda: context_tree_weighting([0], 2, -1), ValueError, "depth must be at least 0, got -1"),
    (lambda: context_tree_weighting([0], 2, 1.5), TypeError, "depth must be a whole number"),  # pyright: ignore
    (lambda: context_tree_weighting([0], 2, 1, pseudo_count=0), ValueError, "pseudo_count must be positive"),
    (lambda: context_tree_weighting([0], 2, 1, pseudo_count=math.nan), ValueError, "pseudo_count must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
