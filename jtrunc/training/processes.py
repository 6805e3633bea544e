"""Several processes that make one run: jax's distributed runtime computes, process 0 reads and writes files.

Every process calls the same functions in the same order. What decides how a run goes on (a file, a clock, a
signal) is decided by one process for all, so that none waits for a computation that another never begins.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jtrunc.base import PyTree
from jtrunc.trees import is_key

Result = TypeVar("Result")

_ADDRESS = re.compile(r"([^:\[\]]+|\[[^\[\]]+\]):[0-9]+")
"""A host, in brackets if it has colons of its own, and a port."""

_NOTATION = "it must be 'auto', on a cluster, or 'address:port,processes,index', such as 'localhost:4321,2,0'"


def start_processes(where: str = "auto") -> None:
    """Join the other processes of a run, by `jax.distributed`; before anything else asks jax for devices.

    Processes on CPUs talk by gloo. The run then belongs to all: a `mesh` over `jax.devices()` has the devices
    of every process.

    Args:
      where: "auto" where a cluster says it (Slurm, Open MPI, Kubernetes, TPU pods), else
        ``"address:port,processes,index"``: where process 0 listens, how many there are, which one this is.

    Raises:
      ValueError: for another notation, or if no cluster is found.
      RuntimeError: from jax, if the others do not come, or jax is in use already.
    """
    address, count, index = (None, None, None) if where == "auto" else _read(where)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, num_processes=count, process_id=index)
    except ValueError as error:
        raise ValueError(
            f"start_processes: no run of several processes can be begun from {where!r} ({error}); {_NOTATION}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises in process 0, in every process; the others wait, and do not run it.

    A result must be made of Python objects and NumPy arrays: it travels pickled, between the processes of one
    run.

    Example: a single process is process 0.

      >>> from_first(lambda: "written")
      'written'
    """
    if jax.process_count() == 1:
        return work()
    message, failed = b"", None
    if is_first():
        try:
            message = pickle.dumps((work(), None))
        except Exception as error:
            message, failed = _failure(error), error
    result, error = pickle.loads(_broadcast(message))
    if failed or error:
        raise failed or error
    return result


def largest(value: float) -> float:
    """The largest of what the processes say, in every one of them."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).max())


def each(text: str) -> list[str]:
    """What every process says, texts of one length, in order."""
    if jax.process_count() == 1:
        return [text]
    letters = np.frombuffer(text.encode("ascii"), np.uint8)
    return [row.tobytes().decode("ascii") for row in multihost_utils.process_allgather(letters)]


def gather(tree: PyTree) -> PyTree:
    """Arrays that are spread over several processes as whole ones, in every process; others as they are.

    Memory: a device holds one leaf at a time in full.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if is_key(leaf):
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process has whole, or that are spread already, where they belong.

    Args:
      tree: arrays.
      shardings: one for each leaf, or for a part of the tree.

    Raises:
      ValueError: if a leaf that every process should have whole is not the same in all.
    """

    def leaf_to(sharding: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        if is_key(leaf):
            data = leaf_to(sharding, jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return _spread(np.asarray(jnp.asarray(leaf)), sharding)

    return jax.tree.map(
        lambda sharding, part: jax.tree.map(partial(leaf_to, sharding), part), shardings, tree
    )


def _spread(array: np.ndarray, sharding: Any) -> jax.Array:
    """Every process's part of an array that all have; jax.device_put takes NaN for a difference."""
    if len(set(each(hashlib.sha256(array.tobytes()).hexdigest()))) > 1:
        raise ValueError(
            f"train: the processes have different values for an array of shape {array.shape} and dtype "
            f"{array.dtype} that no axis of `mesh` splits; give all of them the same data, parameters, "
            "hidden state and hyperparameters"
        )
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _broadcast(message: bytes) -> bytes:
    """The bytes of process 0; as bytes, so that no sum rounds a number or loses the sign of a zero."""
    size = np.frombuffer(len(message).to_bytes(8, "little"), np.uint8)
    length = int.from_bytes(np.asarray(multihost_utils.broadcast_one_to_all(size)).tobytes(), "little")
    mine = np.frombuffer(message, np.uint8) if is_first() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def _failure(error: Exception) -> bytes:
    try:
        message = pickle.dumps((None, error))
        pickle.loads(message)
    except Exception:  # an exception with arguments of its own
        message = pickle.dumps((None, RuntimeError(f"process 0 failed: {type(error).__name__}: {error}")))
    return message


def _read(where: str) -> tuple[str, int, int]:
    parts = where.split(",")
    if len(parts) != 3 or not _ADDRESS.fullmatch(parts[0]) or not all(map(str.isdigit, parts[1:])):
        raise ValueError(f"start_processes: `where` is {where!r}; {_NOTATION}")
    count, index = int(parts[1]), int(parts[2])
    if index >= count:
        raise ValueError(f"start_processes: process {index} of {count} does not exist; they count from 0")
    return parts[0], count, index
