"""The command lines of README and docs have the options of the commands, and links lead to files."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from adaptermix.cli import COMMANDS
from adaptermix.cli.parse import click_command, settings_of

from .pages import PAGES, ROOT, blocks, command_lines, name_of

LINES = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for kind, text in blocks(page)
    if kind in ("console", "bash")
    for words in command_lines(text)
]
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("words", LINES)
def test_the_command_takes_these_options(words: list[str]) -> None:
    name, *arguments = words
    record = COMMANDS[name]
    if {"--help", "--help-all"} & set(arguments) or (name == "search" and arguments[0].endswith(".yaml")):
        return
    with click_command(record).make_context(name, arguments) as ctx:
        values = {key: value for key, value in ctx.params.items() if key not in ("as_json", "quiet")}
        settings_of(record.schema(), values, ctx)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_titles(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 1500


def test_every_page_is_linked_from_the_readme_or_another_page() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target, _ in _LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert [name_of(page) for page in PAGES[1:] if page not in linked and page.name != "index.md"] == []


def test_reference_pages_are_those_of_the_code() -> None:
    """After a change of options: scripts/docs --reference."""
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == page(), name
