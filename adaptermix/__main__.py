"""`python -m adaptermix`: the same as the command `adaptermix`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
