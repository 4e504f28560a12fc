"""Search settings of training: a recipe runs once per candidate, and the score of its last step decides.

Steps that candidates have in common run once: a step is identified by its settings and by the steps that made its
inputs.
"""

from .plan import candidates, plan
from .report import RecipeTrial, Tuning, label_of
from .run import check, tune

__all__ = ["RecipeTrial", "Tuning", "candidates", "check", "label_of", "plan", "tune"]
