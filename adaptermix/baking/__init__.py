"""Adapters written into their base model, in 16 bits or in 4, and what is left of them there."""
