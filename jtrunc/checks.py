"""Errors at trace time that name the argument, the value and the remedy."""

from __future__ import annotations

from numbers import Real
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Params, PyTree, System


def check_size(owner: str, name: str, value: Any) -> int:
    """A positive Python integer, or a clear error."""
    return _check_integer(owner, name, value, 1, "a positive integer")


def check_count(owner: str, name: str, value: Any) -> int:
    """A Python integer of at least 0, or a clear error."""
    return _check_integer(owner, name, value, 0, "an integer of at least 0")


def _check_integer(owner: str, name: str, value: Any, least: int, wanted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{owner}: `{name}` must be {wanted}, not {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{owner}: `{name}` must be at least {least}, not {value}")
    return int(value)


def check_positive(owner: str, name: str, value: Any) -> float:
    """A positive finite Python number, or a clear error."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: `{name}` must be a positive number, not {value!r}")
    number = float(value)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{owner}: `{name}` must be positive and finite, not {value}")
    return number


def check_choice(owner: str, name: str, value: Any, choices: Any) -> None:
    """One of the names of a `Literal`, or a ValueError."""
    known = get_args(choices)
    if value not in known:
        shown = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise ValueError(f"{owner}: `{name}` must be {shown}, not {value!r}")


def check_system(owner: str, system: Any) -> System:
    """A `System` of two functions, or a clear error."""
    if not isinstance(system, System):
        raise TypeError(
            f"{owner}: `system` must be a jtrunc.System(transition, loss), not {type(system).__name__}"
        )
    for name in ("transition", "loss"):
        if not callable(getattr(system, name)):
            raise TypeError(f"{owner}: `system.{name}` must be a function, not {getattr(system, name)!r}")
    return system


def check_params(params: Any) -> None:
    """`Params` whose leaves are all floating point, or a clear error."""
    if not isinstance(params, Params):
        raise TypeError(
            f"`params` must be a jtrunc.Params(recurrent, readout), not {type(params).__name__}; "
            "wrap the transition's parameters as Params(recurrent=theta)"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` has dtype {dtype}, which has no gradient; "
                "make it floating point, or move it into `hidden` or `inputs`"
            )


def check_key(owner: str, key: Any, random: bool) -> None:
    """A typed key where one is needed; a legacy key is an error everywhere."""
    if key is None:
        if random:
            raise ValueError(f"{owner} is random: `key` is None; pass a typed key, jax.random.key(seed)")
        return
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        shown = f"{type(key).__name__} of dtype {getattr(key, 'dtype', 'none')}"
        raise TypeError(f"{owner}: `key` must be a typed key, jax.random.key(seed), not {shown}")
    if key.shape != ():
        raise ValueError(f"{owner}: `key` must be one key, not an array of keys of shape {key.shape}")


def check_inputs(inputs: PyTree, argument: str = "inputs") -> int:
    """The common length of the time axis, at least 1, or a clear error."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    if not leaves:
        raise ValueError(
            f"`{argument}` has no array leaves, so it has no time axis; pass jnp.zeros((T,)) if F needs none"
        )
    lengths = {}
    for path, leaf in leaves:
        name = f"{argument}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "shape"):
            raise TypeError(f"`{name}` must be an array with a leading time axis, not {type(leaf).__name__}")
        if leaf.ndim == 0:
            raise ValueError(f"`{name}` is a scalar; every leaf needs a leading time axis")
        lengths[name] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
        raise ValueError(
            f"`{argument}` has unequal time axes: {shown} steps; give all leaves the same leading axis"
        )
    length = next(iter(lengths.values()))
    if length == 0:
        raise ValueError(f"`{argument}` is empty: its time axis has 0 steps; give at least one step")
    return length


def check_step(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> int:
    """Runs one step on shapes alone: the transition keeps its state, the loss is a real scalar."""
    check_params(params)
    length = check_inputs(inputs)
    hidden_aval, inputs_aval = jax.eval_shape(
        lambda hidden, inputs: (hidden, jax.tree.map(lambda leaf: leaf[0], inputs)), hidden, inputs
    )
    new_hidden = jax.eval_shape(system.transition, params.recurrent, hidden_aval, inputs_aval)
    check_same_state("the transition", hidden_aval, new_hidden)
    value = jax.eval_shape(system.loss, params, hidden_aval, inputs_aval)
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            f"`system.loss` must return (scalar, aux), not {shown(value)}; "
            "return (loss, ()) if there is no aux"
        )
    scalar = value[0]
    if not hasattr(scalar, "shape") or scalar.shape != ():
        raise ValueError(
            f"`system.loss` must return a scalar first, not {shown(scalar)}; sum or average over the batch"
        )
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        raise TypeError(f"`system.loss` must return a real floating scalar, not dtype {scalar.dtype}")
    return length


def check_same_state(what: str, before: PyTree, after: PyTree, name: str = "hidden") -> None:
    """The hidden state keeps structure, shapes and dtypes, or an error shows the first difference."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise TypeError(
            f"{what} changes the structure of `{name}` from {jax.tree.structure(before)} to "
            f"{jax.tree.structure(after)}; return the structure that came in"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        leaf = f"{name}{jax.tree_util.keystr(path)}"
        if old.shape != new.shape:
            raise ValueError(
                f"{what} changes the shape of `{leaf}` from {old.shape} to {new.shape}; "
                "return the shape that came in (a broadcast against `inputs` is the usual cause)"
            )
        if old.dtype != new.dtype:
            raise TypeError(
                f"{what} changes the dtype of `{leaf}` from {old.dtype} to {new.dtype}; "
                f"cast the initial value or the result, e.g. with .astype({old.dtype})"
            )


def check_alike(owner: str, name: str, given: PyTree, like: str, expected: PyTree) -> None:
    """Structure, shapes and dtypes of an argument are those of another, or an error names both."""
    if jax.tree.structure(given) != jax.tree.structure(expected):
        raise TypeError(
            f"{owner}: `{name}` must have the structure of {like}, {jax.tree.structure(expected)}, not "
            f"{jax.tree.structure(given)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in pairs:
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            error = TypeError if leaf.shape == wanted.shape else ValueError
            raise error(
                f"{owner}: `{name}{jax.tree_util.keystr(path)}` must be like {like}, {shown(wanted)}, not "
                f"{shown(leaf)}; reshape or cast it"
            )


def shown(value: Any) -> str:
    """An array as its dtype and shape, anything else as its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
