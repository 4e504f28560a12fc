"""Scores per language, and translation retrieval per layer."""

from .compare import Systems, compare_systems
from .predict import Prediction
from .retrieval import retrieve
from .retrieval_report import Retrieval
from .run import Comparison, Evaluation, evaluate
from .score import Score, mean_score, paired_difference

__all__ = [
    "Comparison",
    "Evaluation",
    "Prediction",
    "Retrieval",
    "Score",
    "Systems",
    "compare_systems",
    "evaluate",
    "mean_score",
    "paired_difference",
    "retrieve",
]
