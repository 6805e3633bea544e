"""The synthetic language against closed forms, exhaustive enumeration, and a parser of its own."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jtrunc.tasks import synthetic_language
from jtrunc.tasks.synthetic_language import Language


def entropy(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities)


def birth_and_death_rate(depth: int, kinds: int, opening: float, closing: float, agreement: float) -> float:
    """h from the depth alone, a birth-death chain: π(d + 1) closing = π(d) opening."""
    weights = [(opening / closing) ** d for d in range(depth + 1)]
    letter = entropy(agreement) + (1 - agreement) * (math.log(kinds - 1) - math.log(1 - agreement))
    outside = entropy(opening, 1 - opening) + math.log(kinds)
    between = entropy(opening, closing, 1 - opening - closing)
    between += opening * math.log(kinds) + (1 - opening - closing) * letter
    deepest = entropy(closing, 1 - closing) + (1 - closing) * letter
    rates = [outside, *[between] * (depth - 1), deepest]
    return sum(w * r for w, r in zip(weights, rates, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    "arguments",
    [(3, 2, 0.1, 0.15, 0.9), (1, 2, 0.3, 0.3, 0.5), (2, 3, 0.4, 0.2, 0.7), (5, 2, 0.05, 0.5, 0.2)],
)
def test_entropy_rate_is_the_closed_form(arguments: tuple[int, int, float, float, float]) -> None:
    language = synthetic_language.brackets(*arguments)
    expected = birth_and_death_rate(*arguments)
    np.testing.assert_allclose(synthetic_language.entropy_rate(language), expected, rtol=1e-12)
    np.testing.assert_allclose(
        synthetic_language.entropy_rate_bits(language), expected / math.log(2), rtol=1e-12
    )


def block_entropies(language: Language, longest: int) -> list[float]:
    """H(x₁ … xₙ) for n = 1 … longest, by listing every string with its probability."""
    strings = {"": (1.0, language.initial)}
    entropies = []
    for _ in range(longest):
        strings = {
            text + symbol: (p * language.probabilities[state, i], int(language.successors[state, i]))
            for text, (p, state) in strings.items()
            for i, symbol in enumerate(language.symbols)
            if language.probabilities[state, i] > 0
        }
        entropies.append(-sum(p * math.log(p) for p, _ in strings.values()))
    return entropies


def test_entropy_rate_is_the_growth_of_block_entropies() -> None:
    language = synthetic_language.brackets(depth=1, open_probability=0.4, close_probability=0.5)
    growth = np.diff(block_entropies(language, 9))
    errors = np.abs(growth - synthetic_language.entropy_rate(language))
    # The depth forgets its start at rate 1 − 0.4 − 0.5 = 0.1 a step.
    assert errors[-1] < 1e-8
    np.testing.assert_allclose(errors[1:4] / errors[:3], 0.1, rtol=1e-6)


def test_memoryless_entropy() -> None:
    """As many brackets close as open, kinds are alike: the frequencies follow from that of the depth."""
    language = synthetic_language.brackets()
    weights = [(0.1 / 0.15) ** d for d in range(4)]
    opened = 0.1 * sum(weights[:3]) / sum(weights)
    expected = entropy(*[opened / 2] * 4, *[0.5 - opened] * 2)
    np.testing.assert_allclose(synthetic_language.memoryless_entropy(language), expected, rtol=1e-12)
    assert expected > synthetic_language.entropy_rate(language)


def parse(text: str, depth: int = 3, opening: float = 0.1, closing: float = 0.15, agreement: float = 0.9):
    """−log p of every symbol of a text of `brackets()`, from a stack; fails on an impossible symbol."""
    partner, letter_of = {")": "(", "]": "["}, {"(": "a", "[": "b"}
    stack: list[str] = []
    losses = []
    for symbol in text:
        if symbol in "([":
            assert len(stack) < depth
            probability = opening / 2
            stack.append(symbol)
        elif symbol in partner:
            assert stack.pop() == partner[symbol]
            probability = closing
        else:
            probability = 1 - (opening if len(stack) < depth else 0) - (closing if stack else 0)
            agrees = bool(stack) and letter_of[stack[-1]] == symbol
            probability *= 0.5 if not stack else agreement if agrees else 1 - agreement
        losses.append(-math.log(probability))
    return losses


def test_generated_text_is_in_the_language_and_has_its_entropy(key: jax.Array) -> None:
    """The mean of −log p over 64 independent streams: a z-test, |z| < 5 fails by chance once in 10⁶."""
    language = synthetic_language.brackets()
    inputs, targets = synthetic_language.sequences(key, 1999, 64)
    tokens = np.concatenate([inputs[:1], targets])
    means = np.array([np.mean(parse(language.decode(stream))) for stream in tokens.T])
    standard_error = means.std(ddof=1) / math.sqrt(64)
    z = (means.mean() - synthetic_language.entropy_rate(language)) / standard_error
    assert abs(z) < 5
    # A rate that is 2 % off must be seen.
    assert abs(means.mean() - 1.02 * synthetic_language.entropy_rate(language)) / standard_error > 5


def test_shapes_shift_and_determinism(keys: jax.Array) -> None:
    inputs, targets = synthetic_language.sequences(keys[0], 50, 3)
    assert inputs.shape == targets.shape == (50, 3)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    np.testing.assert_array_equal(inputs, synthetic_language.sequences(keys[0], 50, 3)[0])
    assert (inputs != synthetic_language.sequences(keys[1], 50, 3)[0]).any()


def test_same_data_without_x64(key: jax.Array) -> None:
    wide = synthetic_language.sequences(key, 200, 2)[0]
    with jax.enable_x64(False):
        narrow = synthetic_language.sequences(key, 200, 2)[0]
    np.testing.assert_array_equal(wide, narrow)


def test_a_language_of_ones_own() -> None:
    """After a comes a or b, after b always a: the golden-mean source with p = 1/2, h = 2/3 log 2."""
    language = Language("ab", np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0, 1], [0, 0]]))
    np.testing.assert_allclose(
        synthetic_language.stationary_distribution(language), [2 / 3, 1 / 3], rtol=1e-12
    )
    np.testing.assert_allclose(synthetic_language.entropy_rate_bits(language), 2 / 3, rtol=1e-12)
    inputs, _ = synthetic_language.sequences(jax.random.key(0), 500, 1, language=language)
    assert "bb" not in language.decode(inputs[:, 0])
