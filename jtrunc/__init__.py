"""Gradient estimators for recurrent dynamical systems: a system is a transition and a loss."""

import importlib
from types import ModuleType

from jtrunc import cells as cells
from jtrunc import diagnostics as diagnostics
from jtrunc import targets as targets
from jtrunc.backward import truncation as truncation
from jtrunc.backward.adaptive import adaptive_bptt as adaptive_bptt
from jtrunc.backward.adaptive_artbp import adaptive_artbp as adaptive_artbp
from jtrunc.backward.artbp import artbp as artbp
from jtrunc.backward.bptt import bptt as bptt
from jtrunc.backward.online_artbp import online_artbp as online_artbp
from jtrunc.backward.scan import scan as scan
from jtrunc.backward.truncated import truncated_bptt as truncated_bptt
from jtrunc.backward.unroll import unroll as unroll
from jtrunc.backward.windowed import windowed_bptt as windowed_bptt
from jtrunc.base import Aux as Aux
from jtrunc.base import Estimate as Estimate
from jtrunc.base import GradientEstimator as GradientEstimator
from jtrunc.base import Params as Params
from jtrunc.base import System as System
from jtrunc.combinators import continuous_time as continuous_time
from jtrunc.combinators import per_stream as per_stream
from jtrunc.combinators import with_resets as with_resets
from jtrunc.diagnostics import audit as audit
from jtrunc.diagnostics import plan as plan
from jtrunc.forward.diagonal import diagonal_rtrl as diagonal_rtrl
from jtrunc.forward.eprop import eprop as eprop
from jtrunc.forward.eprop import rflo as rflo
from jtrunc.forward.kronecker import kf_rtrl as kf_rtrl
from jtrunc.forward.kronecker import optimal_kronecker_sum as optimal_kronecker_sum
from jtrunc.forward.nobacktrack import nobacktrack as nobacktrack
from jtrunc.forward.noise import rademacher as rademacher
from jtrunc.forward.rtrl import rtrl as rtrl
from jtrunc.forward.snap import snap as snap
from jtrunc.forward.uoro import uoro as uoro
from jtrunc.policies import by_group as by_group
from jtrunc.policies import clipped as clipped
from jtrunc.policies import replicas as replicas
from jtrunc.policies import with_shadows as with_shadows
from jtrunc.targets.propagation import target_propagation as target_propagation

_ON_DEMAND = ("adapters", "optimizers", "tasks", "training")


def __getattr__(name: str) -> ModuleType:
    # flax and the training loop are imported when first named, so that `import jtrunc` stays light.
    if name in _ON_DEMAND:
        return importlib.import_module(f"jtrunc.{name}")
    raise AttributeError(f"module 'jtrunc' has no attribute {name!r}")
