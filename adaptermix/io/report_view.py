"""Results in one line, and as tables in notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import cut
from .markup import as_html

_LINE, _ROWS = 200, 50


class ResultView:
    """A result with a `document()`: its `repr` is one line, and a notebook shows it as a table."""

    __slots__ = ()

    def document(self) -> Any:
        """Return the JSON document of the result."""
        raise NotImplementedError

    def __repr__(self) -> str:
        entries = [f"{key}={_short(value)}" for key, value in _document(self).items() if value is not None]
        return cut(f"{type(self).__name__}({', '.join(entries)})", _LINE)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{as_html(str(key))}</th><td>{_cell(value)}</td></tr>" for key, value in _document(self).items()
        )
        return f"<table><caption>{as_html(type(self).__name__)}</caption>{rows}</table>"


def _document(report: ResultView) -> Mapping[str, object]:
    document = report.document()
    return document if isinstance(document, Mapping) else {"entries": document}


def _short(value: object) -> str:
    """Return a value in a few characters; of a long list or a mapping only the number of entries."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and len(value) <= 4 and all(isinstance(item, int | float) for item in value):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, Mapping | list | tuple):
        return f"<{len(value)} entries>"
    return cut(repr(value), 60)


def _cell(value: object) -> str:
    """Return a value as HTML; mappings of mappings become tables with a column per key."""
    if not isinstance(value, Mapping) or not value:
        return as_html(_short(value))
    rows = list(value.items())[:_ROWS]
    more = f"<tr><td>and {len(value) - len(rows)} more</td></tr>" if len(value) > len(rows) else ""
    columns = list(dict.fromkeys(key for _, row in rows if isinstance(row, Mapping) for key in row))
    head = "".join(f"<th>{as_html(str(name))}</th>" for name in columns)
    lines = "".join(f"<tr><th>{as_html(str(key))}</th>{_cells(row, columns)}</tr>" for key, row in rows)
    return f"<table>{f'<tr><th></th>{head}</tr>' if columns else ''}{lines}{more}</table>"


def _cells(row: object, columns: list[str]) -> str:
    if isinstance(row, Mapping):
        return "".join(f"<td>{as_html(_short(row[name])) if name in row else ''}</td>" for name in columns)
    return f"<td>{as_html(_short(row))}</td>"
