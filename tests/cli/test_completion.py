"""Completion in a shell, by click's protocol."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def completions(words: str, count: int) -> list[str]:
    """Return what bash is offered for the last of some words."""
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_ADAPTERMIX_COMPLETE": "bash_complete"}
    program = "import sys; sys.argv = ['adaptermix']; from adaptermix.cli import adaptermix; adaptermix()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("adaptermix mer", ["plain,merge"]),
        ("adaptermix merge --met", ["plain,--method"]),
        ("adaptermix merge --form ", ["plain,concat", "plain,lowrank", "plain,dense"]),
        ("adaptermix bake --strategy res", ["plain,residual"]),
        ("adaptermix merge ta", ["file,ta"]),
        ("adaptermix evaluate --data te", ["file,te"]),
        ("adaptermix train-align --pairs a.tsv b", ["file,b"]),
    ],
)
def test_what_a_shell_is_offered(words: str, offered: list[str]) -> None:
    assert completions(words, len(words.split(" ")) - 1) == offered


def test_the_script_for_bash_names_the_program() -> None:
    program = "import sys; sys.argv = ['adaptermix']; from adaptermix.cli import adaptermix; adaptermix()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "_ADAPTERMIX_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "complete -o nosort -F _adaptermix_completion adaptermix" in done.stdout
