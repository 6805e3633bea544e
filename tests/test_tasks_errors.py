"""Bad input to the tasks: each a clear error that names the argument or the path, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc.tasks import copying, corpora, influence_balancing, synthetic_language, text
from jtrunc.tasks.synthetic_language import Language


def key() -> jax.Array:
    return jax.random.key(0)


def copy(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"key": key(), "num_steps": 8, "num_streams": 2, **changed}
    return copying.sequences(**arguments)


def speak(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"key": key(), "num_steps": 8, "num_streams": 2, **changed}
    return synthetic_language.sequences(**arguments)


def language(**changed: Any) -> Language:
    fields: dict[str, Any] = {
        "symbols": "ab",
        "probabilities": np.full((2, 2), 0.5),
        "successors": np.eye(2, dtype=int),
    }
    return Language(**{**fields, **changed})


build = influence_balancing.build
brackets = synthetic_language.brackets
vocabulary = text.build_vocabulary("abc")

ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "copy: m = 0": (lambda: copy(length=0), ValueError, "length must be at least 1, got 0"),
    "copy: m < 0": (lambda: copy(length=-3), ValueError, "length must be at least 1, got -3"),
    "copy: m a float": (lambda: copy(length=2.5), TypeError, "length must be a whole number, got 2.5"),
    "copy: m a bool": (lambda: copy(length=True), TypeError, "length must be a whole number, got True"),
    "copy: range from 0": (lambda: copy(length=(0, 3)), ValueError, r"length\[0\] must be at least 1"),
    "copy: range reversed": (lambda: copy(length=(5, 2)), ValueError, r"length = \(5, 2\).*smallest"),
    "copy: three lengths": (lambda: copy(length=(1, 2, 3)), ValueError, r"length must be m or \(smallest"),
    "copy: no symbols": (lambda: copy(num_symbols=0), ValueError, "num_symbols must be at least 1"),
    "copy: no steps": (lambda: copy(num_steps=0), ValueError, "num_steps must be at least 1"),
    "copy: no streams": (lambda: copy(num_streams=0), ValueError, "num_streams must be at least 1"),
    "copy: seed as key": (lambda: copy(key=0), TypeError, r"key must be a typed key.*jax.random.key\(seed\)"),
    "copy: no key": (lambda: copy(key=None), TypeError, "key must be a typed key, got None"),
    "copy: legacy key": (lambda: copy(key=jax.random.PRNGKey(0)), TypeError, "key must be a typed key"),
    "copy: many keys": (lambda: copy(key=jax.random.split(key())), ValueError, r"array of keys .* \(2,\)"),
    "influence: p < 0": (lambda: build(-1, 3), ValueError, "num_positive must be at least 0, got -1"),
    "influence: n < 0": (lambda: build(1, -3), ValueError, "num_negative must be at least 0, got -3"),
    "influence: no agent": (lambda: build(0, 0), ValueError, "at least one agent"),
    "influence: p a float": (lambda: build(1.5, 3), TypeError, "num_positive must be a whole number"),  # pyright: ignore
    "influence: θ a vector": (lambda: build(theta=[1.0, 2.0]), ValueError, "theta must be one finite number"),  # pyright: ignore
    "influence: θ nan": (lambda: build(theta=np.nan), ValueError, "theta must be one finite number"),
    "influence: integer dtype": (lambda: build(dtype=jnp.int32), TypeError, "dtype must be a floating type"),
    "influence: no steps": (lambda: influence_balancing.inputs(0), ValueError, "num_steps must be at"),
    "influence: p = n": (lambda: influence_balancing.optimum(4, 4), ValueError, "has no optimum"),
    "influence: L = 0": (lambda: influence_balancing.truncated_influence(0), ValueError, "length must be at"),
    "language: depth 0": (lambda: brackets(depth=0), ValueError, "depth must be at least 1"),
    "language: one kind": (lambda: brackets(kinds=1), ValueError, "kinds must be at least 2"),
    "language: four kinds": (lambda: brackets(kinds=4), ValueError, "kinds must be 2 or 3, got 4"),
    "language: opens never": (lambda: brackets(open_probability=0.0), ValueError, "open_probability must"),
    "language: no letters": (lambda: brackets(open_probability=0.9), ValueError, "leaves no letters"),
    "language: agreement 1": (lambda: brackets(agreement=1.0), ValueError, "agreement must lie strictly"),
    "language: no steps": (lambda: speak(num_steps=0), ValueError, "num_steps must be at least 1"),
    "language: seed as key": (lambda: speak(key=7), TypeError, "key must be a typed key"),
    "language: row sums": (
        lambda: speak(language=language(probabilities=np.ones((2, 2)))), ValueError, "sum to one"),
    "language: nan": (
        lambda: speak(language=language(probabilities=np.full((2, 2), np.nan))), ValueError, "sum to one"),
    "language: shapes": (
        lambda: speak(language=language(symbols="abc")), ValueError, r"\(2, 2\).*with 3 symbols"),
    "language: successor": (
        lambda: speak(language=language(successors=np.full((2, 2), 2))), ValueError, "successors must be"),
    "language: initial": (lambda: speak(language=language(initial=5)), ValueError, "initial must be a state"),
    "language: two parts": (
        lambda: synthetic_language.entropy_rate(language(successors=np.array([[0, 0], [1, 1]]))),
        ValueError, "several separate parts"),
    "vocabulary: empty text": (lambda: text.build_vocabulary(""), ValueError, "text is empty"),
    "vocabulary: long unknown": (lambda: text.build_vocabulary("a", "??"), ValueError, "one character, got"),
    "vocabulary: unknown character": (lambda: vocabulary.encode("abx"), ValueError, "'x' at position 2"),
    "vocabulary: token too large": (lambda: vocabulary.decode([3]), ValueError, "from 0 to 2, got 3 to 3"),
    "vocabulary: token negative": (lambda: vocabulary.decode([-1]), ValueError, "from 0 to 2, got -1"),
    "split: two fractions": (lambda: text.split("abc", (0.5, 0.5)), ValueError, "fractions must be three"),
    "split: sum not 1": (lambda: text.split("abc", (0.5, 0.2, 0.2)), ValueError, "fractions must be three"),
    "split: negative": (lambda: text.split("abc", (1.2, -0.3, 0.1)), ValueError, "fractions must be three"),
    "split: nan": (lambda: text.split("abc", (np.nan, 0.5, 0.5)), ValueError, "fractions must be three"),
    "split: short text": (lambda: text.split("abc"), ValueError, r"3 characters is too short.*\[3, 0, 0\]"),
    "lanes: no streams": (lambda: text.lanes(np.arange(9), 0), ValueError, "num_streams must be at least 1"),
    "lanes: too many streams": (lambda: text.lanes(np.arange(9), 9), ValueError, "at least 10 tokens, got 9"),
    "lanes: no tokens": (lambda: text.lanes(np.arange(0), 1), ValueError, "needs at least 2 tokens, got 0"),
    "lanes: floats": (lambda: text.lanes(np.ones(9), 2), TypeError, "tokens must be integers, got float64"),
    "lanes: two axes": (lambda: text.lanes(np.ones((3, 3), int), 2), ValueError, "tokens must have one axis"),
    "corpus: no characters": (
        lambda: corpora.python_standard_library(0), ValueError, "max_characters must be at least 1"),
    "corpus: too short": (lambda: corpora.python_standard_library(5), ValueError, "5 characters is too"),
    "corpus: half a character": (
        lambda: corpora.python_standard_library(1.5), TypeError, "max_characters must be a"),  # pyright: ignore
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument(case: str) -> None:
    call, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        call()


def empty_file(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"")
    return folder / "a.txt"


def latin_file(folder: Path) -> Path:
    (folder / "a.txt").write_bytes("abcdé".encode("latin-1"))
    return folder / "a.txt"


def folder_with_a_picture(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"abc")
    (folder / "b.png").write_bytes(b"\x89PNG")
    return folder


def below_a_file(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"abc")
    return folder / "a.txt" / "b.txt"


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.txt", r"cannot read .*none.txt: No such file"),
    "below a file": (below_a_file, r"cannot read .*b.txt: Not a directory"),
    "empty file": (empty_file, r"a.txt is empty"),
    "not UTF-8": (latin_file, r"a.txt is not UTF-8 text \(byte 4 is 0xe9\)"),
    "picture in the folder": (folder_with_a_picture, r"b.png is not UTF-8 text \(byte 0 is 0x89\).*pattern"),
    "empty folder": (lambda folder: folder, r"has no file that matches '\*'"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    prepare, message = FILES[case]
    with pytest.raises(ValueError, match=message):
        corpora.characters(prepare(tmp_path))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_bytes(b"abc")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*a.txt: Permission denied; give a readable"):
        corpora.characters(tmp_path / "a.txt")


def test_no_file_matches(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"has no file that matches '\*\.md'"):
        corpora.characters(tmp_path, pattern="*.md")


def test_penn_treebank_missing_or_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ptb.train.txt does not exist; .*simple-examples"):
        corpora.penn_treebank(tmp_path)
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_bytes(b" the \n")
    with pytest.raises(ValueError, match=r"not the published file: .*fcea919f; .*verify=False"):
        corpora.penn_treebank(tmp_path)
    (tmp_path / "ptb.test.txt").write_bytes(b" an \n")
    with pytest.raises(ValueError, match=r"character 'a' at position 0 is not in the vocabulary"):
        corpora.penn_treebank(tmp_path, verify=False)


def test_standard_library_without_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module of the standard library lies in"):
        corpora._standard_library_files(tmp_path)
