"""Cells are their formulas: states against NumPy, gradients against jax.grad of code written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells
from tests.compare import assert_close, differ

FEEDBACK = [0.0, 0.3, 0.9, 1.0]
WIDTH, INPUTS, STEPS = 4, 2, 12


class Formula(NamedTuple):
    """A cell, and its step and output as the docstring writes them, for numpy or jax.numpy."""

    cell: cells.Cell
    step: Callable[[Any, Any, Any], Any]
    output: Callable[[Any], Any]


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + jnp.exp(-x))


def softsign(x: Any) -> Any:
    return x / (1.0 + jnp.abs(x))


def preactivation(sigma: Callable[[Any], Any], alpha: Any, **options: Any) -> Formula:
    def step(theta: Any, h: Any, x: Any) -> Any:
        return alpha * h + sigma(h) @ theta["hidden_kernel"] + x @ theta["input_kernel"] + theta["bias"][None]

    return Formula(cells.preactivation(INPUTS, WIDTH, **options), step, sigma)


def linear_recurrent() -> Formula:
    def step(theta: Any, h: Any, x: Any) -> Any:
        eigenvalue = jnp.exp(-jnp.exp(theta["nu"]) + 1j * jnp.exp(theta["phi"]))[None]
        drive = x @ (theta["real_kernel"] + 1j * theta["imaginary_kernel"])
        return eigenvalue * h + jnp.exp(theta["log_gamma"])[None] * drive

    def output(h: Any) -> Any:
        return jnp.concatenate([jnp.real(h), jnp.imag(h)], axis=-1)

    return Formula(cells.linear_recurrent(INPUTS, WIDTH), step, output)


FORMULAS = {
    "preactivation": preactivation(jnp.tanh, 0.0),
    "preactivation, sigmoid": preactivation(sigmoid, 0.0, activation="sigmoid"),
    "preactivation, a function": preactivation(softsign, 0.25, activation=softsign, feedback=0.25),
    "preactivation, leaky": preactivation(jnp.tanh, jnp.asarray(FEEDBACK)[None], feedback=FEEDBACK),
    "linear recurrent": linear_recurrent(),
}


def shifted(tree: Any, seed: int) -> Any:
    """Away from special initial values."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * generator.normal(size=leaf.shape)), tree)


def stream(batch: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(3)
    x, target = (jnp.asarray(generator.normal(size=(STEPS, *batch, size))) for size in (INPUTS, 3))
    return x, target


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((prediction - target) ** 2)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_cell_is_its_formula(name: str) -> None:
    cell, step, output = FORMULAS[name]
    theta = shifted(cell.init(jax.random.key(0), jnp.float64), 0)
    hidden, xs = shifted(cell.initial_hidden((3,), jnp.float64), 1), stream((3,))[0]
    alone, before = hidden[0], hidden
    for x in xs[:4]:
        before, hidden = hidden, step(theta, hidden, x)
        ours = cell.transition(theta, before, x)
        assert_close(ours, hidden, rtol=1e-14)
        alone = cell.transition(theta, alone, x[0])
    assert_close(alone, hidden[0], rtol=1e-13)
    assert differ(hidden, before)
    assert_close(cell.output(hidden), output(hidden), rtol=1e-14)
    assert cell.output(hidden).shape == (3, cell.width)


@pytest.mark.parametrize("name", ["preactivation, leaky", "linear recurrent"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_bptt_is_jax_grad_of_the_formula(name: str, batch: tuple[int, ...]) -> None:
    """Alone through the two-phase pass where the cell has one, batched through the plain pass."""
    cell, step, output = FORMULAS[name]
    model = cells.model(cell, 3, squared_error)
    params = shifted(model.init(jax.random.key(0), jnp.float64), 0)
    hidden, inputs = shifted(model.initial_hidden(batch, jnp.float64), 1), stream(batch)

    @jax.jit
    @jax.grad
    def gradient(params: Any, kept: jax.Array) -> jax.Array:
        def one_step(h: Any, xs: Any) -> tuple[Any, jax.Array]:
            (x, target), kept = xs
            h = step(params.recurrent, jnp.where(kept, h, jax.lax.stop_gradient(h)), x.reshape(-1, INPUTS))
            prediction = output(h) @ params.readout["kernel"] + params.readout["bias"][None]
            return h, squared_error(prediction, target.reshape(-1, 3))

        return jax.lax.scan(one_step, hidden.reshape(-1, WIDTH), (inputs, kept))[1].sum()

    estimator = jtrunc.bptt(model.system)
    estimate, _ = jax.jit(estimator.update)(params, estimator.init(params, hidden), inputs)
    assert_close(estimate.grads, gradient(params, jnp.ones(STEPS, bool)), rtol=1e-12)
    assert differ(estimate.grads, gradient(params, jnp.arange(STEPS) != 6))


@pytest.mark.slow
def test_a_linear_recurrent_layer_in_a_stack() -> None:
    """A layer without hidden kernels below one that has them."""
    model = cells.model(cells.stack([cells.linear_recurrent(INPUTS, 3), cells.gru(6, 2)]), 3, squared_error)
    params = shifted(model.init(jax.random.key(0), jnp.float64), 0)
    hidden, inputs = model.initial_hidden((), jnp.float64), stream()

    def total(params: Any) -> jax.Array:
        return jtrunc.unroll(model.system, params, hidden, inputs)[1][0].sum()

    estimator = jtrunc.bptt(model.system)
    estimate, _ = jax.jit(estimator.update)(params, estimator.init(params, hidden), inputs)
    assert_close(estimate.grads, jax.jit(jax.grad(total))(params), rtol=1e-12)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(estimate.grads))


def test_the_jacobian_of_equation_37() -> None:
    """∂hᵢ/∂hⱼ = W_ji σ′(hⱼ) + αᵢ δᵢⱼ."""
    cell = FORMULAS["preactivation, leaky"].cell
    theta = shifted(cell.init(jax.random.key(0), jnp.float64), 0)
    hidden, x = shifted(cell.initial_hidden((), jnp.float64), 1), stream()[0][0]
    jacobian = jax.jacobian(cell.transition, argnums=1)(theta, hidden, x)
    feedforward = theta["hidden_kernel"].T * (1.0 - jnp.tanh(hidden) ** 2)[None]
    assert_close(jacobian, feedforward + jnp.diag(jnp.asarray(FEEDBACK)), rtol=1e-14)
    assert differ(jacobian, feedforward)


@pytest.mark.parametrize("name", ["preactivation, leaky", "linear recurrent"])
def test_tokens_are_one_hot_vectors(name: str) -> None:
    cell = FORMULAS[name].cell
    theta, hidden = cell.init(jax.random.key(0), jnp.float64), cell.initial_hidden((3,), jnp.float64)
    tokens = jnp.asarray([1, 0, 1])
    dense = cell.transition(theta, hidden, jax.nn.one_hot(tokens, INPUTS, dtype=jnp.float64))
    assert_close(cell.transition(theta, hidden, tokens), dense, rtol=1e-15)
    assert differ(cell.transition(theta, hidden, 1 - tokens), dense)


@pytest.mark.parametrize(("dtype", "state"), [("bfloat16", "complex64"), ("float64", "complex128")])
def test_dtypes_of_a_linear_recurrent_cell(dtype: str, state: str) -> None:
    cell = cells.linear_recurrent(INPUTS, WIDTH)
    theta, hidden = cell.init(jax.random.key(0), dtype), cell.initial_hidden((), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype(dtype)}
    assert hidden.dtype == cell.transition(theta, hidden, jnp.ones(INPUTS, dtype)).dtype == state


# The initial values of the linear recurrent unit.


def uniform_distance(values: Any) -> float:
    """The greatest distance of an empirical distribution function from that of [0, 1] (Kolmogorov)."""
    values = np.sort(np.asarray(values, np.float64))
    steps = np.arange(len(values) + 1) / len(values)
    return float(max((steps[1:] - values).max(), (values - steps[:-1]).max()))


def eigenvalues(theta: Any) -> np.ndarray:
    return np.exp(-np.exp(np.asarray(theta["nu"], np.float64)) + 1j * np.exp(np.asarray(theta["phi"])))


def test_eigenvalues_start_uniform_on_the_ring() -> None:
    """The area inside |λ| and the phase are uniform; by the bound of Massart a true law fails once in 10⁶."""
    count, low, high = 20_000, 0.4, 0.9
    bound = np.sqrt(np.log(2 / 1e-6) / (2 * count))
    cell = cells.linear_recurrent(1, count, min_radius=low, max_radius=high, max_phase=1.5)
    values = eigenvalues(cell.init(jax.random.key(0), jnp.float64))
    radius, phase = np.abs(values), np.angle(values)
    assert uniform_distance((radius**2 - low**2) / (high**2 - low**2)) < bound
    assert uniform_distance(phase / 1.5) < bound
    assert uniform_distance((radius - low) / (high - low)) > 2 * bound  # uniform in |λ| would be another law
    assert abs(np.corrcoef(radius, phase)[0, 1]) < 5 / np.sqrt(count)


def test_the_state_of_a_linear_recurrent_unit_keeps_the_variance_of_its_drive() -> None:
    """γ² = 1 − |λ|², so that Σₖ |λ|²ᵏ γ² = 1; the entries of B have variance 1/input_size in all."""
    cell = cells.linear_recurrent(64, 256, min_radius=0.5, max_radius=0.99)
    theta = cell.init(jax.random.key(0), jnp.float64)
    np.testing.assert_allclose(
        np.exp(2 * theta["log_gamma"]) + np.abs(eigenvalues(theta)) ** 2, 1, rtol=1e-12
    )
    for part in ("real_kernel", "imaginary_kernel"):  # 16,384 normal numbers each: six standard errors
        np.testing.assert_allclose(np.var(theta[part]), 0.5 / 64, rtol=6 * np.sqrt(2 / 16_384))
    assert differ(theta["real_kernel"], theta["imaginary_kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("radii", [(0.0, 0.0), (0.0, 1 - 1e-9), (1 - 1e-9, 1 - 1e-9)])
def test_extreme_rings_start_finite(radii: tuple[float, float], dtype: Any) -> None:
    cell = cells.linear_recurrent(1, 100_000, min_radius=radii[0], max_radius=radii[1])
    theta = cell.init(jax.random.key(0), dtype)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theta))
    assert (np.abs(eigenvalues(theta)) <= 1).all()


def test_the_networks_of_the_paper_do_not_explode_at_first() -> None:
    """α uniform in [0, 1] and an orthogonal kernel: small differences do not grow over 500 steps."""
    cell = cells.preactivation(3, 20, feedback=np.random.default_rng(0).uniform(size=20))
    theta, xs = cell.init(jax.random.key(0), jnp.float64), jnp.arange(500) * 7 % 11 % 3

    def run(hidden: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, x: (cell.transition(theta, h, x), None), hidden, xs)[0]

    hidden = cell.initial_hidden((), jnp.float64)
    last, change = jax.jvp(run, (hidden,), (jnp.ones(20),))
    assert np.isfinite(last).all() and 0 < np.linalg.norm(change) < 1


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "width": (lambda: cells.preactivation(2, 0), ValueError, "`width` must be at least 1, not 0"),
    "activation": (
        lambda: cells.preactivation(2, 3, activation="relu"),
        ValueError,
        "'sigmoid', 'tanh'.*relu",
    ),
    "activation 3": (lambda: cells.preactivation(2, 3, activation=3), ValueError, "function, not 3"),  # pyright: ignore
    "feedback 2": (lambda: cells.preactivation(2, 3, feedback=2.0), ValueError, r"\[0, 1\], not 2.0"),
    "feedback nan": (lambda: cells.preactivation(2, 3, feedback=np.nan), ValueError, r"\[0, 1\], not nan"),
    "feedback shape": (
        lambda: cells.preactivation(2, 3, feedback=np.ones(2)),
        ValueError,
        r"`feedback` has shape \(2,\).*\(3,\)",
    ),
    "feedback traced": (
        lambda: jax.jit(lambda a: cells.preactivation(2, 3, feedback=a).width)(0.5),
        TypeError,
        "`feedback` must be known numbers",
    ),
    "input_size": (
        lambda: cells.linear_recurrent(0, 3),
        ValueError,
        "`input_size` must be at least 1, not 0",
    ),
    "radii swapped": (
        lambda: cells.linear_recurrent(2, 3, min_radius=0.9, max_radius=0.5),
        ValueError,
        "`min_radius` 0.9 and `max_radius` 0.5",
    ),
    "radius 1": (lambda: cells.linear_recurrent(2, 3, max_radius=1.0), ValueError, "`max_radius` 1.0.*< 1"),
    "phase 0": (lambda: cells.linear_recurrent(2, 3, max_phase=0.0), ValueError, "`max_phase`.*not 0.0"),
    "phase 7": (lambda: cells.linear_recurrent(2, 3, max_phase=7.0), ValueError, "`max_phase`.*not 7.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
