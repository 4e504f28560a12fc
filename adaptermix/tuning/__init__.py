"""Settings of training as parameters of a search: a recipe is run once per candidate, and its last step judges.

What a candidate has in common with an earlier one is not run again: a step is known by its settings and by the steps
that made its inputs.
"""

from .plan import candidates, plan
from .report import Candidate, Tuning, shown
from .run import check, tune

__all__ = ["Candidate", "Tuning", "candidates", "check", "plan", "shown", "tune"]
