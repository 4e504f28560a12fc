"""Pure tensor algebra of adapter updates: no files, no models, no global state."""

from .geometry import cosine, inner, norm, sign_conflict
from .lowrank import concatenate, recompress, singular_values
from .updates import Dense, LowRank

__all__ = [
    "Dense",
    "LowRank",
    "concatenate",
    "cosine",
    "inner",
    "norm",
    "recompress",
    "sign_conflict",
    "singular_values",
]
