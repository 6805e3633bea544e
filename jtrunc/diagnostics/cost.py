"""What an update costs, before anything runs: bytes, operations and depth of the compiled program."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax

from jtrunc.base import GradientEstimator, Params, PyTree
from jtrunc.checks import check_inputs, check_params
from jtrunc.probe import static_num_steps
from jtrunc.trees import is_key, num_time_steps

_UNROLLED, _IRREGULAR = 16, 128
"""Windows up to so many steps are written out to count their operations; and those that follow no rule."""

_SHORTEST, _LONGEST = 8, 64
"""How many steps apart the lengths are from which longer windows follow."""


class Cost(NamedTuple):
    """One update of an estimator.

    Attributes:
      window: steps of `inputs` that it is given.
      num_steps: steps that it consumes, or None where that is data.
      state_bytes: of the estimator's state, which lives from update to update.
      gradient_bytes: of the parameters' gradient.
      temporary_bytes: the most that the compiled program needs beside what comes in and goes out.
      total_bytes: parameters, state, inputs, all results and temporaries together; the state counts once,
        for it is replaced in place.
      flops_per_step: floating-point operations of one update, divided by the steps that it consumes; None
        where a loop's length is data.
      depth: iterations of loops that must follow each other, those that make random numbers included; 1
        without any, None where a loop's length is data.
    """

    window: int
    num_steps: int | None
    state_bytes: int
    gradient_bytes: int
    temporary_bytes: int
    total_bytes: int
    flops_per_step: float | None
    depth: int | None


def cost(estimator: GradientEstimator, params: Params, hidden: PyTree, inputs: PyTree) -> Cost:
    """Compiles one update for these shapes and reads what it costs; nothing is computed or allocated.

    Bytes are the compiler's own plan (`memory_analysis`). Operations are counted in a program whose loops are
    written out, because the compiler's count takes the body of a loop once; windows beyond 16 steps follow
    from shorter ones, a distance of 8 steps or more apart at which the count grows evenly. What an estimator
    does once for each of its blocks is missed where these are longer than all of them. Operations are those
    of the algorithm as jtrunc writes it: what the compiler computes twice to save memory does not count.

    Args:
      estimator: any; a random one gets a key of its own.
      params, hidden, inputs: arrays, or `jax.ShapeDtypeStruct`; `inputs` is what one update is given.

    Returns:
      A `Cost`.

    Raises:
      TypeError, ValueError: whatever `init` and `update` object to.

    Example: a scalar system, ten steps; the state is one number in float32, the way out and back 20 steps.

      >>> import jax.numpy as jnp, jtrunc
      >>> system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h * h, ()))
      >>> number = jax.ShapeDtypeStruct((), jnp.float32)
      >>> steps = jax.ShapeDtypeStruct((10,), jnp.float32)
      >>> found = cost(jtrunc.bptt(system), Params(number), number, steps)
      >>> found.num_steps, found.state_bytes, found.depth
      (10, 4, 20)
    """
    check_params(params)
    window = check_inputs(inputs)
    params, hidden, inputs = jax.eval_shape(lambda *trees: trees, params, hidden, inputs)
    state = jax.eval_shape(estimator.init, params, hidden, jax.eval_shape(lambda: jax.random.key(0)))
    num_steps = static_num_steps(estimator, params, hidden, inputs, owner="cost")
    compiled = _lower(estimator, params, state, inputs).compile()
    memory: Any = compiled.memory_analysis()
    both_ways = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    depth = sequential_depth(compiled.as_text() or "")
    return Cost(
        window=window,
        num_steps=num_steps,
        state_bytes=num_bytes(state),
        gradient_bytes=num_bytes(params),
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=both_ways + memory.temp_size_in_bytes,
        flops_per_step=None
        if depth is None or num_steps is None
        else _flops_per_step(estimator, params, state, inputs, num_steps),
        depth=depth,
    )


def num_bytes(tree: PyTree) -> int:
    """Of all leaves, arrays or their shapes; a key counts as its data."""

    def of_leaf(leaf: Any) -> int:
        if is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return leaf.size * leaf.dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


def _lower(estimator: GradientEstimator, params: Params, state: Any, inputs: PyTree) -> jax.stages.Lowered:
    """The update, with its state replaced in place."""
    with warnings.catch_warnings():
        # A state of which a leaf comes out in another layout, or not at all, is no fault here.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(estimator.update, donate_argnums=1).lower(params, state, inputs)


def _flops_per_step(
    estimator: GradientEstimator, params: Params, state: Any, inputs: PyTree, num_steps: int
) -> float:
    window = num_time_steps(inputs)
    count = partial(_unrolled_flops, estimator, params, state, inputs)
    found = None
    for apart in _distances(window):
        lengths = [window % apart + apart * parts for parts in (1, 2, 3)]
        try:
            first, second, third = map(count, lengths)
        except ValueError:  # an estimator that takes whole groups of steps only
            continue
        found = third + (window - lengths[2]) / apart * (third - second)
        if abs((third - second) - (second - first)) <= 1e-2 * abs(third - second):
            return found / num_steps
    # Nothing is regular: a short window is written out, of a long one the best guess is the last.
    return (count(window) if found is None or window <= _IRREGULAR else found) / num_steps


def _distances(window: int) -> list[int]:
    """Of the lengths to count; estimators that work in groups or blocks are regular in multiples of them."""
    if window <= _UNROLLED:
        return []
    most = min(window // 3, _LONGEST)
    divisors = (apart for apart in range(_SHORTEST + 1, most + 1) if window % apart == 0)
    return [_SHORTEST, *divisors] if most >= _SHORTEST else []


def _unrolled_flops(
    estimator: GradientEstimator, params: Params, state: Any, inputs: PyTree, steps: int
) -> float:
    """Operations of an update on the first steps of `inputs`, with every loop of known length written out."""
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape[1:]), leaf.dtype), inputs)

    def unrolled(params: Params, state: Any, inputs: PyTree) -> Any:
        with jax.disable_jit():  # loops run in Python, so that the outer trace sees every iteration
            return estimator.update(params, state, inputs)

    analysis: Any = jax.jit(unrolled).lower(params, state, inputs).cost_analysis()
    return float(analysis["flops"])


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LOOP = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALL = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def sequential_depth(program: str) -> int | None:
    """Loop iterations of a compiled program, one after another, at least 1; None where a length is data.

    Loops inside a loop multiply, loops behind each other add. Read from the text of the program
    (``compiled.as_text()``), in which the compiler notes the lengths that it knows.

    Example:

      >>> import jax.numpy as jnp
      >>> double = jax.jit(lambda x: jax.lax.scan(lambda c, x: (c * x, c), x[0], x)[0])
      >>> sequential_depth(double.lower(jnp.ones(7)).compile().as_text())
      7
    """
    bodies: dict[str, list[str]] = {}
    entry = lines = None
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif lines is not None:
            lines.append(line)

    def depth(name: str) -> int | None:
        total = 0
        for line in bodies.get(name, ()):
            loop, trips, call = _LOOP.search(line), _TRIPS.search(line), _CALL.search(line)
            inner = depth((loop or call)[1]) if loop or call else 0  # pyright: ignore[reportOptionalSubscript]
            if inner is None or (loop and not trips):
                return None
            total += inner if not loop else int(trips[1]) * max(1, inner)  # pyright: ignore
        return total

    found = None if entry is None else depth(entry)
    return None if found is None else max(1, found)
