"""The parts that the command line knows by name: tasks, cells, estimators, optimisers.

Keyword-only parameters are the options of a name: ``lstm:width=256,layers=2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import optax

import jtrunc
from jtrunc import cells, optimizers, tasks
from jtrunc.optimizers import inverse_square_root_decay
from jtrunc.tasks import copying, corpora, counting, synthetic_language, text

HIT_PROBABILITY = 1e-5
"""A default look-ahead is so long that a window of ARTBP is longer with this probability."""


class Tokens(NamedTuple):
    """A task of predicting tokens.

    Attributes:
      num_classes: how many tokens there are.
      train: ``num_streams -> (inputs, targets)``, int32, (T, B) each.
      valid: the same, of data that are not trained on.
      test: the same, of data that no choice was made on.
      vocabulary: to write samples with, or None.
      summary: one line for the reader: source, size, known bounds.
    """

    num_classes: int
    train: Callable[[int], Any]
    valid: Callable[[int], Any]
    test: Callable[[int], Any]
    vocabulary: text.Vocabulary | tasks.words.Vocabulary | None
    summary: str


def _of_corpus(corpus: corpora.Corpus | tasks.words.Corpus) -> Tokens:
    source, size = corpus.source, corpus.vocabulary.size
    counted = f"{source.num_characters:,} characters ({size} different)"
    if isinstance(corpus, tasks.words.Corpus):
        num_words = sum(len(part) for part in (corpus.train, corpus.valid, corpus.test))
        counted = f"{num_words:,} words ({size} different)"
    return Tokens(
        corpus.vocabulary.size,
        lambda streams: text.lanes(corpus.train, streams),
        lambda streams: text.lanes(corpus.valid, streams),
        lambda streams: text.lanes(corpus.test, streams),
        corpus.vocabulary,
        f"{source.name}: {source.num_files} files, {counted}, SHA-256 {source.sha256[:12]}",
    )


def characters(data: Path | None, *, max_characters: int = 0, pattern: str = "*") -> Tokens:
    """Characters of the text in --data; without --data, of Python's own standard library."""
    limit = max_characters or None
    if data is None:
        return _of_corpus(corpora.python_standard_library(limit or 3_000_000))
    return _of_corpus(corpora.characters(data, pattern=pattern, max_characters=limit))


def penn_treebank(data: Path | None, *, verify: bool = True) -> Tokens:
    """Penn Treebank characters, from ptb.train.txt, ptb.valid.txt and ptb.test.txt in the folder --data."""
    if data is None:
        raise ValueError("task 'penn-treebank' needs --data: the folder of ptb.train.txt and its two sisters")
    return _of_corpus(corpora.penn_treebank(data, verify=verify))


def words(
    data: Path | None, *, max_vocabulary: int = 10_000, max_characters: int = 0, pattern: str = "*"
) -> Tokens:
    """Words of the text in --data; without --data, of Python's own standard library."""
    limit = max_characters or None
    corpus = tasks.words.words(data, pattern=pattern, max_vocabulary=max_vocabulary, max_characters=limit)
    return _of_corpus(corpus)


def penn_treebank_words(data: Path | None, *, verify: bool = True) -> Tokens:
    """Penn Treebank by words (10,000), from ptb.train.txt and its two sisters in the folder --data."""
    if data is None:
        raise ValueError(
            "task 'penn-treebank-words' needs --data: the folder of ptb.train.txt and its two sisters"
        )
    return _of_corpus(tasks.words.penn_treebank_words(data, verify=verify))


def wikitext_2(data: Path | None, *, verify: bool = True) -> Tokens:
    """WikiText-2 by words (33,278), from wiki.train.tokens and its two sisters in the folder --data."""
    if data is None:
        raise ValueError(
            "task 'wikitext-2' needs --data: the folder of wiki.train.tokens and its two sisters"
        )
    return _of_corpus(tasks.words.wikitext2(data, verify=verify))


def shakespeare(
    data: Path | None, *, max_characters: int = 0, pattern: str = "*.txt", verify: bool = True
) -> Tokens:
    """Characters of Shakespeare, from the text file or the folder --data."""
    if data is None:
        raise ValueError("task 'shakespeare' needs --data: a text file or a folder of them")
    limit = max_characters or None
    return _of_corpus(corpora.shakespeare(data, pattern=pattern, max_characters=limit, verify=verify))


def copy(
    data: Path | None, *, shortest: int = 10, longest: int = 10, symbols: int = 6, steps: int = 256_000
) -> Tokens:
    """The copy task: read m symbols, write them; m is drawn from shortest..longest. Synthetic."""
    _require_no_data(data, "copy")
    sequences = partial(copying.sequences, length=(shortest, longest), num_symbols=symbols)
    bounds = f"best perplexity 1, without memory {copying.memoryless_perplexity(symbols):.3f}"
    return Tokens(copying.num_classes(symbols), *_draws(sequences, steps), None, f"copy task, {bounds}")


def brackets(data: Path | None, *, steps: int = 256_000) -> Tokens:
    """A small synthetic language of nested brackets, whose entropy rate is known."""
    _require_no_data(data, "brackets")
    language = synthetic_language.brackets()
    sequences = partial(synthetic_language.sequences, language=language)
    rate = synthetic_language.entropy_rate_bits(language)
    summary = f"brackets, entropy rate {rate:.4f} bits a symbol"
    return Tokens(len(language.symbols), *_draws(sequences, steps), None, summary)


def anbn(data: Path | None, *, shortest: int = 1, longest: int = 32, steps: int = 1_000_000) -> Tokens:
    """aⁿbⁿ: n letters a, a newline, n letters b, a newline; n is drawn from shortest..longest. Synthetic."""
    _require_no_data(data, "anbn")
    sequences = partial(counting.sequences, shortest=shortest, longest=longest)
    rate = counting.entropy_rate_bits(shortest, longest)
    summary = (
        f"aⁿbⁿ on [{shortest}; {longest}], entropy rate {rate:.4f} bits a character, of aⁿbᵖ {2 * rate:.4f}"
    )
    vocabulary = counting.VOCABULARY
    return Tokens(vocabulary.size, *_draws(sequences, steps), vocabulary, summary)


def music(data: Path | None, *, steps: int = 100_000) -> Tokens:
    """A synthetic music notation with rules of syntax, rhythm and harmony, whose entropy rate is known."""
    _require_no_data(data, "music")
    summary = f"music notation, entropy rate {tasks.music.entropy_rate_bits():.4f} bits a character"
    vocabulary = tasks.music.VOCABULARY
    return Tokens(vocabulary.size, *_draws(tasks.music.sequences, steps), vocabulary, summary)


def _draws(
    sequences: Callable[[jax.Array, int, int], Any], steps: int
) -> tuple[Callable[[int], Any], Callable[[int], Any], Callable[[int], Any]]:
    """Training, validation and test part of a synthetic task: `steps`, and a quarter of them each."""

    def draw(seed: int, num_steps: int) -> Callable[[int], Any]:
        return lambda streams: sequences(jax.random.key(seed), max(1, num_steps // streams), streams)

    return draw(1000, steps), draw(1001, steps // 4), draw(1002, steps // 4)


def _require_no_data(data: Path | None, name: str) -> None:
    if data is not None:
        raise ValueError(f"task {name!r} is synthetic, but --data names {str(data)!r}: leave --data out")


def _stacked(layers: int, make: Callable[[int], Any], input_size: int, width: int) -> Any:
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    sizes = [input_size] + [width] * (layers - 1)
    return make(input_size) if layers == 1 else cells.stack([make(size) for size in sizes])


def tanh(input_size: int, *, width: int = 128, layers: int = 1) -> Any:
    """h = tanh(W h + U x + b)."""
    return _stacked(layers, lambda size: cells.tanh(size, width), input_size, width)


def leaky(input_size: int, *, width: int = 128, rate: float = 0.1, layers: int = 1) -> Any:
    """A tanh unit that moves by a fraction `rate` towards its new value."""
    return _stacked(layers, lambda size: cells.leaky(size, width, rate), input_size, width)


def gru(input_size: int, *, width: int = 128, layers: int = 1) -> Any:
    """Gated recurrent unit."""
    return _stacked(layers, lambda size: cells.gru(size, width), input_size, width)


def lstm(input_size: int, *, width: int = 128, forget_bias: float = 1.0, layers: int = 1) -> Any:
    """Long short-term memory."""
    return _stacked(layers, lambda size: cells.lstm(size, width, forget_bias), input_size, width)


def linear_recurrent(input_size: int, *, width: int = 128, min_radius: float = 0.9) -> Any:
    """Linear recurrent unit: complex, diagonal; `diagonal-rtrl` is exact for it."""
    return cells.linear_recurrent(input_size, width, min_radius=min_radius)


class Windowed(NamedTuple):
    """An estimator, and how it is fed.

    Attributes:
      estimator: the estimator.
      window: how many steps of data an update is given.
      consumed: how many of them it consumes, on average where that is random.
    """

    estimator: jtrunc.GradientEstimator
    window: int
    consumed: int


def bptt(system: jtrunc.System, *, window: int = 100) -> Windowed:
    """Backpropagation through the whole of each window; windows do not overlap."""
    return Windowed(jtrunc.bptt(system), window, window)


def truncated_bptt(system: jtrunc.System, *, length: int = 50) -> Windowed:
    """Backpropagation cut every `length` steps: cheap, and biased towards short influences."""
    return Windowed(jtrunc.truncated_bptt(system, length), length, length)


def windowed_bptt(system: jtrunc.System, *, backward_steps: int = 50, loss_steps: int = 10) -> Windowed:
    """BPTT(K1, K2): scores the last K2 = loss_steps, looks back K1 = backward_steps; windows overlap."""
    estimator = jtrunc.windowed_bptt(system, backward_steps, loss_steps)
    return Windowed(estimator, backward_steps + 1, loss_steps)


def artbp(
    system: jtrunc.System, *, mean_length: float = 50, alpha: float = 4.0, window: int = 500
) -> Windowed:
    """Unbiased within windows of `window` steps: random cuts inside, reweighted by 1/(1-c)."""
    law = jtrunc.truncation.polynomial(mean_length, alpha)
    return Windowed(jtrunc.artbp(system, law), window, window)


def online_artbp(
    system: jtrunc.System, *, mean_length: float = 50, alpha: float = 4.0, look_ahead: int = 0
) -> Windowed:
    """Unbiased on the whole stream: one random, reweighted window an update (look-ahead 0: long enough)."""
    law = jtrunc.truncation.polynomial(mean_length, alpha)
    estimator = jtrunc.online_artbp(system, law)
    return Windowed(estimator, look_ahead or long_enough(mean_length, alpha), max(1, round(mean_length)))


def adaptive_bptt(
    system: jtrunc.System,
    *,
    tolerance: float = 0.5,
    num_lags: int = 100,
    min_length: int = 2,
    max_length: int = 100,
    initial_length: int = 15,
    estimate_every: int = 4000,
    fit_share: float = 0.9,
    num_times: int = 1,
    method: str = "least_squares",
    weighted: bool = False,
) -> Windowed:
    """BPTT(2K, K), K measured every `estimate_every` steps; --steps / initial-length updates, whatever K is.

    K is the least whose estimated relative bias is below `tolerance`; the decay is fitted on the lags from
    `fit_share` of `num_lags` on. The gradient is a mean over the window: see sgd:length-power=0.5.
    """
    if not 0 <= fit_share < 1:
        raise ValueError(f"fit_share must lie in [0, 1), got {fit_share}")
    estimator = jtrunc.adaptive_bptt(
        system,
        tolerance,
        num_lags=num_lags,
        min_length=min_length,
        max_length=max_length,
        initial_length=initial_length,
        estimate_every=estimate_every,
        unit="steps",
        fit_from=round(fit_share * num_lags),
        method=cast(Any, method),
        num_times=num_times,
        streams=True,
        weighted=weighted,
    )
    return Windowed(estimator, max(2 * max_length + 1, num_lags + num_times), initial_length)


def _forward(estimator: jtrunc.GradientEstimator, window: int) -> Windowed:
    """A forward estimator follows one stream: each stream gets its own, and their gradients are averaged."""
    return Windowed(jtrunc.per_stream(estimator), window, window)


def rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Real-time recurrent learning: the exact influence of all the past, carried forward."""
    return _forward(jtrunc.rtrl(system), window)


def nobacktrack(
    system: jtrunc.System,
    *,
    rank: int = 1,
    norms: str = "euclidean",
    split: bool = False,
    window: int = 1,
) -> Windowed:
    """Unbiased rank-K influence, scaled unit by unit; norms=kalman goes with the optimiser qdop."""
    return _forward(jtrunc.nobacktrack(system, rank, norms=cast(Any, norms), split=split), window)


def uoro(system: jtrunc.System, *, memory: int = 1, window: int = 0) -> Windowed:
    """Unbiased rank-one influence with one scale; exact inside `memory` steps (window 0: as many)."""
    return _forward(jtrunc.uoro(system, memory=memory), window or memory)


def diagonal_rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Exact influence of an elementwise recurrence (cell linear-recurrent), cheap."""
    return _forward(jtrunc.diagonal_rtrl(system), window)


def kf_rtrl(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Unbiased Kronecker-factored influence: little variance, n³ a step."""
    return _forward(jtrunc.kf_rtrl(system), window)


def optimal_kronecker_sum(system: jtrunc.System, *, terms: int = 1, window: int = 1) -> Windowed:
    """Unbiased sum of Kronecker products, reduced with the least variance."""
    return _forward(jtrunc.optimal_kronecker_sum(system, terms), window)


def snap(system: jtrunc.System, *, order: int = 1, window: int = 1) -> Windowed:
    """Influence on the entries that `order` steps can fill: cheap for order 1, and biased."""
    return _forward(jtrunc.snap(system, order), window)


def eprop(system: jtrunc.System, *, window: int = 1) -> Windowed:
    """Eligibility traces within each unit: the cheapest, and biased."""
    return _forward(jtrunc.eprop(system), window)


def long_enough(mean_length: float, alpha: float, probability: float = HIT_PROBABILITY) -> int:
    """A look-ahead N that an ARTBP window exceeds with at most `probability`.

    P(window > N) = Π_{k≤N} (1 − (α−1)/((α−2) L₀ + k)) ≤ (1 + N/((α−2) L₀))^−(α−1), solved for N.

      >>> long_enough(16, 6.0)
      577
    """
    scale = (alpha - 2) * mean_length
    return math.ceil(scale * (probability ** (-1 / (alpha - 1)) - 1))


def sgd(
    learning_rate: Any, *, momentum: float = 0.0, length_power: float = 0.0
) -> optax.GradientTransformation:
    """Gradient descent; gradients that are sums over the window take longer steps where it is longer.

    Those of adaptive-bptt are means: length_power=0.5 makes steps longer by the root of the length.
    """
    descent = optax.sgd(learning_rate, momentum or None)
    if not length_power:
        return descent
    return optax.chain(descent, optimizers.scale_by_truncation_length(length_power))


def adam(learning_rate: Any, *, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Adam; the scale of the gradient, and so the window's length, cancels."""
    return optax.adam(learning_rate, b1, b2)


def rmsprop(learning_rate: Any, *, decay: float = 0.9) -> optax.GradientTransformation:
    """RMSProp."""
    return optax.rmsprop(learning_rate, decay)


def qdop(
    learning_rate: Any, *, prior: float = 20.0, decay: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Quasi-diagonal Kalman step: --learning-rate 1, prior about the units, memory of √t/decay gradients."""
    schedule = inverse_square_root_decay(decay)
    return optimizers.qdop(prior, decay=schedule, learning_rate=learning_rate)


TASKS = {
    "characters": characters,
    "penn-treebank": penn_treebank,
    "words": words,
    "penn-treebank-words": penn_treebank_words,
    "wikitext-2": wikitext_2,
    "shakespeare": shakespeare,
    "copy": copy,
    "brackets": brackets,
    "anbn": anbn,
    "music": music,
}
CELLS = {"lstm": lstm, "gru": gru, "tanh": tanh, "leaky": leaky, "linear-recurrent": linear_recurrent}
ESTIMATORS = {
    "truncated-bptt": truncated_bptt,
    "online-artbp": online_artbp,
    "artbp": artbp,
    "windowed-bptt": windowed_bptt,
    "adaptive-bptt": adaptive_bptt,
    "bptt": bptt,
    "rtrl": rtrl,
    "nobacktrack": nobacktrack,
    "uoro": uoro,
    "diagonal-rtrl": diagonal_rtrl,
    "kf-rtrl": kf_rtrl,
    "optimal-kronecker-sum": optimal_kronecker_sum,
    "snap": snap,
    "eprop": eprop,
}
OPTIMIZERS = {"adam": adam, "sgd": sgd, "rmsprop": rmsprop, "qdop": qdop}
