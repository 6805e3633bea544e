"""aⁿbⁿ: its entropy rates against an explicit Markov chain, its text against a parser, and the score."""

from __future__ import annotations

import math
from itertools import groupby

import jax
import numpy as np
import pytest

from jtrunc.experiments import parts
from jtrunc.tasks import counting
from tests.compare import python_calls

RANGES = [(1, 32), (1, 2), (3, 7), (10, 11)]


def chain_rate(shortest: int, longest: int, independent: bool) -> float:
    """Σ π(s) H(next | s) of the chain of (letter, how many were read, how many there will be or None)."""
    states: list[tuple[str, int, int | None]] = [("a", 0, None)]
    moves = []
    for letter, read, total in states:
        left = range(max(read, shortest), longest + 1) if total is None else [total]
        stop = sum(n == read for n in left) / len(left)
        after = ("a", 0, None) if letter == "b" else ("b", 0, None if independent else read)
        moves.append({after: stop, (letter, read + 1, total): 1 - stop})
        states += [state for state, p in moves[-1].items() if p > 0 and state not in states]
    transition = np.array([[move.get(state, 0.0) for state in states] for move in moves])
    system = transition.T - np.eye(len(states))
    system[-1] = 1.0
    occupancy = np.linalg.solve(system, np.eye(len(states))[-1])
    return float(-occupancy @ np.sum(transition * np.log2(np.where(transition > 0, transition, 1)), axis=1))


@pytest.mark.parametrize("bounds", RANGES)
def test_entropy_rates_are_those_of_the_markov_chain(bounds: tuple[int, int]) -> None:
    rate, independent = counting.entropy_rate_bits(*bounds), counting.independent_entropy_rate_bits(*bounds)
    np.testing.assert_allclose(rate, chain_rate(*bounds, independent=False), rtol=1e-10)
    np.testing.assert_allclose(independent, chain_rate(*bounds, independent=True), rtol=1e-10)
    assert abs(rate - chain_rate(bounds[0], bounds[1] + 1, independent=False)) > 1e-3 * rate


def test_the_numbers_of_the_paper() -> None:
    """Errata 21."""
    assert round(counting.entropy_rate_bits(), 6) == 0.142857
    assert round(counting.independent_entropy_rate_bits(), 6) == 0.285714


def read(text: str) -> list[int]:
    """The n of every whole block; fails on anything that is not aⁿbⁿ."""
    numbers, runs = [], [(symbol, len(list(run))) for symbol, run in groupby(text)]
    for block in range(0, len(runs) - 3, 4):
        (a, n), (first, one), (b, p), (second, other) = runs[block : block + 4]
        assert (a, first, b, second) == ("a", "\n", "b", "\n") and one == other == 1 and n == p
        numbers.append(n)
    rest = runs[4 * len(numbers) :]
    assert all(symbol == expected for (symbol, _), expected in zip(rest, "a\nb", strict=False))
    return numbers


@pytest.mark.parametrize("bounds", RANGES)
def test_streams_are_blocks_and_n_is_uniform(key: jax.Array, bounds: tuple[int, int]) -> None:
    """P(χ² > d + 2 √(16 d) + 32) < e⁻¹⁶ for d degrees of freedom (Laurent & Massart)."""
    inputs, targets = counting.sequences(key, 20_001, 8, shortest=bounds[0], longest=bounds[1])
    assert inputs.shape == targets.shape == (20_001, 8) and inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    texts = [counting.VOCABULARY.decode(stream) for stream in inputs.T]
    assert len(set(texts)) == 8
    # The last blocks of a text are short more often; the first 400 are not chosen by their length.
    numbers = np.concatenate([read(text)[:400] for text in texts])
    kinds = bounds[1] - bounds[0] + 1

    def chi_squared(numbers: np.ndarray) -> float:
        counts = np.bincount(numbers - bounds[0], minlength=kinds)
        return float(np.sum((counts - len(numbers) / kinds) ** 2) / (len(numbers) / kinds))

    limit = kinds - 1 + 8 * math.sqrt(kinds - 1) + 32
    assert len(numbers) == 3200 and chi_squared(numbers) < limit
    # A source that never draws l must be seen.
    assert chi_squared(np.where(numbers == bounds[1], bounds[0], numbers)) > limit


def test_any_length_and_where_it_is_cut(key: jax.Array) -> None:
    for num_steps in range(1, 14):
        _, targets = counting.sequences(key, num_steps, 1, shortest=2, longest=2)
        assert counting.VOCABULARY.decode(targets[:, 0]) == ("aa\nbb\n" * 3)[1 : num_steps + 1]


def test_same_key_same_data(keys: jax.Array) -> None:
    inputs = counting.sequences(keys[0], 300, 2).inputs
    np.testing.assert_array_equal(inputs, counting.sequences(keys[0], 300, 2).inputs)
    assert (inputs != counting.sequences(keys[1], 300, 2).inputs).any()
    with jax.enable_x64(False):
        np.testing.assert_array_equal(inputs, counting.sequences(keys[0], 300, 2).inputs)


def test_characters_are_made_without_a_loop_over_them(key: jax.Array) -> None:
    assert python_calls(lambda: counting.sequences(key, 10**6)) < 10**6 / 2


SCORES = {
    "": (0, 0, 0),
    "aa\nbb\naaa\nbbb\n": (2, 2, 2),
    "aa\nbb\naaa\nbb": (1, 1, 1),
    "aa\nbb\naaa\nbb\n": (2, 2, 1),
    "aa\nbbb": (1, 0, 0),
    "aa\nbb\naaaaa": (2, 1, 1),
    "aaaaa\nbbbbb\n": (1, 1, 0),
    "a\nb\nb\na\nb\n": (2, 1, 1),
    "aa\naa\nbb\na": (2, 1, 1),
    "aba\nbb\n": (1, 0, 0),
    "bb\naa\nbb\n": (2, 1, 1),
    "aa\n\nbb\na\nb\n": (2, 1, 1),
    "\n\n\n": (1, 0, 0),
    "a?": (1, 0, 0),
}


@pytest.mark.parametrize("text", SCORES)
def test_score(text: str) -> None:
    blocks = counting.score(text, longest=4)
    assert blocks == SCORES[text]
    if blocks.num_blocks:
        assert blocks.fraction == blocks.num_well_formed / blocks.num_blocks
    else:
        assert math.isnan(blocks.fraction)


def test_true_text_scores_one_and_other_sources_less(key: jax.Array) -> None:
    text = counting.VOCABULARY.decode(counting.sequences(key, 5000, shortest=2, longest=9).inputs[:, 0])
    assert counting.score(text, shortest=2, longest=9).fraction == 1.0
    assert counting.score(text, shortest=3, longest=9).fraction < 0.95
    lines = text.split("\n")[:-1]
    shuffled = "\n".join(lines[::2][i] + "\n" + lines[1::2][i - 1] for i in range(len(lines) // 2)) + "\n"
    blocks = counting.score(shuffled, shortest=2, longest=9)
    assert blocks.num_in_shape == blocks.num_blocks and blocks.fraction < 0.3


ERRORS = [
    (lambda: counting.entropy_rate_bits(0, 3), ValueError, "shortest must be at least 1, got 0"),
    (lambda: counting.entropy_rate_bits(4, 3), ValueError, "longest must be at least 4, got 3"),
    (lambda: counting.score("a", shortest=2.5), TypeError, "shortest must be a whole number"),  # pyright: ignore
    (lambda: counting.sequences(jax.random.key(0), 0), ValueError, "num_steps must be at least 1"),
    (lambda: counting.sequences(jax.random.key(0), 5, 0), ValueError, "num_streams must be at least 1"),
    (lambda: counting.sequences(3, 5), TypeError, "key must be a typed key"),  # pyright: ignore
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_command_line_knows_it() -> None:
    tokens = parts.TASKS["anbn"](None, shortest=2, longest=3, steps=800)
    train, valid, test = (part(2)[0] for part in (tokens.train, tokens.valid, tokens.test))
    assert train.shape == (400, 2) and valid.shape == test.shape == (100, 2)
    assert (valid != test).any() and tokens.num_classes == 3 and tokens.vocabulary is not None
    assert set(read(tokens.vocabulary.decode(np.asarray(train)[:, 0]))) == {2, 3}
    assert "0.1429 bits a character, of aⁿbᵖ 0.2857" in tokens.summary
