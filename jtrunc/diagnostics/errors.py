"""What draws of a gradient estimate say of its bias and variance, with intervals of a stated confidence.

Everything is relative to the exact gradient g: with errors e_r = ĝ_r − g of R draws,

    bias² = ‖E e‖² / ‖g‖²      estimated without bias by Σ_{r≠s} ⟨e_r, e_s⟩ / (R (R − 1) ‖g‖²)
    arrived = ⟨E ĝ, g⟩ / ‖g‖²   1 where nothing of the gradient is lost on average
    noise² = tr Cov ĝ / ‖g‖²

The plain ‖mean e‖² would count the noise of the mean as bias. The interval of bias² is the jackknife's, which
is wider than need be where there is no bias, so that an unbiased estimator is not suspected too often.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and its confidence interval; all three are equal where nothing is random.

    Attributes:
      value: the estimate.
      low, high: the ends of the interval.
    """

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies in the interval."""
        return self.low <= value <= self.high


def critical_value(confidence: float) -> float:
    """How many standard errors lie on each side: 1.96 for 0.95.

    >>> round(critical_value(0.95), 2)
    1.96
    """
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def mean_interval(values: np.ndarray, confidence: float) -> Interval:
    """The mean of independent draws, with the normal interval of its standard error.

    >>> [round(x, 3) for x in mean_interval(np.array([0.0, 1.0, 2.0, 1.0]), 0.95)]
    [1.0, 0.2, 1.8]
    """
    mean = float(np.mean(values))
    half = critical_value(confidence) * _standard_error(values)
    return Interval(mean, mean - half, mean + half)


def relative_bias(errors: np.ndarray, exact_norm: float, confidence: float) -> Interval:
    """‖E e‖ / ‖g‖ from draws of the error.

    The value and both ends are roots of those of the square, of which the negative part counts as 0: an
    interval from 0 says that no bias was found.

    Args:
      errors: e_r, (R, p); one row stands for an estimator that draws nothing.
      exact_norm: ‖g‖.
      confidence: of the interval, such as 0.95.

    Example: errors of mean 3 in one of two entries; without noise, and with.

      >>> relative_bias(np.array([[3.0, 0.0]]), 6.0, 0.95)
      Interval(value=0.5, low=0.5, high=0.5)
      >>> noise = np.random.default_rng(0).normal(size=(1000, 2))
      >>> found = relative_bias(noise + np.array([3.0, 0.0]), 6.0, 0.999)
      >>> found.holds(0.5), relative_bias(noise, 6.0, 0.999).low
      (True, 0.0)
    """
    count = len(errors)
    if count == 1:
        return Interval(*(float(np.linalg.norm(errors[0]) / exact_norm),) * 3)
    squares = np.sum(errors**2, axis=1)
    total = errors.sum(axis=0)
    whole = float(total @ total - squares.sum())
    square = whole / (count * (count - 1))
    if count == 2:
        half = np.inf
    else:
        # ‖S − e_r‖² − Σ_{s≠r} ‖e_s‖², of the draws without r
        without = whole - 2 * (errors @ total) + 2 * squares
        without /= (count - 1) * (count - 2)
        half = critical_value(confidence) * np.sqrt((count - 1) * np.var(without))
    ends = np.sqrt(np.maximum([square, square - half, square + half], 0)) / exact_norm
    return Interval(*ends.tolist())


def relative_noise(errors: np.ndarray, exact_norm: float) -> float:
    """√(tr Cov ĝ) / ‖g‖; 0 for one draw.

    >>> relative_noise(np.array([[1.0, 0.0], [-1.0, 0.0]]), 2.0) ** 2
    0.5000000000000001
    """
    if len(errors) == 1:
        return 0.0
    return float(np.sqrt(np.sum(np.var(errors, axis=0, ddof=1))) / exact_norm)


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, confidence: float) -> Interval:
    """Σ a / Σ b over independent draws of pairs; linearised around the ratio.

    >>> ratio_interval(np.array([1.0, 3.0]), np.array([2.0, 6.0]), 0.95)
    Interval(value=0.5, low=0.5, high=0.5)
    """
    ratio = float(np.sum(numerators) / np.sum(denominators))
    residuals = (numerators - ratio * denominators) / np.mean(denominators)
    half = critical_value(confidence) * _standard_error(residuals)
    return Interval(ratio, ratio - half, ratio + half)


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
