"""One further process of a search: settings as JSON on stdin, the worker's number as argument."""

from __future__ import annotations

import sys

from ..settings import SearchSettings


def main() -> None:
    """Run trials until there are none left."""
    from .run import help_with

    settings = SearchSettings.model_validate_json(sys.stdin.read())
    help_with(settings, number=int(sys.argv[1]))


if __name__ == "__main__":
    main()
