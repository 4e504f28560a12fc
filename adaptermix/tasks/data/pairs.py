"""Parallel sentence pairs: TSV, CSV or JSONL with two columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ...errors import DataError
from ...io.json_types import JsonObject
from ...models.languages import canonical_language
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files, parse_rows, several_languages
from .language_names import english_name
from .tables import table_cells, texts_of

_JSON_FIELDS = (
    ("source", "target"),
    ("text_parallel_0", "text_parallel_1"),
    ("sentence1", "sentence2"),
    ("sourceString", "targetString"),
)
_HEADERS = (*_JSON_FIELDS, ("src", "tgt"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A sentence and its translation.

    Args:
        languages: Codes of both sides, the anchor first.
        source: Anchor sentence, usually not English.
        target: Its translation, usually English.
    """

    languages: tuple[str, str]
    source: str
    target: str

    @property
    def row_texts(self) -> RowTexts:
        return RowTexts((self.source, self.target), separate=True)


def _columns(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    return _json_columns(file) if ".jsonl" in file.suffixes else table_cells(file)


def _json_columns(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    for number, whole in file.json_rows():
        row = _flat(file, whole)
        names = next(
            (pair for pair in (*_JSON_FIELDS, file.languages) if set(pair) <= set(row) and len(pair) == 2), None
        )
        names = names or _wide_columns(file, row)
        if names is None:
            known = " and ".join(map(repr, file.languages if len(file.languages) == 2 else ("de", "en")))
            raise DataError(
                f"{file.path}:{number}: a pair must have the fields 'source' and 'target', or its languages ({known}), "
                f"also under 'translation'; found {', '.join(map(repr, whole)) or 'none'}.",
                code="pairs.fields",
            )
        sides = ["" if row[name] is None else row[name] for name in names]
        texts = [side for side in sides if isinstance(side, str)]
        if len(texts) < len(sides):
            raise DataError(
                f"{file.path}:{number}: '{names[0]}' and '{names[1]}' must be text, found {str(row)[:60]!r}.",
                code="pairs.not-text",
            )
        yield number, texts


def _wide_columns(file: DataFile, row: JsonObject) -> tuple[str, str] | None:
    """Return the columns of the languages where their names are codes of any form, such as `deu_Latn` in NTREX.

    Raises:
        DataError: a language has several columns, such as two scripts of it.
    """
    if len(file.languages) != 2:
        return None
    named = []
    for language in file.languages:
        columns = [name for name in row if canonical_language(name) == language]
        if len(columns) > 1:
            raise DataError(
                f"{file.path}: a language must have one column, and '{language}' has {', '.join(columns)}. Rename the "
                "columns to 'source' and 'target'.",
                code="pairs.several-columns",
            )
        named += columns
    return (named[0], named[1]) if len(named) == 2 else None


def _flat(file: DataFile, row: JsonObject) -> JsonObject:
    """Return a row with its sides as fields; data sets of the Hub nest them under "translation", by language."""
    sides = row.get("translation")
    if len(file.languages) == 2 and isinstance(sides, dict) and set(file.languages) <= set(sides):
        return {"source": sides[file.languages[0]], "target": sides[file.languages[1]]}
    return row


def read_pairs(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[Pair], list[DataFile]]:
    """Read parallel pairs.

    Args:
        arguments: `FILE` arguments; languages from names such as `deu-eng.tsv` or given as `de-en=FILE`.
        rows: `START:STOP[:STEP]` of the rows of each file.

    Returns:
        The pairs in file order, and the files. Rows with an empty side are left out and counted in `left_out`; they
        count as rows.

    Raises:
        DataError: a file is missing, empty, has a row of one column, or its languages are unknown.
    """
    pairs, files = [], []
    for file in find_files(arguments, "translate"):
        kept, counted = pairs_of_file(file, rows=rows)
        pairs += kept
        files.append(counted)
    return pairs, files


def pairs_of_file(file: DataFile, *, rows: str | None = None) -> tuple[list[Pair], DataFile]:
    """Read the pairs of one file; see `read_pairs`."""
    chosen = parse_rows(rows)
    every = _every_pair(file, chosen.stop)
    picked = every[chosen]
    kept = [pair for pair in picked if pair.source and pair.target]
    if not kept:
        raise DataError(
            f"{file.path} must have pairs in the requested rows ({rows or 'all'}), it has {len(every)}.",
            code="pairs.none-in-rows",
        )
    return kept, file.using(partial(texts_of, kept), rows, len(picked) - len(kept))


def _every_pair(file: DataFile, stop: int | None) -> list[Pair]:
    languages = _pair_languages(file)
    pairs: list[Pair] = []
    for index, (number, columns) in enumerate(_columns(file)):
        if index == 0 and _is_header(columns[:2], languages):
            continue
        if len(columns) < 2:
            raise DataError(
                f"{file.path}:{number}: a pair must have two columns (sentence, translation), found one: "
                f"{columns[0][:60]!r}. Separate them with a tab.",
                code="pairs.one-column",
            )
        if len(columns) > 3:  # a third column is an attribution, as in many Tatoeba exports
            raise DataError(
                f"{file.path}:{number}: a pair must have two columns (sentence, translation), "
                f"found {len(columns)}. "
                "Keep the two, in this order.",
                code="pairs.columns",
            )
        pairs.append(Pair(languages=languages, source=columns[0].strip(), target=columns[1].strip()))
        if len(pairs) == stop:
            break
    return pairs


def _is_header(cells: list[str], languages: tuple[str, str]) -> bool:
    """Whether a first row has names of columns: those of the two sides, or of the two languages."""
    lowered = tuple(cell.strip().lower() for cell in cells)
    if lowered in _HEADERS:
        return True
    named = [{code.lower(), english_name(code).lower()} for code in languages]
    return len(lowered) == 2 and all(
        cell in names or canonical_language(cell) == code
        for cell, names, code in zip(lowered, named, languages, strict=True)
    )


def _pair_languages(file: DataFile) -> tuple[str, str]:
    if len(set(file.languages)) == 2:
        return file.languages[0], file.languages[1]
    if len(file.languages) == 2:
        raise DataError(
            f"{file.path}: a pair must be of two languages, and both are '{file.languages[0]}'. Give both: de-en=FILE.",
            code="pairs.same-language",
        )
    if file.language and file.language != "en":
        return file.language, "en"
    raise DataError(
        f"{file.path}: the languages of a pair file must show in its name (de-en.tsv) or be given (de-en=FILE)"
        f"{several_languages(file)}.",
        code="pairs.no-languages",
    )
