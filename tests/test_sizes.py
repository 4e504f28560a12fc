"""Files and functions stay small; medians are reported, only the maximum fails."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parent.parent / "adaptermix"
FILES = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def functions() -> dict[str, int]:
    found = {}
    for path, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                found[f"{path.relative_to(ROOT)}:{node.name}"] = (node.end_lineno or 0) - body[0].lineno + 1
    return found


@pytest.mark.parametrize(
    ("what", "sizes", "most"),
    [
        (
            "file",
            {str(path.relative_to(ROOT)): text.count("\n") for path, text in FILES.items() if text.count("\n") > 4},
            MOST_LINES,
        ),
        ("function body", functions(), MOST_LINES_OF_A_FUNCTION),
    ],
    ids=["files", "functions"],
)
def test_nothing_is_too_long(what: str, sizes: dict[str, int], most: int) -> None:
    values = list(sizes.values())
    worst = max(sizes, key=lambda name: sizes[name])
    p90 = quantiles(values, n=10)[-1]
    print(  # noqa: T201  (the report)
        f"lines per {what}: median {median(values):.0f}, p90 {p90:.0f}, max {sizes[worst]} ({worst})"
    )
    assert sizes[worst] <= most, f"{worst} has {sizes[worst]} lines; split it (at most {most})"
