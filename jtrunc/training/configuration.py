"""What a run is: enough to refuse to resume it as another one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree
from jtrunc.probe import estimator_name
from jtrunc.sealed import hash_json, sync
from jtrunc.training.chunk import Program
from jtrunc.training.processes import each
from jtrunc.training.seeds import Hyperparameters
from jtrunc.training.step import TrainState

FILE = "config.json"
_STEP = jax.jit(Program.step, static_argnums=0)
_TIED_TO_BACKEND = ("backend", "program", "first state")
_HASHES = ("data", "evaluation data", "program", "first state")


class ConfigurationError(ValueError):
    """The folder belongs to another run; nothing was written."""


def configuration(
    program: Program,
    state: TrainState,
    inputs: PyTree,
    data: PyTree,
    given: Mapping[str, Any],
    hyperparameters: Hyperparameters = None,
) -> dict[str, Any]:
    """The JSON object that says what a run computes.

    Args:
      program: the compiled parts.
      state: the first state, whole.
      inputs: the shapes of one window.
      data: the data of this process; its bytes are hashed.
      given: what the caller adds (seeds, key, own options).
      hyperparameters: of all seeds.

    Returns:
      `given`, hyperparameters where there are any, the estimator's name and window, SHA-256 of the data, of
      the first state and of the lowered train step: a length or a learning rate that sits in a closure
      changes the program.
    """
    one, numbers = (_first(tree) for tree in (state, hyperparameters))
    if program.seed_axis.value == "none":
        one = state
    # Shapes alone: the text must not say on which devices the arrays lie.
    shapes = jax.eval_shape(lambda *trees: trees, one, inputs, numbers)
    text = _STEP.lower(program._replace(mesh=None), *shapes).as_text()
    if hyperparameters is not None:
        given = {**given, "hyperparameters": {name: row.tolist() for name, row in hyperparameters.items()}}
    return {
        **given,
        "estimator": estimator_name(program.parts(numbers)[0]),
        "window": program.window,
        "data": hash_of_all(data),
        "first state": hash_tree(state),
        "program": hashlib.sha256(text.encode()).hexdigest(),
        "backend": f"jax {jax.__version__} {jax.default_backend()}",
    }


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if jnp.ndim(leaf) == 0 else leaf[0], tree)


def hash_of_all(data: PyTree) -> str | dict[str, str]:
    """The hash of the data, or of every process's own where they differ."""
    hashes = each(hash_tree(data))
    if len(set(hashes)) == 1:
        return hashes[0]
    return {f"process {index}": found for index, found in enumerate(hashes)}


def hash_tree(tree: PyTree) -> str:
    """SHA-256 over the dtypes, shapes and bytes of all leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_configuration(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration."""
    return hash_json(configuration)


def begin(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Claim an empty or absent folder for a new run.

    Raises:
      ConfigurationError: if the folder holds a run already.
      TypeError: if the configuration is no JSON object.
    """
    if (folder / FILE).exists():
        raise ConfigurationError(
            f"train: {folder} holds a run already; pass resume=True to go on with it, or another `out_dir`. "
            "Nothing was overwritten"
        )
    text = json.dumps(configuration, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / FILE)
    sync(folder)


def check_same(folder: Path, configuration: Mapping[str, Any]) -> str:
    """Refuse to resume a folder that another configuration wrote.

    Another release of jax or another backend is allowed, with a warning: the run goes on, but no longer bit
    for bit.

    Returns:
      The hash of the configuration that the folder was written with.

    Raises:
      ConfigurationError: naming the entries that differ; nothing is written.
    """
    saved = _read(folder)
    here = json.loads(json.dumps(configuration))
    different = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if "backend" in different:
        warnings.warn(
            f"{folder} was written under {saved.get('backend')}, this is {here['backend']}: the resumed run "
            "will not equal an uninterrupted one bit for bit",
            RuntimeWarning,
            stacklevel=2,
        )
        different = [name for name in different if name not in _TIED_TO_BACKEND]
    if different:
        entries = "; ".join(_differences(saved, here, different))
        raise ConfigurationError(
            f"train: {folder} was written by another configuration ({entries}); resume with the options of "
            "that run, or choose another `out_dir`. Nothing was overwritten"
        )
    return hash_configuration(saved)


def _differences(saved: dict[str, Any], here: dict[str, Any], names: list[str]) -> list[str]:
    """One phrase for each option that differs; hashes only where no option explains them."""
    readable = [name for name in names if name not in _HASHES]
    phrases = []
    for name in readable or names:
        there, now = saved.get(name, "absent"), here.get(name, "absent")
        if isinstance(there, dict) and isinstance(now, dict):
            inner = [key for key in {**there, **now} if there.get(key) != now.get(key)]
            where = "" if name == "given" else f"{name}, "
            phrases += [where + phrase for phrase in _differences(there, now, inner)]
        else:
            phrases.append(f"{name}: {_short(there)} there, {_short(now)} here")
    return phrases


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.exists():
        raise ConfigurationError(
            f"train: there is no run to resume in {folder} (no {FILE}); check `out_dir`, or leave out resume"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"train: {path} is damaged ({error}); begin a new run elsewhere") from error


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"
