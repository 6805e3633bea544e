"""The linear recurrent unit: a complex diagonal recurrence."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.cells.cell import Cell, check_sizes, plain_input, variance_scaled
from jtrunc.structure import Affine, Structure


def linear_recurrent(
    input_size: int,
    width: int,
    *,
    min_radius: float = 0.9,
    max_radius: float = 0.999,
    max_phase: float = 2.0 * math.pi,
) -> Cell:
    """hₜ = λ hₜ₋₁ + γ (xₜ B): `width` complex units that do not read each other (Orvieto et al. 2023).

        λ = exp(−exp(ν) + i exp(φ)),   B = B′ + i B″,   output = (Re h, Im h)

    |λ| < 1 whatever the parameters. At first λ is uniform on the ring min_radius ≤ |λ| ≤ max_radius with
    phases in [0, max_phase], γ = √(1 − |λ|²) keeps E|h|² at E|xB|² for white inputs, and the entries of B
    have variance 1/input_size in all. A linear readout of the output is the paper's Re(C h); its D x, which
    does not recur, is left out. Layers of linear cells alone are linear: put another cell between them.

    θ = {"nu": (width,), "phi": (width,), "log_gamma": (width,), "real_kernel": (input_size, width),
    "imaginary_kernel": (input_size, width)}, all real; the hidden state is (..., width), complex128 where θ
    is float64, else complex64; the output is real, (..., 2·width). No unit reads another, so exact forward
    influence costs O(|θ|) a step.

    Args:
      min_radius, max_radius: of the ring, 0 ≤ min_radius ≤ max_radius < 1; about 1/(1 − |λ|) steps of memory.
      max_phase: in (0, 2π], radians a step; small values favour slow oscillations.

    Raises:
      TypeError, ValueError: a size that is not a positive integer, radii or a phase out of range.

    Example: with one radius, every unit forgets at the same pace.

      >>> cell = linear_recurrent(input_size=1, width=2, min_radius=0.5, max_radius=0.5)
      >>> theta = cell.init(jax.random.key(0))
      >>> hidden = cell.transition(theta, jnp.ones(2, jnp.complex64), jnp.zeros(1))
      >>> [round(r, 4) for r in jnp.abs(hidden).tolist()], cell.output(hidden).shape
      ([0.5, 0.5], (4,))
    """
    check_sizes("linear_recurrent", input_size, width)
    _check_ring(min_radius, max_radius, max_phase)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        diagonal_key, real_key, imaginary_key = jax.random.split(key, 3)
        half = jnp.sqrt(jnp.asarray(0.5, dtype))  # of the variance to each part
        return _initial_diagonal(diagonal_key, width, min_radius, max_radius, max_phase, dtype) | {
            "real_kernel": half * variance_scaled(real_key, (input_size, width), dtype),
            "imaginary_kernel": half * variance_scaled(imaginary_key, (input_size, width), dtype),
        }

    def initial_hidden(batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> PyTree:
        return jnp.zeros((*batch_shape, width), jnp.result_type(dtype, jnp.complex64))

    structure = Structure(
        affine=lambda theta: {
            "real": Affine(None, theta["real_kernel"], None),
            "imaginary": Affine(None, theta["imaginary_kernel"], None),
        },
        hidden_features=lambda hidden, inputs: {},
        input_features=lambda inputs: dict.fromkeys(("real", "imaginary"), plain_input(inputs)),
        combine=_combine,
        elementwise=lambda theta: {name: theta[name] for name in ("nu", "phi", "log_gamma")},
    )
    return Cell(init, initial_hidden, _real_and_imaginary, structure, 2 * width)


def _initial_diagonal(
    key: jax.Array, width: int, min_radius: float, max_radius: float, max_phase: float, dtype: Any
) -> dict[str, jax.Array]:
    """ν, φ and log γ for λ uniform on the ring, computed in at least 32 bits."""
    radius_key, phase_key = jax.random.split(key)
    wide = jnp.promote_types(dtype, jnp.float32)
    info = jnp.finfo(wide)
    gap = jax.random.uniform(radius_key, (width,), wide) * (max_radius**2 - min_radius**2)
    # 1 − |λ|²; λ = 0 and a phase of 0 have no logarithm.
    gap = jnp.minimum(1.0 - max_radius**2 + gap, 1.0 - info.eps)
    phase = max_phase * jax.random.uniform(phase_key, (width,), wide, float(info.tiny), 1.0)
    diagonal = {
        "nu": jnp.log(-0.5 * jnp.log1p(-gap)),
        "phi": jnp.log(phase),
        "log_gamma": 0.5 * jnp.log(gap),
    }
    return {name: leaf.astype(dtype) for name, leaf in diagonal.items()}


def _combine(elementwise: PyTree, hidden: jax.Array, inputs: PyTree, p: dict[str, jax.Array]) -> jax.Array:
    eigenvalue = jnp.exp(_complex(-jnp.exp(elementwise["nu"]), jnp.exp(elementwise["phi"])))
    gain = jnp.exp(elementwise["log_gamma"])
    drive = _complex(p["real"], p["imaginary"])
    return jnp.broadcast_to(eigenvalue, hidden.shape) * hidden + jnp.broadcast_to(gain, drive.shape) * drive


def _complex(real: jax.Array, imaginary: jax.Array) -> jax.Array:
    wide = jnp.promote_types(real.dtype, jnp.float32)
    return jax.lax.complex(real.astype(wide), imaginary.astype(wide))


def _real_and_imaginary(hidden: jax.Array) -> jax.Array:
    return jnp.concatenate([hidden.real, hidden.imag], axis=-1)


def _check_ring(min_radius: float, max_radius: float, max_phase: float) -> None:
    if not 0.0 <= min_radius <= max_radius < 1.0:
        raise ValueError(
            f"linear_recurrent: `min_radius` {min_radius} and `max_radius` {max_radius} must satisfy "
            "0 <= min_radius <= max_radius < 1; outside the unit circle the state explodes"
        )
    if not 0.0 < max_phase <= 2.0 * math.pi:
        raise ValueError(
            f"linear_recurrent: `max_phase` must lie in (0, 2π], not {max_phase}; in radians a step"
        )
