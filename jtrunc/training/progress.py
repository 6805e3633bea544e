"""A progress bar on the host, over chunks that run on the device."""

from __future__ import annotations

import sys
import time
from typing import Any

from jtrunc.training.extras import require

PATIENCE = 2.0
"""Seconds that a run may take before it shows a bar."""


class Progress:
    """A bar on stderr, shown only if the run lasts longer than two seconds.

    Args:
      total: updates of the whole run.
      done: updates that were made before.
      show: True shows it wherever stderr leads, False never, None (default) on a terminal only.
    """

    def __init__(self, total: int, done: int, show: bool | None = None) -> None:
        self._total, self._first = total, done
        self._wanted = sys.stderr.isatty() if show is None else show
        self._tqdm = require("tqdm", "progress=True").tqdm if show else None
        self._start = time.monotonic()
        self._compiled: tuple[float, int, float] | None = None
        self._bar: Any = None

    def advance_to(self, done: int, steps: float, loss: float) -> None:
        """Report the run so far.

        Args:
          done: updates made.
          steps: time steps consumed (mean over seeds).
          loss: mean per step of the last line (nats).
        """
        if self._bar is None and self._wanted and self._is_long(done, steps):
            self._bar = self._make_bar()
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(steps, loss), refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _postfix(self, steps: float, loss: float) -> str:
        text = f"{_with_unit(steps)} steps, loss {loss:.4g} nats/step"
        assert self._compiled is not None
        seconds = time.monotonic() - self._compiled[0]
        rate = (steps - self._compiled[2]) / seconds if seconds > 0 else 0.0
        return f"{text}, {_with_unit(rate)} steps/s" if rate else text

    def _is_long(self, done: int, steps: float) -> bool:
        now = time.monotonic()
        if self._compiled is None:  # the first chunk compiled the program: its rate says nothing
            self._compiled = (now, done, steps)
            return now - self._start > PATIENCE
        seconds, updates = now - self._compiled[0], done - self._compiled[1]
        expected = seconds * (self._total - done) / max(1, updates)
        return max(now - self._start, expected) > PATIENCE

    def _make_bar(self) -> Any:
        tqdm = self._tqdm
        if tqdm is None:
            try:
                tqdm = require("tqdm", "a progress bar").tqdm
            except ImportError:  # nobody asked for the bar, so nobody needs it
                self._wanted = False
                return None
        return tqdm(
            total=self._total, initial=self._first, unit=" updates", unit_scale=True, file=sys.stderr,
            dynamic_ncols=True,
        )  # fmt: skip


def _with_unit(number: float) -> str:
    """Three digits or so: ``1.25M``.

    Example:

      >>> _with_unit(950), _with_unit(98_760), _with_unit(1_254_000)
      ('950', '98.8k', '1.25M')
    """
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:.3g}"
