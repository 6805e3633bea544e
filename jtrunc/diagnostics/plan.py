"""Which estimator fits a budget: the costs of several side by side, and a choice with its reason."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

import jtrunc.backward.bptt as backward
from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_inputs, check_size, check_system
from jtrunc.diagnostics.cost import Cost, cost
from jtrunc.probe import estimator_name

Make = Callable[[System], GradientEstimator]
"""``system -> estimator``: ``jtrunc.rtrl``, or ``lambda system: jtrunc.truncated_bptt(system, 20)``."""

MOST_WORK = 10.0
"""An exact estimator is recommended where its operations are at most so many times those of the cheapest."""


class Claim(enum.Enum):
    """What an estimate is, at fixed parameters, for the gradient of all losses of a stream."""

    EXACT = "exact"
    EXACT_INSIDE = "exact inside an update"
    UNBIASED = "unbiased"
    UNBIASED_INSIDE = "unbiased inside an update"
    BIASED = "biased"
    UNKNOWN = "unknown"


CLAIMS = {
    "bptt": Claim.EXACT_INSIDE,
    "truncated_bptt": Claim.BIASED,
    "windowed_bptt": Claim.BIASED,
    "adaptive_bptt": Claim.BIASED,
    "artbp": Claim.UNBIASED_INSIDE,
    "online_artbp": Claim.UNBIASED,
    "adaptive_artbp": Claim.UNBIASED,
    "rtrl": Claim.EXACT,
    "diagonal_rtrl": Claim.EXACT,
    "nobacktrack": Claim.UNBIASED,
    "uoro": Claim.UNBIASED,
    "kf_rtrl": Claim.UNBIASED,
    "optimal_kronecker_sum": Claim.UNBIASED,
    "snap": Claim.BIASED,
    "eprop": Claim.BIASED,
    "rflo": Claim.BIASED,
    "target_propagation": Claim.BIASED,
}
"""By the name of the constructor."""

_STREAM = (Claim.EXACT, Claim.UNBIASED, Claim.EXACT_INSIDE, Claim.UNBIASED_INSIDE, Claim.BIASED)
_SEQUENCES = (Claim.EXACT_INSIDE, Claim.EXACT, Claim.UNBIASED_INSIDE, Claim.UNBIASED, Claim.BIASED)


class Choice(NamedTuple):
    """One estimator of a plan.

    Attributes:
      claim: what its gradient is.
      cost: of one update.
      fits: whether `cost.total_bytes` is within the limit.
      flops_per_step: those of `cost`, or, where they are data, those of full backpropagation over as many
        steps, which no window of random length does with less.
    """

    claim: Claim
    cost: Cost
    fits: bool
    flops_per_step: float


class Plan(NamedTuple):
    """What several estimators cost, and which to take.

    Attributes:
      choices: by name, in the order given.
      recommended: a name, or None where nothing fits.
      reason: why, in a sentence or two with the figures that it rests on.
    """

    choices: dict[str, Choice]
    recommended: str | None
    reason: str


def plan(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    estimators: Mapping[str, Make | tuple[Make, int]],
    *,
    memory_limit: int | None = None,
    stream: bool = True,
) -> Plan:
    """What each estimator would cost, and which to take; from shapes alone, before anything runs.

    Of what fits, the first kind in this order: on a stream exact (RTRL; only where its operations are at most
    ten times the least), unbiased, exact inside an update, unbiased inside an update, biased; on separate
    sequences, each of which one update reads, exact inside an update comes first. Within a kind the one of
    fewest operations. A plan knows nothing of variance: `jtrunc.diagnostics.audit` measures it.

    Args:
      system: the user's.
      params, hidden, inputs: arrays, or `jax.ShapeDtypeStruct`.
      estimators: constructors by name, or pairs of one and the steps that its updates are given (all of
        `inputs` by default). The name says what a wrapped estimator is: ``"rtrl"``, or ``"rtrl:..."``.
      memory_limit: bytes, or None.
      stream: whether influences reach from update to update.

    Returns:
      A `Plan`.

    Raises:
      TypeError, ValueError: no system, no estimator, a window that is no positive integer, or what an
        estimator objects to.

    Example: a tanh network that is too large for RTRL in a megabyte.

      >>> import jax.numpy as jnp, jtrunc
      >>> from jtrunc import cells
      >>> model = cells.model(cells.tanh(4, 64), 4, cells.softmax_cross_entropy)
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> inputs = (jnp.zeros((16, 4), jnp.float32), jnp.zeros(16, jnp.int32))
      >>> found = plan(model.system, params, model.initial_hidden(), inputs, {
      ...     "rtrl": jtrunc.rtrl, "nobacktrack": jtrunc.nobacktrack, "bptt": jtrunc.bptt,
      ... }, memory_limit=1_000_000)
      >>> found.recommended, found.choices["rtrl"].fits
      ('nobacktrack', False)
      >>> [name for name in found.choices if found.choices[name].claim is Claim.UNBIASED]
      ['nobacktrack']
    """
    check_system("plan", system)
    given = check_inputs(inputs)
    if memory_limit is not None:
        check_size("plan", "memory_limit", memory_limit)
    full = cost_of("plan", backward.bptt(system), params, hidden, inputs, min(given, 16)).flops_per_step
    assert full is not None
    choices = {}
    for name, (make, window) in with_windows("plan", estimators, given).items():
        estimator = make(system)
        found = cost_of(name, estimator, params, hidden, inputs, window)
        fits = memory_limit is None or found.total_bytes <= memory_limit
        flops = full if found.flops_per_step is None else found.flops_per_step
        choices[name] = Choice(claim_of(name, make, estimator), found, fits, flops)
    return Plan(choices, *_recommend(choices, memory_limit, stream))


def with_windows(
    owner: str, estimators: Mapping[str, Make | tuple[Make, int]], given: int
) -> dict[str, tuple[Make, int]]:
    """Each constructor with the steps that its updates are given, checked."""
    if not isinstance(estimators, Mapping) or not estimators:
        raise ValueError(
            f"{owner}: `estimators` must map at least one name to a constructor, not {estimators!r}"
        )
    pairs, window = {}, given
    for name, make in estimators.items():
        if not isinstance(make, GradientEstimator):  # which is a tuple too
            make, window = make if isinstance(make, tuple) else (make, given)
        if not callable(make):
            raise TypeError(
                f"{owner}: {name!r} must be a function system -> estimator, such as jtrunc.rtrl, not {make!r}"
            )
        pairs[name] = (make, check_size(owner, f"window of {name}", window))
    return pairs


def claim_of(name: str, make: Make, estimator: GradientEstimator) -> Claim:
    """By the constructor, else by the first word of the name that was given to it."""
    constructor = getattr(make, "func", make)  # of a functools.partial
    words = (estimator_name(estimator), getattr(constructor, "__name__", ""), name.partition(":")[0])
    known = (CLAIMS.get(word.replace("-", "_")) for word in words)
    return next(filter(None, known), Claim.UNKNOWN)


def cost_of(
    name: str, estimator: GradientEstimator, params: Params, hidden: PyTree, inputs: PyTree, window: int
) -> Cost:
    """The `cost` of an update that is given `window` steps like `inputs`."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((window, *leaf.shape[1:]), leaf.dtype)

    try:
        return cost(estimator, params, hidden, jax.tree.map(shape, inputs))
    except (TypeError, ValueError) as error:
        error.add_note(f"this is what {name!r} objects to")
        raise


def _recommend(choices: dict[str, Choice], memory_limit: int | None, stream: bool) -> tuple[str | None, str]:
    fitting = {name: choice for name, choice in choices.items() if choice.fits}
    if not fitting:
        least = min(choices, key=lambda name: choices[name].cost.total_bytes)
        return None, (
            f"Nothing fits in {memory_limit:,} bytes; {least} needs the least, "
            f"{choices[least].cost.total_bytes:,}."
        )
    cheapest = min(choice.flops_per_step for choice in fitting.values())
    passed = []
    for claim in _STREAM if stream else _SEQUENCES:
        names = [name for name, choice in fitting.items() if choice.claim is claim]
        if not names:
            continue
        name = min(names, key=lambda name: fitting[name].flops_per_step)
        share = fitting[name].flops_per_step / max(cheapest, 1.0)
        if claim is Claim.EXACT and share > MOST_WORK:
            passed.append(f"{name} is exact and fits, but does {share:.3g} times the least operations.")
            continue
        too_large = [n for n, choice in choices.items() if not choice.fits]
        if too_large:
            passed.append(f"{', '.join(too_large)}: more than {memory_limit:,} bytes.")
        chosen = fitting[name]
        return name, " ".join([
            f"{name} is {claim.value}, the best kind that fits, at {chosen.cost.total_bytes:,} bytes and "
            f"{share:.3g} times the least operations a step.",
            *passed,
        ])  # fmt: skip
    name = min(fitting, key=lambda name: fitting[name].flops_per_step)
    return name, f"{name} does the fewest operations; nothing is known of its gradient."
