"""Gated cells: LSTM and GRU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.cells.cell import Cell, check_sizes, orthogonal, plain_input, variance_scaled, zeros_hidden
from jtrunc.structure import Affine, Structure

AffineMaps = Callable[[PyTree], dict[str, Affine]]
Elementwise = Callable[[jax.Array], jax.Array]


def lstm(input_size: int, width: int, forget_bias: float = 1.0) -> Cell:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gates of Gers et al. 2000).

        i, f, z, o = split(hₜ₋₁ W + xₜ U + b)
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(z),   hₜ = σ(o) tanh(cₜ)

    θ = {"hidden_kernel": (width, 4·width), "input_kernel": (input_size, 4·width), "bias": (4·width,)}, gates
    in the order i, f, z, o; the hidden state is the pair (c, h), each (..., width).

    Args:
      forget_bias: initial bias of the forget gates; the ARTBP paper uses 2.

    Raises:
      TypeError, ValueError: a size that is not a positive integer.

    Example:

      >>> cell = lstm(input_size=2, width=3, forget_bias=2.0)
      >>> cell.init(jax.random.key(0))["bias"].reshape(4, 3)[:, 0].tolist()
      [0.0, 2.0, 0.0, 0.0]
    """
    check_sizes("lstm", input_size, width)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        bias = jnp.zeros((4, width), dtype).at[1].set(forget_bias)
        return _gate_kernels(key, input_size, width, 4, dtype) | {"bias": bias.reshape(-1)}

    def affine(theta: PyTree) -> dict[str, Affine]:
        return {"gates": Affine(theta["hidden_kernel"], theta["input_kernel"], theta["bias"])}

    def initial_hidden(batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> PyTree:
        return zeros_hidden(width)(batch_shape, dtype), zeros_hidden(width)(batch_shape, dtype)

    return Cell(init, initial_hidden, lambda hidden: hidden[1], lstm_structure(affine), width)


def lstm_structure(
    affine: AffineMaps, gate: Elementwise = jax.nn.sigmoid, activation: Elementwise = jnp.tanh
) -> Structure:
    """cₜ = gate(f) cₜ₋₁ + gate(i) φ(z), hₜ = gate(o) φ(cₜ); hidden = (c, h); one map, "gates": i, f, z, o."""

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        cell, _ = hidden
        write, forget, candidate, read = jnp.split(p["gates"], 4, axis=-1)
        cell = gate(forget) * cell + gate(write) * activation(candidate)
        return cell, gate(read) * activation(cell)

    return Structure(
        affine=affine,
        hidden_features=lambda hidden, inputs: {"gates": hidden[1]},
        input_features=lambda inputs: {"gates": plain_input(inputs)},
        combine=combine,
    )


def gru(input_size: int, width: int) -> Cell:
    """Gated recurrent unit (Cho et al. 2014, with the reset gate after the product).

        r, z = split(σ(hₜ₋₁ W_g + xₜ U_g + b_g))
        n = tanh(xₜ U_n + b_n + r · (hₜ₋₁ W_n + b′_n))
        hₜ = (1 − z) n + z hₜ₋₁

    θ = {"gates": {"hidden_kernel": (width, 2·width), "input_kernel": (input_size, 2·width), "bias": ...},
    "candidate": {"hidden_kernel": (width, width), "input_kernel": (input_size, width), "bias": ...,
    "hidden_bias": ...}},
    gates in the order r, z; the hidden state is (..., width).

    Raises:
      TypeError, ValueError: a size that is not a positive integer.
    """
    check_sizes("gru", input_size, width)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        gates_key, candidate_key = jax.random.split(key)
        gates = _gate_kernels(gates_key, input_size, width, 2, dtype)
        candidate = _gate_kernels(candidate_key, input_size, width, 1, dtype)
        zeros = jnp.zeros(width, dtype)
        return {
            "gates": gates | {"bias": jnp.zeros(2 * width, dtype)},
            "candidate": candidate | {"bias": zeros, "hidden_bias": zeros},
        }

    def affine(theta: PyTree) -> dict[str, Affine]:
        gates, candidate = theta["gates"], theta["candidate"]
        return {
            "gates": Affine(gates["hidden_kernel"], gates["input_kernel"], gates["bias"]),
            "candidate_hidden": Affine(candidate["hidden_kernel"], None, candidate["hidden_bias"]),
            "candidate_input": Affine(None, candidate["input_kernel"], candidate["bias"]),
        }

    return Cell(init, zeros_hidden(width), lambda hidden: hidden, gru_structure(affine), width)


def gru_structure(
    affine: AffineMaps, gate: Elementwise = jax.nn.sigmoid, activation: Elementwise = jnp.tanh
) -> Structure:
    """hₜ = (1 − z) φ(xₜ U_n + b_n + r · (hₜ₋₁ W_n + b′_n)) + z hₜ₋₁ with r, z = gate("gates"), in this order.

    The reset gate multiplies a preactivation, not a feature, so the candidate has two maps,
    "candidate_hidden" and "candidate_input".
    """

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        reset, keep = jnp.split(gate(p["gates"]), 2, axis=-1)
        candidate = activation(p["candidate_input"] + reset * p["candidate_hidden"])
        return (1.0 - keep) * candidate + keep * hidden

    return Structure(
        affine=affine,
        hidden_features=lambda hidden, inputs: {"gates": hidden, "candidate_hidden": hidden},
        input_features=lambda inputs: dict.fromkeys(("gates", "candidate_input"), plain_input(inputs)),
        combine=combine,
    )


def _gate_kernels(
    key: jax.Array, input_size: int, width: int, gates: int, dtype: Any
) -> dict[str, jax.Array]:
    hidden_key, input_key = jax.random.split(key)
    return {
        "hidden_kernel": orthogonal(hidden_key, width, gates, dtype),
        "input_kernel": variance_scaled(input_key, (input_size, gates * width), dtype),
    }
