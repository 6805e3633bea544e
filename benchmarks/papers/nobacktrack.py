"""Figures 1 to 6 of the NoBackTrack paper: python benchmarks/papers/nobacktrack.py --figure 5."""

import sys

from jtrunc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "nobacktrack", *sys.argv[1:]]))
