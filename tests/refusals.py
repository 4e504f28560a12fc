"""Errors are recognised by their codes: texts may be reworded, and tests/messages.json lists them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from adaptermix.errors import AdapterMixError, InvalidValueError, codes_of


@contextmanager
def refuses(expected: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error of the package with a code, whose message names some values.

    Args:
        expected: The code, such as "rank.too-small". Where the values in the message matter, ": " and a regular
            expression that is found in the message follow: "row.tag: x.jsonl:3.*'B'".
    """
    code, _, values = expected.partition(": ")
    with pytest.raises((AdapterMixError, InvalidValueError, ValidationError), match=values or None) as caught:
        yield caught
    assert code in codes_of(caught.value), f"expected {code}, got {codes_of(caught.value)}: {caught.value}"
