"""Signals: one exit code for all commands, and what each says about going on."""

from __future__ import annotations

import os
import signal
import weakref

import pytest

from adaptermix.cli.console import fail
from adaptermix.cli.signals import Interrupts
from adaptermix.commands.table import COMMANDS


class _Thing:
    """An object that can be referred to weakly."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_are_interrupts(number: int) -> None:
    interrupts = Interrupts()
    interrupts.install()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), number)
    finally:
        interrupts.end(restore=True)
    assert fail(caught.value, as_json=False) == 130


def test_an_interrupt_that_python_swallows_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    interrupts, thing = Interrupts(), _Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    interrupts.install()
    try:
        del thing
        with pytest.raises(KeyboardInterrupt):
            signal.pause()  # It is raised again after half a second.
    finally:
        interrupts.end(restore=True)
    assert reference() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [("merge", "starts again"), ("train-task", "--resume"), ("run", "--resume"), ("search", "continues")],
)
def test_an_interrupt_says_how_to_go_on(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = COMMANDS[name].after_interrupt
    assert fail(KeyboardInterrupt(), as_json=False, after_interrupt=sentence) == 130
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("could not create a primitive"), ImportError("x.so: failed to map segment from shared object")],
)
def test_libraries_without_memory_are_reported_in_a_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error, as_json=False) == 1
    assert "memory" in capsys.readouterr().err
