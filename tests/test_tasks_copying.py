"""The copy task against a reader that sees the inputs only, one step at a time."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jtrunc.tasks import copying


def read_and_write(inputs: list[int], num_symbols: int) -> tuple[list[int], list[int]]:
    """What to write at each step, from x₁ … xₜ alone, and the m of every block whose recall was seen."""
    blank, recall = num_symbols, num_symbols + 1
    memory: list[int] = []
    pending: list[int] = []
    targets, lengths = [], []
    for token in inputs:
        if token == recall:
            assert not pending and memory
            lengths.append(len(memory))
            pending, memory = memory, []
        elif token == blank:
            assert pending, "a blank comes only while symbols are still to be written"
        else:
            assert not pending, "a block ends before the next begins"
            memory.append(token)
        targets.append(pending.pop(0) if pending else blank)
    return targets, lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "num_steps"), [(1, 9), (3, 24), (10, 205), ((5, 10), 400), ((1, 4), 101), ((4, 4), 50)]
)
@pytest.mark.parametrize("num_symbols", [1, 6])
def test_targets_follow_from_the_inputs_so_far(
    key: jax.Array, length: int | tuple[int, int], num_steps: int, num_symbols: int
) -> None:
    inputs, targets = copying.sequences(key, num_steps, 3, length=length, num_symbols=num_symbols)
    assert inputs.shape == targets.shape == (num_steps, 3)
    assert inputs.dtype == targets.dtype == np.int32
    shortest, longest = length if isinstance(length, tuple) else (length, length)
    for stream in range(3):
        expected, lengths = read_and_write(np.asarray(inputs)[:, stream].tolist(), num_symbols)
        assert np.asarray(targets)[:, stream].tolist() == expected
        assert lengths and min(lengths) >= shortest and max(lengths) <= longest


@pytest.mark.parametrize("length", [10, (5, 10)])
def test_data_of_the_papers_size_are_clean(key: jax.Array, length: int | tuple[int, int]) -> None:
    """256,000 steps: no target contradicts its inputs (published data: 2.6 to 9.7 %, errata 14)."""
    inputs, targets = (
        np.asarray(leaf).T.tolist() for leaf in copying.sequences(key, 4000, 64, length=length)
    )
    read = [read_and_write(stream, 6) for stream in inputs]
    assert all(target == written for target, (written, _) in zip(targets, read, strict=True))
    drawn = {m for _, lengths in read for m in lengths}
    assert drawn == ({10} if length == 10 else set(range(5, 11)))
    # One symbol that was read wrong is one contradiction.
    spoilt = [(inputs[0][0] + 1) % 6, *inputs[0][1:]]
    written = read_and_write(spoilt, 6)[0]
    assert sum(a != b for a, b in zip(written, targets[0], strict=True)) == 1


def test_a_fixed_block_looks_as_in_the_paper(key: jax.Array) -> None:
    inputs, targets = (np.asarray(array)[:, 0] for array in copying.sequences(key, 12, 1, length=6))
    blank, recall = 6, 7
    assert inputs[6] == recall and (inputs[7:] == blank).all() and (inputs[:6] < blank).all()
    assert (targets[:6] == blank).all() and (targets[6:] == inputs[:6]).all()


def test_same_key_same_data_other_key_other_data(keys: jax.Array) -> None:
    first, again, other = (copying.sequences(k, 60, 2, length=(5, 10)) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    assert (first[0][:, 0] != first[0][:, 1]).any(), "streams are independent"


def test_symbols_and_lengths_are_uniform(key: jax.Array) -> None:
    """χ² of six symbols and of six lengths: 5 degrees of freedom, 37.1 is exceeded with probability 6e-7."""
    inputs, _ = copying.sequences(key, 6000, 4, length=(5, 10))
    tokens = np.asarray(inputs)
    symbols = np.bincount(tokens[tokens < 6], minlength=6)
    lengths = [m for stream in tokens.T.tolist() for m in read_and_write(stream, 6)[1]]
    for counts in (symbols, np.bincount(lengths, minlength=11)[5:]):
        expected = counts.sum() / 6
        assert ((counts - expected) ** 2 / expected).sum() < 37.1
    # What the test must reject: lengths of which one never comes.
    skewed = np.bincount([m for m in lengths if m != 10], minlength=11)[5:]
    assert ((skewed - skewed.sum() / 6) ** 2 / (skewed.sum() / 6)).sum() > 37.1


@pytest.mark.parametrize("length", [10, (5, 10)])
def test_memoryless_perplexity(key: jax.Array, length: int | tuple[int, int]) -> None:
    """Half of the targets are blanks that the phase gives away, half are one of six symbols."""
    _, targets = copying.sequences(key, 20_000, 1, length=length)
    guessed = np.mean(np.asarray(targets) < 6)
    assert abs(math.exp(guessed * math.log(6)) - copying.memoryless_perplexity()) < 2e-3
    assert round(copying.memoryless_perplexity(), 3) == 2.449
    assert copying.OPTIMAL_PERPLEXITY == 1.0 and copying.num_classes() == 8


def test_same_data_under_jit_and_without_x64(key: jax.Array) -> None:
    outside = copying.sequences(key, 30, 2, length=(1, 3))
    inside = jax.jit(lambda key: copying.sequences(key, 30, 2, length=(1, 3)))(key)
    with jax.enable_x64(False):
        narrow = copying.sequences(key, 30, 2, length=(1, 3))
    for array, jitted, without in zip(outside, inside, narrow, strict=True):
        np.testing.assert_array_equal(array, jitted)
        np.testing.assert_array_equal(array, without)
