"""Named entities: IOB2 in columns, and JSONL with the entities spelled out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files
from .slots import CHARACTER_LANGUAGES
from .tables import is_json, pick_rows, row_cluster, row_language, usable

_TAG = re.compile(r"O|[BI]-\S+")
_DOCUMENT = "-DOCSTART-"
_TAG_NAMES = ("ner_tags", "tags")


@dataclass(frozen=True, slots=True, kw_only=True)
class NerRow:
    """A sentence with its named entities.

    Args:
        text: The sentence.
        entities: (type, text) in order.
        language: Language code.
        tokens: The sentence in tokens, where there are; else empty.
        tags: IOB2 tag per token; as long as `tokens`.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    text: str
    entities: tuple[tuple[str, str], ...]
    language: str
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.text,))


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, start, stop) of each entity, as seqeval's strict IOB2 has them.

    An `I-` tag that continues no entity of its type is outside.

    Example:
        >>> entity_spans(["B-PER", "I-PER", "I-LOC", "B-LOC"])
        [('PER', 0, 2), ('LOC', 3, 4)]
    """
    spans = []
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            stop = start + 1
            while stop < len(tags) and tags[stop] == f"I-{tag[2:]}":
                stop += 1
            spans.append((tag[2:], start, stop))
    return spans


def strict_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags whose `I-` all continue an entity of their type; others become outside, as `entity_spans` has it.

    Example:
        >>> strict_tags(["B-PER", "I-PER", "I-LOC"])
        ('B-PER', 'I-PER', 'O')
    """
    inside = {place for _, start, stop in entity_spans(tags) for place in range(start, stop)}
    return tuple(tag if place in inside else "O" for place, tag in enumerate(tags))


def tag_entities(tokens: Sequence[str], entities: Sequence[tuple[str, str]]) -> list[str]:
    """Return IOB2 tags for entities given as text, each at its first place in tokens that no earlier one took.

    Blanks do not count, so that "Al-Zaman" is found in `Al`, `-`, `Zaman`; case does. Entities that do not occur are
    passed over.

    Example:
        >>> tag_entities(["Ada", "met", "Ada", "Lovelace"], [("PER", "Ada"), ("PER", "Ada Lovelace")])
        ['B-PER', 'O', 'B-PER', 'I-PER']
    """
    squeezed = ["".join(token.split()) for token in tokens]
    tags = ["O"] * len(tokens)
    for kind, value in entities:
        found = _find(squeezed, tags, "".join(value.split()))
        if found:
            start, stop = found
            tags[start:stop] = [f"B-{kind}"] + [f"I-{kind}"] * (stop - start - 1)
    return tags


def _find(tokens: Sequence[str], tags: Sequence[str], phrase: str) -> tuple[int, int] | None:
    for start in range(len(tokens)):
        joined = ""
        for place in range(start, len(tokens)):
            joined += tokens[place]
            if tags[place] != "O" or not joined or not phrase.startswith(joined):
                break
            if joined == phrase:
                return start, place + 1
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where token and tag stand.

    Args:
        tabbed: Columns are parted by tabs, else by blanks.
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
        """A line may begin with # because its token does."""
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
                f"found {len(cells)}: {line[:60]!r}."
            )
        token, tag = cells[self.numbered].strip(), cells[self.tag].strip()
        if not token or (self.numbered and not cells[0].isdigit()):
            raise DataError(f"{file.path}:{number}: a row must have a token and its number, found {line[:60]!r}.")
        if not _TAG.fullmatch(tag):
            raise DataError(f"{file.path}:{number}: a tag must be O, B-TYPE or I-TYPE (IOB2), found {tag[:60]!r}.")
        return token, tag


def _layout(file: DataFile, lines: Sequence[tuple[int, str]]) -> _Layout:
    """Choose by the first sentence; of several columns with tags the last is meant, as in CoNLL 2003."""
    tabbed = any("\t" in line for _, line in lines)
    blocks = groupby(lines, key=lambda item: bool(item[1].strip()))
    for _, block in ((filled, list(block)) for filled, block in blocks if filled):
        rows = [
            (number, line.split("\t") if tabbed else line.split())
            for number, line in block
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
                f"found {' '.join(first)[:60]!r}."
            )
        return _Layout(tabbed=tabbed, numbered=numbered, width=len(first), tag=tag)
    raise DataError(f"a data file must hold rows, and {file.path} has none.")


class _Scheme:
    """Counts how the entities of a file begin, to tell IOB2 from schemes in which they would be lost."""

    def __init__(self, file: DataFile) -> None:
        self._file, self._begun, self._strays = file, 0, list[int]()

    def add(self, numbers: Sequence[int], tags: Sequence[str]) -> None:
        """Count the entities of a sentence, whose tokens stand in these lines."""
        for number, before, tag in zip(numbers, ("O", *tags), tags, strict=False):
            self._begun += tag[0] == "B"
            if tag[0] == "I" and before not in (f"B-{tag[2:]}", tag):
                self._strays.append(number)

    def check(self) -> None:
        """Refuse a file of another scheme; a few strays occur in UNER.

        Raises:
            DataError: more entities begin with I- than with B-.
        """
        if len(self._strays) > self._begun:
            raise DataError(
                f"{self._file.path}:{self._strays[0]}: the first tag of an entity must be B- (IOB2), found "
                f"{len(self._strays)} entities that begin with I- and {self._begun} with B-. Convert IOB1 to IOB2."
            )


def _iob2(file: DataFile, scheme: _Scheme) -> Iterator[NerRow]:
    """`# key = value` comments, then one token a line; sentences parted by blank lines."""
    language = row_language(file)
    lines = list(file.lines())
    layout = _layout(file, lines)
    for filled, block in groupby(lines, key=lambda item: bool(item[1].strip())):
        text = ""
        tokens: list[str] = []
        tags: list[str] = []
        numbers: list[int] = []
        for number, line in block if filled else ():
            if layout.is_comment(line):
                key, _, value = line[1:].partition("=")
                text = value.strip() if key.strip() == "text" else text
                continue
            token, tag = layout.read(file, number, line)
            if token == _DOCUMENT:
                continue
            tokens.append(token)
            tags.append(tag)
            numbers.append(number)
        if tokens:
            scheme.add(numbers, tags)
            yield _from_tags(tokens, tags, text, language)


def entities_in(tokens: Sequence[str], tags: Sequence[str], text: str, language: str) -> list[tuple[str, str]]:
    """Return (type, text) of each entity of IOB2 tags, as it stands in the sentence."""
    entities, at = [], 0
    for kind, start, stop in entity_spans(tags):
        # as it stands in the text, where tokens may touch
        pattern = re.compile(r"\s*".join(map(re.escape, tokens[start:stop])))
        found = pattern.search(text, at)
        entities.append((kind, found[0] if found else _blank(language).join(tokens[start:stop])))
        at = found.end() if found else at
    return entities


def _from_tags(tokens: Sequence[str], tags: Sequence[str], text: str, language: str) -> NerRow:
    return NerRow(
        text=text or _blank(language).join(tokens),
        entities=tuple(entities_in(tokens, tags, text, language)),
        language=language,
        tokens=tuple(tokens),
        tags=tuple(tags),
    )


def _blank(language: str) -> str:
    return "" if language in CHARACTER_LANGUAGES else " "


def _tagged(file: DataFile, number: int, row: dict[str, Any], tags: Any) -> NerRow | None:
    """{"tokens", "ner_tags" or "tags", "language"}: data sets of the Hub."""
    tokens: Any = row.get("tokens")
    if tokens == tags == []:
        return None
    whole = isinstance(tokens, list) and isinstance(tags, list) and tokens and len(tokens) == len(tags)
    if not whole or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise DataError(f"{file.path}:{number}: a row must have tokens, none of them empty, and a tag for each.")
    odd = next((tag for tag in tags if not isinstance(tag, str) or not _TAG.fullmatch(tag)), None)
    if odd is not None:
        raise DataError(
            f"{file.path}:{number}: a tag must be O, B-TYPE or I-TYPE (IOB2), found {odd!r}."
            + (
                " Numbers need names: write the tags as text, or read a data set whose features name the classes (hf:)."
                if isinstance(odd, int)
                else ""
            )
        )
    return replace(_from_tags(tokens, tags, "", row_language(file, row.get("language"))), cluster=row_cluster(row))


def _spelled_out(file: DataFile, scheme: _Scheme) -> Iterator[NerRow | DataError | None]:
    """{"text" or "tokens", "entities": [{"type", "text"}], "language"}; or tags in the place of entities."""
    for number, row in file.json_rows():
        tags = next((row[name] for name in _TAG_NAMES if name in row), None)
        if tags is not None and "entities" not in row:
            found = _tagged(file, number, row, tags)
            if found:
                scheme.add([number] * len(found.tags), found.tags)
            yield found
            continue
        try:
            entities = tuple((entity["type"], entity["text"]) for entity in row["entities"])
            text, tokens, named = row.get("text") or "", tuple(row.get("tokens", ())), row.get("language")
            words = [text, *tokens, *(part for entity in entities for part in entity), named or ""]
            if not isinstance(row.get("tokens", []), list) or not all(isinstance(word, str) for word in words):
                raise TypeError("not text")
            if not all(part.strip() for part in words[1:-1]):
                raise KeyError("empty")
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{file.path}:{number}: a row must be {{"text": ... or "tokens": [...], '
                '"entities": [{"type": ..., "text": ...}]}, all of them text.'
            ) from error
        if not (text.strip() or tokens):
            yield None
            continue
        language = row_language(file, named)
        tags = tag_entities(tokens, entities)
        if tokens and len(entity_spans(tags)) != len(entities):
            yield DataError(
                f"{file.path}:{number}: each entity must be found in tokens of its own, found "
                f"{len(entity_spans(tags))} of {len(entities)}. Mend the row, or leave out its tokens."
            )
            continue
        yield NerRow(
            text=text or _blank(language).join(tokens),
            entities=entities,
            language=language,
            tokens=tokens,
            tags=tuple(tags),
            cluster=row_cluster(row),
        )


def _read(file: DataFile) -> Iterator[NerRow | None]:
    scheme = _Scheme(file)
    try:
        yield from usable((_spelled_out if is_json(file) else _iob2)(file, scheme))
    except GeneratorExit:  # `--rows` asks for no more sentences: check those that were read
        scheme.check()
        raise
    scheme.check()


def read_ner(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[NerRow], list[DataFile]]:
    """Read sentences with named entities.

    Args:
        arguments: `FILE` arguments: IOB2, where the last column with tags counts, the token is the first column or
            stands behind its number, and `# text = ` comments give the sentence, else its tokens do; or
            JSONL, with entities spelled out or with tokens and their tags.
        rows: `START:STOP[:STEP]` of the sentences of each file.

    Raises:
        DataError: a file is missing, empty, malformed, or does not tell its language.
    """
    files = find_files(arguments)
    return pick_rows(files, rows, _read)
