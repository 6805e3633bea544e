"""Folders with a manifest, so that a file that was changed, cut or lost is noticed.

folder/...              any files
folder/manifest.json    SHA-256 of each file and what the writer wants to know again; sealed by its own
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class Damaged(Exception):
    """The files of a folder are not those that were sealed."""


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a folder; every file is on the disk when this returns.

    Args:
      folder: with all its files.
      content: a JSON object that `read_seal` gives back.
    """
    body = {"content": content, "files": _hashes(folder)}
    text = json.dumps({"sha256": hash_json(body), "body": body})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def read_seal(folder: Path) -> dict[str, Any]:
    """What was sealed with a folder, if every file is as it was then.

    Raises:
      Damaged: if a file was changed, cut, lost or added.
      OSError: if one cannot be read.
    """
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        body, expected = sealed["body"], sealed["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if expected != hash_json(body):
        raise Damaged(f"{MANIFEST} was changed")
    if _hashes(folder) != body["files"]:
        raise Damaged("a file was changed, cut or lost")
    return body["content"]


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its names.

    Example:

      >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
      True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in memory that does not depend on its size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """A file, or the names in a folder, on the disk and not only on their way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
