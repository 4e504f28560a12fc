"""Scores per language, and translation retrieval per layer."""

from .retrieval import Retrieval, retrieve
from .run import Comparison, Evaluation, evaluate
from .score import Score, mean_score, paired_difference
from .systems import Systems, compare_systems

__all__ = [
    "Comparison",
    "Evaluation",
    "Retrieval",
    "Score",
    "Systems",
    "compare_systems",
    "evaluate",
    "mean_score",
    "paired_difference",
    "retrieve",
]
