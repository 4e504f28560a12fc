"""What methods there are, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError, UsageError, did_you_mean
from ..io.json_types import JsonObject
from .base import METHODS, is_weighted_sum, options_of
from .mergekit import describe, mergekit_methods

_ZEROS = """

Zeros: a module that an adapter lacks counts as a delta of zero. An adapter of weight 0 is left out and has no say, so
the result may jump between a weight of 0 and a tiny one.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """One method.

    Args:
        name: Its name, for `--method`.
        summary: What it does, in one sentence.
        options: Its options with their defaults; `...` where one must be given.
        text: Its whole description.
    """

    name: str
    summary: str
    options: JsonObject
    text: str

    def document(self) -> JsonObject:
        """Return the entry as plain data; options that must be given have the default null."""
        options = {key: None if value is ... else value for key, value in self.options.items()}
        return {"name": self.name, "summary": self.summary, "options": options, "description": self.text}


def _built_in() -> list[MethodEntry]:
    METHODS.load_all()
    result = []
    for name, cls in sorted(METHODS.items()):
        text = "\n".join(line.removeprefix("    ") for line in (cls.__doc__ or "").strip().splitlines())
        summary = text.splitlines()[0]
        if not is_weighted_sum(cls):
            text = text.rstrip() + _ZEROS
        result.append(MethodEntry(name=name, summary=summary, options=options_of(cls), text=text))
    return result


def _mergekit() -> list[MethodEntry]:
    try:
        known = mergekit_methods()
    except PlanError:  # not installed
        return []
    result = []
    for name, options in known.items():
        text = describe(name) + _ZEROS
        result.append(MethodEntry(name=f"mergekit:{name}", summary=text.splitlines()[0], options=options, text=text))
    return result


def list_methods(names: Sequence[str] = ()) -> list[MethodEntry]:
    """Return the methods of these names, or all: our own, other packages' and mergekit's if it is installed.

    Raises:
        PlanError: a name is unknown.
    """
    known = {entry.name: entry for entry in (*_built_in(), *_mergekit())}
    for name in names:
        if name not in known:
            raise UsageError(
                f"unknown merge method {name!r}.{did_you_mean(name, known)} `adaptermix methods` lists them all.",
                code="method.unknown",
            )
    return [known[name] for name in names] or list(known.values())
