"""Settings of the whole test run: they have to be made before jax first looks for its devices."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the run is compilation; the programs and their memory plans are the same at level 0, and
        # without the fusion emitters, whose MLIR takes two thirds of it. XLA dies of flags it does not know.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


MAPS, MOST_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Compiled programs are let go before a process runs out of memory maps (65,530 on Linux).

    Each takes some; beyond the limit the compiler dies of a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    """A typed key; a test that needs several splits it."""
    return jax.random.key(2017)


@pytest.fixture
def keys(key: jax.Array) -> jax.Array:
    """Sixteen typed keys, for tests that only need a few independent draws."""
    return jax.random.split(key, 16)


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Eight host devices in a row, the axis named `data`."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
