"""An adapted flax cell is flax's own cell: forward, gradients, parameters, carries."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jtrunc
from jtrunc import adapters
from jtrunc.adapters.assemble import CarryAndOutput
from jtrunc.adapters.known import is_elementwise
from jtrunc.structure import transition_of
from tests.compare import assert_close, differ
from tests.flax_cases import (
    CASES,
    EACH_CELL,
    FEATURES,
    GENERIC,
    STRUCTURED,
    WIDTH,
    FlaxCase,
    LinenLeaky,
    case_of,
    data,
    flax_losses,
    linen_case,
    nnx_case,
    nnx_cell,
    squared_error,
)

pytestmark = pytest.mark.slow  # nearly all of its time is compilation


def carry_of(hidden: Any) -> Any:
    """flax's carry in a hidden state of ours, which may keep the output beside it."""
    is_pair = lambda leaf: isinstance(leaf, CarryAndOutput)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.carry if is_pair(leaf) else leaf, hidden, is_leaf=is_pair)


def flax_gradient(case: FlaxCase, inputs: Any, scored: Any = None, cuts: Any = None) -> Any:
    """jax.grad of the sum of flax's own `scored` losses; the carry is a constant where a step is cut off."""
    length = inputs[0].shape[0]
    scored = jnp.ones(length) if scored is None else scored
    cuts = jnp.zeros(length, bool) if cuts is None else cuts
    return _flax_gradient(case.step, case.readout, case.params, carry_of(case.hidden), inputs, scored, cuts)


@partial(jax.jit, static_argnums=(0, 1))
def _flax_gradient(
    flax_step: Any, readout: Any, params: Any, carry: Any, inputs: Any, scored: jax.Array, cuts: jax.Array
) -> Any:
    def total(params: Any) -> jax.Array:
        def step(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
            (x, target), cut = xs
            carry = jax.tree.map(lambda leaf: jnp.where(cut, jax.lax.stop_gradient(leaf), leaf), carry)
            carry, output = flax_step(params.recurrent, carry, x)
            return carry, squared_error(readout(params.readout, output), target)[0]

        return jnp.vdot(scored, jax.lax.scan(step, carry, (inputs, cuts))[1])

    return jax.grad(total)(params)


def estimated(estimator: Any, case: FlaxCase, inputs: Any) -> Any:
    state = estimator.init(case.params, case.hidden)
    return jax.jit(estimator.update)(case.params, state, inputs)[0].grads


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_forward_is_flax(name: str, batch: tuple[int, ...]) -> None:
    case, inputs = CASES[name](batch), data(17, batch)
    carry, losses = flax_losses(case, case.params, carry_of(case.hidden), inputs)
    hidden, (ours, aux) = jtrunc.unroll(case.system, case.params, case.hidden, inputs)
    assert_close(ours, losses, rtol=1e-13)
    assert_close(carry_of(hidden), carry, rtol=1e-13)
    assert aux["prediction"].shape == inputs[1].shape


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("batch", [(), (4,)])
def test_structure_is_the_transition(name: str, batch: tuple[int, ...]) -> None:
    case, (xs, targets) = STRUCTURED[name](batch), data(2, batch)
    assert case.system.structure is not None
    transition = transition_of(case.system.structure)

    def ours(theta: Any, hidden: Any, x: Any) -> Any:
        return transition(theta, hidden, (x, targets[0]))

    def flax(theta: Any, hidden: Any, x: Any) -> Any:
        return case.step(theta, hidden, x)[0]

    hidden = flax(case.params.recurrent, case.hidden, xs[0])
    arguments = case.params.recurrent, hidden, xs[1]
    assert_close(ours(*arguments), flax(*arguments), rtol=1e-14)
    bar = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), hidden
    )
    assert_close(jax.vjp(ours, *arguments)[1](bar), jax.vjp(flax, *arguments)[1](bar), rtol=1e-13)


@pytest.mark.parametrize("name", GENERIC)
def test_no_structure_is_claimed_where_there_is_none(name: str) -> None:
    assert GENERIC[name](()).system.structure is None


def check_gradients(name: str, lengths: list[int]) -> None:
    """All three estimators over the first steps of one stream, against one program of flax's own."""
    case, stream, steps = CASES[name](()), data(200, ()), np.arange(200)
    for length in lengths:
        inputs = jax.tree.map(lambda leaf, n=length: leaf[:n], stream)
        exact = flax_gradient(case, stream, scored=jnp.asarray(1.0 * (steps < length)))
        assert_close(estimated(jtrunc.bptt(case.system), case, inputs), exact)

        window = max(length // 3, 1)
        cuts = jnp.asarray(steps % window == 0)
        truncated = flax_gradient(case, stream, jnp.asarray(1.0 * (steps < length)), cuts)
        assert_close(estimated(jtrunc.truncated_bptt(case.system, window), case, inputs), truncated)
        assert length == 1 or differ(truncated, exact, by=1e-6)

        look_back = max(length - 1, 1)
        last = min(3, look_back)
        scored = jnp.asarray(1.0 * ((steps < length) & (steps >= length - last)))
        estimator = jtrunc.windowed_bptt(case.system, look_back, last, average=False)
        assert_close(estimated(estimator, case, inputs), flax_gradient(case, stream, scored))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_CELL)
def test_bptt_is_jax_grad_through_flax(name: str) -> None:
    case, inputs = CASES[name](()), data(17, ())
    assert_close(estimated(jtrunc.bptt(case.system), case, inputs), flax_gradient(case, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_CELL)
def test_estimators_are_jax_grad_through_flax(name: str) -> None:
    check_gradients(name, [1, 2, 17, 200])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(EACH_CELL)))
def test_estimators_are_jax_grad_through_flax_with_other_options(name: str) -> None:
    check_gradients(name, [17])


@pytest.mark.parametrize("name", ["linen_stack", "linen_own_cell", "nnx_stack", "nnx_mixed_stack"])
def test_batched_gradient(name: str) -> None:
    case, inputs = CASES[name]((4,)), data(17, (4,))
    assert_close(estimated(jtrunc.bptt(case.system), case, inputs), flax_gradient(case, inputs))


@pytest.mark.slow
def test_convolutional_lstm() -> None:
    """The carry has the image's axes too, and the readout is a plain function."""
    cell = nn.ConvLSTMCell(features=2, kernel_size=(3, 3), param_dtype=jnp.float64)
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(5, 2, 4, 4, 3)))
    adapted = adapters.linen(
        cell, lambda h: h.mean((1, 2)), squared_error, key=jax.random.key(0), inputs=x[0]
    )
    case = FlaxCase(
        *adapted,
        step=lambda theta, carry, x: cell.apply({"params": theta}, carry, x),
        readout=lambda params, output: output.mean((1, 2)),
    )
    assert (
        case.hidden[0].shape == (2, 4, 4, 2) and case.params.readout == () and case.system.structure is None
    )
    inputs = x, jnp.asarray(generator.normal(size=(5, 2, 2)))
    assert_close(estimated(jtrunc.bptt(case.system), case, inputs), flax_gradient(case, inputs))


def test_hidden_is_the_initial_carry_with_the_batch_of_x() -> None:
    lstm = nn.LSTMCell(WIDTH, carry_init=nn.initializers.ones_init())
    arguments: Any = {"key": jax.random.key(0), "inputs": jnp.zeros((5, 2, FEATURES), jnp.float32)}
    _, _, hidden = adapters.linen(lstm, None, squared_error, **arguments)
    assert_close(hidden, (jnp.ones((5, 2, WIDTH), jnp.float32),) * 2)
    gru = nnx.GRUCell(FEATURES, WIDTH, rngs=nnx.Rngs(0))
    _, _, hidden = adapters.nnx([gru], None, squared_error)
    assert [leaf.shape for leaf in hidden] == [(WIDTH,)]


def test_linen_parameters_are_flax_trees() -> None:
    cell, readout, x = nn.GRUCell(WIDTH), nn.Dense(2), jnp.ones((4, FEATURES), jnp.float32)
    _, params, hidden = adapters.linen(cell, readout, squared_error, key=jax.random.key(0), inputs=x)
    own = cell.init(jax.random.key(1), hidden, x)["params"]
    assert jax.tree.structure(params.recurrent) == jax.tree.structure(own)
    _, output = cell.apply({"params": params.recurrent}, hidden, x)
    prediction: Any = readout.apply({"params": params.readout}, output)
    assert prediction.shape == (4, 2)


def test_nnx_parameters_are_copies_and_go_back() -> None:
    cell, readout = nnx.LSTMCell(FEATURES, WIDTH, rngs=nnx.Rngs(0)), nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(1))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state((cell, readout))))
    _, params, _ = adapters.nnx(cell, readout, squared_error)
    # A training step may donate its parameters: that must not take the module's arrays away.
    moved = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf + 1.0, p), donate_argnums=0)(params)
    assert_close(nnx.to_pure_dict(nnx.state((cell, readout))), before, rtol=0)
    nnx.update(cell, moved.recurrent)
    nnx.update(readout, moved.readout)
    after = nnx.to_pure_dict(nnx.state((cell, readout)))
    assert_close(after, jax.tree.map(lambda leaf: leaf + 1.0, before), rtol=0)


def test_parameters_of_many_seeds_under_vmap() -> None:
    def params_of(key: jax.Array) -> Any:
        cell, x = nn.GRUCell(WIDTH, recurrent_kernel_init=nn.initializers.lecun_normal()), jnp.zeros(FEATURES)
        return adapters.linen(cell, nn.Dense(2), squared_error, key=key, inputs=x)[1]

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(params_of)(keys)
    assert_close(jax.tree.map(lambda leaf: leaf[1], stacked), params_of(keys[1]), rtol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_embedding_of_tokens(stacked: bool, learned: bool) -> None:
    """An embedding's parameters are recurrent; a one-hot function keeps the structure."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, size=(17, 4)), jnp.int32)
    table = nn.Embed(5, FEATURES, param_dtype=jnp.float64)
    one_hot = lambda x: jax.nn.one_hot(x, 5, dtype=jnp.float64)  # noqa: E731
    gru = nn.GRUCell(WIDTH, param_dtype=jnp.float64)
    first = lambda output: output[..., :2]  # noqa: E731
    adapted = adapters.linen(
        [gru] if stacked else gru,
        first,
        squared_error,
        embed=table if learned else one_hot,
        key=jax.random.key(0),
        inputs=tokens[0],
    )

    def step(theta: Any, carry: Any, x: Any) -> Any:
        x = table.apply({"params": theta["embed"]}, x) if learned else one_hot(x)
        theta = theta["cell"] if learned else theta
        if not stacked:
            return gru.apply({"params": theta}, carry, x)
        carry, output = gru.apply({"params": theta[0]}, carry[0], x)
        return (carry,), output

    case = case_of(adapted, step, lambda params, output: first(output))
    assert (case.system.structure is None) == learned
    inputs = tokens, data(17, (4,))[1]
    assert_close(estimated(jtrunc.bptt(case.system), case, inputs), flax_gradient(case, inputs))


def test_nnx_embedding_of_tokens() -> None:
    embed = nnx.Embed(5, FEATURES, rngs=nnx.Rngs(0))
    cell = nnx.GRUCell(FEATURES, WIDTH, rngs=nnx.Rngs(1))
    tokens = jnp.arange(4, dtype=jnp.int32)
    system, params, hidden = adapters.nnx(cell, None, squared_error, embed=embed, inputs=tokens)
    assert set(params.recurrent) == {"embed", "cell"} and hidden.shape == (4, WIDTH)
    assert_close(
        system.transition(params.recurrent, hidden, (tokens, ())), cell(hidden, embed(tokens))[0], rtol=1e-6
    )


def test_structure_is_refused_where_an_option_stands_against_it() -> None:
    lookalike = type("GRUCell", (nn.GRUCell,), {})
    for cell in (
        nn.SimpleCell(WIDTH, dtype=jnp.float32, param_dtype=jnp.float64),
        nn.SimpleCell(WIDTH, param_dtype=jnp.float32),
        nn.LSTMCell(WIDTH, param_dtype=jnp.float64, activation_fn=lambda x: x / (1 + jnp.abs(x).max())),
        nn.GRUCell(
            WIDTH,
            param_dtype=jnp.float64,
            kernel_init=nn.with_partitioning(nn.initializers.ones, (None, None)),
        ),
        lookalike(WIDTH, param_dtype=jnp.float64),
    ):
        assert linen_case(cell, (4,)).system.structure is None, cell
    quantised = nnx_cell(nnx.LSTMCell)
    quantised.hi.dot_general = lambda *args, **options: jax.lax.dot_general(*args, **options)
    precise = nnx_cell(nnx.GRUCell)
    precise.dense_i.precision = jax.lax.Precision.HIGHEST
    with_parameters = nnx_cell(nnx.SimpleCell, activation_fn=nnx.PReLU(param_dtype=jnp.float64))
    narrow = nnx_cell(nnx.SimpleCell, dtype=jnp.float32)
    for cell in (quantised, precise, with_parameters, narrow):
        assert nnx_case(cell, (4,)).system.structure is None, cell


def test_activation_with_parameters_gets_their_gradient() -> None:
    case = nnx_case(nnx_cell(nnx.SimpleCell, activation_fn=nnx.PReLU(param_dtype=jnp.float64)), ())
    inputs = data(17, ())
    grads = flax_gradient(case, inputs)
    assert abs(grads.recurrent["activation_fn"]["negative_slope"]) > 1e-3
    assert_close(estimated(jtrunc.bptt(case.system), case, inputs), grads)


def test_hidden_takes_the_dtype_that_the_cell_computes_in() -> None:
    """nnx.SimpleCell computes in float32 whatever its parameters are."""
    case = nnx_case(nnx.SimpleCell(FEATURES, WIDTH, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), (4,))
    assert case.hidden.dtype == jnp.float32
    hidden, _ = jtrunc.unroll(case.system, case.params, case.hidden, data(5, (4,)))
    assert hidden.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes_keep_the_structure(dtype: Any) -> None:
    # flax's default, orthogonal, has no bfloat16 form.
    cell = nn.LSTMCell(WIDTH, param_dtype=dtype, recurrent_kernel_init=nn.initializers.lecun_normal())
    x = jnp.ones((4, FEATURES), dtype)
    system, params, hidden = adapters.linen(cell, None, squared_error, key=jax.random.key(0), inputs=x)
    assert system.structure is not None
    ours = system.transition(params.recurrent, hidden, (x, ()))
    flax = cell.apply({"params": params.recurrent}, hidden, x)[0]
    assert jax.tree.map(jnp.result_type, ours) == jax.tree.map(jnp.result_type, hidden)
    as_wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)  # noqa: E731
    assert_close(as_wide(ours), as_wide(flax), rtol=4 * float(jnp.finfo(dtype).eps))


def test_integer_features_are_multiplied_as_flax_does() -> None:
    """After an example of floats, whole numbers are features, not tokens."""
    case, x = linen_case(nn.GRUCell(WIDTH, param_dtype=jnp.float64), ()), jnp.asarray([3, 0, 1], jnp.int32)
    flax = case.step(case.params.recurrent, case.hidden, x)[0]
    assert_close(case.system.transition(case.params.recurrent, case.hidden, (x, ())), flax, rtol=1e-14)


def test_output_that_is_not_in_the_carry_is_kept_beside_it() -> None:
    case = linen_case(LinenLeaky(), (4,))
    assert isinstance(case.hidden, CarryAndOutput)
    assert case.hidden.carry.shape == case.hidden.output.shape == (4, WIDTH)


@pytest.mark.parametrize(
    "function", [jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jax.nn.gelu, jnp.sin, lambda x: x]
)
def test_elementwise_functions_are_recognised(function: Any) -> None:
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        assert is_elementwise(function, dtype)


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.softmax,
        lambda x: x - x.mean(),
        lambda x: x / (1 + jnp.linalg.norm(x, axis=0)),
        lambda x: jnp.cumsum(x, axis=-1),
        lambda x: x.sum(-1),
        lambda x: x > 0,
        lambda x: x.missing,
    ],
)
def test_functions_of_several_units_are_recognised(function: Any) -> None:
    assert not is_elementwise(function, jnp.float64)
