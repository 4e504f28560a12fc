"""One further process of a search: settings as JSON on stdin, the worker's number as argument."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ..settings import SearchSettings


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run trials until there are none left."""
    from .run import help_with

    if hasattr(os, "fork"):  # elsewhere a process keeps the number of a parent that is gone
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings = SearchSettings.model_validate_json(sys.stdin.read())
    help_with(settings, number=int(sys.argv[1]))


if __name__ == "__main__":
    main()
