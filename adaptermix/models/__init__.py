"""Base models: found, loaded, and seen as a stack of blocks."""
