"""Figure 3 of the ARTBP paper: python benchmarks/papers/influence_balancing.py [--seeds 10]."""

import sys

from jtrunc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "influence-balancing", *sys.argv[1:]]))
