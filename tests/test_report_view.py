"""Results in one line, and as tables in notebooks."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import adaptermix
from adaptermix.commands.record import load
from adaptermix.commands.table import COMMANDS
from adaptermix.io.report_view import ResultView

from .factories import write_lora

FUNCTIONS = {command.function: command for command in COMMANDS.values() if command.function}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    modules = {f"model.layers.{layer}.self_attn.{kind}_proj": (6, 4, 2) for layer in range(30) for kind in "qkvo"}
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, modules, seed=seed)
    return [tmp_path / "task", tmp_path / "align"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_returns_a_result_of_one_line(name: str) -> None:
    run = load(str(FUNCTIONS[name].run))
    module = inspect.getmodule(run)
    report = inspect.signature(run, eval_str=True, locals=vars(adaptermix) | vars(module)).return_annotation
    assert issubclass(report, ResultView)
    assert report.__repr__ is ResultView.__repr__


def test_the_results_of_large_adapters_are_short(adapters: list[Path]) -> None:
    merged, inspected = adaptermix.merge(adapters, weights=[0.9]), adaptermix.inspect(adapters)
    for result in (merged, inspected, merged.adapter):
        assert 20 < len(repr(result)) <= 200
        assert "\n" not in repr(result)
    assert repr(merged).startswith("MergeReport(method='exact', weights=[0.9, 0.1], ")
    assert "modules=<120 entries>" in repr(merged)


def test_a_notebook_shows_a_table_with_escaped_text(adapters: list[Path]) -> None:
    table = adaptermix.merge(adapters, weights=[0.9])._repr_html_()
    assert table.count("<table>") == table.count("</table>") >= 2
    assert "<th>residual</th>" in table
    assert "and 70 more" in table

    class Marked(ResultView):
        def document(self) -> dict[str, object]:
            return {"<b>": "<script>", "rows": {"<i>": {"<u>": "<s>"}}}

    shown = Marked()._repr_html_()
    assert [mark for mark in ("<b>", "<script>", "<i>", "<u>", "<s>") if mark in shown] == []
    assert "&lt;script&gt;" in shown
