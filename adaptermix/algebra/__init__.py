"""Pure tensor algebra of adapter updates: no files, no models, no global state."""

from .core import Core, core_of
from .geometry import cosine, inner, inner_products, norm, sign_conflict, sign_conflict_by_chance
from .lowrank import concatenate, factored, recompress, singular_values
from .randomised import least_rank, truncate
from .stack import Stack
from .updates import Dense, LowRank, Update, all_finite

__all__ = [
    "Core",
    "Dense",
    "LowRank",
    "Stack",
    "Update",
    "all_finite",
    "concatenate",
    "core_of",
    "cosine",
    "factored",
    "inner",
    "inner_products",
    "least_rank",
    "norm",
    "recompress",
    "sign_conflict",
    "sign_conflict_by_chance",
    "singular_values",
    "truncate",
]
