"""Named entities: IOB2 in columns, and JSONL with the entities spelled out; generated as a JSON list, or tagged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..errors import DataError
from ..io.json_types import JsonObject, JsonValue
from .base import task
from .data.files import DataFile
from .data.tables import is_json, named_language, row_cluster, row_language, usable
from .metrics import Counts, Metric, f1_ends, micro_f1
from .prompts import Template, table
from .tagged import (
    CHARACTER_LANGUAGES,
    Pairs,
    Tagged,
    TaggedRow,
    TaggedTask,
    check_tags,
    count_bags,
    iob2_spans,
    strict_tags,
    tag_entities,
)

_TAG = re.compile(r"O|[BI]-\S+")
_DOCUMENT = "-DOCSTART-"
_TAG_NAMES = ("ner_tags", "tags")
_STRING = r'"((?:[^"\\]|\\.)*)"'
_KIND, _TEXT = rf'"TypeName"\s*:\s*{_STRING}', rf'"Text"\s*:\s*{_STRING}'
_PAIR = re.compile(rf"{_KIND}\s*,\s*{_TEXT}|{_TEXT}\s*,\s*{_KIND}", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class NerRow(TaggedRow):
    """A sentence with its named entities, (type, text) in order; its tags are IOB2."""

    entities: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Where token and tag are in a line.

    Args:
        tabbed: Tabs separate columns, not blanks.
        numbered: The first column numbers the tokens.
        width: Number of columns.
        tag: Column of the tag.
    """

    tabbed: bool
    numbered: bool
    width: int
    tag: int

    def cells(self, line: str) -> list[str]:
        return line.split("\t") if self.tabbed else line.split()

    def is_comment(self, line: str) -> bool:
        """Return whether a line is a comment; a token may be # too."""
        if not line.startswith("#"):
            return False
        cells = self.cells(line)
        return len(cells) == 1 if self.tabbed else len(cells) != self.width or not _TAG.fullmatch(cells[self.tag])

    def read(self, file: DataFile, number: int, line: str) -> tuple[str, str]:
        """Return token and tag."""
        cells = self.cells(line)
        if len(cells) != self.width:
            raise DataError(
                f"{file.path}:{number}: a row must have {self.width} columns as the first one has, "
                f"found {len(cells)}: {line[:60]!r}.",
                code="row.columns",
            )
        token, tag = cells[self.numbered].strip(), cells[self.tag].strip()
        if not token or (self.numbered and not cells[0].isdigit()):
            raise DataError(
                f"{file.path}:{number}: a row must have a token and its number, found {line[:60]!r}.",
                code="row.token-number",
            )
        check_tags(file, number, [tag], _TAG)
        return token, tag


def _columns_of(file: DataFile, lines: Sequence[tuple[int, str]]) -> _Columns:
    """Choose by the first sentence; if several columns have tags, use the last, as CoNLL 2003 does."""
    tabbed = any("\t" in line for _, line in lines)
    for filled, block in groupby(lines, key=lambda item: bool(item[1].strip())):
        rows = [
            (number, line.split("\t") if tabbed else line.split())
            for number, line in (block if filled else ())
            if not line.startswith("#") or (tabbed and "\t" in line)
        ]
        if not rows or rows[0][1][0] == _DOCUMENT:
            continue
        number, first = rows[0]
        numbered = len(first) > 2 and [cells[0] for _, cells in rows] == [str(i + 1) for i in range(len(rows))]
        tag = max((i for i, cell in enumerate(first) if i > numbered and _TAG.fullmatch(cell.strip())), default=None)
        if tag is None:
            raise DataError(
                f"{file.path}:{number}: rows must have a token and a tag (O, B-TYPE or I-TYPE), "
                f"found {' '.join(first)[:60]!r}.",
                code="row.token-tag",
            )
        return _Columns(tabbed=tabbed, numbered=numbered, width=len(first), tag=tag)
    raise DataError(f"a data file must have rows, but {file.path} is empty.", code="data.empty")


class _Scheme:
    """Counts how the entities of a file start, to recognise schemes other than IOB2, whose entities would be lost."""

    def __init__(self, file: DataFile) -> None:
        self._file, self._starts, self._strays = file, 0, list[int]()

    def add(self, numbers: Sequence[int], tags: Sequence[str]) -> None:
        """Count the entities of a sentence whose tokens are in these lines."""
        for number, before, tag in zip(numbers, ("O", *tags), tags, strict=False):
            self._starts += tag[0] == "B"
            if tag[0] == "I" and before not in (f"B-{tag[2:]}", tag):
                self._strays.append(number)

    def check(self) -> None:
        """Refuse a file of another scheme; a few strays occur in UNER.

        Raises:
            DataError: more entities start with I- than with B-.
        """
        if len(self._strays) > self._starts:
            raise DataError(
                f"{self._file.path}:{self._strays[0]}: the first tag of an entity must be B- (IOB2), found "
                f"{len(self._strays)} entities that start with I- and {self._starts} with B-. Convert IOB1 to IOB2.",
                code="data.iob1",
            )


def _iob2(file: DataFile, scheme: _Scheme) -> Iterator[NerRow]:
    """Yield rows of `# key = value` comments, then one token a line; blank lines separate sentences."""
    language = row_language(file)
    lines = list(file.lines())
    columns = _columns_of(file, lines)
    for filled, block in groupby(lines, key=lambda item: bool(item[1].strip())):
        text = ""
        words: list[tuple[int, str, str]] = []
        for number, line in block if filled else ():
            if columns.is_comment(line):
                key, _, value = line[1:].partition("=")
                text = value.strip() if key.strip() == "text" else text
                continue
            token, tag = columns.read(file, number, line)
            if token != _DOCUMENT:
                words.append((number, token, tag))
        if words:
            numbers, tokens, tags = zip(*words, strict=True)
            scheme.add(numbers, tags)
            yield _from_tags(tokens, tags, text, language)


def entities_in(tokens: Sequence[str], tags: Sequence[str], text: str, language: str) -> list[tuple[str, str]]:
    """Return (type, text) of each entity of IOB2 tags, spelled as in the sentence."""
    entities, at = [], 0
    for kind, start, stop in iob2_spans(tags):
        # Tokens may touch in the text.
        match = re.compile(r"\s*".join(map(re.escape, tokens[start:stop]))).search(text, at)
        entities.append((kind, match[0] if match else _joined(tokens[start:stop], language)))
        at = match.end() if match else at
    return entities


def _from_tags(tokens: Sequence[str], tags: Sequence[str], text: str, language: str) -> NerRow:
    return NerRow(
        text=text or _joined(tokens, language),
        entities=tuple(entities_in(tokens, tags, text, language)),
        language=language,
        tokens=tuple(tokens),
        tags=tuple(tags),
    )


def _joined(tokens: Sequence[str], language: str) -> str:
    return ("" if language in CHARACTER_LANGUAGES else " ").join(tokens)


def _with_tags(file: DataFile, number: int, row: JsonObject, tags: JsonValue) -> NerRow | None:
    """Return the row of {"tokens", "ner_tags" or "tags", "language"}, as data sets of the Hub have it."""
    tokens = row.get("tokens")
    if tokens == tags == []:
        return None
    if not (
        isinstance(tokens, list)
        and isinstance(tags, list)
        and 0 < len(tokens) == len(tags)
        and all(isinstance(token, str) and token.strip() for token in tokens)
    ):
        raise DataError(
            f"{file.path}:{number}: a row must have non-empty tokens and one tag per token.",
            code="row.tokens-tags",
        )
    check_tags(file, number, tags, _TAG)
    return replace(_from_tags(tokens, tags, "", row_language(file, named_language(row))), cluster=row_cluster(row))


def _spelled_out(file: DataFile, number: int, row: JsonObject) -> NerRow | DataError | None:
    """Return the row of {"text" or "tokens", "entities": [{"type", "text"}], "language"}."""
    try:
        text, listed, spelled, named = (
            row.get("text") or "",
            row.get("tokens", []),
            row["entities"],
            named_language(row),
        )
        if not isinstance(text, str) or not isinstance(listed, list) or not isinstance(spelled, Iterable):
            raise TypeError("not text and lists")
        tokens, entities = tuple(listed), tuple((entity["type"], entity["text"]) for entity in spelled)
        words = [text, *tokens, *(part for entity in entities for part in entity), named or ""]
        if not all(isinstance(word, str) for word in words):
            raise TypeError("not text")
        if not all(part.strip() for part in words[1:-1]):
            raise KeyError("empty")
    except (KeyError, TypeError) as error:
        raise DataError(
            f'{file.path}:{number}: a row must be {{"text": ... or "tokens": [...], '
            '"entities": [{"type": ..., "text": ...}]}, all of them text.',
            code="row.ner-json",
        ) from error
    if not (text.strip() or tokens):
        return None
    language = row_language(file, named)
    tags = tag_entities(tokens, entities)
    if tokens and len(iob2_spans(tags)) != len(entities):
        return DataError(
            f"{file.path}:{number}: each entity must match separate tokens, but only "
            f"{len(iob2_spans(tags))} of {len(entities)} do. Fix the row, or leave out its tokens.",
            code="row.entity-not-found",
        )
    return NerRow(
        text=text or _joined(tokens, language),
        entities=entities,
        language=language,
        tokens=tokens,
        tags=tuple(tags),
        cluster=row_cluster(row),
    )


def _json(file: DataFile, scheme: _Scheme) -> Iterator[NerRow | DataError | None]:
    for number, row in file.json_rows():
        tags = next((row[name] for name in _TAG_NAMES if name in row), None)
        if tags is None or "entities" in row:
            yield _spelled_out(file, number, row)
            continue
        tagged = _with_tags(file, number, row, tags)
        if tagged:
            scheme.add([number] * len(tagged.tags), tagged.tags)
        yield tagged


def format_entities(entities: Pairs) -> str:
    """Return the answer for these entities, in one line.

    Example:
        >>> format_entities([("PER", "Ada Lovelace")])
        '[{"TypeName": "PER", "Text": "Ada Lovelace"}]'
    """
    return json.dumps([{"TypeName": kind, "Text": value} for kind, value in entities], ensure_ascii=False)


def parse_entities(answer: str) -> list[tuple[str, str]]:
    """Read the first JSON value of an answer if it is a list of entities or one entity, else what looks like one.

    Words around the list and an end that is cut off are thus ignored. Items without type or text are dropped.

    Example:
        >>> parse_entities('Sure: [{"Text": "Ada", "TypeName": "PER"}, {"TypeName": "LOC", "Text": "Lon')
        [('PER', 'Ada')]
    """
    value = _first_json(answer)
    if value == []:
        return []
    whole = _entities(value if isinstance(value, list) else [value])
    return whole or _entities(
        {"TypeName": _unescaped(match[1] or match[4]), "Text": _unescaped(match[2] or match[3])}
        for match in _PAIR.finditer(answer)
    )


def _first_json(answer: str) -> object:
    start = re.search(r"[\[{]", answer)
    try:
        value: object = json.JSONDecoder(strict=False).raw_decode(answer, start.start())[0] if start else None
    except (ValueError, RecursionError):
        return None
    return value


def _entities(items: Iterable[JsonValue]) -> list[tuple[str, str]]:
    pairs = [(item.get("TypeName"), item.get("Text")) for item in items if isinstance(item, dict)]
    return [
        (kind, value)
        for kind, value in pairs
        if isinstance(kind, str) and isinstance(value, str) and kind.strip() and value.strip()
    ]


def _unescaped(raw: str | None) -> str:
    try:
        return str(json.loads(f'"{raw or ""}"', strict=False))
    except ValueError:  # an escape that JSON does not have
        return raw or ""


def count_entities(gold: Pairs, predicted: Pairs) -> Counts:
    """Compare bags of (type, text), ignoring how blanks are written."""
    want, have = ([(kind.strip(), " ".join(value.split())) for kind, value in pairs] for pairs in (gold, predicted))
    return count_bags(want, have)


@task
class NerJson(TaggedTask[NerRow]):
    """Named entity recognition, scored by micro F1.

    `tuple_f1` compares bags of (type, text), as Liu and Niehues do (ACL 2025). `entity_f1` compares token spans as
    seqeval's strict IOB2 does, with each predicted text at its first occurrence that is still free; texts that do not
    occur are ignored there. It needs tokens.

    Files are IOB2, where the last column with tags is read, the token is the first column or follows its number, and
    `# text = ` comments give the sentence; or JSONL, with entities spelled out or with tokens and their tags.
    """

    name = "ner-json"
    text_field = "text"
    blank = {"entities": []}
    row = NerRow
    one_line = False  # chat models often write JSON on several lines
    no_answer = format_entities([])
    format, parse, count = staticmethod(format_entities), staticmethod(parse_entities), staticmethod(count_entities)
    templates = table(
        Template(name="plain", prompt="Text: {text}\nEntities:", lead=" "),
        # The form of the answer is that of Liu and Niehues, the wording of the system turn is ours.
        Template(
            name="mid-align",
            prompt="{text}",
            chat=True,
            system=(
                "List the named entities of the types person (PER), organization (ORG) and location (LOC) in the "
                "user's text as a JSON list of objects with the keys TypeName and Text."
            ),
        ),
    )

    def rows_of(self, file: DataFile) -> Iterator[NerRow | None]:
        scheme = _Scheme(file)
        try:
            yield from usable((_json if is_json(file) else _iob2)(file, scheme))
        except GeneratorExit:  # `--rows` needs no more sentences: check those that were read
            scheme.check()
            raise
        scheme.check()

    def pairs(self, row: NerRow) -> Pairs:
        return row.entities

    def with_pairs(self, row: NerRow, pairs: tuple[tuple[str, str], ...]) -> NerRow:
        return replace(row, entities=pairs)

    def tags(self, row: NerRow) -> tuple[str, ...]:
        self.words(row)
        return strict_tags(row.tags)

    def tagged_pairs(self, row: NerRow, tags: Sequence[str]) -> Pairs:
        return entities_in(row.tokens, tags, row.text, row.language)

    def metrics(self, rows: Sequence[NerRow]) -> tuple[Metric, ...]:
        def by_pair(row: NerRow, answer: str) -> Counts:
            return count_entities(row.entities, self.predicted(answer))

        def by_span(row: NerRow, answer: str) -> Counts | None:
            if not row.tokens:
                return None
            entities = [(kind.strip(), value) for kind, value in parse_entities(answer)]
            tags = answer.tags if isinstance(answer, Tagged) else tag_entities(row.tokens, entities)
            return count_bags(iob2_spans(row.tags), iob2_spans(tags))

        counts = {"tuple_f1": by_pair} | ({"entity_f1": by_span} if any(row.tokens for row in rows) else {})
        return tuple(Metric(name=name, count=count, value=micro_f1, ends=f1_ends) for name, count in counts.items())
