"""Machine translation by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .data import DataFile, TranslateRow, read_translations
from .data.language_names import english_name
from .metrics import Metric
from .overlap import bleu, bleu_counts, chrf, chrf_counts, has_own_tokenizer, require_tokenizers, tokenizer_for
from .prompts import Template, table


def _line(answer: str) -> str:
    # tokens that hold a full stop and a line break let a model run past the end of its line
    return answer.strip().split("\n", maxsplit=1)[0].strip()


def _bleu_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return bleu_counts(row.target, _line(answer), row.target_language)


def _default_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return bleu_counts(row.target, _line(answer), "en")


def _chrf_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return chrf_counts(row.target, _line(answer))


_SYSTEM = "Translate the following sentences from {source} to {target}."


class Translate:
    """Translation, scored by corpus BLEU and chrF2 of each pair of languages.

    Both are in [0, 100] and equal to sacrebleu's. BLEU counts words by sacrebleu's tokenizer for the target language:
    `zh`, `ja-mecab`, `ko-mecab`, `char` for other languages without blanks between words, else `13a`. Only the first
    line of an answer counts.
    """

    name = "translate"
    one_line = True
    is_open = False
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="Translate from {source} to {target}.\n{source}: {text}\n{target}:", lead=" "),
        # the system turn of Liu and Niehues (ACL 2025), appendix D; the wording is theirs
        Template(
            name="mid-align",
            prompt="{text}",
            chat=True,
            system=_SYSTEM,
        ),
        # their released Llama adapters were trained with a line break after each turn
        Template(name="mid-align-eot", prompt="{text}", chat=True, system=_SYSTEM, broken_after="<|eot_id|>"),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[TranslateRow], list[DataFile]]:
        """Read texts and their translations; see `adaptermix.tasks.data.translate`."""
        return read_translations(arguments, rows=rows)

    def fields(self, row: TranslateRow) -> Mapping[str, str]:
        """Return the text, and both languages by their English names."""
        return {
            "text": row.source,
            "source": english_name(row.source_language),
            "target": english_name(row.target_language),
        }

    def texts(self, row: TranslateRow) -> tuple[str, ...]:
        """Return the text to translate."""
        return (row.source,)

    def answer(self, row: TranslateRow) -> str:
        """Return the translation."""
        return row.target

    def evidence(self, row: TranslateRow) -> tuple[str, ...]:
        """Return the text to translate."""
        return (row.source,)

    def language(self, row: TranslateRow) -> str:
        """Return the pair, such as `de-en`."""
        return f"{row.source_language}-{row.target_language}"

    def remarks(self, rows: Sequence[TranslateRow]) -> list[str]:
        """Return which tokenizers BLEU takes, where they are not sacrebleu's default."""
        own = sorted({row.target_language for row in rows if has_own_tokenizer(row.target_language)})
        taken = ", ".join(f"{tokenizer_for(language)} for {language}" for language in own)
        return [f"BLEU counts words by sacrebleu's tokenizer {taken} (others: 13a)."] if own else []

    def metrics(self, rows: Sequence[TranslateRow]) -> tuple[Metric, ...]:
        """Return BLEU and chrF2, and BLEU by sacrebleu's default tokenizer where that of a language is another.

        The release of Liu and Niehues (ACL 2025) calls sacrebleu with its default, their paper names the others.

        Raises:
            PlanError: the tokenizer of a target language is not installed.
        """
        languages = sorted({row.target_language for row in rows})
        require_tokenizers(languages)
        found = [
            Metric(name="bleu", count=_bleu_counts, value=bleu),
            Metric(name="chrf", count=_chrf_counts, value=chrf),
        ]
        if any(map(has_own_tokenizer, languages)):
            found.append(Metric(name="bleu-13a", count=_default_counts, value=bleu))
        return tuple(found)
