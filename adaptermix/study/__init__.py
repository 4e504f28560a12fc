"""Merge weights, and options of merge methods, found on a dev set."""

from .run import SearchResult, search, search_dry
from .shown import shown

__all__ = ["SearchResult", "search", "search_dry", "shown"]
