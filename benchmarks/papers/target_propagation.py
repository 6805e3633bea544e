"""Tables 1 and 2 of target propagation: python benchmarks/papers/target_propagation.py --data FOLDER."""

import sys

from jtrunc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "target-propagation", *sys.argv[1:]]))
