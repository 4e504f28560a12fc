"""Text from files, folder names and other programs, for Markdown and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from ..errors import as_line, escaped

_MARKUP = re.compile(r"[\\`*\[\]<>|#~&]")


def as_markdown(text: object, limit: int = 200) -> str:
    r"""Return text for Markdown: one line, with control characters, Markdown and HTML escaped, and cut to a limit.

    Args:
        text: Any object; its `str` is used.
        limit: Most characters before Markdown and HTML are escaped.

    Example:
        >>> as_markdown("a|b\x1b")
        'a&#124;b&#92;x1b'
    """
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", as_line(text, limit))


def as_code(text: object, limit: int = 200) -> str:
    """Return text as inline code of Markdown, or escaped if it contains markup; see `as_markdown`."""
    line = as_line(text, limit)
    return as_markdown(text, limit) if _MARKUP.search(line) else f"`{line}`"


def as_html(text: object) -> str:
    """Return text for an HTML page, with control characters and HTML escaped."""
    return html.escape(escaped(str(text)))


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """Return a Markdown table, a line per row.

    Args:
        titles: Titles of the columns; they are escaped.
        rows: Cells.
        names: Number of leading columns with names, which are escaped. Other cells are not changed.
    """
    body = [[*map(as_markdown, row[:names]), *row[names:]] for row in rows]
    lines = [[*map(as_markdown, titles)], ["---"] * len(titles), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
