"""Merge task adapters and alignment adapters across languages."""
