"""The tasks of predicting tokens that the command line knows by name.

Keyword-only parameters are the options of a name: ``copy:shortest=5,longest=10``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jtrunc import tasks
from jtrunc.tasks import copying, corpora, counting, downloads, synthetic_language, text
from jtrunc.tasks.memory_map import memory_mapped


class Tokens(NamedTuple):
    """A task of predicting tokens.

    Attributes:
      num_classes: how many tokens there are.
      train: ``num_streams -> (inputs, targets)``, int32, (T, B) each.
      valid: the same, of data that are not trained on.
      test: the same, of data that no choice was made on.
      vocabulary: to write samples with, or None.
      summary: one line for the reader: source, size, known bounds.
      fingerprint: what a run must find again when it is resumed: the hash of a text.
    """

    num_classes: int
    train: Callable[[int], Any]
    valid: Callable[[int], Any]
    test: Callable[[int], Any]
    vocabulary: text.Vocabulary | tasks.words.Vocabulary | None
    summary: str
    fingerprint: Mapping[str, str] = MappingProxyType({})


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
        {"SHA-256 of the text": source.sha256},
    )


def characters(data: Path | None, *, max_characters: int = 0, pattern: str = "*") -> Tokens:
    """Characters of the text in --data; without --data, of Python's own standard library."""
    limit = max_characters or None
    if data is None:
        return _of_corpus(corpora.python_standard_library(limit or 3_000_000))
    return _of_corpus(corpora.characters(data, pattern=pattern, max_characters=limit))


def penn_treebank(data: Path | None, *, verify: bool = True, download: bool = False) -> Tokens:
    """Penn Treebank characters, from ptb.train.txt, ptb.valid.txt and ptb.test.txt in the folder --data.

    With download=true, as for all corpora that have it, --data is where the corpus is kept once it was
    fetched and encoded (by default the user's cache folder).
    """
    needs = "penn-treebank", "the folder of ptb.train.txt and its two sisters"
    return _of_file(corpora.penn_treebank, data, download, *needs, verify=verify)


def words(
    data: Path | None, *, max_vocabulary: int = 10_000, max_characters: int = 0, pattern: str = "*"
) -> Tokens:
    """Words of the text in --data; without --data, of Python's own standard library."""
    limit = max_characters or None
    corpus = tasks.words.words(data, pattern=pattern, max_vocabulary=max_vocabulary, max_characters=limit)
    return _of_corpus(corpus)


def penn_treebank_words(
    data: Path | None, *, max_vocabulary: int = 10_000, verify: bool = True, download: bool = False
) -> Tokens:
    """Penn Treebank by words (10,000), from ptb.train.txt and its two sisters in the folder --data."""
    needs = "penn-treebank-words", "the folder of ptb.train.txt and its two sisters"
    options: dict[str, Any] = {"max_vocabulary": max_vocabulary, "verify": verify}
    return _of_file(tasks.words.penn_treebank_words, data, download, *needs, **options)


def wikitext_2(data: Path | None, *, verify: bool = True, download: bool = False) -> Tokens:
    """WikiText-2 by words (33,278), from wiki.train.tokens and its two sisters in the folder --data."""
    needs = "wikitext-2", "the folder of wiki.train.tokens and its two sisters"
    return _of_file(tasks.words.wikitext2, data, download, *needs, verify=verify)


def shakespeare(
    data: Path | None,
    *,
    max_characters: int = 0,
    pattern: str = "*.txt",
    verify: bool = True,
    download: bool = False,
) -> Tokens:
    """Characters of Shakespeare, from the text file or the folder --data."""
    options = {"max_characters": max_characters or None, "pattern": pattern, "verify": verify}
    needs = "shakespeare", "a text file or a folder of them"
    return _of_file(corpora.shakespeare, data, download, *needs, **options)


def text8(data: Path | None, *, verify: bool = True, download: bool = False) -> Tokens:
    """Characters of text8 (a to z and the blank), from the file text8, or its folder, in --data."""
    needs = "text8", "the file text8, or the folder that holds it"
    return _of_file(corpora.text8, data, download, *needs, verify=verify)


def text8_words(
    data: Path | None,
    *,
    min_count: int = 10,
    max_vocabulary: int = 0,
    verify: bool = True,
    download: bool = False,
) -> Tokens:
    """Words of text8 that occur at least `min_count` times, from the file text8, or its folder, in --data."""
    options = {"min_count": min_count, "max_vocabulary": max_vocabulary or None, "verify": verify}
    needs = "text8-words", "the file text8, or the folder that holds it"
    return _of_file(tasks.words.text8_words, data, download, *needs, **options)


def _of_file(
    load: Callable[..., Any], data: Path | None, download: bool, task: str, needs: str, **options: Any
) -> Tokens:
    """A corpus by path, or fetched and mapped from the disk."""
    if download:
        folder = downloads.fetch(task.removesuffix("-words"), data)
        return _of_corpus(memory_mapped(load, folder, folder.parent / "tokens", **options))
    if data is None:
        raise ValueError(f"task {task!r} needs --data: {needs}; or {task}:download=true")
    return _of_corpus(load(data, **options))


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


TASKS = {
    "characters": characters,
    "penn-treebank": penn_treebank,
    "words": words,
    "penn-treebank-words": penn_treebank_words,
    "wikitext-2": wikitext_2,
    "text8": text8,
    "text8-words": text8_words,
    "shakespeare": shakespeare,
    "copy": copy,
    "brackets": brackets,
    "anbn": anbn,
    "music": music,
}
