"""Full checkpoints: differences of two, writing with deltas added, and reading quantised weights."""
