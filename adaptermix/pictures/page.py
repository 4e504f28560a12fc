"""The frame of an HTML page: no script, no other file, light and dark, from the width of a phone."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import as_line
from ..io.markup import as_html

GENERATOR = "adaptermix report"
"""Content of the page's entry `generator`, by which a page of this toolkit is recognised."""
_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --back: #fff; --line: #d1d9e0; --row: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #a3adb8; --back: #0d1117; --line: #3d444d; --row: #161b22; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 0 auto; padding: 1rem; color: var(--text);
  background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; line-height: 1.3;
  border-top: 1px solid var(--line); padding-top: 1rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { max-width: 48rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; max-width: 100%; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.row > div { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; vertical-align: top; overflow-wrap: break-word; }
td { white-space: nowrap; } th { max-width: 16rem; }
thead th { vertical-align: bottom; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } tbody th { font-weight: 400; }
tbody tr { background: var(--back); } tbody tr:nth-child(even) { background: var(--row); }
tbody th { position: sticky; left: 0; background: inherit; } .chosen { font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; } dd span { display: inline-block; max-width: 100%; }
svg { display: block; } img { max-width: 100%; background: #fff; } .verdict { font-size: 1.1rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return an HTML page.

    Args:
        title: The title; it is escaped.
        parts: HTML of the body.
    """
    name, body = as_html(as_line(title)), "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(titles: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table that scrolls where it is wider than the screen; all cells are escaped."""
    head = "".join(f'<th scope="col">{_cell(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(entries: Sequence[tuple[str, object]]) -> str:
    """Return a list of names and values, without those whose value is empty; all are escaped.

    Lines are broken at blanks, so that options such as `--base` stay whole.
    """
    lines = [f"<dt>{_cell(name)}</dt><dd>{_words(value)}</dd>" for name, value in entries if value]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def _cell(value: object) -> str:
    return as_html(as_line(value))


def _words(value: object) -> str:
    return " ".join(f"<span>{as_html(word)}</span>" for word in as_line(value, 1500).split(" "))
