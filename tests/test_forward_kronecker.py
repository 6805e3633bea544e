"""Kronecker factors of the influence: unbiased over all signs, and the oracle's draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

import jtrunc
import tests.forward_reference as forward
from tests import reference, systems
from tests.forward_cases import affine_maps, assert_unbiased, drawn_influences, same
from tests.forward_reference import signs
from tests.systems import Case

KF: dict[str, tuple[Callable[[], Case], Callable[[], np.ndarray]]] = {
    "tanh": (partial(systems.structured, "tanh", 4, 2), partial(signs, 4, 1, 2)),
    "gru": (partial(systems.structured, "gru", 2, 1), partial(signs, 2, 3, 2)),
    "lstm": (partial(systems.structured, "lstm", 4, 1), partial(signs, 4, 1, 2)),
    "dead units": (partial(systems.relu, 5, 2), partial(signs, 5, 1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KF)
def test_kf_rtrl_over_all_signs(name):
    """The mean is the influence to 1e-12, and each draw is the oracle's at the same signs."""
    case, patterns = KF[name][0](), KF[name][1]()
    run = reference.linearise(*case)
    draws = drawn_influences(jtrunc.kf_rtrl, case, (patterns,))
    assert_unbiased(draws, run)
    maps = affine_maps(case, run)
    for index in np.linspace(0, len(patterns) - 1, 40).astype(int):
        same(draws[index], forward.kf_rtrl(run, maps, patterns[index]))


@pytest.mark.parametrize(
    ("build", "length", "terms"),
    [
        (partial(systems.structured, "tanh", width=2), 3, 1),
        (partial(systems.structured, "tanh", width=2), 3, 2),
        (partial(systems.relu, width=2), 4, 1),
    ],
)
def test_the_optimal_kronecker_sum_over_all_signs(build, length, terms):
    """The mean is the influence; the draws are those of the oracle, in the order of other signs.

    Singular vectors are unique but for their sign, which is one more sign in front of the random ones.
    """
    case, patterns = build(length), signs(length, 1, terms + 1)
    draws = drawn_influences(partial(jtrunc.optimal_kronecker_sum, terms=terms), case, (patterns,))
    run = reference.linearise(*case)
    assert_unbiased(draws, run)
    maps = affine_maps(case, run)
    oracle = np.stack([forward.optimal_kronecker_sum(run, maps, e, terms) for e in patterns])
    shadow = np.random.default_rng(18).normal(size=draws[0].shape)
    mine, theirs = (np.sort(np.einsum("etip,tip->e", each, shadow)) for each in (draws, oracle))
    same(mine, theirs, 1e-8)
