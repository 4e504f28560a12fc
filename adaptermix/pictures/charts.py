"""Charts: bars per language, a curve, a heatmap. They are 340 px wide where their content allows it, as phones are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..io.markup import as_html
from .svg import LETTER, SERIES, Chart, box, line, shortened, text

WIDTH = 340
_TOP = 24
_MOST_ROWS = 60
_SCALES = {
    "share": ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)),
    "signed": ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43)),
}
"""Colours of heatmaps from low to high: viridis, and blue over white to red."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value with its interval; an end is None if it is unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def label(self) -> str:
        """The value, with its interval if both ends are known."""
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or twice the value."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )


def number(value: float) -> str:
    """Return a number in a few characters."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def bars(title: str, series: Mapping[str, Mapping[str, Point]]) -> Chart:
    """Return horizontal bars with intervals: a group per row, with a bar per series.

    Args:
        title: The title.
        series: The points of each series, by the name of the row.
    """
    rows = list(dict.fromkeys(name for points in series.values() for name in points))
    hidden, rows = len(rows) - _MOST_ROWS, rows[:_MOST_ROWS]
    left = 12 + LETTER * min(14, max((len(shortened(row, 14)) for row in rows), default=0))
    ends = [end for points in series.values() for row in rows if row in points for end in points[row].ends]
    low, high = min([0.0, *ends]), _ceiling(max([0.0, *ends]))
    scale = (WIDTH - left - 52) / (high - low)
    y = top = _TOP + 16 * len(series) + 4
    parts = [_title(title), *_legend(list(series))]
    step = 12 if len(series) > 1 else 14
    for row in rows:
        parts.append(text(left - 6, y + (step * (len(series) - 1) + 10) / 2 + 4, row, anchor="end", most=14))
        for index, (name, points) in enumerate(series.items()):
            if point := points.get(row):
                parts.append(_bar(point, f"{name}, {row}", left=left - low * scale, y=y, scale=scale, colour=index))
                x = left + (point.ends[1] - low) * scale + 4
                parts.append(text(x, y + 8.5, number(point.value), style="am-small am-soft"))
            y += step
        y += 7
    parts.append(line(left - low * scale, top - 2, left - low * scale, y, style="am-grid"))
    if hidden > 0:
        parts.append(text(left, y + 10, f"and {hidden} more rows", style="am-soft"))
    return Chart(content="".join(parts), width=WIDTH, height=math.ceil(y) + (20 if hidden > 0 else 8))


def _bar(point: Point, name: str, *, left: float, y: float, scale: float, colour: int) -> str:
    start, height = left + min(0.0, point.value) * scale, 10
    bar = box(start, y, abs(point.value) * scale, height, SERIES[colour % len(SERIES)], label=f"{name}: {point.label}")
    low, high = (left + end * scale for end in point.ends)
    middle = y + height / 2
    return bar + (line(low, middle, high, middle) if high > low else "")


def _title(title: str) -> str:
    return text(8, 16, title, style="am-title", most=46)


def _legend(names: Sequence[str], y: float = _TOP) -> list[str]:
    return [
        part
        for index, name in enumerate(names)
        for part in (
            box(8, y + 16 * index + 1, 10, 10, SERIES[index % len(SERIES)]),
            text(23, y + 16 * index + 10, name, most=46),
        )
    ]


def _ceiling(value: float) -> float:
    """Return the upper end of an axis for values up to this one."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= value * 0.999999)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """Positions in a chart with two axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    top: float
    width: float = 262
    height: float = 140

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in px."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height


def curve(
    title: str,
    points: Sequence[tuple[float, Point]],
    *,
    across: str,
    chosen: float | None = None,
    level: tuple[str, float] | None = None,
) -> Chart:
    """Return a line through points, with their intervals.

    Args:
        title: The title.
        points: Positions on the horizontal axis, with their values.
        across: Name of the horizontal axis.
        chosen: The position of the point to mark.
        level: Name and value of a dashed horizontal line.
    """
    points = sorted(points, key=lambda point: point[0])
    names = ["value, with its interval", *([level[0]] if level else []), *(["chosen"] if chosen is not None else [])]
    shows_names = level is not None or chosen is not None
    ends = [end for _, point in points for end in point.ends] + ([level[1]] if level else [])
    axes = _Axes(
        x=_wide(points[0][0], points[-1][0], 0.04),
        y=_wide(min(ends), max(ends), 0.08),
        left=58,
        top=_TOP + (16 * len(names) if shows_names else 0) + 6,
    )
    colours = {"value, with its interval": 1, "chosen": 2}
    parts = [_title(title)]
    for index, name in enumerate(names if shows_names else ()):
        parts += [
            box(8, _TOP + 16 * index + 1, 10, 10, SERIES[colours.get(name, 0)]),
            text(23, _TOP + 16 * index + 10, name, most=46),
        ]
    parts += _scales(axes, [x for x, _ in points], across)
    if level:
        (x1, y), (x2, _) = axes.at(axes.x[0], level[1]), axes.at(axes.x[1], level[1])
        parts.append(
            f'<line x1="{x1:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y:.1f}" stroke="{SERIES[0]}" stroke-width="2" '
            'stroke-dasharray="5 4"/>'
        )
    path = " ".join("{:.1f},{:.1f}".format(*axes.at(x, point.value)) for x, point in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{SERIES[1]}" stroke-width="1.5"/>')
    dots = 0 if len(points) > 60 else 3.5
    for x, point in points:
        parts += _mark(axes, x, point, is_chosen=chosen is not None and x == chosen, radius=dots, across=across)
    return Chart(content="".join(parts), width=WIDTH, height=math.ceil(axes.top + axes.height) + 42)


def _mark(axes: _Axes, x: float, point: Point, *, is_chosen: bool, radius: float, across: str) -> list[str]:
    across_px, up = axes.at(x, point.value)
    parts = []
    if point.ends[1] > point.ends[0]:
        low, high = (axes.at(x, end)[1] for end in point.ends)
        parts.append(line(across_px, low, across_px, high))
    if radius or is_chosen:
        colour, size = (SERIES[2], 5.5) if is_chosen else (SERIES[1], radius)
        label = f"<title>{as_html(f'{shortened(across, 60)} {x:.4g}: {point.label}')}</title>"
        parts.append(f'<circle cx="{across_px:.1f}" cy="{up:.1f}" r="{size}" fill="{colour}">{label}</circle>')
    return parts


def _wide(low: float, high: float, margin: float) -> tuple[float, float]:
    """Return a range with a margin on both sides."""
    size = (high - low) or max(abs(high), 1.0) * 0.2
    return low - margin * size, high + margin * size


def _scales(axes: _Axes, xs: Sequence[float], across: str) -> list[str]:
    """Return the grid with its numbers."""
    parts = []
    step = _ceiling((axes.y[1] - axes.y[0]) / 5)
    digits = max(0, -math.floor(math.log10(step)))
    for index in range(math.ceil(axes.y[0] / step), math.floor(axes.y[1] / step) + 1):
        value = index * step
        (left, y), (right, _) = axes.at(axes.x[0], value), axes.at(axes.x[1], value)
        parts += [
            line(left, y, right, y, style="am-grid"),
            text(left - 6, y + 4, f"{value:.{digits}f}", style="am-soft", anchor="end"),
        ]
    bottom, last = axes.top + axes.height, -math.inf
    for x in sorted(set(xs)):
        position = axes.at(x, axes.y[0])[0]
        if position - last >= 36:
            parts.append(text(position, bottom + 16, f"{x:.4g}", style="am-soft", anchor="middle"))
            last = position
    parts.append(text(axes.left + axes.width / 2, bottom + 33, across, anchor="middle", most=46))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Colours:
    """The colours of a heatmap, for values between two ends."""

    low: float
    high: float

    def at(self, value: float) -> tuple[int, ...]:
        """Return red, green and blue of a value, each from 0 to 255; values beyond the ends have the colours there."""
        stops = _SCALES["signed" if self.low < 0 else "share"]
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        along = min(max(share, 0.0), 1.0) * (len(stops) - 1)
        index = min(int(along), len(stops) - 2)
        first, second = stops[index], stops[index + 1]
        return tuple(round(a + (b - a) * (along - index)) for a, b in zip(first, second, strict=True))

    def hexadecimal(self, value: float) -> str:
        """Return the colour of a value, such as `#44015a`."""
        return "#{:02x}{:02x}{:02x}".format(*self.at(value))

    def letters(self, value: float) -> str:
        """Return black or white, the one that can be read on the colour of a value."""
        red, green, blue = self.at(value)
        return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else "#fff"


def heatmap(
    title: str, rows: Mapping[str, Mapping[str, float | None]], *, across: str, low: float = 0.0, high: float = 1.0
) -> Chart:
    """Return a heatmap; cells without a value are grey.

    Args:
        title: The title.
        rows: The values of each row, by the name of the column.
        across: Description of rows and columns.
        low: The value with the first colour; if it is negative, the colours are blue over white to red.
        high: The value with the last colour.
    """
    hidden = len(rows) - _MOST_ROWS
    rows = dict(list(rows.items())[:_MOST_ROWS])
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    left = 14 + LETTER * min(16, max((len(shortened(row, 16)) for row in rows), default=0))
    width = max(9.0, min(46.0, (WIDTH - left - 10) / max(len(columns), 1)))
    height = 18 if len(rows) <= 24 else 13
    head, names = _column_names(columns, left, width)
    parts = [_title(title), *names]
    colours = _Colours(low=low, high=high)
    for index, (row, values) in enumerate(rows.items()):
        y = head + height * index
        parts.append(text(left - 6, y + height / 2 + 4, row, anchor="end", most=16))
        for column, name in enumerate(columns):
            x, value = left + width * column, values.get(name)
            label = f"{row}, {name}: {'no value' if value is None else number(value)}"
            parts.append(
                box(x, y, width - 1, height - 1, "" if value is None else colours.hexadecimal(value), label=label)
            )
            if value is not None and width >= 28:
                parts.append(
                    f'<text class="am-text am-small" style="fill:{colours.letters(value)}" x="{x + width / 2:.1f}" '
                    f'y="{y + height / 2 + 3.5:.1f}" text-anchor="middle">{value:.2f}</text>'
                )
    bottom = head + height * len(rows)
    parts.append(text(left, bottom + 14, across + (f", {hidden} more rows" if hidden > 0 else ""), style="am-soft"))
    parts += _key(left, bottom + 21, colours)
    return Chart(
        content="".join(parts),
        width=math.ceil(max(WIDTH, left + width * len(columns) + 10)),
        height=math.ceil(bottom) + 46,
    )


def _column_names(columns: Sequence[str], left: float, width: float) -> tuple[float, list[str]]:
    """Return the position below the names of the columns, in px, and their elements; long names are turned."""
    longest = max((len(shortened(name, 18)) for name in columns), default=0)
    is_turned = longest > 3 and longest * LETTER > width - 4
    head, last, parts = _TOP + (longest * LETTER if is_turned else 14) + 6, -math.inf, []
    for index, name in enumerate(columns):
        x = left + width * (index + 0.5)
        if is_turned:
            label = text(0, 0, name, most=18)
            parts.append(f'<g transform="translate({x + 4:.1f} {head - 5:.1f}) rotate(-90)">{label}</g>')
        elif x - last >= LETTER * longest + 5:
            parts.append(text(x, head - 5, name, anchor="middle"))
            last = x
    return head, parts


def _key(left: float, y: float, colours: _Colours) -> list[str]:
    """Return the bar that shows which value has which colour."""
    low, high = f"{colours.low:.3g}", f"{colours.high:.3g}"
    start, steps = left + LETTER * len(low) + 6, 24
    parts = [text(left, y + 10, low, style="am-soft")]
    for index in range(steps):
        value = colours.low + (colours.high - colours.low) * index / (steps - 1)
        parts.append(box(start + 5 * index, y, 5.5, 12, colours.hexadecimal(value)))
    return [*parts, text(start + 5 * steps + 7, y + 10, high, style="am-soft")]
