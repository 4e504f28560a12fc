"""Heads on base models: kinds that encode rows, compute their loss and give their answers."""

from __future__ import annotations

from ...io.registry import Registry
from ...options import registries
from .. import Task
from .base import HeadKind, HeadRows
from .choices import PooledChoices
from .classes import Classes
from .span import Span
from .tokens import Tokens

HEADS: Registry[HeadKind] = registries.HEADS
"""Kinds of heads by name. Entry points of other packages: `adaptermix.heads`."""
HEADS.update(classes=Classes(), tokens=Tokens(), span=Span(), choices=PooledChoices())


def suiting(task: Task) -> HeadKind | None:
    """Return the first kind of head that can give a task's answers, or None."""
    HEADS.load_all()
    return next((kind for kind in HEADS.values() if kind.suits(task)), None)


__all__ = ["HEADS", "HeadKind", "HeadRows", "suiting"]
