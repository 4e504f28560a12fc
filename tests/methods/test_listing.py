"""The list of methods for people and for programs."""

from __future__ import annotations

import json

import pytest

from adaptermix.cli import main
from adaptermix.errors import PlanError
from adaptermix.methods.base import METHODS, build, options_of
from adaptermix.methods.listing import list_methods
from adaptermix.methods.mergekit import mergekit_methods

from ..refusals import refuses


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    streams = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, streams.out, streams.err


def theirs() -> list[str]:
    pytest.importorskip("mergekit")
    return [f"mergekit:{name}" for name in mergekit_methods()]


def test_every_method_is_listed_with_its_options() -> None:
    entries = {entry.name: entry for entry in list_methods()}
    assert set(METHODS) <= set(entries)
    for name, cls in METHODS.items():
        assert entries[name].options == options_of(cls)
        assert entries[name].summary.endswith(".")
        assert "\n" not in entries[name].summary
        assert entries[name].text.startswith(entries[name].summary)
        assert "Reference:" in entries[name].text
    assert "thresholds" not in entries["ties"].options


def test_mergekit_s_methods_are_listed_where_it_is_installed() -> None:
    names = theirs()
    assert len(names) > 5
    assert names == [entry.name for entry in list_methods() if ":" in entry.name]
    json.dumps([entry.document() for entry in list_methods()])


def test_without_mergekit_our_own_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise PlanError("not installed")

    monkeypatch.setattr("adaptermix.methods.listing.mergekit_methods", absent)
    assert {entry.name for entry in list_methods()} == set(METHODS)


def test_a_method_that_is_listed_can_be_built() -> None:
    for entry in list_methods():
        if ... not in entry.options.values():
            assert build(entry.name, {}) is not None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with refuses(r"method.unknown: 'tie'.*Did you mean 'ties'\?"):
        list_methods(["exact", "tie"])


class TestCommand:
    def test_the_text_names_every_method_and_its_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "methods")
        assert (code, out) == (0, "")
        lines = err.splitlines()
        for name in [*METHODS, *theirs()]:
            assert name in lines
        assert "density=0.2" in err

    def test_the_json_lists_every_method_and_nothing_else_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "methods", "--json", "--quiet")
        assert (code, err) == (0, "")
        entries = {entry["name"]: entry for entry in json.loads(out)["methods"]}
        assert set(entries) == {*METHODS, *theirs()}
        assert set(entries["ties"]) == {"name", "summary", "options", "description"}
        assert entries["ties"]["options"]["density"] == 0.2

    def test_one_method_is_shown_with_its_formula_and_paper(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(capsys, "methods", "ties")
        assert code == 0
        for words in (r"\gamma = sgn(\sum_i \hat\tau_i)", "density=0.2", "arXiv 2306.01708", "Differs from the paper"):
            assert words in err
        assert "breadcrumbs" not in err

    def test_an_unknown_name_is_one_line_and_no_trace(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "methods", "tise")
        assert (code, out) == (2, "")
        assert "unknown merge method 'tise'. Did you mean 'ties'?" in err
        assert "Traceback" not in err
