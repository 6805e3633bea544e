"""Words to learn from: the Penn Treebank, WikiText-2, text8, or any text, Python's own standard library say.

A line's words are followed by <eos>, and rare or unknown words are <unk>. `jtrunc.tasks.text.lanes` makes
streams of the tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jtrunc.tasks.arguments import require_count
from jtrunc.tasks.corpora import (
    FRACTIONS,
    Source,
    read_penn_treebank,
    read_standard_library,
    read_text8,
    sha256,
)
from jtrunc.tasks.text import Split, read_file, read_text, require_tokens, split, text_files

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
"""Stands for every word that is not in the vocabulary; the published corpora have it in their files."""

WordsOf = Callable[[str], list[str]]
"""From a line to its words."""

_WORD = re.compile(r"<\w+>|\w+|[^\w\s]")

WIKITEXT_2_NUM_TOKENS = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
WIKITEXT_2_NUM_WORDS = 33_278


class Vocabulary(NamedTuple):
    """The words that a model knows.

    Attributes:
      symbols: the words, the most frequent first; token i stands for ``symbols[i]``.
      unknown: the one of them that stands for all others.
    """

    symbols: tuple[str, ...]
    unknown: str = UNKNOWN

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.symbols)

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """The tokens of words: int32, (N,)."""
        tokens = {word: token for token, word in enumerate(self.symbols)}
        unknown = tokens[self.unknown]
        return np.fromiter((tokens.get(word, unknown) for word in words), np.int32)

    def count_unknown(self, words: Iterable[str]) -> int:
        """How many words are not in the vocabulary."""
        known = set(self.symbols)
        return sum(word not in known for word in words)

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """The text of tokens (N,): a blank after each word, a new line for <eos>.

        Raises:
          ValueError: if a token is out of range.
        """
        words = (self.symbols[token] for token in require_tokens(tokens, self.size))
        return "".join("\n" if word == END_OF_LINE else f"{word} " for word in words)


def build_vocabulary(
    words: Iterable[str], max_vocabulary: int | None = None, min_count: int = 1
) -> Vocabulary:
    """The most frequent words, which should be of the training part alone; equals in alphabetical order.

    Args:
      words: at least one.
      max_vocabulary: how many tokens at most, <unk> included, which is always one of them; None for all.
      min_count: leave out words that occur less often.

    Raises:
      TypeError: if a number is not whole.
      ValueError: if `max_vocabulary` is less than 2, `min_count` less than 1, or there are no words.

    Example:

      >>> from jtrunc.tasks import words
      >>> vocabulary = words.build_vocabulary("b c a b a b".split(), max_vocabulary=3)
      >>> vocabulary.symbols, vocabulary.encode("a b c".split()).tolist()
      (('b', 'a', '<unk>'), [1, 0, 2])
    """
    counts = Counter(words)
    if not counts:
        raise ValueError("there are no words; a vocabulary needs at least one")
    require_count("min_count", min_count)
    kept = [word for word, count in counts.items() if count >= min_count]
    ranked = sorted(kept, key=lambda word: (-counts[word], word))
    if max_vocabulary is not None:
        ranked = _most_frequent(ranked, require_count("max_vocabulary", max_vocabulary, minimum=2))
    return Vocabulary(tuple(ranked if UNKNOWN in ranked else [*ranked, UNKNOWN]))


def _most_frequent(ranked: list[str], size: int) -> list[str]:
    """So many of these words, one place kept for <unk> where it is not among them."""
    first = ranked[:size]
    return first if UNKNOWN in first or len(ranked) < size else first[: size - 1]


class Corpus(NamedTuple):
    """A text as words, in three parts.

    Attributes:
      train: int32, (N,).
      valid: int32, (N,).
      test: int32, (N,).
      vocabulary: of the training part.
      source: `jtrunc.tasks.corpora.Source`.
      num_unknown: how many words of (valid, test) became <unk> for want of being in the vocabulary.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: Vocabulary
    source: Source
    num_unknown: tuple[int, int]


def words(
    path: str | Path | None = None,
    *,
    pattern: str = "*",
    fractions: Sequence[float] = FRACTIONS,
    max_vocabulary: int | None = 10_000,
    max_characters: int | None = None,
) -> Corpus:
    """The words of any UTF-8 text file, or of a folder of them; without one of Python's standard library.

    Words are runs of letters, digits and underscores; every other character but white space is a word of
    its own, and so is anything like ``<unk>``. The three parts are cut at the next end of a line.

    Args:
      path: a file or a folder (see `jtrunc.tasks.text.read_text` for the order), or None.
      pattern: which files of a folder to read, e.g. ``"*.txt"``.
      fractions: of the training, validation and test part, which follow each other in the text.
      max_vocabulary: how many tokens at most, <unk> and <eos> included; None for all.
      max_characters: use only so many, from the beginning; None for all (3 million without a path).

    Raises:
      TypeError: if a maximum is not a whole number.
      ValueError: if the text is missing, unreadable, empty, not UTF-8 or too short for its three parts.
    """
    if path is None:
        name, num_files, text = read_standard_library(3_000_000 if max_characters is None else max_characters)
    else:
        name, num_files = Path(path).resolve().name, len(text_files(path, pattern))
        text = read_text(path, pattern)
        text = text if max_characters is None else text[: require_count("max_characters", max_characters)]
    return _corpus(
        name, num_files, _at_ends_of("lines", "\n", split(text, fractions)), max_vocabulary, _WORD.findall
    )


def penn_treebank_words(
    folder: str | Path, *, max_vocabulary: int | None = None, verify: bool = True
) -> Corpus:
    """Penn Treebank by words: 929,589 to train, 73,760 to validate, 82,430 to test; 10,000 different ones.

    Args:
      folder: holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, Mikolov's split with 10,000 words.
      max_vocabulary: keep the most frequent ones, <unk> among them; None for all.
      verify: check that the files are the published ones, by their SHA-256.

    Raises:
      TypeError: if `max_vocabulary` is not a whole number.
      ValueError: if a file is missing or unreadable, or is not the published one.

    Source: Mikolov et al., "Recurrent neural network based language model" (2010).
    """
    parts = read_penn_treebank(folder, verify)
    return _corpus("Penn Treebank words", len(Split._fields), parts, max_vocabulary)


def wikitext2(folder: str | Path, *, verify: bool = True) -> Corpus:
    """WikiText-2: 2,088,628 words to train, 217,646 to validate, 245,569 to test; 33,278 different ones.

    Args:
      folder: holds wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens (not the "raw" files).
      verify: check that the numbers of words are the published ones.

    Raises:
      ValueError: if a file is missing or unreadable, or the numbers are others.

    Source: Merity et al., "Pointer sentinel mixture models" (2016).
    """
    paths = [Path(folder) / f"wiki.{part}.tokens" for part in Split._fields]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; give the folder of wiki.train.tokens, wiki.valid.tokens and"
                " wiki.test.tokens, which come in https://wikitext.smerity.com/wikitext-2-v1.zip (MD5"
                " 542ccefacc6c27f945fb54453812b3cd): tasks.downloads.fetch('wikitext-2') gets them"
            )
    corpus = _corpus("WikiText-2 words", len(paths), Split(*(read_file(path) for path in paths)))
    found = {part: len(getattr(corpus, part)) for part in Split._fields} | {"words": corpus.vocabulary.size}
    published = WIKITEXT_2_NUM_TOKENS | {"words": WIKITEXT_2_NUM_WORDS}
    if verify and found != published:
        raise ValueError(
            f"the files in {folder} are not WikiText-2: they have {found} tokens and different words, and not"
            f" {published}; fetch them again, or pass verify=False to use them all the same"
        )
    return corpus


def text8_words(
    path: str | Path,
    *,
    min_count: int = 10,
    max_vocabulary: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    verify: bool = True,
) -> Corpus:
    """text8 by words, with no <eos>: the text has no lines. 17,005,207 words in all, and <unk> for rare ones.

    The parts are those of `jtrunc.tasks.corpora.text8`, cut at the next blank. The target propagation paper
    gives neither its split nor its vocabulary; words that occur less than ten times are usually left out.

    Args:
      path: the file text8, or the folder that holds it.
      min_count: words that the training part has less often become <unk>.
      max_vocabulary: how many tokens at most, <unk> included; None for all.
      fractions: of the training, validation and test part, which follow each other in the text.
      verify: check that it is the published file, by its MD5.

    Raises:
      TypeError: if a number is not whole.
      ValueError: as in `jtrunc.tasks.corpora.text8`, or for a number that is too small.
    """
    parts = _at_ends_of("words", " ", split(read_text8(path, verify), fractions))
    return _corpus("text8 words", 1, parts, max_vocabulary, str.split, min_count, line_ends=False)


def _at_ends_of(what: str, separator: str, parts: Split) -> Split:
    """The parts with their cuts moved on to the next end of a line or a word."""
    text, cut = "".join(parts), len(parts.train)
    first, second = (text.find(separator, at - 1) + 1 or len(text) for at in (cut, cut + len(parts.valid)))
    moved = Split(text[:first], text[first:second], text[second:])
    if not all(moved):
        raise ValueError(
            f"the {what} of the text are too long for parts of {[len(part) for part in parts]} characters;"
            " give more text or larger fractions"
        )
    return moved


def _corpus(
    name: str,
    num_files: int,
    parts: Split,
    max_vocabulary: int | None = None,
    words_of: WordsOf = str.split,
    min_count: int = 1,
    line_ends: bool = True,
) -> Corpus:
    """Tokens of the three parts, with the vocabulary of the first."""
    train, valid, test = (_with_line_ends(part, words_of) if line_ends else words_of(part) for part in parts)
    vocabulary = build_vocabulary(train, max_vocabulary, min_count)
    text = "".join(parts)
    return Corpus(
        *(vocabulary.encode(part) for part in (train, valid, test)),
        vocabulary=vocabulary,
        source=Source(name, num_files, len(text), sha256(text)),
        num_unknown=(vocabulary.count_unknown(valid), vocabulary.count_unknown(test)),
    )


def _with_line_ends(text: str, words_of: WordsOf) -> list[str]:
    """The words of a text, <eos> after each line."""
    lines = text.removesuffix("\n").split("\n")
    return [word for line in lines for word in (*words_of(line), END_OF_LINE)]
