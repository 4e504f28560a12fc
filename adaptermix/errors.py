"""The exceptions of this package.

Every message states the requirement, the value found, and what to do. Every exception has a code that stays the same
when its message is reworded: an area and a few words, such as "rank.too-small". tests/messages.json lists them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Controls, marks of text direction, line separators and lone surrogates change a terminal or cannot be encoded.
# The two joiners (U+200C, U+200D) stay, since words of Persian and of Indic languages contain them.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str, *, keep: str = "") -> str:
    r"""Return a text with its control characters written as in Python, such as `\x1b`.

    Args:
        text: Any text.
        keep: Characters to leave unchanged, such as line ends.
    """
    return UNSAFE.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode("ascii"), text
    )


def as_line(text: object, limit: int = 200) -> str:
    """Return text from a file or another program for use in a message: one line, escaped, and cut to a limit.

    Args:
        text: Any object; its `str` is used.
        limit: Most characters.
    """
    line = escaped(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def cut(text: str, limit: int = 3000) -> str:
    """Return a text; one that is too long loses its middle, since the end of a message says what to do.

    Args:
        text: Any text.
        limit: Most characters.
    """
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty text if no name is close."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def near_or_known(name: str, known: Collection[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or else the list of known names."""
    return did_you_mean(name, known) or f" Known: {', '.join(known) or 'none'}."


class Coded(Exception):  # noqa: N818  (a base of errors, not an error itself)
    """An exception with a stable code.

    Args:
        message: The rule, the value, and the fix.
        code: Names the failure. Packages that add tasks or methods may leave it out.
        codes: Codes of all failures, where one error reports several.
    """

    def __init__(self, message: str = "", *, code: str = "other", codes: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.codes = list(codes) or [code]


def codes_of(error: BaseException) -> list[str]:
    """Return the codes of all failures that an error reports, each once; none if it has no code.

    Args:
        error: An error of the package, pydantic's ValidationError, or an error that one of these caused.
    """
    if isinstance(error, Coded):
        return error.codes
    if type(error).__name__ == "ValidationError":  # pydantic's; importing pydantic here would be slow
        faults = error.errors()  # type: ignore[attr-defined]
        codes = [getattr(fault.get("ctx", {}).get("error"), "code", None) or _of_pydantic(fault) for fault in faults]
        return list(dict.fromkeys(codes))
    return codes_of(error.__cause__) if error.__cause__ else []


def code_of(error: BaseException, default: str) -> str:
    """Return the code of an error that is reported within another one, or a default if it has no code."""
    return next(iter(codes_of(error)), default)


def _of_pydantic(fault: Mapping[str, Any]) -> str:
    return "option." + str(fault["type"]).replace("_", "-")


class InvalidValueError(Coded, ValueError):
    """An argument has a value that it cannot have.

    Commands and merges report it as a PlanError or UsageError with this code.
    """


class AdapterMixError(Coded):
    """Base class. The message explains why the work failed and how to fix it."""


class PlanError(AdapterMixError):
    """The arguments contradict each other (a wrong number of weights, an impossible rank)."""


class UsageError(PlanError):
    """An option has an invalid value (an unknown task, weights that are not numbers)."""


class IncompatibleAdapters(AdapterMixError):  # noqa: N818  (the field calls it that)
    """The adapters cannot be combined (other bases, other shapes)."""


class AdapterFormatError(AdapterMixError):
    """An adapter folder is damaged, or has content that would be dropped without a message."""


class DataError(AdapterMixError):
    """A data file is missing, empty or malformed; the message names file and line."""


class ModelError(AdapterMixError):
    """A base model cannot be loaded, or is of an unsupported kind."""


class OutputError(AdapterMixError):
    """An output folder exists, or cannot be written."""


class ConfigError(AdapterMixError):
    """A recipe or a set of options has faults; all of them are listed at once.

    Args:
        message: The rule, the value, and the fix; with `faults` what has them.
        faults: Each of the faults, which the message then lists: a single one on its line, several one per line.
        more: `code` and `codes`, see `Coded`.
    """

    def __init__(self, message: str = "", *, faults: Sequence[str] = (), **more: Any) -> None:
        self.is_list = len(faults) > 1
        lines = [f"{message} has {len(faults)} faults:", *faults] if self.is_list else [": ".join([message, *faults])]
        super().__init__("\n  ".join(lines), **more)


class PublishError(AdapterMixError):
    """Publishing failed."""


class ServerError(AdapterMixError):
    """An inference server cannot be reached, or does not answer."""


class ReportedElsewhere(AdapterMixError):  # noqa: N818  (it is not the fault itself)
    """The work failed in several processes, and another process reports the reason.

    Args:
        message: The error in this process.
        interrupted: A signal ended the work.
        code: Names the failure.
    """

    def __init__(self, message: str, *, interrupted: bool = False, code: str = "other") -> None:
        super().__init__(message, code=code)
        self.interrupted = interrupted
