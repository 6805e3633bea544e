"""The oracle of the forward family: every algorithm as a plain loop over time, from the papers' equations.

It shares no code with jtrunc. An algorithm is a function from a linearised run (`reference.linearise`) and
the signs that it is to draw to the influences J̃₁ … J̃_T that its gradient uses, as one dense array
(T, n, p): n numbers of state, p recurrent parameters. `gradients` closes the chain rule. Row t − 1 of an
array belongs to step t.

Sources: NoBackTrack = "Training recurrent networks online without backtracking" (2015), Algorithms 1 and 2,
eq. 43–46, 49, 58, 59–64, errata 17; UORO = "Unbiased online recurrent optimization" (2017); KF-RTRL =
"Approximating real-time recurrent learning with random Kronecker factors" (2018); OK = "Optimal
Kronecker-sum approximation of real time recurrent learning" (2019); SnAp = "A practical sparse
approximation for real time recurrent learning" (2020); e-prop (2020) and RFLO (2019).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference import Linearised, from_vector, piece


def gradients(run: Linearised, influences: np.ndarray, signals: np.ndarray | None = None) -> np.ndarray:
    """(T, p + q): ∂ℓₜ/∂params + cₜ J̃ₜ of each step; `signals` (T, n) stand in for cₜ = ∂ℓₜ/∂hₜ."""
    rows = run.loss_by_params.copy()
    signals = run.loss_by_state if signals is None else signals
    rows[:, : influences.shape[2]] += np.einsum("ti,tip->tp", signals, influences)
    return rows


def gradient(run: Linearised, influences: np.ndarray, signals: np.ndarray | None = None) -> Any:
    """The sum over the steps, in the structure of the parameters."""
    return from_vector(gradients(run, influences, signals).sum(axis=0), run.params, conjugate=True)


def signs(*shape: int) -> np.ndarray:
    """(2^m, *shape): every array of ±1 of this shape, m = its size."""
    size = int(np.prod(shape))
    return np.array(list(itertools.product([1.0, -1.0], repeat=size))).reshape(-1, *shape)


def joined(runs: Sequence[Linearised]) -> Linearised:
    """Consecutive runs as one, each at parameters of its own; `params` and what belongs to it: the last's."""
    states = [runs[0].states[0], *(state for run in runs for state in run.states[1:])]
    rows = (np.concatenate(columns) for columns in zip(*(run[2:] for run in runs), strict=True))
    return Linearised(runs[-1].params, states, *rows)


# Exact.


def rtrl(run: Linearised, initial: np.ndarray | None = None) -> np.ndarray:
    """Eq. 4: Jₜ = ∂F/∂h Jₜ₋₁ + ∂F/∂θ."""
    influence = np.zeros(run.state_by_theta.shape[1:]) if initial is None else initial
    rows = []
    for D, immediate in zip(run.state_by_state, run.state_by_theta, strict=True):
        influence = D @ influence + immediate
        rows.append(influence)
    return np.stack(rows)


# Deterministic and biased.


def snap(run: Linearised, immediate: np.ndarray, transition: np.ndarray, order: int) -> np.ndarray:
    """Jₜ = M_n ∘ (D Jₜ₋₁ + I); M₁ = pattern(I), M_n = pattern(D) M_{n−1} ∪ M₁.

    immediate: (n, p) and transition: (n, n), the structural patterns, booleans.
    """
    mask = immediate
    for _ in range(order - 1):
        mask = (transition.astype(int) @ mask.astype(int) > 0) | immediate
    influence, rows = np.zeros(mask.shape), []
    for D, now in zip(run.state_by_state, run.state_by_theta, strict=True):
        influence = np.where(mask, D @ influence + now, 0.0)
        rows.append(influence)
    return np.stack(rows)


def eprop(run: Linearised, own: np.ndarray) -> np.ndarray:
    """Jₜ = Eₜ Jₜ₋₁ + Iₜ; own: (T, n, n), Eₜ = ∂hₜ/∂hₜ₋₁ within a unit, its preactivation held fixed."""
    return rtrl(run._replace(state_by_state=own))


# The rank-one trick.


def euclidean(vector: np.ndarray) -> float:
    return float(np.sqrt(vector @ vector))


Norm = Callable[[np.ndarray], float]


def rank_one(
    vectors: Sequence[np.ndarray] | np.ndarray,
    forms: Sequence[np.ndarray] | np.ndarray,
    signs: Sequence[float] | np.ndarray,
    vector_norm: Norm = euclidean,
    form_norm: Norm = euclidean,
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 and 52: v = Σ εᵢ ρᵢ vᵢ, w = Σ εᵢ wᵢ / ρᵢ, ρᵢ = √(‖wᵢ‖ / ‖vᵢ‖), so that E[v wᵀ] = Σ vᵢ wᵢᵀ.

    A pair with a zero member contributes nothing (errata 17).
    """
    v, w = np.zeros_like(vectors[0]), np.zeros_like(forms[0])
    for vector, form, sign in zip(vectors, forms, signs, strict=True):
        if vector_norm(vector) > 0 and form_norm(form) > 0:
            rho = np.sqrt(form_norm(form) / vector_norm(vector))
            v, w = v + sign * rho * vector, w + sign * form / rho
    return v, w


def second_moment(vectors: np.ndarray, forms: np.ndarray) -> float:
    """Eq. 49: E‖Ã‖² of Ã = (Σ εᵢ vᵢ)(Σ εⱼ wⱼ)ᵀ, without any scaling. vectors (m, n), forms (m, p)."""
    inner = (vectors @ vectors.T) * (forms @ forms.T)
    return float(np.sum(vectors**2) * np.sum(forms**2) + 2 * (inner.sum() - np.trace(inner)))


def least_variance(vectors: np.ndarray, forms: np.ndarray) -> float:
    """Eq. 58: Var Ã = Σᵢ Σ_{j ≠ i} ‖vᵢ‖ ‖vⱼ‖ ‖wᵢ‖ ‖wⱼ‖ + ⟨vᵢ|vⱼ⟩ ⟨wᵢ|wⱼ⟩ after the optimal scaling."""
    norms = np.sqrt(np.sum(vectors**2, axis=1) * np.sum(forms**2, axis=1))
    terms = np.outer(norms, norms) + (vectors @ vectors.T) * (forms @ forms.T)
    return float(terms.sum() - np.trace(terms))


def _invariant_norms(covariance: np.ndarray, influence: np.ndarray) -> tuple[Norm, Norm]:
    """Eq. 59, 61, 62: ‖w‖² = wᵀ C_θ w;  ‖v‖² = Σᵢ vᵢ² / (G̃ C_θ G̃ᵀ)ᵢᵢ."""
    spread = np.einsum("ip,pq,iq->i", influence, covariance, influence)
    spread = np.maximum(spread, 1e-2 * spread.max())  # the regularisation that the paper leaves open
    weights = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    return lambda v: float(np.sqrt(weights @ v**2)), lambda w: float(np.sqrt(w @ covariance @ w))


def nobacktrack(run: Linearised, signs: np.ndarray, covariance: np.ndarray | None = None) -> np.ndarray:
    """Algorithm 1, the mean of K chains (section 1.4); signs (T, K, n), one row a reduction.

    covariance: (p, p) C_θ of appendix B, for the invariant norms; None for the Euclidean ones.
    """
    chains, (n, p) = signs.shape[1], run.state_by_theta.shape[1:]
    v, w, rows = np.zeros((chains, n)), np.zeros((chains, p)), []
    for D, immediate, row in zip(run.state_by_state, run.state_by_theta, signs, strict=True):
        v = v @ D.T  # eq. 16
        rows.append(np.einsum("ki,kp->ip", v, w) / chains + immediate)  # eq. 9, with eq. 17
        norms = (euclidean, euclidean) if covariance is None else _invariant_norms(covariance, rows[-1])
        for k in range(chains):  # eq. 13–14
            v[k], w[k] = rank_one([v[k], *np.eye(n)], [w[k], *immediate], [1.0, *row[k]], *norms)
    return np.stack(rows)


def split_nobacktrack(run: Linearised, signs: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Section 1.4: chain k carries the parameters of block k alone; signs (T, K, n), blocks (p,) in 0…K−1."""
    chains = []
    for k in range(signs.shape[1]):
        mine = run._replace(state_by_theta=run.state_by_theta * (blocks == k))
        chains.append(nobacktrack(mine, signs[:, k : k + 1]))
    return np.sum(chains, axis=0)


class Rolling(NamedTuple):
    """Eq. 43–46 as a system of its own: a clock in the inputs says which layer moves.

    NoBackTrack of a stack is Algorithm 1 of this system, with as many steps a time step as layers.
    """

    transition: Callable[..., Any]
    loss: Callable[..., Any]
    depth: int

    def inputs(self, inputs: Any) -> Any:
        """(layer, x) for each sub-step."""
        length = len(jax.tree.leaves(inputs)[0])
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, self.depth, axis=0), inputs)
        return jnp.tile(jnp.arange(self.depth), length), repeated

    def whole_steps(self, rows: np.ndarray) -> np.ndarray:
        """The rows after the last layer of each time step."""
        return rows[self.depth - 1 :: self.depth]


def rolling(layers: Sequence[Any], loss: Callable[..., Any]) -> Rolling:
    """layers: ``(theta_l, hidden, inputs) -> hidden_l``, reading what they need from the whole state."""

    def move(index: int) -> Callable[..., Any]:
        def moved(theta: Any, hidden: Any, inputs: Any) -> Any:
            new = layers[index](theta[index], hidden, inputs)
            return (*hidden[:index], new, *hidden[index + 1 :])

        return moved

    def transition(theta: Any, hidden: Any, inputs: Any) -> Any:
        return jax.lax.switch(
            inputs[0], [move(index) for index in range(len(layers))], theta, hidden, inputs[1]
        )

    def loss_after_the_last(params: Any, hidden: Any, inputs: Any) -> Any:
        value, aux = loss(params, hidden, inputs[1])
        return jnp.where(inputs[0] == len(layers) - 1, value, 0.0), aux

    return Rolling(transition, loss_after_the_last, len(layers))


# UORO.


def _uoro_step(
    s: np.ndarray, theta: np.ndarray, D: np.ndarray, immediate: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """s̃ ← ρ₀ D s̃ + ρ₁ ν, θ̃ ← θ̃/ρ₀ + νᵀI/ρ₁, ρ₀ = √(‖θ̃‖/‖D s̃‖), ρ₁ = √(‖νᵀI‖/‖ν‖)."""
    return rank_one([D @ s, row], [theta, row @ immediate], [1.0, 1.0])


def uoro(run: Linearised, signs: np.ndarray) -> np.ndarray:
    """J̃ₜ = s̃ₜ θ̃ₜᵀ, reduced before the gradient is taken; signs (T, n)."""
    n, p = run.state_by_theta.shape[1:]
    s, theta, rows = np.zeros(n), np.zeros(p), []
    for D, immediate, row in zip(run.state_by_state, run.state_by_theta, signs, strict=True):
        s, theta = _uoro_step(s, theta, D, immediate, row)
        rows.append(np.outer(s, theta))
    return np.stack(rows)


def uoro_memory(run: Linearised, signs: np.ndarray, memory: int) -> np.ndarray:
    """Exact within `memory` steps, s̃ θ̃ᵀ for all that lies before them; signs (T / memory, n)."""
    n, p = run.state_by_theta.shape[1:]
    s, theta, rows = np.zeros(n), np.zeros(p), []
    for start, row in zip(range(0, run.length, memory), signs, strict=True):
        part = piece(run, start, start + memory)
        rows.append(rtrl(part, np.outer(s, theta)))
        D = np.linalg.multi_dot([*part.state_by_state[::-1], np.eye(n)])
        s, theta = _uoro_step(s, theta, D, rtrl(part)[-1], row)
    return np.concatenate(rows)


# Kronecker factors.


class AffineMap(NamedTuple):
    """Where the weights of p = f W stand in θ, and what they multiply.

    positions: (F, O) indices into the vector of θ.
    features: (T, F), the row f of each step (a 1 for the bias).
    """

    positions: np.ndarray
    features: np.ndarray


def _effect(affine: AffineMap, immediate: np.ndarray, t: int) -> np.ndarray:
    """(n, O): C = ∂h/∂p, from ∂h/∂W = f ⊗ C."""
    f = affine.features[t]
    return np.einsum("k,iko->io", f, immediate[:, affine.positions]) / (f @ f)


def _exact_outside(run: Linearised, maps: Sequence[AffineMap]) -> np.ndarray:
    """(T, n, p): RTRL of the parameters that belong to no map, zeros elsewhere."""
    rows = rtrl(run)
    rows[:, :, np.concatenate([affine.positions.ravel() for affine in maps])] = 0.0
    return rows


def kf_rtrl(run: Linearised, maps: Sequence[AffineMap], signs: np.ndarray) -> np.ndarray:
    """J = u ⊗ A: u ← ε₁ p₁ u + ε₂ p₂ f, A ← ε₁ D A / p₁ + ε₂ C / p₂; signs (T, maps, 2)."""
    rows, n = _exact_outside(run, maps), run.state_by_theta.shape[1]
    for j, affine in enumerate(maps):
        u, A = np.zeros(len(affine.positions)), np.zeros((n, affine.positions.shape[1]))
        for t in range(run.length):
            C = _effect(affine, run.state_by_theta[t], t)
            moved = run.state_by_state[t] @ A
            u, flat = rank_one([u, affine.features[t]], [moved.ravel(), C.ravel()], signs[t, j])
            A = flat.reshape(A.shape)
            rows[t][:, affine.positions] = np.einsum("k,io->iko", u, A)
    return rows


def optimal_kronecker_sum(
    run: Linearised, maps: Sequence[AffineMap], signs: np.ndarray, terms: int
) -> np.ndarray:
    """J = Σᵣ u_r ⊗ A_r, reduced to `terms` terms with the least variance; signs (T, maps, terms + 1).

    J alone is carried, as the matrix (features, state · outputs) whose rank is the number of terms.
    """
    rows, n = _exact_outside(run, maps), run.state_by_theta.shape[1]
    for j, affine in enumerate(maps):
        features, outputs = affine.positions.shape
        influence = np.zeros((features, n, outputs))
        for t in range(run.length):
            C = _effect(affine, run.state_by_theta[t], t)
            full = run.state_by_state[t] @ influence + np.multiply.outer(affine.features[t], C)
            influence = least_variance_rank(full.reshape(features, -1), signs[t, j], terms).reshape(
                full.shape
            )
            rows[t][:, affine.positions] = np.moveaxis(influence, 0, 1)
    return rows


def _mixed(values: np.ndarray, rank: int) -> int:
    """How many of the leading singular values are kept as they are: those of at least their share."""
    kept = 0
    while kept < min(rank, len(values)) and (rank - kept) * values[kept] >= values[kept:].sum():
        kept += 1
    return kept


def least_variance_rank(matrix: np.ndarray, signs: np.ndarray, rank: int) -> np.ndarray:
    """An unbiased draw of rank `rank` for a matrix of rank at most rank + 1, of the least variance.

    In the singular basis: the m large values d stay; the rest, with sum s and k = rank − m places, becomes
    (s/k) Δ (1 − z zᵀ) Δ with zᵢ² = 1 − k dᵢ / s and Δ the diagonal of signs.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = np.where(values > 1e-13 * values[0], values, 0.0)[: rank + 1]
    left, right = left[:, : len(values)], right[: len(values)]
    core, kept = np.diag(values), _mixed(values, rank)
    if kept < rank and values[kept:].sum() > 0:
        total, places, d = values[kept:].sum(), rank - kept, values[kept:]
        z = np.sqrt(np.maximum(1 - places * d / total, 0.0))
        flips = signs[kept : len(values)]
        core[kept:, kept:] = total / places * np.outer(flips, flips) * (np.eye(len(d)) - np.outer(z, z))
    return left @ core @ right


def least_rank_variance(matrix: np.ndarray, rank: int) -> float:
    """The variance of `least_variance_rank`: s²/k − Σ d² over the values that are mixed."""
    values = np.linalg.svd(matrix, compute_uv=False)[: rank + 1]
    mixed, places = values[_mixed(values, rank) :], rank - _mixed(values, rank)
    return float(mixed.sum() ** 2 / places - np.sum(mixed**2)) if places > 0 else 0.0
