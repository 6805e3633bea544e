"""``jtrunc audit``: bias, variance and cost of estimators on a task and cell, against the exact gradient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jtrunc
from jtrunc import cells, training
from jtrunc.diagnostics import Audit as Found
from jtrunc.diagnostics import Cost, Finding, Interval, Lag
from jtrunc.experiments.audit_figure import draw
from jtrunc.experiments.jobs import finite
from jtrunc.experiments.report import fresh_folder, table, write_json
from jtrunc.experiments.subjects import Subject, constructors, read

TRAINING_STREAMS, TRAINING_LENGTH = 16, 50


@dataclass(frozen=True)
class Audit(Subject):
    """Bias, variance and cost of gradient estimators, measured against the exact gradient.

    The network is first trained a little by truncated BPTT, for at its start it remembers nothing. Then its
    parameters stay, and every estimator walks along held-out data, random ones many times. One table, one
    picture, the numbers as JSON.
    """

    trained: int = 20_000
    """Steps of training beforehand (of 16 streams, by truncated BPTT of length 50 and Adam); 0 for none."""
    learning_rate: float = 3e-3
    """Of that training."""
    steps: int = 200
    """Steps whose losses count."""
    warm_up: int = 100
    """Steps before them, which give those a past."""
    draws: int = 100
    """Passes of each random estimator."""
    lags: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50)
    """Lags of which to measure what arrives; `--lags` alone for none."""
    lag_draws: int = 32
    """Passes for each lag, each for a loss chosen at random."""
    seed: int = 0
    """Of parameters and draws."""
    output: Path = Path("runs/audit")
    """Folder for the results; it must not exist yet, or be empty."""

    def run(self) -> list[Path]:
        if far := [lag for lag in self.lags if lag > self.warm_up]:
            raise ValueError(f"--lags {far[0]} is beyond --warm-up {self.warm_up}: give a longer warm-up")
        tokens, model = read(self)
        estimators = constructors(self, model.system)
        length = self.warm_up + self.steps
        data = tuple(jnp.asarray(leaf)[:length] for leaf in tokens.valid(self.streams))
        if len(data[0]) < length:
            raise ValueError(
                f"--warm-up and --steps ask for {length} steps of {self.streams} streams, but only "
                f"{len(data[0])} are held out; ask for less, or give more --data"
            )
        keys = jax.random.split(jax.random.key(self.seed), 2)
        folder = fresh_folder(self.output)
        params = self._trained(tokens, model, keys[0])
        print(f"{len(estimators)} estimators, {self.draws} draws each where they are random", flush=True)
        found = jtrunc.audit(
            model.system,
            params,
            model.initial_hidden((self.streams,)),
            data,
            estimators,
            key=keys[1],
            num_draws=self.draws,
            warm_up=self.warm_up,
            lags=self.lags,
            lag_draws=self.lag_draws,
            streams=self.streams,
        )
        print(f"\n{summary(found)}", flush=True)
        records = {name: _record(finding) for name, finding in found.findings.items()}
        picture = draw(found, folder / "bias_and_noise.png")
        return [
            picture,
            write_json(folder / "audit.json", self, confidence=found.confidence, findings=records),
        ]

    def _trained(self, tokens: Any, model: cells.Model, key: jax.Array) -> jtrunc.Params:
        if not self.trained:
            return model.init(key)
        system, streams = model.system, (TRAINING_STREAMS,)
        return training.train(
            system, model.init, model.initial_hidden(streams),
            jtrunc.truncated_bptt(system, TRAINING_LENGTH), optax.adam(self.learning_rate),
            tuple(tokens.train(TRAINING_STREAMS)),
            window=TRAINING_LENGTH, num_updates=max(1, self.trained // TRAINING_LENGTH), key=key,
            progress=True,
        ).params  # fmt: skip


def summary(found: Found) -> str:
    """Two tables: bias, noise and cost of each estimator, and what arrives by lag."""
    header = ["estimator", "gradient", "bias", "arrived", "noise", "cosine", "µs/step", "FLOP/step", "bytes"]
    rows = [_row(name, finding) for name, finding in found.findings.items()]
    parts = [
        f"Relative to the exact gradient of {found.num_scored} steps; intervals of {found.confidence:.0%}. "
        "Noise: of one pass over them",
        table(header, rows),
    ]
    lags = sorted({lag for finding in found.findings.values() for lag in finding.by_lag or ()})
    if lags:
        parts += [
            "\nShare of a step's influence on a later loss that arrives, by lag (± noise of one draw)",
            table(
                ["estimator", *map(str, lags)],
                [_lag_row(name, f, lags) for name, f in found.findings.items()],
            ),
        ]
    return "\n".join(parts)


def _row(name: str, finding: Finding) -> list[str]:
    flops = finding.cost.flops_per_step
    return [
        name,
        finding.claim.value,
        _shown(finding.bias),
        _shown(finding.arrived),
        f"{finding.noise:.3g}",
        f"{finding.cosine.value:.3f}",
        f"{1e6 * finding.seconds_per_step:.3g}",
        "data" if flops is None else f"{flops:,.0f}",
        f"{finding.cost.total_bytes:,}",
    ]


def _shown(interval: Interval) -> str:
    value, low, high = (f"{0.0 if abs(x) < 5e-5 else x:.3g}" for x in interval)
    return value if low == high else f"{value} [{low}, {high}]"


def _lag_row(name: str, finding: Finding, lags: list[int]) -> list[str]:
    if finding.by_lag is None:
        return [name, *("needs a structure" if i == 0 else "" for i in range(len(lags)))]
    return [name, *(_lag(finding.by_lag[lag]) if lag in finding.by_lag else "–" for lag in lags)]


def _lag(lag: Lag) -> str:
    noise = f" ± {lag.noise:.2g}" if lag.noise > 5e-3 else ""
    return f"{lag.arrived.value + 0.0:.2f}{noise}"


def _record(finding: Finding) -> Any:
    """As JSON has it."""
    by_lag = finding.by_lag and {str(lag): of for lag, of in finding.by_lag.items()}
    record = {**finding._asdict(), "claim": finding.claim.value, "by_lag": by_lag}
    return finite(_plain(record))


def _plain(value: Any) -> Any:
    """NamedTuples as dicts."""
    if isinstance(value, Cost | Interval | Lag):
        value = value._asdict()
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value
