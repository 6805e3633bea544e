"""What each figure of the NoBackTrack paper compares, and what the paper says came out.

A claim is judged by a rule on the numbers of all seeds, stated beside it; nothing is judged by eye.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

import jtrunc
from jtrunc import optimizers
from jtrunc.experiments.nobacktrack_runs import WIDTH, Curve, Method, Text, finite_or_inf
from jtrunc.optimizers import scale_by_timestep_schedule
from jtrunc.tasks import compression, corpora, counting, music

RANKS = (1, 2, 10)
TRUNCATION = 15
SHORTEST, LONGEST = 1, 32
DATA_SEED = 1000
CTW_CHARACTERS = 300_000
"""Context-tree weighting reads the beginning of a longer file: it takes time N log N and much memory."""

Curves = Mapping[str, Curve]

BPTT = f"truncated BPTT T={TRUNCATION}"
RTRL = "RTRL"
KALMAN_RTRL = "Kalman RTRL"


def euclidean(rank: int) -> str:
    """The name of NoBackTrack of this rank, Euclidean."""
    return f"NoBackTrack rank {rank}"


def kalman(rank: int) -> str:
    """The name of NoBackTrack of this rank with QDOP."""
    return f"Kalman NoBackTrack rank {rank}"


class Claim(NamedTuple):
    """A sentence of section 2, and the rule by which the numbers decide.

    Attributes:
      text: the claim, in short.
      rule: in words; "final" is the average of the last tenth of a run, its median over seeds.
      holds: ``(curves, levels) -> whether the rule is met``.
    """

    text: str
    rule: str
    holds: Callable[[Curves, Mapping[str, float]], bool]


class Figure(NamedTuple):
    """An experiment.

    Attributes:
      title: of the picture.
      steps: characters of a run, unless the user says otherwise.
      text: ``(path of a text or None, quick) -> Text``.
      methods: what is compared.
      claims: what the paper says.
    """

    title: str
    steps: int
    text: Callable[[Path | None, bool], Text]
    methods: tuple[Method, ...]
    claims: tuple[Claim, ...]


def descent(rate: float) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with rate/√t, t in characters, from 1."""
    schedule = optimizers.inverse_square_root(rate)
    return optax.chain(scale_by_timestep_schedule(lambda t: schedule(t - 1)), optax.scale(-1.0))


def _euclidean(rate: float) -> tuple[Method, ...]:
    ranks = [Method(euclidean(k), partial(jtrunc.nobacktrack, rank=k), descent(rate)) for k in RANKS]
    return (*ranks, Method(RTRL, jtrunc.rtrl, descent(rate)))


def _kalman(*ranks: int) -> list[Method]:
    return [Method(kalman(k), partial(jtrunc.nobacktrack, rank=k, norms="kalman"), _QDOP) for k in ranks]


_QDOP = optimizers.qdop(prior=float(WIDTH))
_KALMAN_RTRL = Method(KALMAN_RTRL, jtrunc.rtrl, _QDOP)
_RTRL = Method(RTRL, jtrunc.rtrl, descent(1.0))
_BPTT = Method(BPTT, partial(jtrunc.truncated_bptt, length=TRUNCATION), descent(1.0), TRUNCATION)


def _median(curve: Curve) -> float:
    return float(np.median(curve.final))


def _lowest(curves: Curves, name: str = "") -> float:
    return min(_median(curve) for label, curve in curves.items() if name in label)


def _within(part: float, value: float, reference: float) -> bool:
    return bool(abs(value - reference) <= part * reference)


def _follows(curve: Curve, other: Curve, part: float) -> bool:
    """Whether the median stays within a part of another's in the last decade of characters."""
    late = curve.characters[curve.characters >= curve.characters[-1] / 10]
    return all(_within(part, curve.median_at(c), other.median_at(c)) for c in late)


def _is_stable(curve: Curve) -> bool:
    """Every seed finite, and the median at the end no more than a tenth above its lowest point."""
    median = np.median(finite_or_inf(curve.bits), axis=1)
    return bool(np.isfinite(curve.bits).all() and median[-1] <= 1.1 * median.min())


def _ctw(levels: Mapping[str, float]) -> float:
    return next(level for label, level in levels.items() if label.startswith("CTW"))


_NONE_REACHES_CTW = Claim(
    "no recurrent network matches CTW",
    "all finals above CTW",
    lambda curves, levels: _lowest(curves) > _ctw(levels),
)

UNSTABLE = (
    Claim(
        "at 1/√t NoBackTrack is unstable, whatever its rank",
        "finals of all ranks more than 10 % above RTRL's",
        lambda curves, _: _lowest(curves, "NoBackTrack") > 1.1 * _median(curves[RTRL]),
    ),
)
TRACKS = (
    Claim(
        "at 0.03/√t NoBackTrack tracks RTRL, even at rank 2",
        "ranks 2 and 10 within 5 % of RTRL in the last decade of characters, which ends 10 % below its start",
        lambda curves, _: (
            _median(curves[RTRL]) < 0.9 * curves[RTRL].median_at(1)
            and all(_follows(curves[euclidean(k)], curves[RTRL], 0.05) for k in RANKS[1:])
        ),
    ),
)
FIXED = (
    Claim(
        "QDOP fixes the instability",
        "every seed of every rank finite, median at the end at most 10 % above its lowest",
        lambda curves, _: all(_is_stable(curves[kalman(k)]) for k in RANKS),
    ),
    Claim(
        "low ranks are on a par with QDOP RTRL",
        "finals of all ranks within 10 % of Kalman RTRL's",
        lambda curves, _: all(
            _within(0.1, _median(curves[kalman(k)]), _median(curves[KALMAN_RTRL])) for k in RANKS
        ),
    ),
    Claim(
        "no gain from higher ranks",
        "final of rank 10 within 5 % of rank 1's",
        lambda curves, _: _within(0.05, _median(curves[kalman(10)]), _median(curves[kalman(1)])),
    ),
    _NONE_REACHES_CTW,
)
COMPARABLE = (
    Claim(
        "truncated BPTT is better than Kalman NoBackTrack",
        "final below those of all ranks",
        lambda curves, _: _median(curves[BPTT]) < _lowest(curves, "Kalman NoBackTrack"),
    ),
    Claim(
        "yet the two are broadly comparable",
        "final within 20 % of the best rank's",
        lambda curves, _: _within(0.2, _median(curves[BPTT]), _lowest(curves, "Kalman NoBackTrack")),
    ),
    Claim(
        "RTRL and truncated BPTT are about on a par",
        "finals within 10 %",
        lambda curves, _: _within(0.1, _median(curves[BPTT]), _median(curves[RTRL])),
    ),
    _NONE_REACHES_CTW,
)
LONG_TERM = (
    Claim(
        "Kalman NoBackTrack ends below truncated BPTT",
        "final lower",
        lambda curves, _: _lowest(curves, "Kalman NoBackTrack") < _median(curves[BPTT]),
    ),
    Claim(
        "it mostly learns that n = p",
        "final nearer to the rate of aⁿbⁿ than to that of aⁿbᵖ",
        lambda curves, levels: 2 * _lowest(curves, "Kalman NoBackTrack") < levels["aⁿbⁿ"] + levels["aⁿbᵖ"],
    ),
    Claim(
        "truncated BPTT ends nearer to aⁿbᵖ",
        "final nearer to the rate of aⁿbᵖ than to that of aⁿbⁿ",
        lambda curves, levels: 2 * _median(curves[BPTT]) > levels["aⁿbⁿ"] + levels["aⁿbᵖ"],
    ),
    Claim(
        "RTRL is best, character for character",
        "lowest final is an RTRL's",
        lambda curves, _: _lowest(curves, "RTRL") == _lowest(curves),
    ),
)
ALL_ALIKE = (
    Claim(
        "all networks are alike",
        "finals within 10 % of the lowest",
        lambda curves, _: all(_within(0.1, _median(curve), _lowest(curves)) for curve in curves.values()),
    ),
    Claim(
        "all are much worse than CTW",
        "all finals more than 10 % above CTW",
        lambda curves, levels: _lowest(curves) > 1.1 * _ctw(levels),
    ),
)


def music_file(data: Path | None, quick: bool) -> Text:
    """10⁵ characters of synthetic music."""
    _refuse(data)
    tokens = np.asarray(music.sequences(jax.random.key(DATA_SEED), 10_000 if quick else 100_000)[0][:, 0])
    levels = {"entropy rate": music.entropy_rate_bits()}
    levels |= _compressors(tokens, music.VOCABULARY, depth=4 if quick else 16)
    return Text("synthetic music", tokens, music.VOCABULARY.size, levels)


def counting_file(data: Path | None, quick: bool) -> Text:
    """10⁶ characters of aⁿbⁿ[1;32]."""
    _refuse(data)
    size = 10_000 if quick else 1_000_000
    lanes = counting.sequences(jax.random.key(DATA_SEED), size, shortest=SHORTEST, longest=LONGEST)
    rates = counting.entropy_rate_bits, counting.independent_entropy_rate_bits
    levels = {name: rate(SHORTEST, LONGEST) for name, rate in zip(("aⁿbⁿ", "aⁿbᵖ"), rates, strict=True)}
    levels |= _compressors(lanes.inputs[:, 0], counting.VOCABULARY, depth=4 if quick else 40)
    name = f"aⁿbⁿ on [{SHORTEST}; {LONGEST}]"
    return Text(name, lanes.inputs[:, 0], counting.VOCABULARY.size, levels, leaky=True)


def english_file(data: Path | None, quick: bool) -> Text:
    """Shakespeare from a file or folder, or Python's own library in his place."""
    if data is None:
        print("Figure 6 wants Shakespeare: name a text with --data. Python's own library stands in for it.")
        corpus = corpora.python_standard_library(20_000 if quick else 1_000_000)
    else:
        corpus = corpora.shakespeare(data, max_characters=20_000 if quick else None)
    tokens = np.concatenate([corpus.train, corpus.valid, corpus.test])
    levels = _compressors(tokens, corpus.vocabulary, depth=4 if quick else 12)
    return Text(corpus.source.name, tokens, corpus.vocabulary.size, levels)


def _refuse(data: Path | None) -> None:
    if data is not None:
        raise ValueError(f"--data is for figure 6 only, but names {str(data)!r}: leave --data out")


def _compressors(tokens: np.ndarray, vocabulary: corpora.Vocabulary, depth: int) -> dict[str, float]:
    """Bits a character of gzip, and of context-tree weighting on the beginning of the file."""
    begin = tokens[:CTW_CHARACTERS]
    bits = compression.context_tree_weighting(begin, vocabulary.size, depth)
    part = "" if len(begin) == len(tokens) else f", first {CTW_CHARACTERS:,}"
    return {
        "gzip": compression.gzip_bits(vocabulary.decode(tokens)),
        f"CTW depth {depth}{part}": float(bits.mean()),
    }


FIGURES = {
    1: Figure("Euclidean, 1/√t", 300_000, music_file, _euclidean(1.0), UNSTABLE),
    2: Figure("Euclidean, 0.03/√t", 1_000_000, music_file, _euclidean(0.03), TRACKS),
    3: Figure("Kalman", 300_000, music_file, (*_kalman(*RANKS), _KALMAN_RTRL), FIXED),
    4: Figure("Kalman and BPTT", 300_000, music_file, (*_kalman(*RANKS), _RTRL, _BPTT), COMPARABLE),
    5: Figure("Leaky network", 1_000_000, counting_file, (*_kalman(1, 10), _KALMAN_RTRL, _BPTT), LONG_TERM),
    6: Figure("Kalman and BPTT", 1_000_000, english_file, (*_kalman(*RANKS), _RTRL, _BPTT), ALL_ALIKE),
}
