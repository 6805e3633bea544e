"""Windows of a static size of which only the first steps, a number that is data, are real."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.structure import Wrapper, wrap_structure, wrap_transition
from jtrunc.trees import select


def with_mask(system: System) -> System:
    """The system on inputs ``(active, x)``: an inactive step keeps its state, scores 0 and has aux 0."""
    keep = Wrapper(after=lambda active, hidden, new_hidden: select(active, new_hidden, hidden))

    def loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        active, x = inputs
        value, aux = system.loss(params, hidden, x)
        return select(active, (value, aux), jax.tree.map(jnp.zeros_like, (value, aux)))

    structure = wrap_structure(system.structure, lambda depth: keep)
    return System(wrap_transition(system.transition, keep), loss, structure)
