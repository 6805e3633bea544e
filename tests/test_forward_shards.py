"""Streams on eight devices, each with its own influence, equal the same streams on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import jtrunc
from jtrunc import cells
from tests.compare import assert_close, differ

STREAMS, STEPS = 8, 5
ESTIMATORS: dict[str, Callable[[Any], Any]] = {
    "rtrl": jtrunc.rtrl,
    "nobacktrack": partial(jtrunc.nobacktrack, rank=2),
    "snap": partial(jtrunc.snap, order=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "structured"), [("rtrl", True), ("nobacktrack", True), ("nobacktrack", False), ("snap", False)]
)
def test_streams_on_devices_equal_streams_on_one(name, structured, mesh, key):
    """With shard_map's checks: parameters are cast to varying, gradients averaged at the end."""
    model = cells.model(cells.tanh(2, 3), 3, cells.softmax_cross_entropy)
    params, hidden = model.init(key, jnp.float64), model.initial_hidden((STREAMS,), jnp.float64)
    system = model.system if structured else model.system._replace(structure=None)
    inputs = (
        jax.random.normal(key, (STEPS, STREAMS, 2), jnp.float64),
        jnp.arange(STEPS * STREAMS).reshape(STEPS, -1) % 3,
    )
    estimator = jtrunc.per_stream(ESTIMATORS[name](system))
    state = estimator.init(params, hidden, key)
    expected = jax.jit(estimator.update)(params, state, inputs)[0].grads

    def local(params: Any, state: Any, inputs: Any) -> Any:
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        grads = estimator.update(params, state, inputs)[0].grads
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), grads)

    replicated, by_stream = PartitionSpec(), PartitionSpec("data")
    specs = (replicated, by_stream, PartitionSpec(None, "data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=replicated)
    assert_close(jax.jit(sharded)(params, state, inputs), expected, rtol=1e-12)
    others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), inputs)
    assert differ(jax.jit(sharded)(params, state, others), expected)
