"""Heads on base models: a table of kinds, each of which encodes rows, gives their loss and their answers."""

from __future__ import annotations

from .. import Task
from .base import HeadKind, HeadRows
from .classes import Classes
from .span import Span
from .tokens import Tokens

_ALL: tuple[HeadKind, ...] = (Classes(), Tokens(), Span())
HEADS: dict[str, HeadKind] = {kind.form.name: kind for kind in _ALL}


def suiting(task: Task) -> HeadKind | None:
    """Return the kind of head that can give a task's answers, if there is one."""
    return next((kind for kind in _ALL if kind.suits(task)), None)


__all__ = ["HEADS", "HeadKind", "HeadRows", "suiting"]
