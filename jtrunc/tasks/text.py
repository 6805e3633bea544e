"""Text as tokens: reading, vocabulary, split, and streams for a recurrent network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jtrunc.tasks.arguments import require_count

UNKNOWN = "\ufffd"
"""U+FFFD, the replacement character: stands for every character that the training part does not have."""


class Vocabulary(NamedTuple):
    """The characters that a model knows.

    Attributes:
      symbols: the characters, sorted by code point; token i stands for ``symbols[i]``.
      unknown: the one of them that stands for all others, or None if others are an error.
    """

    symbols: str
    unknown: str | None = None

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text: int32, (N,).

        Raises:
          ValueError: if a character is not in the vocabulary and there is no symbol for unknown ones.
        """
        tokens, is_unknown = self._look_up(text)
        if is_unknown.any():
            first = int(np.argmax(is_unknown))
            if self.unknown is None:
                raise ValueError(
                    f"character {text[first]!r} at position {first} is not in the vocabulary; build it with"
                    " unknown=UNKNOWN to map such characters to U+FFFD, or remove them from the text"
                )
            tokens[is_unknown] = self.symbols.index(self.unknown)
        return tokens

    def count_unknown(self, text: str) -> int:
        """How many characters of a text are not in the vocabulary."""
        return int(self._look_up(text)[1].sum())

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """The text of tokens (N,); a ValueError if one is out of range."""
        return "".join(self.symbols[index] for index in require_tokens(tokens, self.size))

    def _look_up(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and where they are meaningless because the character is not in the vocabulary."""
        known, codes = _code_points(self.symbols), _code_points(text)
        tokens = np.minimum(np.searchsorted(known, codes), len(known) - 1).astype(np.int32)
        return tokens, known[tokens] != codes


def require_tokens(tokens: np.ndarray | Sequence[int], size: int) -> np.ndarray:
    """Tokens as an array; a ValueError if one is not below the size of the vocabulary."""
    indices = np.asarray(tokens)
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise ValueError(
            f"tokens must lie from 0 to {size - 1}, got {indices.min()} to {indices.max()};"
            " were they encoded with another vocabulary?"
        )
    return indices


def build_vocabulary(text: str, unknown: str | None = None) -> Vocabulary:
    """The vocabulary of a text, which should be the training part alone.

    Args:
      text: at least one character.
      unknown: None, so that other characters are an error, or one character that stands for them
        (`UNKNOWN`, say); it is added if the text does not have it.

    Raises:
      ValueError: if the text is empty, or `unknown` is not one character.

    Example:

      >>> from jtrunc.tasks import text
      >>> vocabulary = text.build_vocabulary("banana", unknown="?")
      >>> vocabulary.symbols, vocabulary.encode("bandana").tolist()
      ('?abn', [2, 1, 3, 0, 1, 3, 1])
    """
    if not text:
        raise ValueError("text is empty; a vocabulary needs at least one character")
    if unknown is not None and len(unknown) != 1:
        raise ValueError(f"unknown must be None or one character, got {unknown!r}; pass e.g. UNKNOWN")
    return Vocabulary("".join(sorted(set(text) | set(unknown or ""))), unknown)


def read_text(path: str | Path, pattern: str = "*") -> str:
    """The text of a file, or of all files of a folder one after the other.

    A folder is read with its subfolders, in the order of the files' relative paths, hidden files and
    folders left out. Bytes are decoded as UTF-8; line ends are kept as they are.

    Args:
      path: a file or a folder.
      pattern: which files of a folder to read, e.g. ``"*.txt"``.

    Raises:
      ValueError: if the path does not exist or cannot be read, if no file matches, if a file is not
        UTF-8, or if there is no text in it.
    """
    path = Path(path)
    text = "".join(read_file(file) for file in text_files(path, pattern))
    if not text:
        raise ValueError(f"{path} is empty; give a text of at least a few characters")
    return text


def text_files(path: str | Path, pattern: str = "*") -> list[Path]:
    """The files that `read_text` reads, in its order; the path itself if it is no folder."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = {file.relative_to(path).as_posix(): file for file in path.rglob(pattern) if file.is_file()}
    names = sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise ValueError(f"folder {path} has no file that matches {pattern!r}; check the path or the pattern")
    return [found[name] for name in names]


def read_file(path: Path) -> str:
    """The text of one file; a ValueError if it cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"cannot read {path}: {reason}; give a readable text file or folder") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert it,"
            " or choose the text files of a folder with pattern"
        ) from error


class Split(NamedTuple):
    """The three parts of a text."""

    train: str
    valid: str
    test: str


def split(text: str, fractions: Sequence[float] = (0.9, 0.05, 0.05)) -> Split:
    """Cuts a text into a training, a validation and a test part, in this order.

    Args:
      text: the text.
      fractions: of the three parts; positive, with sum 1. The cuts are rounded to the nearest character.

    Raises:
      ValueError: if the fractions are not three positive numbers with sum 1, or a part would be empty.

    Example:

      >>> from jtrunc.tasks import text
      >>> text.split("abcdefghij", (0.6, 0.2, 0.2))
      Split(train='abcdef', valid='gh', test='ij')
    """
    values = [float(fraction) for fraction in fractions]
    if len(values) != 3 or not min(values) > 0.0 or not abs(sum(values) - 1.0) < 1e-6:
        raise ValueError(
            "fractions must be three positive numbers with sum 1 (train, validation, test),"
            f" got {fractions!r}; pass e.g. (0.9, 0.05, 0.05)"
        )
    first, second = round(values[0] * len(text)), round((values[0] + values[1]) * len(text))
    parts = Split(text[:first], text[first:second], text[second:])
    if not all(parts):
        raise ValueError(
            f"text of {len(text)} characters is too short for fractions {tuple(values)}: its parts have"
            f" {[len(part) for part in parts]} characters; give more text or larger fractions"
        )
    return parts


class Lanes(NamedTuple):
    """Streams side by side, time-major.

    Attributes:
      inputs: int32, (T, B).
      targets: int32, (T, B), the token after each input.
    """

    inputs: np.ndarray
    targets: np.ndarray


def lanes(tokens: np.ndarray, num_streams: int) -> Lanes:
    """Lays tokens out as B contiguous streams of T = ⌊(N − 1) / B⌋ steps each.

      inputs[t, b] = tokens[b T + t],   targets[t, b] = tokens[b T + t + 1]

    Each token but the first is the target of one step, but for the last (N − 1) mod B, which do not fill
    a step of all streams: `num_left_over` counts them.

    Args:
      tokens: integers, (N,).
      num_streams: B ≥ 1.

    Returns:
      `Lanes`, a pair (inputs, targets): read-only views of the tokens where these are int32, also of tokens
      that are mapped from a file (`jtrunc.tasks.memory_map`), else of a copy.

    Raises:
      TypeError: if the tokens are not integers.
      ValueError: if they have more than one axis, or are too few for one step of every stream.

    Example:

      >>> import numpy as np
      >>> from jtrunc.tasks import text
      >>> inputs, targets = text.lanes(np.arange(8), num_streams=2)
      >>> inputs.tolist(), targets.tolist(), text.num_left_over(8, num_streams=2)
      ([[0, 3], [1, 4], [2, 5]], [[1, 4], [2, 5], [3, 6]], 1)
    """
    tokens, num_streams = np.asarray(tokens), require_count("num_streams", num_streams)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}; encode the text first")
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have one axis, got shape {tokens.shape}; pass one long sequence")
    num_steps = (len(tokens) - 1) // num_streams
    if num_steps < 1:
        raise ValueError(
            f"num_streams = {num_streams} needs at least {num_streams + 1} tokens, got {len(tokens)};"
            " use fewer streams or more text"
        )
    used = num_steps * num_streams
    view = np.asarray(tokens[: used + 1], np.int32).view()
    view.flags.writeable = False
    inputs, targets = (part.reshape(num_streams, num_steps).T for part in (view[:-1], view[1:]))
    return Lanes(inputs, targets)


def num_left_over(num_tokens: int, num_streams: int) -> int:
    """How many tokens at the end are no target in `lanes`: (N − 1) mod B."""
    return (require_count("num_tokens", num_tokens) - 1) % require_count("num_streams", num_streams)


def _code_points(text: str) -> np.ndarray:
    """uint32, (N,)."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
