"""Language codes in their canonical form, and the language tags that tokenizers of translation models write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

VARIETIES = {
    "zh": {"Hans": "zh", "CN": "zh", "SG": "zh", "Hant": "zh-Hant", "TW": "zh-Hant", "HK": "zh-Hant", "MO": "zh-Hant"},
}
"""Varieties with separate codes, by script or, without a script, by region."""


@cache
def canonical_language(code: str) -> str | None:
    """Return the shortest standard code (`deu` gives `de`, `cmn` gives `zh`), or None if it is not a language.

    Scripts and regions are left out, except for varieties with separate codes such as traditional Chinese.

    Example:
        >>> canonical_language("deu"), canonical_language("gsw"), canonical_language("xq")
        ('de', 'gsw', None)
        >>> canonical_language("pt-BR"), canonical_language("zho_Hans"), canonical_language("zh-TW")
        ('pt', 'zh', 'zh-Hant')
    """
    import langcodes
    from langcodes.tag_parser import LanguageTagError

    try:
        language = langcodes.Language.get(langcodes.standardize_tag(code, macro=True))
    except LanguageTagError:
        return None
    if not language.is_valid() or language.language is None:
        return None
    varieties = VARIETIES.get(language.language, {})
    return varieties.get(language.script or language.territory or "", language.language)


def language_tags(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a tokenizer's language tags by canonical language; an empty dictionary if its texts have no tag.

    Of several scripts of a language, the one that it is usually written in is returned.
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    tags: dict[str, str] = {}
    for tag in sorted(known_tags(tokenizer), key=_is_rare):
        if language := canonical_language(tag):
            tags.setdefault(language, tag)
    return tags


def known_tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens of a tokenizer as its `src_lang` spells them; language tags are among them."""
    return [str(token).strip("_") for token in tokenizer.all_special_tokens]


def _is_rare(tag: str) -> bool:
    """Return whether a tag names a script that its language is rarely written in (`ace_Arab`)."""
    import langcodes

    language, _, script = tag.partition("_")
    return len(script) == 4 and langcodes.Language.get(language).maximize().script != script


Text = str | tuple[str, ...] | list[str]
"""A text, a pair of texts, or the words of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """A tokenizer that writes the language of each text as a tag, if it has language tags.

    Args:
        tokenizer: The tokenizer.
        tags: Its tags by canonical language; "" stands for all languages. Empty if texts have no tag.
    """

    tokenizer: PreTrainedTokenizerBase
    tags: Mapping[str, str]

    def tag_of(self, language: str) -> str | None:
        """Return the tag of a language, or of the first of a pair such as `de-en`; None if there is no such tag."""
        tag = self.tags.get("", self.tags.get(language))
        tag = tag or self.tags.get(canonical_language(language) or language)
        return tag if tag or "-" not in language else self.tag_of(language.rpartition("-")[0])

    def without_tag(self, languages: Sequence[str]) -> str | None:
        """Return the first language that needs a tag for which there is no tag; None if every language has one."""
        if not self.tags:
            return None
        return next((language for language in dict.fromkeys(languages) if self.tag_of(language) is None), None)

    def encode(self, texts: Sequence[Text], languages: Sequence[str], **options: object) -> list[BatchEncoding]:
        """Return the tokens of each text; every language has a tag, see `without_tag`.

        Args:
            texts: Texts, pairs of texts, or lists of words with `is_split_into_words=True`.
            languages: Language of each text.
            options: Further arguments of the tokenizer.
        """
        if not self.tags:
            return self._encode(texts, options)
        groups: dict[str, list[int]] = {}
        for row, language in enumerate(languages):
            groups.setdefault(self.tag_of(language) or "", []).append(row)
        encoded: dict[int, BatchEncoding] = {}
        before = self.tokenizer.src_lang
        try:
            for tag, rows in groups.items():
                self.tokenizer.src_lang = tag
                encoded |= zip(rows, self._encode([texts[row] for row in rows], options), strict=True)
        finally:
            self.tokenizer.src_lang = before
        return [encoded[row] for row in range(len(texts))]

    def _encode(self, texts: Sequence[Text], options: Mapping[str, object]) -> list[BatchEncoding]:
        if texts and all(isinstance(text, str) for text in texts) and "return_overflowing_tokens" not in options:
            return self._encode_together(texts, options)
        return [
            self.tokenizer(*text, **options) if isinstance(text, tuple) else self.tokenizer(text, **options)
            for text in texts
        ]

    def _encode_together(self, texts: Sequence[Text], options: Mapping[str, object]) -> list[BatchEncoding]:
        """Encode plain texts in one call, which is three times as fast as one by one."""
        from transformers import BatchEncoding

        batch = self.tokenizer(list(texts), **options)
        return [BatchEncoding({name: batch[name][row] for name in batch}) for row in range(len(texts))]
