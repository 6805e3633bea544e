"""Imports of the optional packages, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """Import an optional module.

    Raises:
      ImportError: naming what needs it and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{purpose} needs {package!r}, which is not installed: pip install 'jtrunc[experiments]'"
        ) from error
