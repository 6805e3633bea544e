"""Plans: bytes against formulas and against what a process takes, operations, depth, and the choice."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells, truncation
from jtrunc.diagnostics import Claim, cost, plan
from jtrunc.diagnostics.cost import sequential_depth
from jtrunc.diagnostics.plan import CLAIMS
from tests import systems

N, X = 64, 2
"""Units and inputs of tests.systems.tanh, whose θ has N² + XN + N numbers, the readout NX."""
THETA, ALL = N * N + X * N + N, N * N + X * N + N + N * X


def shaped(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def tanh_cost(make: Any, steps: int) -> Any:
    case = systems.tanh(2, N, jnp.float32)
    inputs = jax.ShapeDtypeStruct((steps, X), jnp.float32)
    return cost(make(case.system), shaped(case.params), shaped(case.hidden), inputs)


# What lies in memory besides parameters, gradient, state and data, in numbers: what the backward pass stores
# for a step is h, and tanh's slope and value; a window whose length is data stores that for blocks of 128
# steps and one h a block, and adds up its gradient apart; forward, the influence or its traces once more.
STORED = {
    "bptt": (jtrunc.bptt, 4000, N, 3 * 4000 * N),
    "checkpointed": (partial(jtrunc.bptt, checkpoint="sqrt"), 10_000, N, (100 + 3 * 100) * N),
    "truncated": (partial(jtrunc.truncated_bptt, length=4000), 4000, N, 3 * 4000 * N),
    "windowed": (partial(jtrunc.windowed_bptt, backward_steps=3999, loss_steps=1000), 4000, N, 3 * 4000 * N),
    "adaptive": (
        partial(jtrunc.adaptive_bptt, tolerance=0.5, num_lags=100, max_length=1999),
        4000, N, (3 * 128 + 4000 // 128 + 100) * N + THETA,
    ),
    "artbp": (partial(jtrunc.artbp, truncation=truncation.constant(0.1)), 4000, N, 3 * 4000 * N),
    "online_artbp": (
        partial(jtrunc.online_artbp, truncation=truncation.constant(0.1)),
        4000, N, (3 * 128 + 4000 // 128) * N + THETA,
    ),
    "targets": (
        partial(jtrunc.target_propagation, block_length=50, penalty=0.1), 4000, N, 5 * 4000 * N,
    ),
    "rtrl": (jtrunc.rtrl, 1, N * THETA + N, N * THETA),
    "rtrl_window": (jtrunc.rtrl, 50, N * THETA + N, 2 * N * THETA),
    "snap": (partial(jtrunc.snap, order=1), 1, N * THETA + N, N * THETA),
    "nobacktrack": (jtrunc.nobacktrack, 1, THETA + 2 * N, THETA),
    "nobacktrack_4": (partial(jtrunc.nobacktrack, rank=4), 1, 4 * THETA + 5 * N, 3 * THETA),
    "uoro": (jtrunc.uoro, 1, THETA + 2 * N, 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_bytes_are_those_of_the_formula(name):
    make, steps, state, stored = STORED[name]
    found = tanh_cost(make, steps)
    assert 0 <= found.state_bytes - 4 * state <= 32  # and a key, counters
    assert found.gradient_bytes == 4 * ALL
    prediction_and_data = 2 * steps * X
    np.testing.assert_allclose(
        found.total_bytes, 4 * (2 * ALL + state + prediction_and_data + stored), rtol=0.1
    )


# State, and what else: the factors u and A, the best sum of two with a decomposition; a trace a weight.
FACTORS = 1 + N + X + N * N + N
STRUCTURED = {
    "kf_rtrl": (jtrunc.kf_rtrl, FACTORS, N * N),
    "optimal_kronecker_sum": (partial(jtrunc.optimal_kronecker_sum, terms=1), FACTORS, 4 * N * N),
    "eprop": (jtrunc.eprop, THETA + N, THETA),
    "rflo": (jtrunc.rflo, THETA + N, THETA),
    "snap": (partial(jtrunc.snap, order=1), THETA + N, THETA),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURED)
def test_bytes_of_estimators_that_need_a_structure(name):
    make, state, stored = STRUCTURED[name]
    model = cells.model(cells.tanh(X, N), X, lambda y, target: jnp.sum((y - target) ** 2))
    params = jax.eval_shape(partial(model.init, dtype=jnp.float32), jax.random.key(0))
    inputs = (jax.ShapeDtypeStruct((1, X), jnp.float32),) * 2
    found = cost(make(model.system), params, shaped(model.initial_hidden()), inputs)
    assert 0 <= found.state_bytes - 4 * state <= 64
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(found.total_bytes, 4 * (2 * num_params + state + stored), rtol=0.1)


@pytest.mark.slow
def test_operations_of_backpropagation_are_three_products_a_step():
    """Forward Wh and Ux; back Wᵀλ and the outer products λhᵀ, λxᵀ, added up; readout and its two."""
    found = tanh_cost(jtrunc.bptt, 1000)
    products = 2 * (3 * N * N + 2 * X * N + 3 * N * X) + ALL
    np.testing.assert_allclose(found.flops_per_step, products, rtol=0.05)
    assert found.flops_per_step > products
    longer = tanh_cost(jtrunc.bptt, 4000)
    np.testing.assert_allclose(longer.flops_per_step, found.flops_per_step, rtol=0.02)


@pytest.mark.slow
def test_operations_of_rtrl_are_its_own_product():
    found = tanh_cost(jtrunc.rtrl, 1)
    np.testing.assert_allclose(found.flops_per_step, 2 * N * N * THETA, rtol=0.1)


@pytest.mark.slow
def test_operations_follow_the_steps_that_are_consumed():
    """BPTT(K₁, K₂) reads K₁ + 1 steps for every K₂."""
    full = tanh_cost(jtrunc.bptt, 40).flops_per_step
    windowed = tanh_cost(partial(jtrunc.windowed_bptt, backward_steps=39, loss_steps=10), 40)
    assert windowed.num_steps == 10
    np.testing.assert_allclose(windowed.flops_per_step, 4 * full, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        partial(jtrunc.uoro, memory=5),  # takes no 8 steps
        partial(jtrunc.target_propagation, block_length=5, penalty=0.1),  # a block more, half full, for 8
    ],
)
def test_operations_of_groups_and_blocks_are_those_of_the_whole_window(make):
    """10 steps are written out, 100 are not; the ends of a window are worth a few per cent."""
    short, long = (tanh_cost(make, steps).flops_per_step for steps in (10, 100))
    np.testing.assert_allclose(long, short, rtol=0.05)


@pytest.mark.slow
def test_depth():
    assert tanh_cost(jtrunc.bptt, 40).depth == 80
    assert tanh_cost(partial(jtrunc.bptt, checkpoint="sqrt"), 36).depth == 3 * 36
    blocks = partial(jtrunc.target_propagation, penalty=0.1, hidden_steps=0)
    deep, flat = (tanh_cost(partial(blocks, block_length=length), 40).depth for length in (20, 5))
    assert deep - flat >= 15
    dynamic = tanh_cost(partial(jtrunc.online_artbp, truncation=truncation.constant(0.1)), 40)
    assert dynamic.depth is None and dynamic.flops_per_step is None and dynamic.num_steps is None


def test_depth_of_nested_loops():
    def nested(x: jax.Array) -> jax.Array:
        def outer(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda c, y: (jnp.sin(c + y), None), carry, row)[0], None

        total = jax.lax.scan(outer, x[0, 0], x)[0]
        return jax.lax.fori_loop(0, 11, lambda i, c: jnp.cos(c), total)

    compiled = jax.jit(nested).lower(jnp.ones((3, 5))).compile()
    assert sequential_depth(compiled.as_text() or "") == 3 * 5 + 11
    assert sequential_depth("no program") is None
    plain = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
    assert sequential_depth(plain.as_text() or "") == 1


RESIDENT = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
import jtrunc
from functools import partial
from jtrunc.diagnostics import cost

def resident(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

system = jtrunc.System(
    lambda theta, h, x: jnp.tanh(h @ theta["W"] + x @ theta["U"]),
    lambda params, h, x: (jnp.sum((h @ params.readout - x) ** 2), ()),
)
shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
found = {}
for name, (make, width, steps) in {
    "bptt": (jtrunc.bptt, 64, 200_000),
    "truncated_bptt": (partial(jtrunc.truncated_bptt, length=200_000), 64, 200_000),
    "target_propagation": (partial(jtrunc.target_propagation, block_length=1000, penalty=0.1), 64, 150_000),
    "rtrl": (jtrunc.rtrl, 320, 1),
}.items():
    params = jtrunc.Params({"W": shape((width, width)), "U": shape((2, width))}, shape((width, 2)))
    arguments = params, shape((width,)), shape((steps, 2))
    estimator = make(system)
    planned = cost(estimator, *arguments).total_bytes
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(estimator.init, *arguments[:2], key)
    update = jax.jit(estimator.update, donate_argnums=1).lower(params, state, arguments[2]).compile()
    before = resident("VmRSS")
    fill = lambda leaf: jnp.asarray(np.full(leaf.shape, 0.01, "f4"))
    params, hidden, inputs = jax.tree.map(fill, arguments)
    state = estimator.init(params, hidden, jax.random.key(0))
    jax.block_until_ready((state, inputs))
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    result = jax.block_until_ready(update(params, state, inputs))
    found[name] = [planned, resident("VmHWM") - before]
    del result, state, params, inputs
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's count of resident pages"
)
def test_bytes_are_those_that_a_process_takes():
    """Some hundred megabytes each, against the resident pages of a process that runs them."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (planned, taken) in json.loads(done.stdout).items():
        assert planned > 1e8
        assert abs(planned / taken - 1) < 0.1, (name, planned, taken)


class Subject(NamedTuple):
    system: jtrunc.System
    params: Any
    hidden: Any
    inputs: Any


def subject() -> Subject:
    case = systems.tanh(2, N, jnp.float32)
    return Subject(*case[:3], jax.ShapeDtypeStruct((100, X), jnp.float32))


MAKERS: dict[str, Any] = {
    "bptt": jtrunc.bptt,
    "rtrl": (jtrunc.rtrl, 1),
    "online-artbp:mean-length=10": partial(jtrunc.online_artbp, truncation=truncation.constant(0.1)),
    "uoro": (jtrunc.uoro, 1),
    "short": (partial(jtrunc.truncated_bptt, length=5), 5),
}


@pytest.mark.slow
def test_recommendations_and_their_reasons():
    found = plan(*subject(), estimators=MAKERS)
    claims = [choice.claim for choice in found.choices.values()]
    assert claims == [Claim.EXACT_INSIDE, Claim.EXACT, Claim.UNBIASED, Claim.UNBIASED, Claim.BIASED]
    assert found.recommended == "online-artbp:mean-length=10"
    assert "rtrl is exact and fits, but does" in found.reason
    assert plan(*subject(), estimators=MAKERS, stream=False).recommended == "bptt"

    limit = found.choices["uoro"].cost.total_bytes
    small = plan(*subject(), estimators=MAKERS, memory_limit=limit)
    assert small.recommended == "uoro"
    assert (
        not small.choices["rtrl"].fits
        and f"rtrl, online-artbp:mean-length=10: more than {limit:,}" in small.reason
    )
    nothing = plan(*subject(), estimators=MAKERS, memory_limit=1000)
    assert nothing.recommended is None and nothing.reason.startswith("Nothing fits in 1,000 bytes; ")
    bound = found.choices["online-artbp:mean-length=10"]
    assert bound.cost.flops_per_step is None
    np.testing.assert_allclose(bound.flops_per_step, found.choices["bptt"].flops_per_step, rtol=0.05)


@pytest.mark.slow
def test_rtrl_is_recommended_where_it_is_cheap():
    case = systems.scalar(5)
    makers: dict[str, Any] = {"rtrl": (jtrunc.rtrl, 1), "uoro": (jtrunc.uoro, 1), "unknown": lambda s: mine}
    exact = jtrunc.bptt(case.system)

    def update(params: Any, state: Any, inputs: Any) -> Any:
        return exact.update(params, state, inputs)

    mine = jtrunc.GradientEstimator(exact.init, update)
    found = plan(case.system, case.params, case.hidden, case.inputs, makers)
    assert found.recommended == "rtrl" and found.reason.startswith("rtrl is exact, the best kind that fits")
    assert found.choices["unknown"].claim is Claim.UNKNOWN
    alone = plan(case.system, case.params, case.hidden, case.inputs, {"unknown": lambda s: mine})
    assert alone.recommended == "unknown" and "nothing is known" in alone.reason


def test_a_claim_is_made_for_every_estimator():
    public = {name for name in dir(jtrunc) if name.endswith(("bptt", "artbp", "rtrl", "oro", "track"))}
    assert public | {"snap", "eprop", "rflo", "optimal_kronecker_sum", "target_propagation"} == set(CLAIMS)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"memory_limit": 0}, ValueError, "`memory_limit` must be at least 1"),
        ({"memory_limit": "2G"}, TypeError, "`memory_limit` must be a positive integer"),
        ({"estimators": {}}, ValueError, "`estimators` must map at least one name"),
        ({"estimators": {"a": 3}}, TypeError, "'a' must be a function system -> estimator"),
        ({"estimators": {"a": jtrunc.bptt(subject()[0])}}, TypeError, "'a' must be a function"),
        ({"inputs": ()}, ValueError, "no array leaves"),
        ({"params": 1.0}, TypeError, "must be a jtrunc.Params"),
    ],
)
def test_bad_input(changed, error, message):
    system, params, hidden, inputs = subject()
    given: dict[str, Any] = {
        "params": params,
        "hidden": hidden,
        "inputs": inputs,
        "estimators": MAKERS,
        **changed,
    }
    with pytest.raises(error, match=message):
        plan(system, **given)


def test_what_an_estimator_objects_to_is_passed_on_with_its_name():
    system, params, hidden, inputs = subject()
    with pytest.raises(ValueError, match="structure") as raised:
        plan(system, params, hidden, inputs, {"mine": jtrunc.kf_rtrl})
    assert raised.value.__notes__[-1] == "this is what 'mine' objects to"
