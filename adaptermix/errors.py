"""What can go wrong, by kind. Every message says what must hold, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or nothing if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class AdapterMixError(Exception):
    """The work could not be done; the message tells a person why and what to do."""


class PlanError(AdapterMixError):
    """The request contradicts itself (a wrong count of weights, an impossible rank)."""


class UsageError(PlanError):
    """An option has a value that it can never have (an unknown task, weights that are no numbers)."""


class IncompatibleAdapters(AdapterMixError):  # noqa: N818  (the field calls it that)
    """The adapters cannot be combined (other bases, other shapes)."""


class AdapterFormatError(AdapterMixError):
    """An adapter folder is damaged, or holds something that would be lost in silence."""


class DataError(AdapterMixError):
    """A data file is missing, empty or malformed; the message names file and line."""


class ModelError(AdapterMixError):
    """A base model cannot be loaded or is of a kind that the work does not support."""


class OutputError(AdapterMixError):
    """An output folder exists, or cannot be written."""


class ConfigError(AdapterMixError):
    """A recipe or a set of options has faults; all of them are listed at once."""


class PublishError(AdapterMixError):
    """Publishing failed."""


class ToldElsewhere(AdapterMixError):  # noqa: N818  (it is not the fault itself)
    """The work failed in several processes, and another one says why.

    Args:
        message: What went wrong here.
        interrupted: A signal ended the work.
    """

    def __init__(self, message: str, *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted
