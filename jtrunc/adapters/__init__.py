"""flax cells as systems: flax cell + readout + loss -> (System, Params, hidden).

Each of the two names is a function, also where its file of the same name has been imported.
"""

from jtrunc.adapters.linen import linen as linen
from jtrunc.adapters.nnx import nnx as nnx

__all__ = ["linen", "nnx"]
