"""Checkpoints that are either whole or not there, and that notice a flipped bit.

    folder/00000300/arrays/...       what orbax writes: the leaves of the state
    folder/00000300/manifest.json    SHA-256 of each file, shape and dtype of each leaf, hash of the run's
                                     configuration; sealed by its own SHA-256

A step is written beside its place and renamed into it, so that a kill leaves the old steps and no half one.
Orbax by itself restores some single bit flips without a word: the manifest is checked before all else.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree
from jtrunc.sealed import Damaged, read_seal, seal, sync
from jtrunc.training.extras import require

_TEMPORARY = ".unfinished-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be restored; the message says what to do."""


class Restored(NamedTuple):
    """What `restore` found.

    Attributes:
      update: the update that the checkpoint was written at.
      state: the state, bit for bit, in the structure of the template.
      extra: the JSON object that was saved with it.
    """

    update: int
    state: PyTree
    extra: dict[str, Any]


def save(
    folder: str | Path,
    update: int,
    state: PyTree,
    *,
    config_hash: str = "",
    extra: dict[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """Write one checkpoint atomically and remove all but the newest `keep` up to it.

    Later steps stay: where a run goes on from an older one, they are damaged, and must not count.

    Args:
      folder: where the steps lie; created if need be.
      update: names the step; a step of that name is replaced.
      state: any pytree of arrays; typed keys included.
      config_hash: what `restore` compares.
      extra: a JSON object to go with the state.
      keep: how many steps stay, at least 1.

    Returns:
      The folder of the step.

    Raises:
      CheckpointError: if it cannot be written, for example on a full disk; older steps stay as they are.
      ImportError: if orbax is not installed.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.save: `keep` must be at least 1, not {keep}")
    orbax = require("orbax.checkpoint", "writing a checkpoint")
    folder = Path(folder).absolute()
    final = folder / f"{update:08d}"
    temporary = folder / f"{_TEMPORARY}{update:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
        arrays = {name: leaf for name, leaf in _raw_leaves(state).items() if leaf.size}
        if arrays:  # orbax writes neither an empty tree nor an array of size zero
            with _without_log():
                _checkpointer(orbax).save(temporary / "arrays", arrays)
        leaves = describe_leaves(state)
        content = {"update": update, "config_hash": config_hash, "extra": extra or {}, "leaves": leaves}
        seal(temporary, content)
        _move_into_place(temporary, final)
        for old in [step for step in list_steps(folder) if step <= update][:-keep]:
            shutil.rmtree(folder / f"{old:08d}")
    except Exception as error:  # orbax reports a full disk as OSError, ValueError or its own errors
        _remove_unfinished(folder)
        older = list_steps(folder)
        kept = f"the older checkpoints {older} are intact" if older else "there is no older one"
        raise CheckpointError(
            f"could not write the checkpoint of update {update} to {final} ({_reason(error)}); {kept}: "
            "make room or restore access, then resume"
        ) from error
    return final


def restore(folder: str | Path, template: PyTree, *, config_hash: str | None = None) -> Restored:
    """The newest intact checkpoint.

    A step whose files were torn, cut or flipped is passed over with one warning for all of them.

    Args:
      folder: where the steps lie.
      template: a pytree of the structure, shapes and dtypes that are expected (a freshly made state).
      config_hash: if given, it must equal the one that was saved.

    Raises:
      CheckpointError: if there is no step, none is intact, or an intact one belongs to another configuration
        or to another structure, shape or dtype.
      ImportError: if orbax is not installed.
    """
    orbax = require("orbax.checkpoint", "reading a checkpoint")
    folder = Path(folder).absolute()
    damaged: list[str] = []
    for update in reversed(list_steps(folder)):
        step = folder / f"{update:08d}"
        try:
            manifest = read_seal(step)
        except (Damaged, OSError) as error:
            damaged.append(f"{step.name}: {error}")
            continue
        _check_belongs(manifest, template, config_hash, step)
        arrays = _checkpointer(orbax).restore(step / "arrays") if (step / "arrays").exists() else {}
        if damaged:
            warnings.warn(
                f"damaged checkpoints in {folder} were passed over ({'; '.join(damaged)}); going on from the "
                f"newest intact one, update {update}",
                RuntimeWarning,
                stacklevel=2,
            )
        return Restored(manifest["update"], _rebuild(template, arrays), manifest["extra"])
    if damaged:
        raise CheckpointError(f"no checkpoint in {folder} is intact ({'; '.join(damaged)}); begin a new run")
    raise CheckpointError(f"there is no checkpoint in {folder}; begin a new run, or check the path")


def _checkpointer(orbax: Any) -> Any:
    """One that waits for no other process: in a run of several, one alone reads and writes."""
    this = jax.process_index()
    options = orbax.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=options)
    return orbax.Checkpointer(handler, multiprocessing_options=options)


def list_steps(folder: str | Path) -> list[int]:
    """The updates that have a checkpoint, oldest first."""
    folder = Path(folder)
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def _raw_leaves(state: PyTree) -> dict[str, np.ndarray]:
    """Each leaf as a NumPy array, a typed key as its data, named by its place in the tree."""
    leaves = jax.tree.leaves(state)
    raw = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    return {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.device_get(raw))}


def _rebuild(template: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    leaves, treedef = jax.tree.flatten(template)
    restored = []
    for i, leaf in enumerate(leaves):
        data = arrays.get(f"{i:05d}")
        if data is None:
            restored.append(jnp.zeros(leaf.shape, leaf.dtype))
        elif _is_key(leaf):
            restored.append(jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf)))
        else:
            restored.append(jnp.asarray(data))
    return jax.tree.unflatten(treedef, restored)


def describe_leaves(state: PyTree) -> dict[str, str]:
    """Path, dtype and shape of each leaf: ``{".params.recurrent['W']": "float32 (3, 3)"}``."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {tuple(leaf.shape)}" for path, leaf in paths}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_belongs(manifest: dict[str, Any], template: PyTree, config_hash: str | None, step: Path) -> None:
    if config_hash is not None and manifest["config_hash"] != config_hash:
        raise CheckpointError(
            f"the checkpoint {step} was written by a run of another configuration "
            f"({manifest['config_hash'][:12]}… and not {config_hash[:12]}…); resume with the options of that "
            "run, or choose another folder"
        )
    expected, found = describe_leaves(template), manifest["leaves"]
    if expected != found:
        wrong = next(path for path in {**expected, **found} if expected.get(path) != found.get(path))
        raise CheckpointError(
            f"the checkpoint {step} does not fit this run: {wrong} is {found.get(wrong, 'absent')} there and "
            f"{expected.get(wrong, 'absent')} here; use the same system, optimiser, estimator and precision"
        )


@contextmanager
def _without_log() -> Iterator[None]:
    """Orbax logs the traceback of every error that it raises, one for each of its threads."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _reason(error: Exception) -> str:
    """What went wrong; orbax says that a disk is full at the end of a long story."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else str(error)


def _move_into_place(temporary: Path, final: Path) -> None:
    if final.exists():  # a folder cannot be renamed onto another one that is not empty
        aside = final.with_name(f"{_TEMPORARY}old-{final.name}")
        os.replace(final, aside)
    os.replace(temporary, final)
    _remove_unfinished(final.parent)
    sync(final.parent)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
