"""Merge weights, and options of merge methods, found on a dev set."""

from ..merging.request import merge_as_asked as merge_learned
from .decision import CONTROL_NAME
from .result import SearchResult
from .run import search, search_dry
from .space import label_of

__all__ = ["CONTROL_NAME", "SearchResult", "label_of", "merge_learned", "search", "search_dry"]
