"""Windows of adaptive truncation, BPTT(2K, K) with K = 15, against the same windows in PyTorch.

The network and the task are those of `adaptive.py`: two layers of 50 LSTM units, batch 64, symbols of the
copy task, one-hot for PyTorch, looked up in jtrunc. A window is K steps of look-back and K whose mean loss
counts, then SGD; the next begins K steps on. jtrunc makes its updates inside one program, with K in it or
(`adaptive_bptt`) as data, which looks one step further back; PyTorch's are a loop in Python on one thread.
Time is per step of the stream.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from typing import Any

import jax
from adaptive import NEVER, RATE, SMALL, Case, adaptive, compiled, stream_of
from harness import Effort, Program, Target, compare, main, not_installed
from pytorch import PYTORCH, overlapping_windows, torch
from structured_cells import check_same_step

import jtrunc

LIMIT = Target(0.82)
FIXED, ADAPTIVE = "windowed_bptt(2K − 1, K)", "adaptive_bptt"


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    case = SMALL if quick else Case()
    length = case.max_length // 2 if quick else 15
    updates = -(-case.steps // length)
    stream = stream_of(case)
    windows = jtrunc.windowed_bptt(stream.model.system, 2 * length - 1, length)
    programs = {
        FIXED: compiled(stream, windows, 2 * length, updates),
        ADAPTIVE: adaptive(stream, case, length, NEVER, fixed=False),
    }
    name = f"two LSTM layers of {case.width}, B={case.batch}, K={length}"
    work = dict.fromkeys(programs, float(updates * length))
    if torch is None:
        return [not_installed(name, PYTORCH), *compare(name, programs, FIXED, {}, effort, work)]

    symbols, targets = stream.data
    data = (jax.nn.one_hot(symbols, stream.params.readout["bias"].size), targets)
    run = overlapping_windows(stream.params, stream.hidden, data, RATE, length, updates)
    check_same_step(stream.params, programs[FIXED].run()[0][0], run())
    programs[PYTORCH] = Program(run, ((),), compile_seconds=0.0, temp_bytes=0)
    work[PYTORCH] = float(updates * length)
    return compare(name, programs, PYTORCH, dict.fromkeys((FIXED, ADAPTIVE), LIMIT), effort, work)


if __name__ == "__main__":
    main("adaptive_peers", __doc__, measure)
