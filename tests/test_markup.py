"""Names from files and folders in Markdown, in HTML and in pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adaptermix
from adaptermix.analysis.inspect_adapters import inspect
from adaptermix.analysis.spectrum_table import Cell, ScalingTable
from adaptermix.io.markup import as_code, as_html, markdown_table

from .factories import write_lora

EVIL = "<img src=x>|a`b\x1b[31m\u202e"


def test_names_add_no_column_no_html_and_no_control_character() -> None:
    text = markdown_table(["system", EVIL], [[EVIL, "0.5*"]])
    assert [line.count("|") for line in text.splitlines()] == [3, 3, 3]
    assert "<" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.endswith(" | 0.5* |\n")


def test_html_has_no_tag_and_no_control_character() -> None:
    assert as_html(EVIL) == r"&lt;img src=x&gt;|a`b\x1b[31m\u202e"


def test_code_is_left_where_it_holds_a_backtick() -> None:
    assert as_code("a_b") == "`a_b`"
    assert as_code("a`<b>") == "a&#96;&#60;b&#62;"


def test_a_folder_name_does_not_break_the_spectrum_table() -> None:
    cell = Cell(norm=1.0, distance=0.5, base_norm=2.0)
    cells = {name: {("0", "K"): cell} for name in ("base", EVIL)}
    table = ScalingTable(models=("base", EVIL), columns={"K": ("k",)}, layers=("0",), cells=cells)
    text = table.markdown()
    assert "<" not in text
    assert {line.count("|") for line in text.split("\n\n")[0].splitlines()} == {5}


def test_a_folder_name_that_looks_like_a_formula_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "$\\frac$", tmp_path / "b"]
    for folder in folders:
        write_lora(folder, {"layers.0.q": (6, 5, 2)})
    inspect(folders, plot=tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_only_one_module_writes_markdown_tables_and_escapes_html() -> None:
    package = Path(adaptermix.__file__).parent
    own = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"from html import|import html\b|\| \{' \| '\.join", path.read_text(encoding="utf-8"))
    }
    assert own == {"io/markup.py"}
