"""What the scripts of this folder leave behind: a table of counts, and JSON with every trial."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jtrunc.experiments.report import provenance, table

RESULTS = Path(__file__).parents[1] / "results"


def write(
    name: str, options: argparse.Namespace, found: Mapping[str, Any], counts: Mapping[str, Any]
) -> None:
    """Print the counts and write faults_NAME.json."""
    print(f"\n{table(['count', 'value'], list(counts.items()))}\n", flush=True)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = {"options": given, "provenance": provenance(), "counts": counts, **found}
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"faults_{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
