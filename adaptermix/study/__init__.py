"""Merge weights found on a dev set."""

from .run import SearchResult, search, search_dry

__all__ = ["SearchResult", "search", "search_dry"]
