"""Which leaf of a tree of parameters is the bias of which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.trees import is_inexact

Path = tuple[str | int, ...]
"""Where a leaf lies: dict keys, field names and positions, e.g. ``("recurrent", "gates", "bias")``."""

BiasOf = Callable[[Path], Path | None]
"""``path of a leaf -> path of the bias of the same units, or None``."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """Which leaf is the bias of which: part of a tree's structure, not of its data.

    Attributes:
      biases: for each leaf, in the order of `jax.tree.leaves`, the position of its bias, or None.
    """

    biases: tuple[int | None, ...]


def sibling_bias(path: Path) -> Iterator[Path]:
    """The default rule: where the bias of a kernel may lie, best first, by the names of leaves.

    "X_kernel" has the bias "X_bias" of the same dict, or else its "bias"; "kernel" has "bias". A flax cell
    adds two layers up, one of which has no bias: the kernel of layer "hf" then has the bias of "if", that of
    "dense_h" the bias of "dense_i", and the other way round. Other leaves have none.

    Example:

      >>> list(sibling_bias(("gates", "hidden_kernel")))
      [('gates', 'hidden_bias'), ('gates', 'bias')]
      >>> list(sibling_bias(("hf", "kernel")))
      [('hf', 'bias'), ('if', 'bias'), ('if_', 'bias')]
    """
    *parents, name = path or ("",)
    if not (isinstance(name, str) and (name == "kernel" or name.endswith("_kernel"))):
        return
    if name != "kernel":
        yield (*parents, name.removesuffix("kernel") + "bias")
    yield (*parents, "bias")
    if name == "kernel" and parents:
        *above, layer = parents
        yield from ((*above, partner, "bias") for partner in _partners(layer))


def layout_of(params: PyTree, bias_of: BiasOf | None = None) -> Layout:
    """Which leaf is the bias of which.

    A kernel (..., out) and its bias (out,) have one unit for each entry of the bias; in general the bias's
    shape must be the last axes of the kernel's. One bias may serve several kernels.

    Args:
      params: a tree of floating-point arrays.
      bias_of: path of a leaf -> path of its bias or None; default: the first of `sibling_bias` that exists.

    Raises:
      TypeError: a leaf that is not floating point, or real weights with a complex bias or the reverse.
      ValueError: a bias that is not there, that has a bias itself, or whose shape does not fit.

    Example: a network of one's own, with weights W and offsets b.

      >>> params = {"W": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> layout_of(params).biases, layout_of(params, lambda path: ("b",) if path == ("W",) else None).biases
      ((None, None), (1, None))
    """
    named = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(params)]
    positions = {path: k for k, (path, _) in enumerate(named)}
    for path, leaf in named:
        if not is_inexact(leaf):
            raise TypeError(
                f"quasi-diagonal: `params` at {path} has dtype {jnp.result_type(leaf)}, which has no "
                "gradient; mask it with optax.masked, or make it floating point"
            )
    biases = []
    for path, leaf in named:
        if bias_of is None:
            bias = next((found for found in sibling_bias(path) if found in positions), None)
        else:
            bias = bias_of(path)
        if bias is not None:
            bias = tuple(bias)
            _check_bias(path, leaf, bias, named[positions[bias]][1] if bias in positions else None)
        biases.append(None if bias is None else positions[bias])
    for (path, _), bias in zip(named, biases, strict=True):
        if bias is not None and biases[bias] is not None:
            raise ValueError(
                f"quasi-diagonal: {named[bias][0]} is the bias of {path} and has a bias itself; "
                "let `bias_of` return None for it"
            )
    return Layout(tuple(biases))


def _check_bias(path: Path, leaf: Any, bias_path: Path, bias: Any) -> None:
    if bias is None or bias_path == path:
        raise ValueError(
            f"quasi-diagonal: the bias of {path} is said to be {bias_path}, which is "
            f"{'the leaf itself' if bias_path == path else 'not a leaf of `params`'}; let `bias_of` return "
            "the path of another leaf, or None"
        )
    shape, bias_shape = jnp.shape(leaf), jnp.shape(bias)
    if shape[max(len(shape) - len(bias_shape), 0) :] != bias_shape:
        raise ValueError(
            f"quasi-diagonal: {path} has shape {shape} and its bias {bias_path} {bias_shape}, which "
            "must be its last axes (one bias a unit); transpose it, or let `bias_of` return None for it"
        )
    if jnp.iscomplexobj(leaf) != jnp.iscomplexobj(bias):
        raise TypeError(
            f"quasi-diagonal: {path} is {leaf.dtype} and its bias {bias_path} {bias.dtype}; make both real "
            "or both complex, or let `bias_of` return None for it"
        )


def _partners(layer: str | int) -> list[str]:
    """The other layer of a flax cell that feeds the same units; nnx writes "if_" for the keyword."""
    swapped = {"h": "i", "i": "h"}
    if not isinstance(layer, str):
        return []
    if layer.startswith("dense_") and layer[6:] in swapped:
        return ["dense_" + swapped[layer[6:]]]
    if layer[:1] in swapped and len(layer.rstrip("_")) <= 2:
        partner = swapped[layer[0]] + layer[1:].rstrip("_")
        return [partner, partner + "_"]
    return []


def path_of(keys: Any) -> Path:
    """The names along a key path of `jax.tree_util`."""
    names = ("key", "name", "idx")
    return tuple(next(getattr(key, name) for name in names if hasattr(key, name)) for key in keys)
