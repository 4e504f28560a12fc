"""Read the model name of a request, such as `task@0.9+align@0.1`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import NamedTuple

from ..errors import UsageError, as_line, did_you_mean

MOST_CHARACTERS = 512
MOST_PARTS = 8
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PART = re.compile(rf"(?P<adapter>{_ADAPTER.pattern})(?:@(?P<weight>[A-Za-z0-9._-]{{1,40}}))?")


class Part(NamedTuple):
    """One adapter of a merge, with its weight."""

    adapter: str
    weight: float


def is_name(text: str) -> bool:
    """Return whether a text can name an adapter: letters, digits, `.`, `_` and `-`, and a letter or digit first.

    Example:
        >>> is_name("align-de"), is_name("../align"), is_name("")
        (True, False, False)
    """
    return _ADAPTER.fullmatch(text) is not None


def parse(name: str, known: Collection[str]) -> tuple[Part, ...]:
    """Return the adapters and weights of a model name, sorted by adapter.

    The name is one adapter (weight 1), or parts `ADAPTER@WEIGHT` joined by `+`. A weight is a number as
    `merge --weights` takes it, without a plus sign.

    Args:
        name: The model name of a request. It may hold anything.
        known: Names of the registered adapters.

    Raises:
        UsageError: the name has another form, or lists an adapter that is not registered.

    Example:
        >>> parse("task@0.9+align@0.1", ["align", "task"])
        (Part(adapter='align', weight=0.1), Part(adapter='task', weight=0.9))
    """
    if len(name) > MOST_CHARACTERS:
        raise UsageError(
            f"a model name must have at most {MOST_CHARACTERS} characters, got {len(name)}. Shorten it.",
            code="serving.long-name",
        )
    texts = name.split("+", MOST_PARTS)
    if len(texts) > MOST_PARTS:
        raise UsageError(
            f"a model name must list at most {MOST_PARTS} adapters, and {as_line(name)!r} lists more. Merge some of "
            "them first.",
            code="serving.many-parts",
        )
    parts = [_part(text, known, is_single=len(texts) == 1) for text in texts]
    if len({part.adapter for part in parts}) < len(parts):
        raise UsageError(
            f"each adapter must be listed once, and {as_line(name)!r} repeats one. Add its weights.",
            code="serving.repeated",
        )
    return tuple(sorted(parts))


def _part(text: str, known: Collection[str], *, is_single: bool) -> Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise UsageError(
            f"a part of a model name must be ADAPTER@WEIGHT, such as task@0.9, got {as_line(text)!r}.",
            code="serving.part",
        )
    adapter, weight = match["adapter"], match["weight"]
    if adapter not in known:
        raise UsageError(
            f"an adapter must be registered, and {adapter!r} is not.{did_you_mean(adapter, known)}",
            code="serving.unknown-adapter",
        )
    if weight is None and not is_single:
        raise UsageError(
            f"with several adapters each must have a weight, and {adapter!r} lacks it. Write {adapter}@1.",
            code="serving.no-weight",
        )
    return Part(adapter, 1.0 if weight is None else _number(weight))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"a weight must be a finite number, got {text!r}.", code="serving.weight")
    return number + 0.0  # so that -0.0 and 0.0 are one key
