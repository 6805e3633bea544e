"""The music notation: every rule by a parser of its own, the entropy rate by two calculations of its own."""

from __future__ import annotations

import functools
import math
import re

import jax
import numpy as np
import pytest

from jtrunc.experiments import parts
from jtrunc.tasks import music, synthetic_language

CHORDS = "CDFGA"
LINE = "C 4e2g2c|D 2f2a4d|G 8g|C 4c4c\n"


def entropy(law) -> float:
    return -sum(p * math.log2(p) for p in law if p > 0)


def durations(eighths: int) -> dict[int, float]:
    """The law of the next duration once so many eighths of a bar are full."""
    fitting = {d: weight for d, weight in music.DURATIONS.items() if eighths % d == 0}
    return {d: weight / sum(fitting.values()) for d, weight in fitting.items()}


def losses_of_bar(bar: str, place: int, chord_before: str) -> list[float]:
    """−log₂ p of the characters of a bar but the last; an AssertionError where a rule is broken."""
    assert re.fullmatch(r"[ACDFG] ([1248][a-g])+", bar), "syntax"
    chord, notes = bar[0], re.findall(r"([1248])([a-g])", bar)
    law = music.PROGRESSION[place][chord_before]
    assert chord in law, "harmony: progression"
    probabilities, begun, tone = [law[chord], 1.0], 0, None
    for number, pitch in notes:
        duration = int(number)
        assert begun % duration == 0 and begun + duration <= 8, "rhythm"
        probabilities.append(durations(begun)[duration])
        begun += duration
        assert pitch in music.TRIADS[chord], "harmony: triad"
        before, tone = tone, music.TRIADS[chord].index(pitch)
        if place == 3 and begun == 8:
            assert tone == 0, "harmony: cadence"
            probabilities.append(1.0)
        else:
            probabilities.append((music.FIRST_TONE if before is None else music.NEXT_TONE[before])[tone])
    assert begun == 8, "rhythm: bar not full"
    return [-math.log2(p) for p in probabilities]


def losses_of_phrase(line: str) -> list[float]:
    """−log₂ p of each character of a line and its newline."""
    bars = line.split("|")
    assert len(bars) == 4, "syntax: four bars"
    losses, chord = [], ""
    for place, bar in enumerate(bars):
        losses += [*losses_of_bar(bar, place, chord), 0.0]
        chord = bar[0]
    return losses


def test_a_bar_by_hand() -> None:
    """C 0.75; durations of weights 4 of 10, 3 of 9, 3 of 5; third 0.25, then fifth 0.45, then root 0.3."""
    bits = -math.log2(0.75 * (4 / 10 * 0.25) * (3 / 9 * 0.45) * (3 / 5 * 0.3))
    np.testing.assert_allclose(sum(losses_of_bar("C 4e2g2c", 0, "")), bits, rtol=1e-12)
    assert abs(sum(losses_of_bar("C 4c2e2g", 0, "")) - bits) > 0.1


BROKEN = {
    "syntax": ("C 4e", "C4e"),
    "syntax: order": ("4e2g", "e42g"),
    "syntax: four bars": ("|G 8g", ""),
    "syntax: chord": ("D 2f2a4d", "D 2f2a4D"),
    "rhythm: too long": ("4e2g2c", "4e4g2c"),
    "rhythm: too short": ("4e2g2c", "4e2g"),
    "rhythm: off the beat": ("4e2g2c", "2e4g2c"),
    "harmony: triad": ("2f2a4d", "2f2g4d"),
    "harmony: progression": ("G 8g", "D 8d"),
    "harmony: cadence": ("C 4c4c", "C 4c4e"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_the_parser_and_the_source_refuse_what_breaks_a_rule(rule: str) -> None:
    good, bad = BROKEN[rule]
    broken = LINE.replace(good, bad)
    assert broken != LINE
    with pytest.raises(AssertionError):
        losses_of_phrase(broken[:-1])
    assert math.isfinite(walk(LINE)) and walk(broken) == math.inf


def walk(text: str) -> float:
    """−log₂ of the probability that the source gives to a text."""
    source = music.language()
    state, bits = source.initial, 0.0
    for token in music.VOCABULARY.encode(text):
        probability = source.probabilities[state, token]
        if probability == 0:
            return math.inf
        bits -= math.log2(probability)
        state = source.successors[state, token]
    return bits


@functools.cache
def rhythm(eighths: int = 0) -> tuple[float, dict[int, float]]:
    """Entropy (bits) of the rest of a bar's rhythm, and the law of how many notes are still to come."""
    if eighths == 8:
        return 0.0, {0: 1.0}
    law = durations(eighths)
    bits, counts = entropy(law.values()), {}
    for duration, p in law.items():
        rest, notes = rhythm(eighths + duration)
        bits += p * rest
        for n, q in notes.items():
            counts[n + 1] = counts.get(n + 1, 0.0) + p * q
    return bits, counts


def pitches(number: int) -> float:
    """Entropy (bits) of so many pitches in a row."""
    law, bits = np.array(music.FIRST_TONE), 0.0
    for i in range(number):
        bits += entropy(law) if i == 0 else law @ [entropy(row) for row in music.NEXT_TONE]
        law = law if i == 0 else law @ np.array(music.NEXT_TONE)
    return float(bits)


def renewal_rate() -> float:
    """H(phrase) / E[length of a phrase]: a phrase is chords, rhythms and pitches, one after the other."""
    bits, chords = 0.0, {"": 1.0}
    for law in music.PROGRESSION:
        after: dict[str, float] = {}
        for chord, p in chords.items():
            bits += p * entropy(law[chord].values())
            for follower, q in law[chord].items():
                after[follower] = after.get(follower, 0.0) + p * q
        chords = after
    of_rhythm, counts = rhythm()
    bits += 4 * of_rhythm
    bits += sum(p * (3 * pitches(n) + pitches(n - 1)) for n, p in counts.items())
    return bits / (4 * (3 + 2 * sum(p * n for n, p in counts.items())))


def test_entropy_rate_is_that_of_a_phrase_by_its_length() -> None:
    np.testing.assert_allclose(music.entropy_rate_bits(), renewal_rate(), rtol=1e-10)


def test_another_grammar_has_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = music.entropy_rate_bits()
    monkeypatch.setattr(music, "FIRST_TONE", (0.5, 0.3, 0.2))
    np.testing.assert_allclose(music.entropy_rate_bits(), renewal_rate(), rtol=1e-10)
    assert abs(music.entropy_rate_bits() - rate) > 1e-3


def test_the_tables_are_laws_and_the_chords_are_triads() -> None:
    laws = [law.values() for bar in music.PROGRESSION for law in bar.values()]
    for law in (*laws, music.FIRST_TONE, *music.NEXT_TONE):
        assert abs(sum(law) - 1) < 1e-12 and min(law) > 0
    scale = "cdefgab"
    for chord, tones in music.TRIADS.items():
        root = scale.index(chord.lower())
        assert tones == "".join(scale[(root + step) % 7] for step in (0, 2, 4))
    assert sorted(music.TRIADS) == sorted(CHORDS) and music.VOCABULARY.size == 19
    assert music.VOCABULARY.symbols == music.language().symbols == "".join(sorted(music.VOCABULARY.symbols))


@pytest.fixture(scope="module")
def text() -> str:
    """The 10⁵ characters of the default."""
    inputs, targets = music.sequences(jax.random.key(3))
    assert inputs.shape == targets.shape == (100_000, 1) and inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    return music.VOCABULARY.decode(np.asarray(inputs)[:, 0])


def test_every_phrase_keeps_every_rule_and_their_loss_is_the_rate(text: str) -> None:
    """Phrases are independent: with r = Σ loss − h Σ length, z = r̄ √n / σ; |z| < 5 but once in 10⁶ runs."""
    phrases = [losses_of_phrase(line) for line in text.split("\n")[:-1]][:2000]
    assert len(phrases) == 2000

    def z(rate: float) -> float:
        rest = np.array([sum(losses) - rate * len(losses) for losses in phrases])
        return abs(rest.mean()) / rest.std(ddof=1) * math.sqrt(len(rest))

    rate = music.entropy_rate_bits()
    assert z(rate) < 5
    # A rate that is 2 % off must be seen.
    assert z(1.02 * rate) > 5 and z(0.98 * rate) > 5


def test_the_source_gives_a_text_the_probability_that_the_parser_gives(text: str) -> None:
    lines = text.split("\n")[:20]
    expected = sum(sum(losses_of_phrase(line)) for line in lines)
    np.testing.assert_allclose(walk("\n".join(lines) + "\n"), expected, rtol=1e-10)


def test_streams_differ_and_a_key_gives_the_same(keys: jax.Array) -> None:
    inputs = np.asarray(music.sequences(keys[0], 200, 2)[0])
    assert (inputs[:, 0] != inputs[:, 1]).any()
    np.testing.assert_array_equal(inputs, music.sequences(keys[0], 200, 2)[0])
    assert (inputs != music.sequences(keys[1], 200, 2)[0]).any()
    with pytest.raises(TypeError, match="typed key"):
        music.sequences(0, 5)  # pyright: ignore
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        music.sequences(keys[0], 0)


def test_it_cannot_be_predicted_without_memory() -> None:
    memoryless = synthetic_language.memoryless_entropy(music.language()) / math.log(2)
    assert memoryless > 3 * music.entropy_rate_bits()


def test_the_command_line_knows_it() -> None:
    tokens = parts.TASKS["music"](None, steps=400)
    train, valid, test = (part(2)[0] for part in (tokens.train, tokens.valid, tokens.test))
    assert train.shape == (200, 2) and valid.shape == test.shape == (50, 2)
    assert (valid != test).any() and tokens.num_classes == 19 and "0.9324" in tokens.summary
    assert tokens.vocabulary is not None
    assert tokens.vocabulary.decode(np.asarray(train)[:, 0])[1] == " "
