"""Tokens on the disk: a text is encoded once, and later runs map its tokens instead of reading them.

    folder/<key>/{train,valid,test}.npy    int32
    folder/<key>/manifest.json             vocabulary and source, hashes of the three

The key is a hash of the text's files, the loader and its options.
"""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jtrunc.sealed import Damaged, hash_file, hash_json, read_seal, seal
from jtrunc.tasks import corpora, text, words
from jtrunc.tasks.text import Split, text_files

Corpus = TypeVar("Corpus", corpora.Corpus, words.Corpus)

_FORMAT = 1


def memory_mapped(
    load: Callable[..., Corpus], path: str | Path, folder: str | Path, **options: Any
) -> Corpus:
    """``load(path, **options)`` with tokens that lie in a file and are read where they are used.

    The first call encodes the text and writes the tokens, whole or not at all; later ones with the same
    files, loader and options compare hashes and open them. A cache that was damaged is noticed, with a
    warning, and made anew.

    Args:
      load: a loader, such as `jtrunc.tasks.corpora.text8` or `jtrunc.tasks.words.wikitext2`.
      path: its file or folder.
      folder: where the tokens are kept; created if need be.
      options: of the loader, which JSON can write.

    Returns:
      The loader's `Corpus`; its tokens are read-only views of mapped files, int32.

    Raises:
      OSError: if the tokens cannot be written.
      ValueError: as the loader.

    Example:

      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "a.txt").write_text("banana " * 40)
      ...     corpus = memory_mapped(corpora.characters, f"{folder}/a.txt", f"{folder}/tokens")
      ...     corpus.vocabulary.decode(corpus.train[:6]), corpus.train.flags.writeable
      ('banana', False)
    """
    if not Path(path).exists():
        return load(path, **options)  # which says where to get it
    folder = Path(folder).resolve()
    place = folder / _key(load, Path(path), folder, options)
    try:
        return _open(place)
    except FileNotFoundError:
        pass
    except (Damaged, OSError) as error:
        message = f"the tokens in {place} are damaged ({error}); they are made anew"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        shutil.rmtree(place)
    _write(place, load(path, **options))
    return _open(place)


def _key(load: Callable[..., Any], path: Path, folder: Path, options: dict[str, Any]) -> str:
    """Of everything that the tokens in `folder` depend on, options that are not given included."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(load).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    files = text_files(path, (defaults | options).get("pattern", "*"))
    described = {
        "format": _FORMAT,
        "loader": f"{load.__module__}.{load.__qualname__}",
        "options": {name: value for name, value in sorted((defaults | options).items())},
        "name": path.resolve().name,
        "files": [
            [file.name, hash_file(file)] for file in files if not file.resolve().is_relative_to(folder)
        ],
    }
    return hash_json(described)[:32]


def _write(place: Path, corpus: Any) -> None:
    temporary = place.with_name(f".unfinished-{place.name}-{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        for part in Split._fields:
            np.save(temporary / f"{part}.npy", getattr(corpus, part))
        described = {name: getattr(corpus, name)._asdict() for name in ("vocabulary", "source")}
        by = "words" if isinstance(corpus, words.Corpus) else "characters"
        seal(temporary, {"by": by, "num_unknown": corpus.num_unknown, **described})
        os.replace(temporary, place)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not place.exists():  # else another process has written the same
            raise


def _open(place: Path) -> Any:
    if not place.exists():
        raise FileNotFoundError(place)
    content = read_seal(place)
    parts = (np.asarray(np.load(place / f"{part}.npy", mmap_mode="r")) for part in Split._fields)
    source, num_unknown = corpora.Source(**content["source"]), tuple(content["num_unknown"])
    symbols, unknown = content["vocabulary"]["symbols"], content["vocabulary"]["unknown"]
    if content["by"] == "words":
        return words.Corpus(
            *parts,
            vocabulary=words.Vocabulary(tuple(symbols), unknown),
            source=source,
            num_unknown=num_unknown,
        )
    return corpora.Corpus(
        *parts, vocabulary=text.Vocabulary(symbols, unknown), source=source, num_unknown=num_unknown
    )
