"""Texts as the two models of a stack read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..models.languages import Tagged, language_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def common_prefix(text: str, counts: Sequence[Callable[[str], int]], most: int) -> str:
    """Return the longest beginning of a text that has at most `most` tokens for each tokenizer.

    Args:
        text: The text.
        counts: The number of tokens of a text, for each tokenizer.
        most: Most tokens.

    Example:
        >>> common_prefix("abcdef", [len, lambda text: 2 * len(text)], 6)
        'abc'
    """
    if all(count(text) <= most for count in counts):
        return text
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if all(count(text[:middle]) <= most for count in counts):
            low = middle
        else:
            high = middle
    return text[:low]


class TwoReadings:
    """Texts as the encoder and the model on top read them.

    Args:
        texts: The texts.
        tokenizers: Tokenizer of the encoder, and of the model on top.
        language: Language of the texts, for tokenizers that write a tag.
        most: Most tokens of a text.
        span: "characters": both read the same beginning of a long text; "tokens": each reads its first tokens.

    Attributes:
        student: Ids of the encoder's tokenizer.
        teacher: Ids of the tokenizer of the model on top.
        cut: Number of texts that were cut.

    Raises:
        ModelError: a tokenizer writes language tags, and the language is not among them.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
        *,
        language: str,
        most: int,
        span: str,
    ) -> None:
        readers = [Tagged(tokenizer=each, tags=language_tags(each)) for each in tokenizers]
        for name, reader in zip(("encoder", "model on top"), readers, strict=True):
            if reader.without_tag([language]):
                raise ModelError(
                    f"the {name} of a stack reads a language tag with each text, and has no tag for {language!r}. Give "
                    "texts in a language that it has a tag for, or name a related language with LANGUAGE=FILE.",
                    code="model.language",
                )

        def count(reader: Tagged, text: str) -> int:
            return len(reader.encode([text], [language], verbose=False)[0]["input_ids"])

        counts = [partial(count, reader) for reader in readers]
        read = [common_prefix(text, counts, most) for text in texts] if span == "characters" else list(texts)
        self.cut = sum(len(new) < len(old) for new, old in zip(read, texts, strict=True))
        spoken = [language] * len(read)
        self.student, self.teacher = (
            [row["input_ids"] for row in reader.encode(read, spoken, truncation=True, max_length=most, verbose=False)]
            for reader in readers
        )
