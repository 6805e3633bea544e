"""Book Order: when, and on which side, one stock's order book changed on one day at the NYSE.

Four files, time-1-train.txt, event-1-train.txt, time-1-test.txt, event-1-test.txt: one line a sequence, 100
lines a file, 3,319 events a training line and 829 a test line; marks 1 (buy) and 2 (sell) become 0 and 1.

What the files do not say, and what they show:

- Times are in minutes. Each is a multiple of 1/60,000, a millisecond, and all lines together last 510.8
  minutes: 121 of thin trading, until the rate of events jumps within the second training line, and the 390
  of a trading day. The published losses near −4.7 nats an event are in this unit; in seconds each would be
  higher by log 60 = 4.09.
- The clock of every line starts anew, close to 0. Marks agree across the end of a training line and the
  beginning of the test line of the same number, and from there to the next training line, as often as
  within a line (0.61, 0.62 and 0.62), and by chance otherwise: the day was cut into 100 pieces, and the
  first 80 % of each train. Lines are no independent days.
- A third of the gaps are of one millisecond and none is 0: a density may put as much mass as it likes on
  the milliseconds, so that no lower bound of the loss exists. A law without memory for gaps, and the mark
  before for marks, (`point_process.constant_rate`) has −5.14 nats an event and an error of 38.3 % on `test`
  as it is defined here, where the paper's networks have −4.69 to −4.75 and 38.3 to 43.2 %.
- The RMSE of the paper, 0.00396 to 0.00397, is near the standard deviation of the gaps in the second half
  of the test file, 0.00394 minutes; in the first half, which begins before the opening, it is 0.0244.
  So the first half is the paper's validation part, and the second its test part.

Source: Du et al., "Recurrent marked temporal point processes" (2016), section 6.2; "Adaptively truncating
backpropagation through time to control gradient bias" (2019), section C.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jtrunc.tasks.corpora import sha256
from jtrunc.tasks.events import EventSequence
from jtrunc.tasks.text import read_file

NUM_MARKS = 2
"""Buy 0, sell 1."""

UNITS = {"minutes": 1, "seconds": 60, "milliseconds": 60_000}
"""How many of each unit a minute has."""

_SHA256 = {
    "time-1-train.txt": "21fdd877a96c3b0b0a4c78490f7d07549e8df2ae8518159810ac44ebe0553acb",
    "event-1-train.txt": "c5c31cb2ebe4e768210faafd3297e990d2ed1aa9a5bc76524b73be5c7b788255",
    "time-1-test.txt": "87192b7f4d4edb0d29644740244778dda9b87ead9e0dbf0cfbfb700b565ee642",
    "event-1-test.txt": "0e0d660ecfc9621cb4065b52d8002d622ccc4e9f479d7551d4e0a5087c18b5d4",
}


class BookOrder(NamedTuple):
    """The data in three parts, each a tuple of sequences.

    Attributes:
      train: 100 sequences.
      valid: 50, the first half of the test file.
      test: 50, the second half.
    """

    train: tuple[EventSequence, ...]
    valid: tuple[EventSequence, ...]
    test: tuple[EventSequence, ...]


def load(folder: str | Path, *, unit: str = "minutes", verify: bool = True) -> BookOrder:
    """Reads the four files; `events.lanes` makes streams of each part.

    Streams either begin anew with each line (``lanes(...).inputs_with_resets``) or carry the state on from
    line to line (``inputs``). No gap reaches across lines either way, and the first event of a line, whose
    gap is its time on the line's clock, is no target. A network that was trained with the state carried on
    has hardly seen the initial state: the first five steps of 50 lines then made up 93 % of its squared
    error of time.

    Args:
      folder: holds time-1-train.txt and its three sisters.
      unit: of the times: "minutes", that of the files and of the published losses, "seconds" or
        "milliseconds".
      verify: check that the files are the published ones, by their SHA-256.

    Raises:
      ValueError: another unit; a file that is missing, unreadable or not the published one; times and marks
        that do not belong together.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}; pass 'minutes'")
    folder = Path(folder)
    train, test = (_sequences(folder, part, UNITS[unit], verify) for part in ("train", "test"))
    half = len(test) // 2
    return BookOrder(train, test[:half], test[half:])


def _sequences(folder: Path, part: str, scale: int, verify: bool) -> tuple[EventSequence, ...]:
    """The sequences of the training or of the test files."""
    times = _rows(folder / f"time-1-{part}.txt", verify)
    marks = _rows(folder / f"event-1-{part}.txt", verify)
    if [len(row) for row in times] != [len(row) for row in marks] or len(times) < 2:
        raise ValueError(
            f"the {part} files in {folder} have {len(times)} lines of times and {len(marks)} of marks, or"
            " lines of unequal length, or less than two lines; fetch them again"
        )
    if not all(np.isin(row, (1, NUM_MARKS)).all() for row in marks):
        raise ValueError(f"event-1-{part}.txt in {folder} has marks beside 1 (buy) and 2 (sell)")
    rows = zip(times, marks, strict=True)
    return tuple(EventSequence(scale * time, mark.astype(np.int32) - 1) for time, mark in rows)


def _rows(path: Path, verify: bool) -> list[np.ndarray]:
    """The numbers of each line of a file: float64."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give the folder of time-1-train.txt, event-1-train.txt, time-1-test.txt"
            " and event-1-test.txt, which are data/real/book_order of"
            " https://github.com/dunan/NeuralPointProcess"
        )
    text = read_file(path)
    found, published = sha256(text), _SHA256[path.name]
    if verify and found != published:
        raise ValueError(
            f"{path} is not the published file: its SHA-256 starts with {found[:8]} and not with"
            f" {published[:8]}; fetch it again, or pass verify=False to use it all the same"
        )
    try:
        return [np.array(line.split(), np.float64) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not all numbers ({error}); fetch it again") from error
