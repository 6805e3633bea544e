"""The host's side of a run: which update comes next, what is written down, when it must stop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Params, PyTree, System
from jtrunc.probe import estimator_name
from jtrunc.training import checkpoint
from jtrunc.training.chunk import Program, lead_in_update, run_chunk
from jtrunc.training.evaluate import evaluate
from jtrunc.training.metrics import Line, MetricsFile, split_columns, train_columns
from jtrunc.training.placement import Placement
from jtrunc.training.processes import from_first, gather, largest, put
from jtrunc.training.seeds import Hyperparameters, SeedAxis
from jtrunc.training.step import TrainState, describe_non_finite
from jtrunc.training.stream import Stream
from jtrunc.training.sums import MetricSums, Sum

_SECONDS_PER_CHUNK = 0.25


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
      params: the last parameters; with seeds, every leaf has a leading axis of seeds.
      state: the last `TrainState`; with seeds likewise, but for `cursor`, `update` and `timestep` where all
        seeds share them (estimators whose lengths are known at trace time).
      history: one array per name, (lines,) or (lines, seeds): ``update``, ``timestep``, ``num_steps``
        (consumed), ``num_scored``, ``loss`` (nats per scored step), ``grad_norm``, the estimator's
        diagnostics and, where they are allowed, ``num_skipped`` updates.
      evaluations: by name of the split: ``update``, ``nats`` and ``bits`` per step.
      seeds: the seeds in the order of the axis, or None for a solo run.
    """

    params: Params
    state: TrainState
    history: dict[str, np.ndarray]
    evaluations: dict[str, dict[str, np.ndarray]]
    seeds: tuple[int, ...] | None = None


class NonFiniteError(FloatingPointError):
    """A loss, gradient, parameter or hidden state became NaN or infinite; `result` is the run before it."""

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop and did so between two updates; `result` is the run so far."""

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


class Options(NamedTuple):
    """Counts of updates."""

    num_updates: int
    log_every: int
    eval_every: int | None
    checkpoint_every: int
    keep: int


class Output(NamedTuple):
    """Where a run is written down."""

    metrics: MetricsFile
    checkpoints: Path
    config_hash: str


@dataclass
class Runner:
    """A run in progress; `advance` is one chunk."""

    program: Program
    placement: Placement
    shardings: TrainState | None
    hyperparameters: Hyperparameters
    stream: Stream
    lead_in: list[int]
    system: System
    eval_data: dict[str, PyTree]
    eval_hidden: PyTree
    options: Options
    seeds: tuple[int, ...] | None
    state: TrainState
    output: Output | None = None
    update: int = 0
    timesteps: np.ndarray = field(default_factory=lambda: np.int64(0))  # type: ignore[assignment]
    blocks: list[dict[str, np.ndarray]] = field(default_factory=list)
    evaluation_lines: list[Line] = field(default_factory=list)
    last_loss: float = float("nan")
    saved_at: int | None = None
    chunk_size: int = 1

    @property
    def finished(self) -> bool:
        return self.update >= self.options.num_updates

    def advance(self) -> None:
        """Run one chunk, write its lines, and evaluate and save where that is due."""
        size = self._next_size()
        start = time.monotonic()
        state, rows = self._compute(size)
        self._adapt_chunk_size(size, largest(time.monotonic() - start))
        good = _num_good(rows)
        if good < size:
            self._stop_before_damage(good)
        self._accept(state, rows)
        options, due = self.options, self.finished
        if self.eval_data and (due or (options.eval_every and self.update % options.eval_every == 0)):
            self._evaluate()
        if due or self.update % options.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this update, unless there is one."""
        if self.output is None or self.saved_at == self.update:
            return
        folder, config_hash, keep = self.output.checkpoints, self.output.config_hash, self.options.keep
        state, metrics = self.whole_state(), self.output.metrics

        def write() -> None:
            extra = {"timesteps": np.asarray(self.timesteps).tolist(), "metrics": metrics.sha256}
            checkpoint.save(folder, self.update, state, config_hash=config_hash, extra=extra, keep=keep)

        from_first(write)
        self.saved_at = self.update

    def whole_state(self) -> TrainState:
        """The state of all seeds and streams, and of nothing else, in every process."""
        return self.placement.trim_state(gather(self.state), self.program.seed_axis)

    def go_on(self, restored: checkpoint.Restored) -> None:
        """Take over a restored state, and the lines of metrics up to it."""
        assert self.output is not None
        if restored.update > self.options.num_updates:
            raise ValueError(
                f"train: the run has made {restored.update} updates already, more than `num_updates` = "
                f"{self.options.num_updates}; pass a larger number to go on"
            )
        metrics, digest = self.output.metrics, restored.extra["metrics"]
        lines = from_first(lambda: metrics.truncate_to(digest))
        self.state = self.placement.fill_state(restored.state, self.program.seed_axis, self.shardings)
        self.update = self.saved_at = restored.update
        self.timesteps = np.asarray(restored.extra["timesteps"], np.int64)
        self.blocks = [train_columns(lines)]
        self.evaluation_lines = [line for line in lines if "split" in line]

    def result(self) -> TrainResult:
        history = {
            name: np.concatenate([block[name] for block in self.blocks])
            for name in (self.blocks[0] if self.blocks else {})
        }
        state, evaluations = self.whole_state(), split_columns(self.evaluation_lines)
        return TrainResult(state.params, state, history, evaluations, self.seeds)

    def interrupted_message(self) -> str:
        if self.output is None:
            return f"stopped after update {self.update}; nothing was saved, for there is no `out_dir`"
        return (
            f"stopped after update {self.update} of {self.options.num_updates}; the run is saved in "
            f"{self.output.checkpoints.parent}: call again with resume=True to go on"
        )

    def _next_size(self) -> int:
        """Updates of the next chunk: whole lines, and no step over an evaluation or a checkpoint."""
        options = self.options
        end = -(-(self.update + max(self.chunk_size, 1)) // options.log_every)
        end = min(end, self.update // options.log_every + self.program.capacity) * options.log_every
        for every in (options.eval_every, options.checkpoint_every):
            if every:
                end = min(end, (self.update // every + 1) * every)
        return min(end, options.num_updates) - self.update

    def _adapt_chunk_size(self, size: int, seconds: float) -> None:
        if seconds < _SECONDS_PER_CHUNK / 2:
            most = self.program.capacity * self.options.log_every
            self.chunk_size = min(4 * max(size, self.chunk_size), most)
        elif seconds > 2 * _SECONDS_PER_CHUNK:
            self.chunk_size = max(1, size // 2)

    def _compute(self, size: int) -> tuple[TrainState, MetricSums]:
        """`size` updates from the current state; their sums as NumPy arrays, (rows,) or (rows, seeds).

        A row is a line of metrics, or an update of the lead-in, or what the lead-in left of a line.
        """
        state, parts, done = self.state, [], 0
        for end in self.lead_in[self.update : self.update + size]:
            state, row = lead_in_update(self.program, end, state, self.stream, self.hyperparameters)
            parts.append(self._time_major(row, 1))
            done += 1
        if done < size:
            count = jnp.int32(size - done)
            state, rows = run_chunk(self.program, state, self.stream, count, self.hyperparameters)
            every = self.options.log_every
            num_lines = (self.update + size - 1) // every - (self.update + done) // every + 1
            parts.append(self._time_major(rows, num_lines))
        if self.shardings is not None:  # the compiler may have moved something
            state = put(state, self.shardings)
        return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _time_major(self, rows: MetricSums, size: int) -> MetricSums:
        rows = jax.device_get(gather(rows))
        if self.program.seed_axis is SeedAxis.NONE:
            return jax.tree.map(lambda leaf: leaf[:size], rows)
        return jax.tree.map(lambda leaf: leaf[:, :size].swapaxes(0, 1), self.placement.trim(rows))

    def _accept(self, state: TrainState, rows: MetricSums) -> None:
        block = self._lines(rows)
        self.state = state
        self.update = int(block["update"][-1])
        self.timesteps = block["timestep"][-1]
        self.last_loss = float(np.mean(block["loss"][-1]))
        self.blocks.append(block)
        plain = {name: column.tolist() for name, column in block.items()}
        self._write([dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)])

    def _write(self, lines: list[Line]) -> None:
        if self.output is not None:
            metrics = self.output.metrics
            from_first(lambda: metrics.append(lines))

    def _lines(self, rows: MetricSums) -> dict[str, np.ndarray]:
        """The chunk's metrics, one entry per line of `log_every` updates."""
        counts = _counts(rows)
        ends = self.update + np.cumsum(counts)
        starts = np.flatnonzero(np.diff((ends - 1) // self.options.log_every, prepend=-1))

        def total(values: Any, dtype: Any = np.float64) -> np.ndarray:
            if isinstance(values, Sum):
                values = values.total.astype(dtype) + values.rest
            return np.add.reduceat(values.astype(dtype), starts, axis=0)

        def mean(values: Sum, number: np.ndarray) -> np.ndarray:
            sums = total(values)  # NaN where there is nothing to average: all updates were skipped
            return np.divide(sums, number, out=np.full_like(sums, np.nan), where=number > 0)

        num_steps, num_scored = (total(count, np.int64) for count in (rows.num_steps, rows.num_scored))
        made = np.add.reduceat(counts, starts).reshape(-1, *(1,) * (num_steps.ndim - 1))
        skipped = {}
        if rows.num_skipped is not None:
            skipped = {"num_skipped": total(rows.num_skipped, np.int64)}
            made = made - skipped["num_skipped"]
        made = np.broadcast_to(made, num_steps.shape)
        return {
            "update": ends[np.append(starts[1:], len(ends)) - 1],
            "timestep": self.timesteps + np.cumsum(num_steps, axis=0),
            "num_steps": num_steps,
            "num_scored": num_scored,
            "loss": mean(rows.loss, num_scored),
            "grad_norm": mean(rows.grad_norm, made),
            **{name: mean(values, made) for name, values in rows.diagnostics.items()},
            **skipped,
        }

    def _evaluate(self) -> None:
        lines = []
        for name, split in self.eval_data.items():
            found = evaluate(
                self.system, self.state.params, self.eval_hidden, split, seed_axis=self.seeds is not None
            )
            nats, bits = self.placement.trim((found.nats, found.bits))
            lines.append({"update": self.update, "split": name, "nats": nats.tolist(), "bits": bits.tolist()})
        self.evaluation_lines += lines
        self._write(lines)

    def _stop_before_damage(self, good: int) -> None:
        """Redo the `good` updates before the damage (the chunk's first state is still there), save, raise."""
        if good:
            self._accept(*self._compute(good))
        self.save()
        row = self._compute(1)[1]
        bits = np.atleast_1d(row.non_finite[0])
        position = int(np.flatnonzero(bits)[0])
        timesteps = np.atleast_1d(self.timesteps + row.num_steps[0].astype(np.int64))
        seed = (
            ""
            if self.seeds is None
            else f", seed {', '.join(str(self.seeds[i]) for i in np.flatnonzero(bits))}"
        )
        spent = "" if self.state.skips_left is None else ", and `max_non_finite` were skipped before it"
        kept = "" if self.output is None else f" and in {self.output.checkpoints}"
        raise NonFiniteError(
            f"{describe_non_finite(int(bits[position]))} not finite at update {self.update + 1}, timestep "
            f"{timesteps[position]}{seed}, estimator {self._estimator_name()}{spent}; the state after "
            f"update {self.update} is in this error's `result`{kept}. Lower the learning rate or clip the "
            "gradients",
            self.result(),
        )

    def _estimator_name(self) -> str:
        first = jax.tree.map(lambda leaf: leaf[0], gather(self.hyperparameters))
        return estimator_name(self.program.parts(first)[0])


def _counts(rows: MetricSums) -> np.ndarray:
    """Updates in each row; all seeds agree."""
    return np.asarray(rows.num_updates, np.int64).reshape(len(rows.num_updates), -1)[:, 0]


def _num_good(rows: MetricSums) -> int:
    """Updates before the first that is not finite in any seed."""
    counts = _counts(rows)
    good = rows.good.reshape(len(counts), -1).min(axis=1)
    first = int(np.argmax(np.append(good < counts, True)))
    return int(counts[:first].sum() + (good[first] if first < len(counts) else 0))
