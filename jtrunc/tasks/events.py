"""Sequences of marked events, and streams of them for a recurrent network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jtrunc.tasks.arguments import require_count


class EventSequence(NamedTuple):
    """One sequence of marked events.

    Attributes:
      times: (N,), float64, not decreasing, since the beginning of the observation at 0.
      marks: (N,), int32, from 0.
    """

    times: np.ndarray
    marks: np.ndarray


class Event(NamedTuple):
    """What the network reads of an event; leaves of one shape, (T, B) for streams.

    Attributes:
      mark: int32.
      gap: float32, time since the event before; for the first of a sequence since its beginning at 0.
      time: float32, since the beginning of the sequence.
    """

    mark: Any
    gap: Any
    time: Any


class Target(NamedTuple):
    """What it is to predict: mark and gap of the next event of the same sequence."""

    mark: Any
    gap: Any


class Lanes(NamedTuple):
    """Streams of events side by side, time-major: all leaves (T, B).

    Attributes:
      resets: bool, where a sequence begins (and on the first step, where each stream does).
      events: `Event`.
      targets: `Target`.
    """

    resets: Any
    events: Event
    targets: Target

    @property
    def inputs(self) -> tuple[Event, Target]:
        """For the system of `model`, which carries its state from one sequence to the next."""
        return self.events, self.targets

    @property
    def inputs_with_resets(self) -> tuple[Any, tuple[Event, Target]]:
        """For `jtrunc.with_resets` of it, which starts each sequence anew."""
        return self.resets, self.inputs


def lanes(sequences: Sequence[EventSequence], num_streams: int) -> Lanes:
    """Lays sequences out, one after the other, as B contiguous streams of T steps.

    A sequence of N events has N − 1 steps: each event but the last is read, each but the first is a
    target, and none is predicted from another sequence. Of all steps the last (sum mod B) do not fill a
    row, and are left out. Gaps are differences in float64, rounded to float32 afterwards: differences of
    times in float32 would lose the short gaps of a long sequence.

    Args:
      sequences: at least one, each of at least two events.
      num_streams: B ≥ 1.

    Returns:
      `Lanes`. A stream that begins inside a sequence begins with a reset too.

    Raises:
      TypeError: if the number of streams is not a whole number, or there is no list of sequences.
      ValueError: if there are too few events, times and marks of a sequence do not match, times decrease or
        are not finite, or marks are no integers from 0 on.

    Example: a sequence of three events and one of four, 2 + 3 steps, in two streams of two.

      >>> first = EventSequence(np.array([0.5, 1.5, 4.0]), np.array([0, 1, 0]))
      >>> second = EventSequence(np.array([0.0, 1.0, 3.0, 6.0]), np.array([1, 1, 0, 0]))
      >>> streams = lanes([first, second], num_streams=2)
      >>> streams.events.gap.tolist(), streams.targets.gap.tolist()
      ([[0.5, 0.0], [1.0, 1.0]], [[1.0, 1.0], [2.5, 2.0]])
      >>> streams.targets.mark.tolist(), streams.resets.tolist()
      ([[1, 1], [0, 0]], [[True, True], [False, False]])
    """
    num_streams = require_count("num_streams", num_streams)
    if isinstance(sequences, EventSequence):
        raise TypeError("sequences is one EventSequence; put it into a list")
    steps = [_steps(index, sequence) for index, sequence in enumerate(sequences)]
    num_steps = sum(len(step.resets) for step in steps) // num_streams
    if num_steps < 1:
        raise ValueError(
            f"num_streams = {num_streams} needs at least as many steps, and the {len(steps)} sequences have"
            f" {sum(len(step.resets) for step in steps)}; use fewer streams or longer sequences"
        )

    def lay_out(*leaves: np.ndarray) -> np.ndarray:
        joined = np.concatenate(leaves)[: num_steps * num_streams]
        return np.ascontiguousarray(joined.reshape(num_streams, num_steps).T)

    streams = jax.tree.map(lay_out, *steps)
    streams.resets[0] = True
    return streams


def _steps(index: int, sequence: EventSequence) -> Lanes:
    """The steps of one sequence, leaves (N − 1,)."""
    times, marks = np.asarray(sequence.times, np.float64), np.asarray(sequence.marks)
    if times.ndim != 1 or times.shape != marks.shape or len(times) < 2:
        raise ValueError(
            f"sequence {index} has times of shape {times.shape} and marks of shape {marks.shape}; give one"
            " of each for every event, and at least two events"
        )
    if not np.isfinite(times).all():
        where = int(np.argmin(np.isfinite(times)))
        raise ValueError(
            f"sequence {index}: time {times[where]} of event {where} is not finite; leave such events out"
        )
    if not np.issubdtype(marks.dtype, np.integer) or marks.min() < 0:
        raise ValueError(f"sequence {index}: marks must be integers from 0 on, not {marks.dtype} {marks[:5]}")
    gaps = np.diff(times, prepend=0.0)
    if not (gaps >= 0).all():
        where = int(np.argmax(~(gaps >= 0)))
        raise ValueError(
            f"sequence {index}: time {times[where]} of event {where} lies before the event before it (or"
            " before 0); sort the events, or subtract the beginning of the observation"
        )
    gaps, times, marks = gaps.astype(np.float32), times.astype(np.float32), marks.astype(np.int32)
    resets = np.arange(len(times) - 1) == 0
    return Lanes(resets, Event(marks[:-1], gaps[:-1], times[:-1]), Target(marks[1:], gaps[1:]))
