"""The output: text and bars on stderr, one JSON document on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import click

from ..errors import (
    UNSAFE,
    AdapterMixError,
    ConfigError,
    ReportedElsewhere,
    UsageError,
    as_line,
    codes_of,
    cut,
    escaped,
)
from ..io.json_types import JsonObject
from ..io.launcher import is_main_process
from ..progress import SILENT, Look, Watcher

_LINE_EVERY = 5.0
_NO_MEMORY = ("allocate memory", "could not create a primitive", "failed to map segment")
"""Parts of the messages of torch, oneDNN and the dynamic linker where the memory does not suffice."""
_WIDEST = 120
"""Most characters of a table's cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """Where a command's output goes; with several processes only the main one prints.

    Args:
        as_json: One JSON document on stdout.
        quiet: No text and no bars.
    """

    as_json: bool = False
    quiet: bool = False

    @property
    def watch(self) -> Watcher:
        """Return the watcher for long work."""
        if self.quiet or not is_main_process():
            return SILENT
        return Bars() if sys.stderr.isatty() else Lines()

    def say(self, text: str) -> None:
        """Show text on stderr; characters that would act on a terminal are escaped."""
        if not self.quiet and is_main_process():
            click.echo(escaped(text, keep="\n\t"), err=True)

    def note(self, text: str, indent: str = "") -> None:
        """Show a note, or a warning, on one line."""
        mark = "" if text.startswith(("warning:", "note:")) else "note: "
        self.say(f"{indent}{mark}{one_line(text)}")

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table on stderr: first column left, others right."""
        lines = [[as_line(cell, _WIDEST) for cell in line] for line in (titles, *rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
        for line in lines:
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            self.say("  " + "  ".join(cells).rstrip())

    def product(self, text: str) -> None:
        """Print text that is the result of the command on stdout; with --json the document has it."""
        if not self.as_json and is_main_process():
            click.echo(text.removesuffix("\n"))

    def document(self, document: Mapping[str, object]) -> None:
        """Print the JSON document with --json."""
        if self.as_json and is_main_process():
            click.echo(json_line(document))


def json_line(document: Mapping[str, object]) -> str:
    """Return a JSON document on one line; characters that would act on a terminal are escaped, as JSON escapes them."""
    return UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], json.dumps(document, ensure_ascii=False))


def one_line(text: str) -> str:
    """Return a message on one line, escaped, and cut in the middle if it is very long."""
    return cut(escaped(text))


class Bars:
    """Live progress bars with speed and time left, on a terminal."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show one bar."""
        from rich.console import Console as Rich
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Rich(stderr=True)) as progress:
            task = progress.add_task(as_line(label), total=total, text="")
            yield lambda done, text: progress.update(task, advance=done, text=as_line(text))

    def note(self, message: str) -> None:
        """Show one line."""
        click.echo(one_line(message), err=True)

    def look(self, look: Look) -> None:
        """Show nothing: the log has it."""


@dataclass(slots=True)
class Lines:
    """A line every few seconds, where there is no terminal."""

    _last: float = field(default=0.0)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show lines for one piece of work."""
        done, start = 0, time.monotonic()
        self._last = start

        def advance(count: int, text: str) -> None:
            nonlocal done
            done += count
            now = time.monotonic()
            if now - self._last >= _LINE_EVERY or (done >= total and now - start >= 2):
                self._last = now
                left = (now - start) / max(done, 1) * (total - done)
                line = f"{as_line(label)}: {done}/{total}  {as_line(text)}  {now - start:.0f} s, {left:.0f} s left"
                click.echo(line, err=True)

        yield advance

    def note(self, message: str) -> None:
        """Show one line."""
        click.echo(one_line(message), err=True)

    def look(self, look: Look) -> None:
        """Show nothing: the log has it."""


def _failure(error: BaseException, after_interrupt: str) -> tuple[int, str, str] | None:
    """Return exit code, kind and message of a failure that has a name; None for a fault of the program."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt):
        error = error.__cause__  # click hides the interrupted operation
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "Interrupted", f"interrupted: {str(error) or 'stopped'}. {after_interrupt}".strip()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return 2, "Usage", error.format_message()
    if isinstance(error, click.ClickException):
        message = error.format_message()
        return error.exit_code, "Usage", message if message.endswith((".", "?")) else f"{message}."
    return _failed_work(error)


def _failed_work(error: BaseException) -> tuple[int, str, str] | None:
    if isinstance(error, UsageError):
        return 2, "Usage", str(error)
    if isinstance(error, AdapterMixError):
        return 1, type(error).__name__, str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing torch for its class would be slow
        return 1, "OutOfMemoryError", "the device's memory must hold the work, and does not. Lower --batch-size."
    if isinstance(error, OSError):
        return 1, "OSError", f"the disk or the network failed: {error}."
    return _exhausted(error)


def _exhausted(error: BaseException) -> tuple[int, str, str] | None:
    """Return the failure if memory, threads or the disk of the machine did not do."""
    first = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "SafetensorError":  # a full disk too; importing safetensors here would be slow
        return 1, "OSError", f"a safetensors file could not be read or written: {first}."
    if isinstance(error, MemoryError) or any(text in first for text in _NO_MEMORY):
        return 1, "OutOfMemoryError", "the memory must hold the work, and does not. Free some, or lower --batch-size."
    if isinstance(error, RuntimeError) and "can't start new thread" in first:
        reason = "the system allows no further thread (memory or the limit of processes, ulimit -u)"
        return 1, "OutOfMemoryError", f"{reason}. Raise the limit, or set OMP_NUM_THREADS=1."
    return None


def _codes(error: BaseException, kind: str) -> JsonObject:
    """Return the code of a failure, and those of its faults where it reports several."""
    codes = codes_of(error)
    if len(codes) > 1:
        return {"code": "option.several", "codes": codes}
    if codes:
        return {"code": codes[0]}
    area, name = ("usage", type(error).__name__) if isinstance(error, click.ClickException) else ("system", kind)
    name = "Invalid" if type(error) is click.UsageError else name
    return {"code": f"{area}.{re.sub('(?<=.)(?=[A-Z][a-z])', '-', name).lower()}"}


def fail(error: BaseException, *, as_json: bool, after_interrupt: str = "") -> int:
    """Show a failure and return the exit code; faults of the program itself are raised again.

    Args:
        error: The failure.
        as_json: Show it as a JSON document.
        after_interrupt: What the user can do after an interrupt, as a sentence.

    Raises:
        BaseException: the error has no name here, so a traceback helps more than a sentence.
    """
    if isinstance(error, SystemExit | click.exceptions.Exit):
        code = error.exit_code if isinstance(error, click.exceptions.Exit) else error.code
        return code if isinstance(code, int) else 1
    failure = _failure(error, after_interrupt)
    if failure is None:
        raise error
    code, kind, message = failure
    if not isinstance(error, click.exceptions.NoArgsIsHelpError):
        lines = message.split("\n") if isinstance(error, ConfigError) and error.is_list else [message]
        message = "\n".join(map(one_line, lines))
    if isinstance(error, ReportedElsewhere):
        return 130 if error.interrupted else code
    if not is_main_process() and isinstance(error, click.ClickException | ConfigError):  # every process finds it
        return code
    if as_json and _write(json_line({"error": {"kind": kind, **_codes(error, kind), "message": message}})):
        return code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _write(message, err=True)
    else:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" See '{error.ctx.command_path} --help'."
        _write(f"error: {message}{hint}", err=True)
    return code


def _write(text: str, *, err: bool = False) -> bool:
    """Show a line; return whether it arrived: a pipe may be closed, and a disk full."""
    try:
        click.echo(text, err=err)
    except OSError:
        return False
    return True


def close_streams() -> None:
    """Discard output that a closed pipe or a full disk refuses; else Python shows a traceback at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # ValueError: it is closed; AttributeError: there is no stream
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
