"""Model names of requests: only registered adapters with finite weights are read from them."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptermix.errors import UsageError
from adaptermix.serving.names import MOST_CHARACTERS, MOST_PARTS, Part, is_name, parse

from ..refusals import refuses

KNOWN = ("task", "align", "a.b-c_1")
WEIGHTS = st.floats(-100, 100).map(lambda weight: round(weight, 6)).filter(lambda weight: "+" not in repr(weight))
HOSTILE = st.lists(
    st.sampled_from(
        ["task", "align", "@", "+", "0.9", "..", "/", "\\", "\0", "~", "$HOME", "nan", "inf", "-", ".", " ", "٣", "é"]
    ),
    max_size=12,
).map("".join)


@given(st.lists(st.tuples(st.sampled_from(KNOWN), WEIGHTS), min_size=1, unique_by=lambda part: part[0]))
def test_parts_in_any_order_are_the_same_merge(parts: list[tuple[str, float]]) -> None:
    names = ["+".join(f"{adapter}@{weight!r}" for adapter, weight in order) for order in (parts, parts[::-1])]
    assert parse(names[0], KNOWN) == parse(names[1], KNOWN) == tuple(sorted(Part(*part) for part in parts))


@given(st.one_of(HOSTILE, st.text(max_size=60), st.text(string.printable, max_size=60)))
@example("../secret")
@example("task@0.9+/etc/passwd@1")
@example("task@nan")
@example("task\n")
@example("task@1e400")
@example("t\N{CYRILLIC SMALL LETTER A}sk")
def test_any_other_text_is_refused_with_a_code(text: str) -> None:
    parts, fault = None, None
    try:
        parts = parse(text, KNOWN)
    except UsageError as error:
        fault = error
    if parts is None:
        assert fault is not None
        assert fault.code.startswith("serving.")
        assert str(fault).isprintable()
    else:
        assert {part.adapter for part in parts} <= set(KNOWN)
        assert all(math.isfinite(part.weight) for part in parts)
        assert set(text) <= set(string.ascii_letters + string.digits + "@+._-")


@given(st.text(min_size=1, max_size=40))
@example("..")
@example("a/b")
@example("a\0")
def test_names_of_adapters_are_single_names_in_a_folder(text: str) -> None:
    if is_name(text):
        assert Path("folder", text).name == text
        assert Path("folder", text).parent == Path("folder")
        assert text.isascii()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("other", "serving.unknown-adapter: 'other'"),
        ("tsak", "serving.unknown-adapter: Did you mean 'task'"),
        ("task+align", "serving.no-weight: align@1|task@1"),
        ("task@0.5+task@0.5", "serving.repeated"),
        ("task@", "serving.part"),
        ("task@0.5+", "serving.part"),
        ("task@0.5,align@1", "serving.part"),
        ("task@1e+3", "serving.weight: 1e"),
        ("task@nan", "serving.weight"),
        ("task@-inf", "serving.weight"),
        ("task@half", "serving.weight"),
        ("", "serving.part"),
        ("x" * (MOST_CHARACTERS + 1), "serving.long-name"),
        ("+".join(["task@1"] * (MOST_PARTS + 1)), "serving.many-parts"),
    ],
)
def test_refusals(name: str, code: str) -> None:
    with refuses(code):
        parse(name, KNOWN)


def test_weights_are_the_numbers_of_merge() -> None:
    assert parse("task", KNOWN) == (Part("task", 1.0),)
    assert parse("task@-1e-3+align@.5", KNOWN) == (Part("align", 0.5), Part("task", -0.001))
    assert math.copysign(1, parse("task@-0.0", KNOWN)[0].weight) == 1
