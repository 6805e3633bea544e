"""Runs on a mesh: seeds that do not divide evenly, streams, both, other devices on the way, sweeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtrunc
from jtrunc import truncation
from jtrunc.base import Params
from jtrunc.probe import static_num_steps
from jtrunc.training import ConfigurationError, NonFiniteError, checkpoint, seed_key, train
from tests import systems
from tests.systems import batched
from tests.training_cases import plain, random_length

CASE = systems.tanh(30)
SEEDS, ADAM = (3, 0, 11, 4, 7), optax.adam(1e-2)
MESHES = {size: jax.make_mesh((size,), ("seeds",)) for size in (2, 4, 8)}
MAKERS = {"side by side": partial(plain, scored=3), "one by one": random_length}


def init(key: jax.Array) -> Params:
    return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * jax.random.normal(key)), CASE.params)


def run(estimator: Any, mesh: Any = None, case: Any = CASE, **options: Any) -> Any:
    arguments = {"window": 7, "num_updates": 8, "log_every": 2, "eval_every": 2, "seeds": SEEDS} | options
    splits = {"valid": case.inputs[:9]}
    optimizer = arguments.pop("optimizer", ADAM)
    return train(case.system, init, case.hidden, estimator, optimizer, case.inputs, mesh=mesh,
                 eval_data=splits, **arguments)  # fmt: skip


def assert_equal_runs(actual: Any, expected: Any) -> None:
    pairs = [(r.params, r.history, r.evaluations, r.state.estimator_state.hidden) for r in (actual, expected)]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_five_seeds_on_devices_that_they_do_not_fill(kind: str, tmp_path: Path) -> None:
    """Begun on four devices, resumed on two, finished on one: as on one all along."""
    estimator = MAKERS[kind](CASE.system)
    expected = run(estimator)
    assert_equal_runs(run(estimator, MESHES[8]), expected)
    run(estimator, MESHES[4], num_updates=2, out_dir=tmp_path)
    saved = checkpoint.restore(tmp_path / "checkpoints", run(estimator, num_updates=2).state)
    assert len(saved.state.params.readout) == len(SEEDS)  # and not those that fill up the devices
    with pytest.raises(ConfigurationError, match="seeds"):
        run(estimator, MESHES[4], seeds=4, out_dir=tmp_path, resume=True)
    run(estimator, MESHES[2], num_updates=4, out_dir=tmp_path, resume=True)
    assert_equal_runs(run(estimator, out_dir=tmp_path, resume=True), expected)
    assert np.ptp(expected.history["loss"][-1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_streams_and_seeds_on_devices(seeds: Any) -> None:
    generator = np.random.default_rng(3)
    hidden, inputs = jnp.asarray(generator.normal(size=(4, 3))), generator.normal(size=(30, 4, 2))
    case = CASE._replace(system=batched(CASE.system), hidden=hidden, inputs=inputs)
    estimator = jtrunc.online_artbp(case.system, truncation.constant(0.3))
    axes = ("data",) if seeds is None else ("seeds", "data")
    mesh = jax.make_mesh((2, 2)[: len(axes)], axes)
    found, expected = (run(estimator, where, case, seeds=seeds) for where in (mesh, None))
    assert_equal_runs(found, expected)
    shards = found.state.estimator_state.hidden.addressable_shards
    assert all(shard.data.shape[-2] == 2 for shard in shards)


def test_parameters_that_come_laid_out_stay_so() -> None:
    """Over an axis of their own; a mesh has axes of the type Explicit where none is said."""
    generator = np.random.default_rng(3)
    hidden, inputs = jnp.asarray(generator.normal(size=(4, 3))), generator.normal(size=(30, 4, 2))
    estimator = plain(batched(CASE.system))
    mesh = jax.make_mesh((2, 3), ("data", "model"), devices=jax.devices()[:6])
    rows = CASE.params.recurrent | {
        "W": jax.device_put(CASE.params.recurrent["W"], NamedSharding(mesh, P("model")))
    }
    found, expected = (
        train(
            batched(CASE.system), params, hidden, estimator, ADAM, inputs, window=7, num_updates=8, mesh=where
        )
        for params, where in ((CASE.params._replace(recurrent=rows), mesh), (CASE.params, None))
    )
    assert_equal_runs(found, expected)
    assert found.params.recurrent["W"].sharding.spec == P("model")


def test_streams_of_one_known_length_run_side_by_side() -> None:
    """`per_stream` keeps the number of steps known, so that seeds of forward estimators are vmapped."""
    streams = (jnp.broadcast_to(CASE.hidden, (2, 3)), jnp.broadcast_to(CASE.inputs[:7, None], (7, 2, 2)))
    for make, steps in ((jtrunc.uoro, 7), (partial(jtrunc.windowed_bptt, backward_steps=6, loss_steps=3), 3)):
        estimator = jtrunc.per_stream(make(CASE.system))
        assert static_num_steps(estimator, CASE.params, *streams) == steps


@pytest.mark.slow
def test_a_bad_seed_is_named_once() -> None:
    """The first seed is what fills up the devices."""
    rates = {"rate": np.array([np.inf, 1e-3, 1e-3, 1e-3, 1e-3])}
    with pytest.raises(NonFiniteError, match=r"seed 3, estimator plain") as caught:
        run(plain(CASE.system), MESHES[8], optimizer=lambda h: optax.sgd(h["rate"]), hyperparameters=rates)
    assert caught.value.result.history == {} and len(caught.value.result.params.readout) == 5


# Hyperparameters of every seed's own.

SWEEPS: dict[str, tuple[Any, np.ndarray]] = {
    "mean_length": (
        lambda value: jtrunc.online_artbp(CASE.system, truncation.polynomial(value, 4.0)),
        np.array([2.0, 8.0]),
    ),
    "c": (lambda value: jtrunc.artbp(CASE.system, truncation.constant(value)), np.array([0.1, 0.6])),
    "penalty": (lambda value: jtrunc.target_propagation(CASE.system, 2, value), np.array([0.05, 2.0])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_hyperparameters_of_a_seed_are_those_of_its_solo_run(name: str, tmp_path: Path) -> None:
    make, values = SWEEPS[name]
    rates = np.array([0.003, 0.01])
    numbers = {name: values, "rate": rates}
    options: Any = {"optimizer": lambda h: optax.sgd(h["rate"]), "seeds": (5, 5), "num_updates": 4}
    found = run(lambda h: make(h[name]), MESHES[2], hyperparameters=numbers, out_dir=tmp_path, **options)
    for i in range(2):
        solo = {"seeds": None, "key": seed_key(jax.random.key(0), 5), "optimizer": optax.sgd(rates[i])}
        alone = run(make(values[i]), **(options | solo))
        np.testing.assert_allclose(found.history["loss"][:, i], alone.history["loss"], rtol=1e-12)
        np.testing.assert_allclose(found.params.readout[i], alone.params.readout, rtol=1e-12)
    assert np.abs(found.history["loss"][-1, 0] - found.history["loss"][-1, 1]) > 1e-6
    other = numbers | {"rate": rates[::-1]}
    with pytest.raises(ConfigurationError, match="rate"):
        run(lambda h: make(h[name]), hyperparameters=other, out_dir=tmp_path, resume=True, **options)


def test_a_value_that_a_part_refuses_is_refused_at_once() -> None:
    def make(h: Any) -> Any:
        return jtrunc.online_artbp(CASE.system, truncation.polynomial(h["mean_length"], 4.0))

    with pytest.raises(ValueError, match=r"`mean_length` must be finite and exceed 1, not 0\.5"):
        run(make, seeds=2, hyperparameters={"mean_length": [8.0, 0.5]})


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no mesh": (TypeError, "jax.sharding.Mesh", {"mesh": 8}),
    "axes": (ValueError, "needs an axis 'seeds'", {"mesh": jax.make_mesh((8,), ("batch",))}),
    "no seeds": (ValueError, "there are no `seeds`", {"mesh": MESHES[8], "seeds": None}),
    "no streams": (ValueError, "take a multiple of 8", {"mesh": jax.make_mesh((8,), ("data",))}),
    "no factory": (ValueError, "need `seeds`", {"hyperparameters": {"rate": [1.0] * 5}}),
    "no numbers": (TypeError, "no `hyperparameters`", {"optimizer": lambda h: optax.sgd(h["rate"])}),
    "no mapping": (TypeError, "map names", {"hyperparameters": [1.0]}),
    "shape": (
        ValueError,
        r"hyperparameters\['rate'\]` must have shape \(5,\)",
        {"hyperparameters": {"rate": [1.0]}, "optimizer": lambda h: optax.sgd(h["rate"])},
    ),
    "twice": (ValueError, "none twice", {"seeds": (1, 1)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    error, message, options = WRONG[name]
    with pytest.raises(error, match=message):
        run(plain(CASE.system), **options)


def test_a_context_of_explicit_axes_is_refused() -> None:
    mesh = jax.make_mesh((2,), ("seeds",), axis_types=(AxisType.Explicit,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"within jax\.set_mesh"),
    ):
        run(plain(CASE.system), mesh)


def test_hyperparameters_may_lie_anywhere() -> None:
    place = NamedSharding(MESHES[2], P("seeds"))
    rates = [jax.device_put(np.array([0.01, 0.02]), where) for where in (place, jax.devices()[3])]
    options: Any = {"optimizer": lambda h: optax.sgd(h["rate"]), "seeds": (5, 5), "num_updates": 2}
    found, expected = (
        run(plain(CASE.system), where, hyperparameters={"rate": rate}, **options)
        for rate, where in zip(rates, (MESHES[2], None), strict=True)
    )
    assert_equal_runs(found, expected)
    assert np.ptp(found.history["grad_norm"][-1]) > 1e-6


def test_per_stream_refuses_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="none is 'data'"):
        jtrunc.per_stream(plain(CASE.system), mesh=MESHES[2])
