"""Machine translation: pair files, one text per language, and sources with references as WMT names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ..errors import DataError
from ..models.languages import canonical_language
from ..provenance.row_hashes import RowTexts
from .base import task
from .data.columns import find_rows
from .data.files import DataFile, parse_rows
from .data.language_names import english_name
from .data.pairs import pairs_of_file
from .data.parallel import is_lines
from .data.tables import lines_used
from .metrics import Metric
from .overlap import bleu, bleu_counts, chrf, chrf_counts, has_own_tokenizer, require_tokenizers, tokenizer_for
from .prompts import Template, table

_NOT_END = r"(?!(?:tsv|csv|txt|jsonl?|gz)(?:\.|$))"
# Such as generaltest2023.en-de.src.en and generaltest2023.en-de.ref.refA.de, optionally with .txt or .gz.
_WMT = re.compile(
    r"(?P<set>(?:.*\.)?[a-z]{2,3}-[a-z]{2,3})\.(?P<side>src|ref)"
    rf"(?:\.{_NOT_END}[A-Za-z0-9]+)??(?:\.{_NOT_END}(?P<code>[a-z]{{2,3}}))?(?:\.txt)?(?:\.gz)?"
)
_BREAK = re.compile(r"\s*[\r\n]+\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateRow:
    """A text and its translation, each in one line.

    Args:
        source: The text to translate.
        target: Its translation.
        source_language: Language code of the text.
        target_language: Language code of the translation.
    """

    source: str
    target: str
    source_language: str
    target_language: str

    @property
    def row_texts(self) -> RowTexts:
        return RowTexts((self.source, self.target), separate=True)


def _lines_used(file: DataFile, rows: str | None, left_out: int) -> DataFile:
    return lines_used(file, list(filter(None, _lines(file)[parse_rows(rows)])), rows, left_out)


def _row(languages: tuple[str, str], source: str, target: str) -> TranslateRow:
    # Prompts and answers are one line, but cells of CSV and JSONL may have several.
    return TranslateRow(
        source=_BREAK.sub(" ", source),
        target=_BREAK.sub(" ", target),
        source_language=languages[0],
        target_language=languages[1],
    )


def _lines(file: DataFile) -> list[str]:
    return [line.strip() for _, line in file.lines()]


def _joined(
    languages: tuple[str, str], one: DataFile, two: DataFile, rows: str | None, left_out: Counter[Path]
) -> list[TranslateRow]:
    """Return the rows of two texts, line by line, and count incomplete ones under the first text."""
    if languages[0] == languages[1]:
        raise DataError(
            f"{two.path}: two texts of different languages are needed, and both are '{languages[0]}'.",
            code="translate.same-language",
        )
    sources, targets = _lines(one), _lines(two)
    if len(sources) != len(targets):
        least = min(len(sources), len(targets))
        longer = one if len(sources) > least else two
        raise DataError(
            f"{longer.path}:{least + 1}: line i of a text must translate line i of the other, and {one.path} has "
            f"{len(sources)} lines, {two.path} has {len(targets)}.",
            code="translate.line-count",
        )
    chosen = parse_rows(rows)
    picked = list(zip(sources[chosen], targets[chosen], strict=True))
    kept = [_row(languages, *row) for row in picked if all(row)]
    if not kept:
        raise DataError(
            f"{one.path} and {two.path} must have lines that are not blank in either, in the requested rows "
            f"({rows or 'all'}), they have {len(sources)}.",
            code="translate.no-lines",
        )
    left_out[one.path] += len(picked) - len(kept)
    return kept


def _from_texts(files: Sequence[DataFile], rows: str | None, left_out: Counter[Path]) -> list[TranslateRow]:
    by_language: dict[str, DataFile] = {}
    for file in files:
        language = file.languages[0]
        if language in by_language:
            raise DataError(
                f"{file.path}: one text per language is needed, and '{language}' occurs twice, in "
                f"{by_language[language].path} too. Run one command per set of texts, or make pair files.",
                code="translate.language-twice",
            )
        by_language[language] = file
    if len(by_language) < 2:
        raise DataError(
            f"{files[0].path}: translation needs at least two texts, one per language, and '{next(iter(by_language))}' "
            "is the only one. Give the other one too, or a file of two columns such as de-en.tsv.",
            code="translate.one-language",
        )
    pairs = combinations(by_language.items(), 2)
    return [row for (a, one), (b, two) in pairs for row in _joined((a, b), one, two, rows, left_out)]


def _put_side(sides: dict[str, DataFile], side: str, file: DataFile) -> None:
    if side in sides:
        what = {"src": "source", "ref": "reference"}[side]
        raise DataError(
            f"{file.path}: one {what} per test set is needed, and {sides[side].path} is one already.",
            code="translate.side-twice",
        )
    sides[side] = file


def _from_sides(sides: Mapping[str, DataFile], rows: str | None, left_out: Counter[Path]) -> list[TranslateRow]:
    first = next(iter(sides.values()))
    lacking = next((side for side in ("src", "ref") if side not in sides), None)
    if lacking:
        raise DataError(
            f"{first.path}: a source and a reference are needed, and the file with '.{lacking}.' in its name is not "
            "among those given.",
            code="translate.no-side",
        )
    source, target = sides["src"], sides["ref"]
    languages = _languages(source)
    if _languages(target) != languages:
        raise DataError(
            f"{target.path}: the reference must be of the language pair of its source, {'-'.join(languages)}.",
            code="translate.other-pair",
        )
    for file, language in ((source, languages[0]), (target, languages[1])):
        match = _WMT.fullmatch(file.path.name)
        code = match["code"] if match else None
        if code and not file.is_given and canonical_language(code) != language:
            raise DataError(
                f"{file.path}: the source must be in the first language of the pair and the reference in the second, "
                f"here '{language}', and the file's name ends in '{code}'.",
                code="translate.side-language",
            )
    return _joined(languages, source, target, rows, left_out)


def _languages(file: DataFile) -> tuple[str, str]:
    if len(file.languages) != 2:
        raise DataError(
            f"{file.path}: the languages of a source and its reference must show in their names (en-de.src.en) or be "
            "given (en-de=FILE).",
            code="translate.no-languages",
        )
    return file.languages[0], file.languages[1]


def _line(answer: str) -> str:
    # Some tokens contain a full stop and a line break. They do not stop generation, so that further lines may follow.
    return answer.strip().split("\n", maxsplit=1)[0].strip()


def _bleu_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return bleu_counts(row.target, _line(answer), row.target_language)


def _default_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return bleu_counts(row.target, _line(answer), "en")


def _chrf_counts(row: TranslateRow, answer: str) -> Sequence[float]:
    return chrf_counts(row.target, _line(answer))


_SYSTEM = "Translate the following sentences from {source} to {target}."


@task
class Translate:
    """Translation, scored by corpus BLEU and chrF2 of each pair of languages.

    Both are in [0, 100] and equal to sacrebleu's. BLEU counts words by sacrebleu's tokenizer for the target language:
    `zh`, `ja-mecab`, `ko-mecab`, `char` for other languages without blanks between words, else `13a`. Only the first
    line of an answer is scored.

    Rows are translated from the first language of their pair into the second. Files are pair files (`de-en.tsv`, see
    `adaptermix.tasks.data.pairs`); texts with one language each and equally many lines (`train.de.gz train.en.gz`),
    each translated into those that follow it (a glob lists them by name); or sources and references
    (`en-de.src.en` and `en-de.ref.de`). Rows with an empty side are left out.
    """

    name = "translate"
    text_field = "source"
    named_columns: Mapping[str, str] = {}
    blank = {"target": "-"}
    one_line = True
    is_open = False
    templates = table(
        Template(name="plain", prompt="Translate from {source} to {target}.\n{source}: {text}\n{target}:", lead=" "),
        # The system turn of Liu and Niehues (ACL 2025), appendix D; the wording is theirs.
        Template(name="mid-align", prompt="{text}", chat=True, system=_SYSTEM),
        # Their released Llama adapters were trained with a line break after each turn.
        Template(name="mid-align-eot", prompt="{text}", chat=True, system=_SYSTEM, broken_after="<|eot_id|>"),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[TranslateRow], list[DataFile]]:
        files = find_rows(arguments, self.name, self.named_columns)
        named = {file.path: _WMT.fullmatch(file.path.name) for file in files}
        texts = [file for file in files if not named[file.path] and is_lines(file)]
        left_out: Counter[Path] = Counter()
        of_texts = _from_texts(texts, rows, left_out) if texts else []
        from_files: list[TranslateRow] = []
        of_pairs: dict[Path, DataFile] = {}
        sides: dict[str, dict[str, DataFile]] = {}
        for file in files:
            match = named[file.path]
            if match:
                _put_side(sides.setdefault(str(file.path.parent / match["set"]), {}), match["side"], file)
            elif file not in texts:
                pairs, counted = pairs_of_file(file, rows=rows)
                of_pairs[file.path] = counted
                from_files += [_row(pair.languages, pair.source, pair.target) for pair in pairs]
        for together in sides.values():
            from_files += _from_sides(together, rows, left_out)
        used = [of_pairs.get(file.path) or _lines_used(file, rows, left_out[file.path]) for file in files]
        return from_files + of_texts, used

    def fields(self, row: TranslateRow) -> Mapping[str, str]:
        return {
            "text": row.source,
            "source": english_name(row.source_language),
            "target": english_name(row.target_language),
        }

    def texts(self, row: TranslateRow) -> tuple[str, ...]:
        return (row.source,)

    def answer(self, row: TranslateRow) -> str:
        return row.target

    def evidence(self, row: TranslateRow) -> tuple[str, ...]:
        return (row.source,)

    def language(self, row: TranslateRow) -> str:
        return f"{row.source_language}-{row.target_language}"

    def remarks(self, rows: Sequence[TranslateRow]) -> list[str]:
        """Name the tokenizers of BLEU that are not sacrebleu's default."""
        languages = sorted({row.target_language for row in rows if has_own_tokenizer(row.target_language)})
        tokenizers = ", ".join(f"{tokenizer_for(language)} for {language}" for language in languages)
        return [f"BLEU counts words by sacrebleu's tokenizer {tokenizers} (others: 13a)."] if languages else []

    def metrics(self, rows: Sequence[TranslateRow]) -> tuple[Metric, ...]:
        """Return BLEU and chrF2, and BLEU by sacrebleu's default tokenizer if a language has its own tokenizer.

        The release of Liu and Niehues (ACL 2025) uses the default; their paper states the tokenizers of the languages.

        Raises:
            PlanError: the tokenizer of a target language is not installed.
        """
        languages = sorted({row.target_language for row in rows})
        require_tokenizers(languages)
        metrics = [
            Metric(name="bleu", count=_bleu_counts, value=bleu),
            Metric(name="chrf", count=_chrf_counts, value=chrf),
        ]
        if any(map(has_own_tokenizer, languages)):
            metrics.append(Metric(name="bleu-13a", count=_default_counts, value=bleu))
        return tuple(metrics)
