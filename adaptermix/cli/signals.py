"""Handling of SIGINT and SIGTERM: the first ends the work, which then cleans up; the third ends the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object] | int | None
_AGAIN = 0.5
"""Seconds after which an interrupt that some code has swallowed is raised again."""
_GIVE_UP = 3
"""Number of signals at which the process ends without cleaning up."""
_INTERRUPTED = 130
"""Exit code after both signals: a caller needs one number for "interrupted; the command may be repeated"."""


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, which ends the command line with exit code 130.

    Where Python swallows the exception, such as in a callback of a weak reference, it prints no traceback.
    A second signal while the work cleans up is ignored, so that it can remove half-written files. If some code
    swallows the exception, as Python does in a finaliser, it is raised again.
    """

    def __init__(self) -> None:
        self._count, self._is_over = 0, False
        self._error: BaseException | None = None
        self._before: dict[int, _Handler] = {}
        self._show_unraisable = sys.unraisablehook

    def install(self) -> None:
        """Handle signals from here on; has no effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        handlers: dict[int, _Handler] = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
        if hasattr(signal, "setitimer"):
            handlers[signal.SIGALRM] = self._raise_again
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        sys.unraisablehook = self._unraisable

    def end(self, *, restore: bool) -> None:
        """Ignore signals from here on: the work is done, or its failure is about to be shown.

        Args:
            restore: Restore the previous handlers, since the process continues.
        """
        self._is_over = True
        if self._before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        if restore and self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            sys.unraisablehook = self._show_unraisable

    def _unraisable(self, swallowed: sys.UnraisableHookArgs) -> None:
        """Show an exception that Python swallowed, unless it is the interrupt, which is raised again."""
        if swallowed.exc_value is None or swallowed.exc_value is not self._error:
            self._show_unraisable(swallowed)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count >= _GIVE_UP:
            os._exit(_INTERRUPTED)
        if self._is_over or self._error:
            return
        self._error = KeyboardInterrupt()
        self._arm()
        raise self._error

    def _arm(self) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)

    def _raise_again(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_over or self._error is None:
            return
        self._arm()
        handled: BaseException | None = sys.exception()
        while handled is not None:
            if isinstance(handled, KeyboardInterrupt):
                return  # the work is cleaning up
            handled = handled.__cause__ or handled.__context__
        raise self._error
