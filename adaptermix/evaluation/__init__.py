"""Scores per language, and translation retrieval per layer."""

from .retrieval import Retrieval, retrieve
from .run import Evaluation, evaluate
from .score import Score, mean_score, paired_difference

__all__ = ["Evaluation", "Retrieval", "Score", "evaluate", "mean_score", "paired_difference", "retrieve"]
