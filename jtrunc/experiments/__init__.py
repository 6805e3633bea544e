"""What the command line runs: named parts, the papers' experiments, the demonstration."""
