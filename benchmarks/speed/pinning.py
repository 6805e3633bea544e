"""One core for the whole process: call this before jax is imported, whose thread pools count the cores."""

from __future__ import annotations

import importlib.util
import os


def pin_to_one_core() -> None:
    """Keep to the lowest core allowed; unpinned, times on CPU have two modes, chosen once a process.

    Nothing is done where jax will find an accelerator, or where the system cannot pin (macOS).
    """
    accelerator = importlib.util.find_spec("jax_plugins") is not None
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and accelerator:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
