"""Merge weights, and options of merge methods, found on a dev set."""

from .gates import merge_learned
from .label import shown
from .result import SearchResult
from .run import search, search_dry

__all__ = ["SearchResult", "merge_learned", "search", "search_dry", "shown"]
