"""Merges on request: a plugin of vLLM that merges the adapters that the model name of a request lists."""
