"""Base models: loading, blocks, heads, quantisation and generation."""
