"""Code blocks of README and docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """Return the path of a page from the root of the project."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and text of each code block."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(kind, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, kind, text in found]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `adaptermix` line of a console block."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ ").replace("; done", " ; done"), comments=True)
        if "adaptermix" in words:
            rest = words[words.index("adaptermix") + 1 :]
            yield rest[: rest.index(";")] if ";" in rest else rest
