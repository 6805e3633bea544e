"""`jtrunc.scan`: jax.lax.scan whose backward pass through the carry follows a truncation law."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import truncation
from tests import reference, systems
from tests.compare import assert_close, differ

STEPS = 7


def body(theta: Any, carry: Any, x: Any) -> Any:
    """A carry with a float, an integer and a pair; outputs that depend on the new carry."""
    level, (a, b), clock = carry
    a, b = jnp.tanh(theta["W"] @ a + x["u"]), b * theta["rate"] + a.sum()
    level = 0.9 * level + jnp.sin(b) * (clock % 3)
    return (level, (a, b), clock + 1), {"y": a * level, "clock": clock}


def arguments() -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(8)
    theta = {"W": jnp.asarray(generator.normal(size=(3, 3))), "rate": jnp.float64(0.8)}
    carry = (jnp.float64(0.5), (jnp.asarray(generator.normal(size=3)), jnp.float64(0.1)), jnp.int32(0))
    return theta, carry, {"u": jnp.asarray(generator.normal(size=(STEPS, 3)))}


def total(scan: Any, theta: Any, carry: Any, xs: Any) -> Any:
    carry, ys = scan(partial(body, theta), carry, xs)
    return jnp.sum(ys["y"] ** 2) + carry[0] ** 3 + carry[1][0].sum(), (carry, ys)


def gradients(scan: Any) -> tuple[Any, Any]:
    """The value and outputs, and the gradients by theta, carry and inputs."""
    function = jax.value_and_grad(partial(total, scan), argnums=(0, 1, 2), has_aux=True, allow_int=True)
    return jax.jit(function)(*arguments())


def without_float0(tree: Any) -> Any:
    return jax.tree.map(lambda g: 0 if g.dtype == jax.dtypes.float0 else g, tree)


def python_scan(weights: Any, f: Any, carry: Any, xs: Any) -> Any:
    """The oracle: an unrolled loop; backwards, the carry after step t is scaled by weights[t − 1]."""

    def scale(leaf: jax.Array, weight: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jax.lax.stop_gradient(leaf) * (1 - weight) + leaf * weight

    ys = []
    for t, x in enumerate(reference.steps_of(xs)):
        if t:
            carry = jax.tree.map(lambda leaf, w=weights[t - 1]: scale(leaf, w), carry)
        carry, y = f(carry, x)
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


@pytest.mark.parametrize("unroll", [1, 3])
def test_never_is_lax_scan(unroll):
    mine = gradients(partial(jtrunc.scan, truncation=truncation.never(), unroll=unroll))
    lax = gradients(jax.lax.scan)
    assert_close(mine[0], lax[0], rtol=1e-12)
    assert_close(without_float0(mine[1]), without_float0(lax[1]), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_every_truncates_as_equation_9(length):
    mine = gradients(partial(jtrunc.scan, truncation=truncation.every(length)))
    weights = [float(t % length != 0) for t in range(1, STEPS)]
    expected = gradients(partial(python_scan, weights))
    assert_close(mine[0], expected[0], rtol=1e-12)
    assert_close(without_float0(mine[1]), without_float0(expected[1]))
    exact = without_float0(gradients(jax.lax.scan)[1])
    assert differ(without_float0(mine[1]), exact) == (length < STEPS)


def test_truncated_scan_is_truncated_bptt():
    case = systems.tanh(10)

    def loss(params):
        def step(hidden, x):
            hidden = case.system.transition(params.recurrent, hidden, x)
            return hidden, case.system.loss(params, hidden, x)[0]

        return jtrunc.scan(step, case.hidden, case.inputs, truncation=truncation.every(4))[1].sum()

    run = reference.linearise(*case)
    assert_close(jax.grad(loss)(case.params), reference.truncated_bptt(run, 4))
    assert differ(jax.grad(loss)(case.params), reference.bptt(run))


LAWS = {"constant": reference.constant(0.4), "polynomial": reference.polynomial(2.0, 5.0)}


@pytest.mark.parametrize("law", LAWS)
def test_the_expectation_over_all_given_cuts_is_exact(law, key):
    case = systems.tanh(STEPS)
    run = reference.linearise(*case)  # for its length only: these laws do not look at the state
    patterns = list(reference.cut_patterns(LAWS[law], run))

    def grads(cuts, probabilities):
        scan = partial(jtrunc.scan, truncation=truncation.given(cuts, probabilities), key=key)
        function = jax.grad(lambda theta, xs: total(scan, theta, arguments()[1], xs)[0], argnums=(0, 1))
        return function(arguments()[0], arguments()[2])

    columns = ([[*p.cuts, 0] for p in patterns], [[*p.probabilities, 0.0] for p in patterns])
    drawn = jax.jit(jax.vmap(grads))(*map(jnp.asarray, columns))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in range(len(patterns))]
    mean = reference.expectation((p.probability, g) for p, g in zip(patterns, each, strict=True))
    exact = gradients(jax.lax.scan)[1]
    assert_close(mean, (exact[0], exact[2]), rtol=1e-12)
    assert differ(reference.expectation((1 / len(each), g) for g in each), (exact[0], exact[2]))


def test_a_random_law_draws_cuts_from_its_key(keys):
    """Each draw is one of the 64 patterns, weighted as the law says; other keys give other patterns."""
    xs = arguments()[2]

    def grads(key):
        scan = partial(jtrunc.scan, truncation=truncation.constant(0.4), key=key)
        return jax.grad(lambda theta: total(scan, theta, arguments()[1], xs)[0])(arguments()[0])

    drawn = jax.jit(jax.vmap(grads))(keys)
    case = systems.tanh(STEPS)
    weights = np.array(
        [
            [0.0 if cut else 1 / 0.6 for cut in pattern.cuts]
            for pattern in reference.cut_patterns(LAWS["constant"], reference.linearise(*case))
        ]
    )
    oracle = jax.grad(lambda theta, w: total(partial(python_scan, w), theta, arguments()[1], xs)[0])
    table = jax.jit(jax.vmap(oracle, (None, 0)))(arguments()[0], jnp.asarray(weights))
    found = [int(np.argmin(np.abs(np.asarray(table["rate"]) - float(rate)))) for rate in drawn["rate"]]
    assert_close(drawn, jax.tree.map(lambda leaf: leaf[np.array(found)], table))
    assert len(set(found)) > 4


def test_reverse_runs_backwards_in_time():
    reverse = partial(jax.lax.scan, reverse=True)
    never = gradients(partial(jtrunc.scan, truncation=truncation.never(), reverse=True))
    assert_close(never[0], gradients(reverse)[0], rtol=1e-12)
    assert_close(without_float0(never[1]), without_float0(gradients(reverse)[1]), rtol=1e-12)

    def flipped(f: Any, carry: Any, xs: Any) -> Any:
        flip = partial(jax.tree.map, lambda leaf: jnp.flip(leaf, 0))
        carry, ys = jtrunc.scan(f, carry, flip(xs), truncation=truncation.every(3))
        return carry, flip(ys)

    mine = gradients(partial(jtrunc.scan, truncation=truncation.every(3), reverse=True))
    assert_close(without_float0(mine), without_float0(gradients(flipped)), rtol=1e-12)
    assert differ(without_float0(mine[1]), without_float0(gradients(reverse)[1]))


def test_without_inputs():
    step = lambda h, x: (0.5 * h + 1, h)  # noqa: E731
    mine = jtrunc.scan(step, jnp.float64(1.0), None, 5, truncation=truncation.every(2))
    lax = jax.lax.scan(step, jnp.float64(1.0), None, 5)
    assert_close(mine, lax, rtol=1e-14)
    slope = jax.grad(lambda h: jtrunc.scan(step, h, None, 5, truncation=truncation.every(2))[1].sum())
    np.testing.assert_allclose(slope(jnp.float64(1.0)), 1.5, rtol=1e-14)  # outputs of steps 1 and 2 only


def test_under_vmap_and_without_jit():
    theta, carry, xs = arguments()
    scan = partial(jtrunc.scan, truncation=truncation.every(3))
    gradient = jax.grad(lambda xs: total(scan, theta, carry, xs)[0])
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), xs)
    together = jax.jit(jax.vmap(gradient))(batch)
    for i in range(2):
        alone = gradient(jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, rtol=1e-12)


def test_forward_mode_is_refused_not_wrong():
    """Weighted edges have a reverse pass only; a law that never cuts has both."""
    theta, carry, xs = arguments()
    scan = partial(jtrunc.scan, truncation=truncation.every(3))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda xs: total(scan, theta, carry, xs)[0], (xs,), (xs,))
