"""Damage, full disks and kills (half an hour): python benchmarks/faults/run_all.py [--seed N] [--out DIR]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("damage", "full_disk", "kill")


def main() -> int:
    """Run all with the options given here; 1 if any of them found a fault."""
    commands = [
        [sys.executable, str(Path(__file__).parent / f"{name}.py"), *sys.argv[1:]] for name in SCRIPTS
    ]
    return max(subprocess.run(command, check=False).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
