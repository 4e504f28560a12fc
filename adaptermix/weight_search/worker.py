"""One more process of a search: settings as JSON on stdin, its number and its parent's process id as arguments."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ..options import SearchSettings


def end_with(parent: int) -> None:
    """End this process when its parent is gone, even if that happened before the call.

    Args:
        parent: Process id that the parent reported: a process whose parent is gone has another parent.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run trials until none is left."""
    if hasattr(os, "fork"):  # Other systems keep the number of a parent that is gone.
        threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    from .run import run_worker

    settings = SearchSettings.model_validate_json(sys.stdin.read())
    run_worker(settings, number=int(sys.argv[1]))


if __name__ == "__main__":
    main()
