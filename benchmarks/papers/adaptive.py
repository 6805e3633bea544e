"""Figures 1 to 3 of the adaptive truncation paper: python benchmarks/papers/adaptive.py --task copy."""

import sys

from jtrunc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "adaptive", *sys.argv[1:]]))
