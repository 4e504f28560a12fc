"""Errors are recognised by their codes: texts may be reworded, and stand in tests/messages.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from adaptermix.errors import AdapterMixError, InvalidValueError, codes_of


@contextmanager
def refuses(*codes: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error of the package that reports one of these codes.

    Args:
        codes: Codes, such as "rank.too-small"; several where one test has inputs that fail in different ways.
    """
    with pytest.raises((AdapterMixError, InvalidValueError, ValidationError)) as caught:
        yield caught
    assert set(codes) & set(codes_of(caught.value)), f"expected {codes}, got {codes_of(caught.value)}: {caught.value}"
