"""Where the arrays of a run lie on a mesh of devices: seeds apart, streams apart, parameters whole.

A mesh axis `SEEDS` splits the seeds (`jtrunc.training.seeds.over_seeds`, by shard_map: nothing travels), an
axis `STREAMS` the streams of every run: the arrays are laid out and the compiler does the rest, so that what
a system computes over its batch, such as a mean, is that of all devices' streams. Any other axis is for
parameters that come laid out over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtrunc.base import PyTree
from jtrunc.training.processes import put
from jtrunc.training.seeds import SEEDS, SeedAxis, state_spec
from jtrunc.training.step import TrainState

STREAMS = "data"
"""The mesh axis that splits the streams: axis 1 of the data, axis 0 of the hidden state."""


@dataclass(frozen=True)
class Placement:
    """How one run is laid out; without a mesh every method hands back what it is given.

    Attributes:
      mesh: the devices, or None.
      num_seeds: how many seeds there are, or None for a solo run.
      own_streams: B, the streams of this process; None if no axis splits them.
      num_streams: those of all processes together.
    """

    mesh: Mesh | None = None
    num_seeds: int | None = None
    own_streams: int | None = None
    num_streams: int | None = None

    def by_seed(self, rows: PyTree) -> PyTree:
        """A leading axis of seeds onto their devices, filled up to a multiple by copies of the first."""
        return self._put(self._fill(rows), P(self._axis(SEEDS)))

    def trim(self, rows: PyTree) -> PyTree:
        """The leading axis of seeds without the copies."""
        return jax.tree.map(lambda leaf: leaf[: self.num_seeds], rows) if self._num_copies else rows

    def trim_state(self, state: TrainState, axis: SeedAxis) -> TrainState:
        """`trim` where a state has that axis."""
        return _where_seeds(self.trim, state, axis)

    def fill_state(self, state: TrainState, axis: SeedAxis, shardings: TrainState | None) -> TrainState:
        """A trimmed state, whole in every process, filled up and onto the devices."""
        filled = _where_seeds(self._fill, state, axis)
        return filled if shardings is None else put(filled, shardings)

    def data(self, data: PyTree) -> PyTree:
        """Leaves (T, B, ...) of this process's streams onto the devices of the streams; others onto all."""
        return jax.tree.map(lambda leaf: self._put_streams(leaf, 1), data)

    def hidden(self, hidden: PyTree) -> PyTree:
        """Leaves (B, ...) likewise."""
        return jax.tree.map(lambda leaf: self._put_streams(jnp.asarray(leaf), 0), hidden)

    def params(self, params: PyTree) -> PyTree:
        """Parameters as they came, where they are laid out over axes of the mesh, else onto all devices."""
        return jax.tree.map(lambda leaf: self._put(leaf, _own_spec(leaf)), params)

    def shardings(self, state: TrainState, params: PyTree, axis: SeedAxis) -> TrainState | None:
        """Where the leaves of a filled state belong; None without a mesh.

        A leaf of the estimator's state whose first axis (behind the seeds) has B entries is taken for one of
        streams: a guess that can cost time, but change no number. The optimiser's stay where the compiler
        put them.
        """
        if self.mesh is None:
            return None
        seeds = () if axis is SeedAxis.NONE else (self._axis(SEEDS),)

        def at(*axes: Any) -> NamedSharding:
            return NamedSharding(self.mesh, P(*axes))  # type: ignore[arg-type]

        def of_estimator(leaf: jax.Array) -> NamedSharding:
            split = self.num_streams and leaf.shape[len(seeds) : len(seeds) + 1] == (self.num_streams,)
            return at(*seeds, STREAMS) if split else at(*seeds)

        count = at(*seeds) if axis is SeedAxis.MAP else at()
        given = state.params if params is None else params
        return TrainState(
            jax.tree.map(lambda leaf: at(*seeds, *(P() if params is None else _own_spec(leaf))), given),
            jax.tree.map(lambda leaf: leaf.sharding, state.opt_state),
            jax.tree.map(of_estimator, state.estimator_state),
            *(count, count, count),  # type: ignore[arg-type]
            jax.tree.map(lambda _: at(*seeds), state.skips_left),
        )

    @property
    def _num_copies(self) -> int:
        if self.mesh is None or self.num_seeds is None:
            return 0
        return -self.num_seeds % self.mesh.shape.get(SEEDS, 1)

    def _fill(self, rows: PyTree) -> PyTree:
        if not self._num_copies:
            return rows
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[:1]] * self._num_copies]), rows)

    def _axis(self, name: str) -> str | None:
        return name if self.mesh is not None and name in self.mesh.axis_names else None

    def _put(self, tree: PyTree, spec: P) -> PyTree:
        return tree if self.mesh is None else put(tree, NamedSharding(self.mesh, spec))

    def _put_streams(self, leaf: Any, position: int) -> Any:
        if self.own_streams is None or leaf.shape[position : position + 1] != (self.own_streams,):
            return self._put(leaf, P())
        spec = P(*[None] * position, STREAMS)
        if jax.process_count() == 1:
            return self._put(leaf, spec)
        sharding = NamedSharding(self.mesh, spec)  # type: ignore[arg-type]
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def place(mesh: Mesh | None, num_seeds: int | None, data: PyTree) -> Placement:
    """A layout for seeds and streams, or an error.

    Args:
      mesh: with an axis `SEEDS`, an axis `STREAMS`, or both.
      num_seeds: of the run.
      data: leaves (T, B, ...), the streams of this process.

    Raises:
      TypeError, ValueError: no mesh where there are several processes, none of the axes, an axis for seeds
        without seeds, a context of explicit axes, or streams that do not divide evenly.
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                "train: a run of several processes needs `mesh`, such as "
                "jax.make_mesh((jax.device_count(),), ('data',))"
            )
        return Placement(num_seeds=num_seeds)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"train: `mesh` must be a jax.sharding.Mesh, not {type(mesh).__name__}")
    if not {SEEDS, STREAMS} & set(mesh.axis_names):
        raise ValueError(
            f"train: `mesh` needs an axis {SEEDS!r}, which splits the seeds, or {STREAMS!r}, which splits "
            f"the streams; its axes are {mesh.axis_names}"
        )
    if SEEDS in mesh.axis_names and num_seeds is None:
        raise ValueError(f"train: `mesh` has an axis {SEEDS!r}, but there are no `seeds`; pass seeds=1, say")
    # Layouts are the compiler's business here; axes of other types would ask the system's own code for them.
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "train: `mesh` cannot be used within jax.set_mesh of axes of the type Explicit; call it outside, "
            "or make them axes of the type Auto"
        )
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    if STREAMS not in mesh.axis_names:
        return Placement(mesh, num_seeds)
    return Placement(mesh, num_seeds, *_count_streams(mesh, data))


def _count_streams(mesh: Mesh, data: PyTree) -> tuple[int, int]:
    """B of this process and of all, if every device gets as many."""
    own = next((np.shape(leaf)[1] for leaf in jax.tree.leaves(data) if np.ndim(leaf) > 1), 0)
    axis, process = mesh.axis_names.index(STREAMS), jax.process_index()
    here = {place[axis] for place, device in np.ndenumerate(mesh.devices) if device.process_index == process}
    if not own or own % len(here):
        raise ValueError(
            f"train: the axis {STREAMS!r} of `mesh` splits the streams over {len(here)} devices of this "
            f"process, but `data` has {own or 'no axis of'} streams (its axis 1); take a multiple of "
            f"{len(here)}"
        )
    return own, own * mesh.shape[STREAMS] // len(here)


def _where_seeds(change: Callable[[PyTree], PyTree], state: TrainState, axis: SeedAxis) -> TrainState:
    if axis is SeedAxis.NONE:
        return state
    parts: list[Any] = [
        change(part) if spec == P(SEEDS) else part for part, spec in zip(state, state_spec(axis), strict=True)
    ]
    return TrainState(*parts)


def _own_spec(leaf: Any) -> P:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else P()
