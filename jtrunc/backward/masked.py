"""Windows of a static size of which only the first steps, a number that is data, are real."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.structure import Wrapper, wrap_structure, wrap_transition
from jtrunc.trees import select


def with_mask(system: System, *, advance: bool = False) -> System:
    """The system on inputs ``(active, x)``: an inactive step scores 0, has aux 0, and keeps its state.

    With `advance` it does not: its state is one like any other.
    """
    keep = Wrapper(after=lambda active, hidden, new_hidden: select(active, new_hidden, hidden))
    around = Wrapper() if advance else keep

    def loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        active, x = inputs
        value, aux = system.loss(params, hidden, x)
        return select(active, (value, aux), jax.tree.map(jnp.zeros_like, (value, aux)))

    structure = wrap_structure(system.structure, lambda depth: around)
    return System(wrap_transition(system.transition, around), loss, structure)
