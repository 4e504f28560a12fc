"""A merge is few calls deep, so that a reader can follow it: measured over the frames of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import adaptermix

from ..factories import write_lora

ROOT = str(Path(adaptermix.__file__).parent)
MOST = 12
RECORD = "commands/request.py"
Q = "model.layers.0.self_attn.q_proj"


def deepest(work: Callable[[], object], leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return the longest stack of frames of the package that a piece of work has at any time.

    Two things are not counted: imports on first use, and the record of command and inputs for `verify`, which is made
    after the merge and hashes files.
    """
    longest: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal longest
        if event != "call" or not frame.f_code.co_filename.startswith(ROOT):
            return
        stack, at = [], frame
        while at is not None:
            name = at.f_code.co_filename.removeprefix(ROOT).lstrip("/")
            if at.f_code.co_filename.startswith(ROOT) and not name.startswith(leave_out):
                stack.append(f"{name}:{at.f_code.co_name}")
            at = at.f_back
        if not any(name.startswith(RECORD) or name.endswith(":<module>") for name in stack):
            longest = max(longest, stack, key=len)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(before)
    return longest[::-1]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate(("one", "two")):
        write_lora(tmp_path / name, {Q: (32, 32, 3)}, seed=seed)
    return [tmp_path / "one", tmp_path / "two"]


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 2}, {"dtype": "bfloat16"}, {"form": "dense"}, {"form": "dense", "base": True}]
)
def test_a_merge_is_at_most_twelve_calls_deep(
    tmp_path: Path, base: Path, adapters: list[Path], settings: dict[str, Any]
) -> None:
    if "base" in settings:
        settings = settings | {"base": str(base), "allow_base_mismatch": True}
    out = tmp_path / "out"
    stack = deepest(lambda: adaptermix.merge(adapters, weights=[0.9], out=out, max_residual=1, **settings))
    assert out.exists()
    assert 5 < len(stack) <= MOST, stack


def test_the_arithmetic_of_a_method_begins_before_the_seventh_call(tmp_path: Path, adapters: list[Path]) -> None:
    settings: dict[str, Any] = {"method": "ties", "rank": 2, "max_residual": 1, "out": tmp_path / "out"}
    stack = deepest(lambda: adaptermix.merge(adapters, weights=[0.9], **settings))
    first = next(number for number, name in enumerate(stack) if name.startswith(("methods", "algebra")))
    assert first <= 6, stack
    rest = deepest(
        lambda: adaptermix.merge(adapters, weights=[0.9], overwrite=True, **settings), ("methods", "algebra")
    )
    assert len(rest) <= MOST, rest
