"""Full checkpoints: read as pairs, written with deltas added, and quantised weights."""
