"""Every question of this folder, each in its own process: python benchmarks/speed/run_all.py [--quick].

Then the report of them all (`report.py`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

QUESTIONS = (
    "structured_cells",
    "any_cell",
    "dynamic_windows",
    "adaptive",
    "long_bptt",
    "memory",
    "rtrl",
    "rank_one",
    "influences",
    "rank_one_memory",
    "target_blocks",
    "seeds",
    "peers",
    "adaptive_peers",
    "online_peers",
)


def main() -> int:
    """Run all with the options given here; the first that fails ends it."""
    folder = Path(__file__).parent
    for name in (*QUESTIONS, "report"):
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, str(folder / f"{name}.py"), *sys.argv[1:]], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
