"""The rank-one family is unbiased, by enumeration, and has the variance that the paper says.

On systems of two units the mean over all patterns of signs is the influence to 1e-12, and each draw is the
oracle's at the same signs. The sampled tests are in `test_forward_sampled`, the Kronecker factors in
`test_forward_kronecker`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
import tests.forward_reference as forward
from tests import reference, systems
from tests.forward_cases import assert_unbiased, drawn_influences, same
from tests.forward_reference import signs
from tests.reference import from_vector, to_vector
from tests.systems import Case

Oracle = Callable[[reference.Linearised, Case, np.ndarray], np.ndarray]


structured_tanh = partial(systems.structured, "tanh", width=2)


class Enumerated(NamedTuple):
    """An estimator on a tiny case with all that it can draw.

    Attributes:
      make: ``(system, noise=...) -> estimator``.
      case: T steps.
      patterns: (patterns, updates, ...), every pattern of signs.
      oracle: ``(run, case, pattern) -> (T, S, p)``.
      chunk: steps an update.
      start: changes the first state.
    """

    make: Callable[..., Any]
    case: Callable[[], Case]
    patterns: Callable[[], np.ndarray]
    oracle: Oracle
    chunk: int = 1
    start: Callable[[Any], Any] = lambda state: state


def some_blocks(state: Any) -> Any:
    """Both blocks in every leaf of θ, instead of those that `init` drew."""
    return state._replace(
        blocks=jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 2, state.blocks)
    )


def split_oracle(run: reference.Linearised, case: Case, e: np.ndarray) -> np.ndarray:
    indices = jax.tree.map(lambda leaf: jnp.arange(leaf.size) % 2, case.params.recurrent)
    return forward.split_nobacktrack(run, e, np.asarray(to_vector(jax.tree.map(jnp.float64, indices))))


def some_metric(state: Any) -> Any:
    """An arbitrary quasi-diagonal metric, far from the identity."""
    generator = np.random.default_rng(17)
    slopes = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape)), state.metric.slopes)
    scales = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.2, 5.0, leaf.shape)), state.metric.scales
    )
    return state._replace(metric=state.metric._replace(slopes=slopes, scales=scales))


def dense_covariance(case: Case) -> np.ndarray:
    """C_θ = Aᵀ diag(scales) A of `some_metric` for the tanh network: A takes slope · bias off each weight."""
    estimator = jtrunc.nobacktrack(case.system, norms="kalman")
    metric = some_metric(estimator.init(case.params, case.hidden, jax.random.key(0))).metric
    theta = case.params.recurrent
    at = jax.tree.map(
        lambda leaf: np.asarray(leaf, int), from_vector(jnp.arange(float(to_vector(theta).size)), theta)
    )
    A = np.eye(int(to_vector(theta).size))
    for name in set(theta) - {"bias"}:
        for (k, unit), slope in np.ndenumerate(np.asarray(metric.slopes[name])):
            A[at[name][k, unit], at["bias"][unit]] = -slope
    return A.T @ np.diag(np.asarray(to_vector(metric.scales))) @ A


def with_a_reset(length: int) -> Case:
    """Two sequences in one stream; the second begins at the third step."""
    case = structured_tanh(length)
    system = jtrunc.with_resets(case.system, case.hidden + 0.1)
    return case._replace(system=system, inputs=(jnp.arange(length) == 2, case.inputs))


CHAINS: Oracle = lambda run, case, e: forward.nobacktrack(run, e)  # noqa: E731
UORO: Oracle = lambda run, case, e: forward.uoro(run, e)  # noqa: E731
KALMAN: Oracle = lambda run, case, e: forward.nobacktrack(run, e, dense_covariance(case))  # noqa: E731

kalman = partial(jtrunc.nobacktrack, norms="kalman")

ENUMERATED = {
    "nobacktrack": Enumerated(
        jtrunc.nobacktrack, partial(structured_tanh, 4), partial(signs, 4, 1, 2), CHAINS
    ),
    "nobacktrack, plain": Enumerated(
        jtrunc.nobacktrack, partial(systems.tanh, 4, 2), partial(signs, 4, 1, 2), CHAINS
    ),
    "nobacktrack, complex": Enumerated(
        jtrunc.nobacktrack,
        partial(systems.structured, "linear_recurrent", 4, 1),
        partial(signs, 4, 1, 2),
        CHAINS,
    ),
    "nobacktrack, lstm": Enumerated(
        jtrunc.nobacktrack, partial(systems.structured, "lstm", 4, 1), partial(signs, 4, 1, 2), CHAINS
    ),
    "nobacktrack, dead units": Enumerated(
        jtrunc.nobacktrack, partial(systems.relu, 5, 2), partial(signs, 5, 1, 2), CHAINS
    ),
    "nobacktrack, shared parameters": Enumerated(
        jtrunc.nobacktrack, partial(systems.tied, 2), partial(signs, 2, 1, 3), CHAINS
    ),
    "nobacktrack, leaves of many kinds": Enumerated(
        jtrunc.nobacktrack, partial(systems.nested, 2), lambda: signs(2, 1, 6)[::64], CHAINS
    ),
    "nobacktrack, a reset": Enumerated(
        jtrunc.nobacktrack, partial(with_a_reset, 4), partial(signs, 4, 1, 2), CHAINS
    ),
    "nobacktrack, rank two": Enumerated(
        partial(jtrunc.nobacktrack, rank=2), partial(structured_tanh, 3), partial(signs, 3, 2, 2), CHAINS
    ),
    "nobacktrack, split": Enumerated(
        partial(jtrunc.nobacktrack, rank=2, split=True),
        partial(structured_tanh, 3),
        partial(signs, 3, 2, 2),
        split_oracle,
        start=some_blocks,
    ),
    "nobacktrack, kalman": Enumerated(
        kalman, partial(structured_tanh, 4), partial(signs, 4, 1, 2), KALMAN, start=some_metric
    ),
    "nobacktrack, kalman, rank two": Enumerated(
        partial(kalman, rank=2),
        partial(structured_tanh, 3),
        partial(signs, 3, 2, 2),
        KALMAN,
        start=some_metric,
    ),
    "uoro": Enumerated(jtrunc.uoro, partial(structured_tanh, 4), partial(signs, 4, 2), UORO),
    "uoro, plain": Enumerated(jtrunc.uoro, partial(systems.tanh, 4, 2), partial(signs, 4, 2), UORO),
    "uoro, dead units": Enumerated(jtrunc.uoro, partial(systems.relu, 5, 2), partial(signs, 5, 2), UORO),
    "uoro, memory": Enumerated(
        partial(jtrunc.uoro, memory=2),
        partial(structured_tanh, 8),
        partial(signs, 4, 2),
        lambda run, case, e: forward.uoro_memory(run, e, 2),
        chunk=2,
    ),
}


@cache
def enumerate_all(name: str) -> tuple[np.ndarray, np.ndarray, Case, reference.Linearised]:
    entry = ENUMERATED[name]
    case, patterns = entry.case(), entry.patterns()
    draws = drawn_influences(entry.make, case, (patterns,), chunk=entry.chunk, start=entry.start)
    return patterns, draws, case, reference.linearise(*case)


FAST = ("nobacktrack", "nobacktrack, kalman", "uoro")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ENUMERATED]
)
def test_the_mean_over_all_signs_is_the_influence(name):
    """And each draw is the oracle's at the same signs."""
    patterns, draws, case, run = enumerate_all(name)
    assert_unbiased(draws, run)
    for index in np.linspace(0, len(patterns) - 1, 40).astype(int):
        same(draws[index], ENUMERATED[name].oracle(run, case, patterns[index]))


@pytest.mark.slow
def test_a_stack_rolls_through_its_layers():
    """Eq. 43–46: a reduction after each layer, with signs of its own: the draws of the rolled system."""
    case, width, length = systems.structured("stack", 3, 2), 2, 3
    patterns = signs(length, 2, 1, width)
    draws = drawn_influences(jtrunc.nobacktrack, case, (patterns[:, :, 0], patterns[:, :, 1]))
    run = reference.linearise(*case)
    assert_unbiased(draws, run)

    def lower(theta: Any, hidden: Any, inputs: Any) -> jax.Array:
        drive = hidden[0] @ theta["hidden_kernel"] + inputs[0] @ theta["input_kernel"] + theta["bias"]
        return 0.7 * hidden[0] + 0.3 * jnp.tanh(drive)

    def upper(theta: Any, hidden: Any, inputs: Any) -> jax.Array:
        return jnp.tanh(
            hidden[1] @ theta["hidden_kernel"] + hidden[0] @ theta["input_kernel"] + theta["bias"]
        )

    form = forward.rolling([lower, upper], case.system.loss)
    rolled = reference.linearise(
        systems.System(form.transition, form.loss), case.params, case.hidden, form.inputs(case.inputs)
    )
    for index in np.linspace(0, len(patterns) - 1, 40).astype(int):
        row = np.zeros((length, 2, 1, 2 * width))
        for layer in (0, 1):
            row[:, layer, :, layer * width : (layer + 1) * width] = patterns[index, :, layer]
        expected = forward.nobacktrack(rolled, row.reshape(2 * length, 1, 2 * width))
        same(draws[index], form.whole_steps(expected))


# Variance.


def carrying(v: np.ndarray, w: np.ndarray, case: Case) -> Callable[[Any], Any]:
    """A change of the first state: it carries v̄ ⊗ w̄."""

    def start(state: Any) -> Any:
        cotangents = (from_vector(jnp.asarray(w), case.params.recurrent),)
        return state._replace(
            chains=state.chains._replace(tangents=jnp.asarray(v)[None], cotangents=cotangents)
        )

    return start


def integrator(length: int) -> Case:
    """h ← h + tanh(x U + b): ∂F/∂h = 1, so that a reduction is seen as it is."""
    case = systems.tanh(length, 2)

    def transition(theta: Any, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return hidden + jnp.tanh(inputs @ theta["input_kernel"] + theta["bias"])

    theta = {"bias": case.params.recurrent["b"], "input_kernel": case.params.recurrent["U"]}
    return case._replace(
        system=systems.System(transition, case.system.loss), params=case.params._replace(recurrent=theta)
    )


def one_reduction(case: Case, norms: Any) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """All draws of D₂ Ã, where Ã is Σ vᵢ wᵢᵀ reduced after a first step from some v̄ w̄ᵀ; and the pairs."""
    run = reference.linearise(*case)
    generator = np.random.default_rng(19)
    v, w = generator.normal(size=2), generator.normal(size=run.state_by_theta.shape[2])
    start = carrying(v, w, case)
    changed = (lambda state: some_metric(start(state))) if norms == "kalman" else start
    make = partial(jtrunc.nobacktrack, norms=norms)
    draws = drawn_influences(make, case, (signs(2, 1, 2)[::4],), start=changed)
    vectors, forms = [run.state_by_state[0] @ v, *np.eye(2)], [w, *run.state_by_theta[0]]
    return draws[:, 1] - run.state_by_theta[1], vectors, forms


@pytest.mark.slow
def test_the_second_moment_is_equation_49():
    """Where D moves the balanced pairs on: E‖D Ã‖² of the pairs (ρᵢ D vᵢ, wᵢ/ρᵢ)."""
    case = structured_tanh(2)
    draws, vectors, forms = one_reduction(case, "euclidean")
    D = reference.linearise(*case).state_by_state[1]
    rho = [np.sqrt(np.linalg.norm(w) / np.linalg.norm(v)) for v, w in zip(vectors, forms, strict=True)]
    moved = np.stack([r * D @ v for r, v in zip(rho, vectors, strict=True)])
    divided = np.stack([w / r for r, w in zip(rho, forms, strict=True)])
    expected = forward.second_moment(moved, divided)
    np.testing.assert_allclose(np.sum(draws**2, axis=(1, 2)).mean(), expected, rtol=1e-12)
    unscaled = forward.second_moment(np.stack(vectors) @ D.T, np.stack(forms))
    assert abs(unscaled - expected) > 0.05 * expected


def test_the_variance_is_equation_58():
    """In its own norm each scaling reaches the least variance, and the other one does not."""
    case = integrator(2)
    covariance = dense_covariance(case)
    drawn = {norms: one_reduction(case, norms) for norms in ("euclidean", "kalman")}
    _, vectors, forms = drawn["euclidean"]
    mean = sum(np.outer(v, w) for v, w in zip(vectors, forms, strict=True))
    spread = np.einsum("ip,pq,iq->i", mean, covariance, mean)
    roots = {
        "euclidean": (np.eye(2), np.eye(6)),
        "kalman": (np.diag(spread**-0.5), np.linalg.cholesky(covariance)),
    }
    for norms, (root_h, root_theta) in roots.items():
        variances = {
            name: np.sum((root_h @ (draws - mean) @ root_theta) ** 2, axis=(1, 2)).mean()
            for name, (draws, _, _) in drawn.items()
        }
        least = forward.least_variance(np.stack(vectors) @ root_h, np.stack(forms) @ root_theta)
        np.testing.assert_allclose(variances[norms], least, rtol=1e-12)
        assert max(variances.values()) > 1.01 * least
