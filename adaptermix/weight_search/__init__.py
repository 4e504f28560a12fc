"""Merge weights, and options of merge methods, found on a dev set."""

from .decision import CONTROL_NAME
from .result import SearchResult
from .run import search, search_dry
from .space import label_of

__all__ = ["CONTROL_NAME", "SearchResult", "label_of", "search", "search_dry"]
