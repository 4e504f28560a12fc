"""The help texts of all commands are those that were last reviewed.

If a change is intended, `pytest tests/golden --update-golden` rewrites `help.txt`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.cli import COMMANDS

from ..cli.test_commands import run

SNAPSHOT = Path(__file__).with_name("help.txt")
# Commands with many options show the common ones only.
LONG = ["train-align", "train-task", "train-joint", "train-fusion"]
CALLS = [["--help"], *([name, "--help"] for name in COMMANDS), *([name, "--help-all"] for name in LONG)]


def test_the_help_texts_are_those_of_the_snapshot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parts = []
    for call in CALLS:
        code, text, said = run(capsys, *call)
        assert (code, said) == (0, "")
        parts.append(f"$ {' '.join(['adaptermix', *call])}\n{text}")
    found = "\n".join(parts)
    if request.config.getoption("--update-golden"):
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert found == SNAPSHOT.read_text(encoding="utf-8"), "if intended: pytest tests/golden --update-golden"
