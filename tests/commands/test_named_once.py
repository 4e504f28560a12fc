"""A command is named in its record and where its function is, so that adding or renaming one touches two files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adaptermix
from adaptermix.commands.table import COMMANDS, Command
from adaptermix.provenance.kinds import KINDS

ROOT = Path(adaptermix.__path__[0])
# Names of one word, such as `merge`, are also ordinary words of the code.
UNMISTAKABLE = [command for command in COMMANDS.values() if "-" in command.name]


@pytest.mark.parametrize("command", UNMISTAKABLE, ids=lambda command: command.name)
def test_a_command_is_named_in_two_files_at_most(command: Command) -> None:
    names = [f'"{command.name}"', rf"\b{command.name.replace('-', '_')}\b"]
    files = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search("|".join(names), path.read_text(encoding="utf-8"))
    }
    # the demo calls commands as a user does
    assert "commands/table.py" in files
    assert len({file for file in files if not file.startswith("demo/")}) <= 2, sorted(files)


def test_cards_know_the_kinds_of_output_from_the_records() -> None:
    assert {command.name: command.makes for command in COMMANDS.values() if command.makes} == KINDS
