"""Gated cells and stacks in two phases, however inputs are projected, against the same without structure.

One row projects its inputs ahead of the steps, a few rows read them one step early, and many project them
inside; windows of static and of dynamic length have code of their own for each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells
from jtrunc.backward import layers, thresholds, two_phase
from tests.compare import assert_close
from tests.systems import Case

STEPS, WIDTH, FEATURES = 40, 3, 2
ROWS = {"ahead": (), "a step early": (2,), "inside": (33,)}

CELLS = {
    "lstm": lambda: cells.lstm(FEATURES, WIDTH),
    "stack": lambda: cells.stack(
        [cells.lstm(FEATURES, WIDTH), cells.linear_recurrent(WIDTH, WIDTH), cells.gru(2 * WIDTH, WIDTH)]
    ),
}


def case_of(cell: cells.Cell, rows: tuple[int, ...]) -> Case:
    """Sequences that start anew now and then, so that an integer flag flows up beside the floats."""
    model = cells.model(cell, FEATURES, lambda prediction, target: jnp.sum((prediction - target) ** 2))
    params = model.init(jax.random.key(3), jnp.float64)
    hidden = jax.tree.map(lambda leaf: leaf + 0.1, model.initial_hidden(rows, jnp.float64))
    generator = np.random.default_rng(7)
    pair = jnp.asarray(generator.normal(size=(2, STEPS, *rows, FEATURES)))
    resets = jnp.asarray(generator.uniform(size=(STEPS, *rows)) < 0.1)
    return Case(jtrunc.with_resets(model.system, hidden), params, hidden, (resets, (pair[0], pair[1])))


def estimators(system: jtrunc.System) -> dict[str, jtrunc.GradientEstimator]:
    law = jtrunc.truncation.polynomial(mean_length=6, alpha=4)
    return {
        "windowed": jtrunc.windowed_bptt(system, 6, 5),
        "dynamic": jtrunc.online_artbp(system, law),
        "scored": jtrunc.adaptive_bptt(system, 0.5, num_lags=10, max_length=9, initial_length=7),
    }


def gradient(estimator: jtrunc.GradientEstimator, case: Case) -> jtrunc.Params:
    state = estimator.init(case.params, case.hidden, jax.random.key(8))
    return jax.jit(estimator.update)(case.params, state, case.inputs)[0].grads


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_way_to_project_inputs_is_the_plain_gradient(cell, rows):
    case = case_of(CELLS[cell](), rows)
    plain = case._replace(system=case.system._replace(structure=None))
    for name, estimator in estimators(case.system).items():
        expected = gradient(estimators(plain.system)[name], plain)
        assert_close(gradient(estimator, case), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_each_way_is_taken(rows, monkeypatch):
    """The test above compares what it says: a bottom layer projected so, and layers above it inside."""
    taken: list[str] = []

    def spy(module: Any) -> None:
        forward_step = module.forward_step

        def step(structure: Any, layout: Any, weights: Any, hidden: Any, inputs: Any, projected: Any) -> Any:
            taken.append("ahead" if projected else "inside")
            return forward_step(structure, layout, weights, hidden, inputs, projected)

        monkeypatch.setattr(module, "forward_step", step)

    spy(layers)
    spy(two_phase)
    case = case_of(CELLS["stack"](), rows)
    few = rows != ROWS["inside"]
    bottom, early = case.system.structure.layers[0], rows == ROWS["a step early"]
    kernels = (case.params.recurrent[0]["hidden_kernel"],)
    assert thresholds.reading_ahead_pays(bottom, kernels, case.hidden[0], case.inputs) == (early or not few)
    gradient(estimators(case.system)["dynamic"], case)
    assert set(taken) == ({"ahead", "inside"} if few else {"inside"})


@pytest.mark.slow
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_gradients_can_be_differentiated(differentiate):
    """As for hyperparameters: the derivatives of Σ g² with respect to the initial state, in both modes."""
    case = case_of(CELLS["stack"](), (2,))

    def squares(system: jtrunc.System, hidden: Any) -> jax.Array:
        estimator = jtrunc.bptt(system)
        estimate, _ = estimator.update(case.params, estimator.init(case.params, hidden), case.inputs)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(estimate.grads))  # pyright: ignore

    def derivative(system: jtrunc.System) -> jax.Array:
        def of_shift(shift: jax.Array) -> jax.Array:
            return squares(system, jax.tree.map(lambda leaf: leaf + shift, case.hidden))

        return jax.jit(differentiate(of_shift))(jnp.float64(0.1))

    assert_close(derivative(case.system), derivative(case.system._replace(structure=None)), rtol=1e-12)


def test_what_flows_into_the_layer_below_is_all_that_it_receives(monkeypatch):
    """Must fail: without it the weights of the bottom layer have no gradient at all."""
    case = case_of(CELLS["stack"](), ())
    assert jax.tree.leaves(gradient(estimators(case.system)["dynamic"], case).recurrent[0])[0].all()
    pull_rise = layers._pull_rise

    def severed(rise: Any, inputs: Any, hidden: Any) -> Any:
        above, pull = pull_rise(rise, inputs, hidden)
        return above, lambda bars: jax.tree.map(jnp.zeros_like, pull(bars))

    monkeypatch.setattr(layers, "_pull_rise", severed)
    assert not jax.tree.leaves(gradient(estimators(case.system)["dynamic"], case).recurrent[0])[0].any()
