"""``jtrunc plan``: what estimators would cost, and which to take, before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

import jtrunc
from jtrunc.diagnostics.plan import Choice
from jtrunc.experiments.report import fresh_folder, table, write_json
from jtrunc.experiments.subjects import Subject, constructors, read

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Plan(Subject):
    """What estimators cost on a task and cell, from shapes alone, and which fits a budget.

    Bytes are the compiler's own, operations are counted, depth is the loop iterations that must follow each
    other in an update. Nothing is trained; `jtrunc audit` measures bias and variance.
    """

    memory: str = ""
    """What an update may take: 500M, 16G, ... (units of 1000 bytes); without it everything fits."""
    sequences: bool = False
    """Each update reads a sequence of its own, so that no influence reaches from one to the next."""
    output: Path = Path("runs/plan")
    """Folder for the results; it must not exist yet, or be empty."""

    def run(self) -> list[Path]:
        limit = num_bytes(self.memory)
        _, model = read(self)
        estimators = constructors(self, model.system)
        longest = max(window for _, window in estimators.values())
        tokens = jax.ShapeDtypeStruct((longest, self.streams), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0))
        hidden = model.initial_hidden((self.streams,))
        found = jtrunc.plan(
            model.system, params, hidden, (tokens, tokens), estimators,
            memory_limit=limit, stream=not self.sequences,
        )  # fmt: skip
        folder = fresh_folder(self.output)
        header = [
            "estimator",
            "gradient",
            "window",
            "state B",
            "temporaries B",
            "total B",
            "FLOP/step",
            "depth",
        ]
        rows = [_row(name, choice) for name, choice in found.choices.items()]
        print("\nOne update, before anything runs (≥: loops whose length is data)")
        print(table([*header, "fits"], rows))
        print(f"\n{found.reason}", flush=True)
        choices = {name: _record(choice) for name, choice in found.choices.items()}
        outcome = {"recommended": found.recommended, "reason": found.reason, "choices": choices}
        return [write_json(folder / "plan.json", self, **outcome)]


def num_bytes(text: str) -> int | None:
    """``500M`` as a number; None for the empty text.

    >>> num_bytes("1.5G"), num_bytes("800"), num_bytes("")
    (1500000000, 800, None)
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kMGT]?)B?", text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"--memory must be a number of bytes such as 500M or 16G, got {text!r}")
    return round(float(found[1]) * UNITS[found[2]])


def _row(name: str, choice: Choice) -> list[object]:
    cost = choice.cost
    flops = f"{'≥ ' if cost.flops_per_step is None else ''}{choice.flops_per_step:,.0f}"
    depth = "data" if cost.depth is None else f"{cost.depth:,}"
    sizes = [f"{size:,}" for size in (cost.state_bytes, cost.temporary_bytes, cost.total_bytes)]
    return [name, choice.claim.value, cost.window, *sizes, flops, depth, "yes" if choice.fits else "no"]


def _record(choice: Choice) -> dict[str, object]:
    return {
        "claim": choice.claim.value,
        "fits": choice.fits,
        **choice.cost._asdict(),
        "flops_per_step": choice.flops_per_step,
        "flops_are_a_bound": choice.cost.flops_per_step is None,
    }
