"""Rows to translate: pair files, one text per language, and sources with references as WMT names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, canonical_language, find_files, parse_rows
from .pairs import pairs_of_file
from .parallel import is_lines
from .tables import lines_used

_NOT_END = r"(?!(?:tsv|csv|txt|jsonl?|gz)(?:\.|$))"
# such as generaltest2023.en-de.src.en and generaltest2023.en-de.ref.refA.de, with .txt or .gz behind it or not
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
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.source, self.target), separate=True)


def read_translations(
    arguments: Sequence[str], *, rows: str | None = None
) -> tuple[list[TranslateRow], list[DataFile]]:
    """Read rows to translate, from the first language of each pair into the second.

    Args:
        arguments: `FILE` arguments of any of three kinds. Pair files (`de-en.tsv`, see `adaptermix.tasks.data.pairs`).
            Texts with one language each and equally many lines (`train.de.gz train.en.gz`): each is translated into
            those given after it, a glob giving them by name. Sources and references (`en-de.src.en` and
            `en-de.ref.de`).
        rows: `START:STOP[:STEP]` of the rows of each file. Rows with an empty side are left out; they count as rows.

    Raises:
        DataError: a file is missing, empty, malformed, lacks its counterpart, or does not tell its languages.
    """
    files = find_files(arguments)
    named = {file.path: _WMT.fullmatch(file.path.name) for file in files}
    texts = [file for file in files if not named[file.path] and is_lines(file)]
    left_out: Counter[Path] = Counter()
    of_texts = _from_texts(texts, rows, left_out) if texts else []
    found: list[TranslateRow] = []
    of_pairs: dict[Path, DataFile] = {}
    sides: dict[str, dict[str, DataFile]] = {}
    for file in files:
        match = named[file.path]
        if match:
            _put_side(sides.setdefault(str(file.path.parent / match["set"]), {}), match["side"], file)
        elif file not in texts:
            pairs, counted = pairs_of_file(file, rows=rows)
            of_pairs[file.path] = counted
            found += [_row(pair.languages, pair.source, pair.target) for pair in pairs]
    for together in sides.values():
        found += _from_sides(together, rows, left_out)
    used = [of_pairs.get(file.path) or _lines_used(file, rows, left_out[file.path]) for file in files]
    return found + of_texts, used


def _lines_used(file: DataFile, rows: str | None, left_out: int) -> DataFile:
    return lines_used(file, list(filter(None, _lines(file)[parse_rows(rows)])), rows, left_out)


def _row(languages: tuple[str, str], source: str, target: str) -> TranslateRow:
    # prompts and answers are one line, and cells of CSV and JSONL may hold several
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
    """Return the rows of two texts, line by line, and count those left out with the first text."""
    if languages[0] == languages[1]:
        raise DataError(f"{two.path}: two texts of different languages are needed, and both are '{languages[0]}'.")
    sources, targets = _lines(one), _lines(two)
    if len(sources) != len(targets):
        least = min(len(sources), len(targets))
        longer = one if len(sources) > least else two
        raise DataError(
            f"{longer.path}:{least + 1}: line i of a text must translate line i of the other, and {one.path} has "
            f"{len(sources)} lines, {two.path} has {len(targets)}."
        )
    chosen = parse_rows(rows)
    asked = list(zip(sources[chosen], targets[chosen], strict=True))
    found = [_row(languages, *row) for row in asked if all(row)]
    if not found:
        raise DataError(
            f"{one.path} and {two.path} must hold lines that are blank in neither, in the rows asked for "
            f"({rows or 'all'}), they have {len(sources)}."
        )
    left_out[one.path] += len(asked) - len(found)
    return found


def _from_texts(files: Sequence[DataFile], rows: str | None, left_out: Counter[Path]) -> list[TranslateRow]:
    by_language: dict[str, DataFile] = {}
    for file in files:
        language = file.languages[0]
        if language in by_language:
            raise DataError(
                f"{file.path}: one text per language is needed, and '{language}' occurs twice, in "
                f"{by_language[language].path} too. Give each set of texts to a command of its own, or make pair files."
            )
        by_language[language] = file
    if len(by_language) < 2:
        raise DataError(
            f"{files[0].path}: translation needs at least two texts, one per language, and '{next(iter(by_language))}' "
            "is alone. Give the other one too, or a file of two columns such as de-en.tsv."
        )
    pairs = combinations(by_language.items(), 2)
    return [row for (a, one), (b, two) in pairs for row in _joined((a, b), one, two, rows, left_out)]


def _put_side(sides: dict[str, DataFile], side: str, file: DataFile) -> None:
    if side in sides:
        what = {"src": "source", "ref": "reference"}[side]
        raise DataError(f"{file.path}: one {what} per test set is needed, and {sides[side].path} is one already.")
    sides[side] = file


def _from_sides(sides: Mapping[str, DataFile], rows: str | None, left_out: Counter[Path]) -> list[TranslateRow]:
    first = next(iter(sides.values()))
    lacking = next((side for side in ("src", "ref") if side not in sides), None)
    if lacking:
        raise DataError(
            f"{first.path}: a source and a reference are needed, and the file with '.{lacking}.' in its name is not "
            "among those given."
        )
    source, target = sides["src"], sides["ref"]
    languages = _languages(source)
    if _languages(target) != languages:
        raise DataError(
            f"{target.path}: source and reference must be of one pair, {'-'.join(languages)} for the source."
        )
    for file, language in ((source, languages[0]), (target, languages[1])):
        match = _WMT.fullmatch(file.path.name)
        code = match["code"] if match else None
        if code and not file.is_given and canonical_language(code) != language:
            raise DataError(
                f"{file.path}: the source must be in the first language of the pair and the reference in the second, "
                f"here '{language}', and the file's name ends in '{code}'."
            )
    return _joined(languages, source, target, rows, left_out)


def _languages(file: DataFile) -> tuple[str, str]:
    if len(file.languages) != 2:
        raise DataError(
            f"{file.path}: the languages of a source and its reference must show in their names (en-de.src.en) or be "
            "given (en-de=FILE)."
        )
    return file.languages[0], file.languages[1]
