"""Answers of heads that tag words: text as a model would generate it, and the places that text cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError


class Tagged(str):
    """An answer whose places are known.

    It is the text that stands for these tags in predictions; scores take pairs and places from the tags themselves,
    since a value may occur twice in a sentence, or hold the signs that part an answer.

    Args:
        text: The answer as text.
        tags: IOB2 tag per token.
        pairs: (type, value) of each span.
    """

    tags: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def __new__(cls, text: str, *, tags: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Tagged:
        """Make the text and attach what it cannot tell."""
        answer = super().__new__(cls, text)
        answer.tags, answer.pairs = tuple(tags), tuple(pairs)
        return answer


def to_entry(answer: str) -> dict[str, object]:
    """Return an answer as plain data, with what its text cannot tell."""
    if not isinstance(answer, Tagged):
        return {"answer": answer}
    return {"answer": str(answer), "tags": list(answer.tags), "pairs": [list(pair) for pair in answer.pairs]}


def from_entry(entry: Mapping[str, Any]) -> str:
    """Return the answer that `to_entry` has made plain.

    Raises:
        KeyError: there is no answer.
        TypeError: its tags or pairs are of another form.
        ValueError: likewise.
    """
    text = str(entry["answer"])
    if "tags" not in entry:
        return text
    pairs = [(str(kind), str(value)) for kind, value in entry["pairs"]]
    return Tagged(text, tags=[str(tag) for tag in entry["tags"]], pairs=pairs)


def require_tokens(tokens: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Return a row's tokens.

    Raises:
        DataError: it has none.
    """
    if not tokens:
        raise DataError(
            f"a token classification head needs rows with tokens, found one with text only: {text[:60]!r}. "
            "Give data in columns or with tokens, or have answers generated: a causal language model with --head none."
        )
    return tokens
