"""Scores per language, and translation retrieval per layer."""

from .retrieval import Retrieval, retrieve
from .run import Evaluation, evaluate
from .score import Score, micro_f1

__all__ = ["Evaluation", "Retrieval", "Score", "evaluate", "micro_f1", "retrieve"]
