"""Many seeds in one program: each equals its solo run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtrunc.base import Params
from jtrunc.probe import static_num_steps
from jtrunc.training import NonFiniteError, seed_key, train
from jtrunc.training.seeds import check_seeds
from tests.training_cases import plain, random_length, small


def init_of(case: Any) -> Any:
    def init(key: jax.Array) -> Params:
        leaves, treedef = jax.tree.flatten(case.params)
        keys = jax.random.split(key, len(leaves))
        noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, [leaf + 0.1 * n for leaf, n in zip(leaves, noise, strict=True)])

    return init


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, random_length])
def test_seed_i_equals_its_solo_run(make: Any) -> None:
    case = small()
    estimator, optimizer, init = make(case.system), optax.adam(1e-2), init_of(case)
    key = jax.random.key(7)
    options: Any = {"window": 7, "num_updates": 20, "eval_data": {"valid": case.inputs}}
    arguments = (case.system, init, case.hidden, estimator, optimizer, case.inputs)
    many = train(*arguments, key=key, seeds=[3, 0, 11], **options)
    assert many.seeds == (3, 0, 11)
    for i, seed in enumerate([3, 0, 11]):
        solo = train(*arguments, key=seed_key(key, seed), **options)
        for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(solo.params), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(many.history["loss"][:, i], solo.history["loss"], rtol=1e-4)
        np.testing.assert_array_equal(many.history["timestep"][:, i], solo.history["timestep"])
        np.testing.assert_allclose(
            many.evaluations["valid"]["nats"][:, i], solo.evaluations["valid"]["nats"], rtol=1e-4
        )
    assert np.ptp(many.history["loss"][-1]) > 1e-6  # and the seeds differ


@pytest.mark.slow
def test_lead_in_for_every_seed() -> None:
    case = small()
    arguments = (case.system, init_of(case), case.hidden, plain(case.system, 3), optax.sgd(0.05), case.inputs)
    many = train(*arguments, seeds=2, window=7, num_updates=5)
    solo = train(*arguments, key=seed_key(jax.random.key(0), 1), window=7, num_updates=5)
    np.testing.assert_allclose(many.history["loss"][:, 1], solo.history["loss"], rtol=1e-5)


def test_lengths_known_at_trace_time_are_found() -> None:
    case = small()
    arguments = (case.params, case.hidden, case.inputs[:7])
    assert static_num_steps(plain(case.system), *arguments) == 7
    assert static_num_steps(plain(case.system, 3), *arguments) == 3
    assert static_num_steps(random_length(case.system), *arguments) is None


@pytest.mark.slow
def test_a_vmapped_run_shares_one_window_between_seeds() -> None:
    case, shapes = small(), []
    inner = plain(case.system)

    def update(params: Any, state: Any, inputs: Any) -> Any:
        jax.debug.callback(
            lambda x: shapes.append(x.shape), inputs
        )  # one call per seed if inputs had the axis
        return inner.update(params, state, inputs)

    train(case.system, case.params, case.hidden, inner._replace(update=update), optax.sgd(0.1), case.inputs,
          window=7, num_updates=1, seeds=4)  # fmt: skip
    jax.effects_barrier()
    assert shapes == [(7, 2)]


def test_counts_and_sequences_of_seeds() -> None:
    assert check_seeds(3) == (0, 1, 2)
    assert check_seeds([5, 2]) == (5, 2)
    assert check_seeds(None) is None


@pytest.mark.slow
def test_one_bad_seed_is_named_and_all_stop_before_it() -> None:
    case = small()
    blow_up = optax.sgd(1.0)

    def init(key: jax.Array) -> Params:
        big = jax.random.key_data(key)[-1] % 2 == 0  # about half of the seeds begin far away
        return jax.tree.map(lambda leaf: jnp.where(big, 1e25, 1.0).astype(leaf.dtype) * leaf, case.params)

    keys = [jax.random.split(seed_key(jax.random.key(0), i))[0] for i in range(6)]
    big = [i for i, k in enumerate(keys) if jax.random.key_data(k)[-1] % 2 == 0]
    assert 0 < len(big) < 6
    with pytest.raises(NonFiniteError, match=f"seed {', '.join(map(str, big))}, estimator plain") as caught:
        train(case.system, init, case.hidden, plain(case.system), blow_up, case.inputs,
              window=7, num_updates=20, seeds=6)  # fmt: skip
    assert int(caught.value.result.state.update) == 0
