"""Answers of heads that tag words: text as a model would generate it, and the places that text cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

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
