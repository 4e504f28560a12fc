"""A picture as SVG, with the style that all pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, as_line
from ..io.files import write_whole
from ..io.markup import as_html

SERIES = ("#8a8d91", "#2f7fd6", "#d9541e", "#16937a", "#a36ad6", "#b08510")
"""Colours of series; each has a contrast of at least 3 with a white and with a dark background."""
LETTER = 6.3
"""Width of a character at a font size of 11, in px."""
_STYLE = (
    ".am-back{fill:#fff}.am-text{font:11px system-ui,sans-serif;fill:#1f2328}.am-soft{fill:#59636e}"
    ".am-title{font-weight:600;font-size:12px}.am-small{font-size:10px}.am-line{stroke:#1f2328;stroke-width:1.2;"
    "fill:none}.am-grid{stroke:#d1d9e0;stroke-width:1}.am-empty{fill:#d1d9e0}"
    "@media (prefers-color-scheme:dark){.am-back{fill:#0d1117}.am-text{fill:#e6edf3}.am-soft{fill:#a3adb8}"
    ".am-line{stroke:#e6edf3}.am-grid{stroke:#3d444d}.am-empty{fill:#3d444d}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One or more charts, one below the other. Notebooks show it, and `save` writes it as an SVG file.

    Args:
        title: Its title.
        charts: The charts.
    """

    title: str
    charts: Sequence[Chart]

    @property
    def svg(self) -> str:
        """The SVG document: it has no script, loads no file, and follows a dark colour scheme."""
        width = max((chart.width for chart in self.charts), default=0)
        height = sum(chart.height for chart in self.charts)
        parts, y = [], 0
        for chart in self.charts:
            parts.append(f'<g transform="translate(0 {y})">{chart.content}</g>')
            y += chart.height
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{as_html(as_line(self.title))}">'
            f'<style>{_STYLE}</style><rect class="am-back" width="{width}" height="{height}"/>{"".join(parts)}</svg>'
        )

    def split(self) -> list[Picture]:
        """Return a picture for each chart."""
        return [Picture(title=self.title, charts=[chart]) for chart in self.charts]

    def save(self, path: str | Path) -> None:
        """Write the picture as an SVG file, atomically.

        Args:
            path: The file; its name ends in `.svg`.

        Raises:
            OutputError: the name has another ending, or the file cannot be written.
        """
        file = Path(path)
        if file.suffix.lower() != ".svg":
            raise OutputError(
                f"a picture must be an SVG file, such as scores.svg, got {str(path)!r}.", code="plot.not-svg"
            )
        if not file.absolute().parent.is_dir() or file.is_dir():
            raise OutputError(
                f"a picture must be a file in a folder that exists, and {path} is not. Choose another name.",
                code="output.no-parent",
            )
        write_whole(file, self.svg.encode())

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return self.svg


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The content of an SVG, with its size.

    Args:
        content: SVG elements.
        width: Width in px.
        height: Height in px.
    """

    content: str
    width: int
    height: int


def text(x: float, y: float, words: object, *, style: str = "", anchor: str = "start", most: int = 60) -> str:
    """Return a text element.

    Args:
        x: Position of the anchor, in px from the left.
        y: Position of the baseline, in px from the top.
        words: The text; it is escaped, and a long one is cut.
        style: Further classes.
        anchor: start, middle or end.
        most: Most characters.
    """
    style = f"am-text {style}".strip()
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{as_html(shortened(words, most))}</text>'
    )


def shortened(words: object, most: int) -> str:
    """Return a text on one line; one that is too long loses its middle, since names differ at their ends."""
    line = as_line(words, 1000)
    if len(line) <= most:
        return line
    end = (most - 1) // 2
    return f"{line[: most - 1 - end]}\N{HORIZONTAL ELLIPSIS}{line[-end:] if end else ''}"


def line(x1: float, y1: float, x2: float, y2: float, *, style: str = "am-line", more: str = "") -> str:
    """Return a line between two points in px, with further attributes."""
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'


def box(x: float, y: float, width: float, height: float, colour: str, *, label: object = "") -> str:
    """Return a rectangle in px, with a label that browsers show for the mouse; an empty colour stands for no value."""
    fill = f'fill="{colour}"' if colour else 'class="am-empty"'
    name = f"<title>{as_html(as_line(label))}</title>" if label else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" {fill}>{name}</rect>'
