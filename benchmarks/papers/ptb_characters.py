"""Figure 4 of the ARTBP paper: python benchmarks/papers/ptb_characters.py FOLDER [--scale full]."""

import sys

from jtrunc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "ptb-characters", *sys.argv[1:]]))
