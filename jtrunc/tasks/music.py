"""A synthetic music notation with syntactic, rhythmic and harmonic constraints, and its entropy rate.

Phrases of four bars, one a line; read ``4e`` as a note e of four eighths:

    C 4e2g2c|D 2f2a4d|G 8g|C 4c4c

- Syntax: a bar is a chord, a blank, and notes, each a duration and a pitch; a bar line ends the first three
  bars of a phrase, a newline the fourth.
- Rhythm: the durations of a bar, 1, 2, 4 or 8 eighths, add up to 8, and a note of d eighths begins at a
  multiple of d (so an eighth on a beat is followed by one off the beat). They have the weights `DURATIONS`
  among those that fit.
- Harmony: pitches are tones of the bar's triad (`TRIADS`: root, third, fifth). The first of a bar is
  chosen by `FIRST_TONE`, each other one from the tone before it by `NEXT_TONE`. Chords follow each other by
  `PROGRESSION`: the tonic C or its relative minor A, then any, then the subdominant F or the dominant G,
  then C or A again. The last note of a phrase is the root of its chord.

The state (bar, chord, eighths so far, last tone, what comes next) follows from the characters read, and a
phrase begins where the stream does. So the best possible loss is h = Σₛ π(s) H(P(· | s)), with π the
stationary distribution of the states, exactly: `entropy_rate_bits`, 0.932 bits a character. Phrases are
independent of each other, so h is also the entropy of a phrase divided by its mean length.

The weights, like the grammar, are this library's own; the idea is Example 3 of Ollivier, "Riemannian metrics
for neural networks II" (2015), the first data set of the NoBackTrack paper (2015), about 10⁵ characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jtrunc.tasks import synthetic_language
from jtrunc.tasks.synthetic_language import Language
from jtrunc.tasks.text import Vocabulary

_EIGHTHS = 8

DURATIONS = {8: 1.0, 4: 4.0, 2: 3.0, 1: 2.0}
"""Weights of a note's length in eighths, before those that do not fit are left out."""

TRIADS = {"C": "ceg", "D": "dfa", "F": "fac", "G": "gbd", "A": "ace"}
"""Root, third and fifth of each chord."""

FIRST_TONE = (0.6, 0.25, 0.15)
"""Probabilities of root, third, fifth for the first note of a bar."""

NEXT_TONE = ((0.1, 0.6, 0.3), (0.45, 0.1, 0.45), (0.3, 0.6, 0.1))
"""Probabilities of root, third, fifth after root, third, fifth."""

PROGRESSION: tuple[Mapping[str, Mapping[str, float]], ...] = (
    {"": {"C": 0.75, "A": 0.25}},
    {
        "C": {"F": 0.35, "D": 0.25, "A": 0.25, "G": 0.15},
        "A": {"D": 0.5, "F": 0.4, "C": 0.1},
    },
    {
        "C": {"G": 0.7, "F": 0.3},
        "D": {"G": 1.0},
        "F": {"G": 0.8, "F": 0.2},
        "G": {"F": 0.5, "G": 0.5},
        "A": {"F": 0.6, "G": 0.4},
    },
    {"F": {"C": 1.0}, "G": {"C": 0.85, "A": 0.15}},
)
"""For each bar of a phrase the probabilities of its chord, given the chord before it."""

_LAST_BAR = len(PROGRESSION) - 1

VOCABULARY = Vocabulary(
    "".join(sorted({"\n", " ", "|", *TRIADS, *"".join(TRIADS.values()), *map(str, DURATIONS)}))
)
"""Nineteen symbols: newline, blank, four durations, five chords, seven pitches and the bar line."""


def language() -> Language:
    """The notation as a finite-state source; its symbols are those of `VOCABULARY`.

    Example:

      >>> from jtrunc.tasks import music
      >>> music.language().probabilities.shape
      (549, 19)
    """
    choices: dict[_State, dict[str, tuple[float, _State]]] = {}
    waiting = [_State("chord")]
    while waiting:
        state = waiting.pop()
        if state not in choices:
            choices[state] = _choices(state)
            waiting.extend(after for _, after in choices[state].values())
    index = {state: i for i, state in enumerate(choices)}
    symbols = VOCABULARY.symbols
    probabilities = np.zeros((len(choices), len(symbols)))
    successors = np.zeros((len(choices), len(symbols)), np.int32)
    for i, of_state in enumerate(choices.values()):
        for symbol, (probability, after) in of_state.items():
            probabilities[i, symbols.index(symbol)] = probability
            successors[i, symbols.index(symbol)] = index[after]
    return Language(symbols, probabilities, successors)


def entropy_rate_bits() -> float:
    """h = Σₛ π(s) H(P(· | s)), the least possible loss, in bits a character.

    >>> from jtrunc.tasks import music
    >>> round(music.entropy_rate_bits(), 6)
    0.932396
    """
    return synthetic_language.entropy_rate_bits(language())


def sequences(key: jax.Array, num_steps: int = 100_000, num_streams: int = 1) -> tuple[jax.Array, jax.Array]:
    """Draws independent streams of music; a step's target is the next step's input.

    Every stream begins with a phrase, and is cut where it ends.

    Args:
      key: a typed key; the same key gives the same data, in float32 and with x64 alike.
      num_steps: T ≥ 1.
      num_streams: B ≥ 1.

    Returns:
      (inputs, targets), each int32 of shape (T, B), tokens of `VOCABULARY`.

    Raises:
      TypeError: if the key is not a typed key, or a count not a whole number.
      ValueError: if a count is below 1.

    Example:

      >>> import jax
      >>> from jtrunc.tasks import music
      >>> inputs, targets = music.sequences(jax.random.key(0), 43)
      >>> music.VOCABULARY.decode(inputs[:, 0])
      'A 4a2e2c|F 2a2c1a1c2a|G 1b1b1d1b4b|C 2c2e4c'
    """
    return synthetic_language.sequences(key, num_steps, num_streams, language=language())


class _State(NamedTuple):
    """What the characters so far say about those to come; a field that says nothing is as at first.

    Attributes:
      expects: "chord", "blank", "duration", "pitch" or "end".
      bar: of the phrase, from 0 to 3.
      chord: of this bar, or of the one before while a chord is expected.
      eighths: how many of the bar are full, the note whose pitch is expected included.
      tone: of the last note of this bar: 0 root, 1 third, 2 fifth.
    """

    expects: str
    bar: int = 0
    chord: str = ""
    eighths: int = 0
    tone: int | None = None


def _choices(state: _State) -> dict[str, tuple[float, _State]]:
    """The symbols that may come, with their probabilities and the states they lead to."""
    if state.expects == "chord":
        law = PROGRESSION[state.bar][state.chord]
        return {chord: (p, state._replace(expects="blank", chord=chord)) for chord, p in law.items()}
    if state.expects == "blank":
        return {" ": (1.0, state._replace(expects="duration"))}
    if state.expects == "duration":
        fitting = {d: weight for d, weight in DURATIONS.items() if state.eighths % d == 0}
        total = sum(fitting.values())
        return {
            str(d): (weight / total, state._replace(expects="pitch", eighths=state.eighths + d))
            for d, weight in fitting.items()
        }
    if state.expects == "pitch":
        return _pitches(state)
    if state.bar == _LAST_BAR:
        return {"\n": (1.0, _State("chord"))}
    return {"|": (1.0, _State("chord", state.bar + 1, state.chord))}


def _pitches(state: _State) -> dict[str, tuple[float, _State]]:
    """The tones of the chord; only the root where a phrase ends."""
    law = FIRST_TONE if state.tone is None else NEXT_TONE[state.tone]
    after = [state._replace(expects="duration", tone=tone) for tone in range(3)]
    if state.eighths == _EIGHTHS:
        after = [_State("end", state.bar, state.chord)] * 3
        law = (1.0, 0.0, 0.0) if state.bar == _LAST_BAR else law
    tones = zip(TRIADS[state.chord], law, after, strict=True)
    return {pitch: (p, then) for pitch, p, then in tones if p > 0.0}
