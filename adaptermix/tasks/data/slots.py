"""Slot-filling rows: xSID CoNLL, `text TAB tags TAB intent`, MASSIVE JSONL, and JSONL with the slots spelled out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files
from .tables import pick_rows, row_cluster, row_language

# xSID's English training set holds 330 tags such as "Orecurring_datetime", which are outside
_TAG = re.compile(r"O\S*|[BI]-\S+")
_MASSIVE_SLOT = re.compile(r"\[\s*(?P<type>[^\]:]+?)\s*:\s*(?P<value>[^\]]*?)\s*\]")
# MASSIVE counts these by character (He and Garner's scorer; ja-JP, zh-CN, zh-TW)
CHARACTER_LANGUAGES = ("ja", "zh", "zh-Hant")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow:
    """A command with its slots.

    Args:
        text: The command.
        slots: (type, value) in order.
        language: Language code.
        tokens: The command in tokens, where spans are annotated; else empty.
        tags: Slot type per token, "O" outside; as long as `tokens`.
        begins: Tokens at which a slot begins, which only they tell where slots of one type touch.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    text: str
    slots: tuple[tuple[str, str], ...]
    language: str
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    begins: tuple[int, ...] = ()
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.text,))


def iob2_tags(row: SlotRow) -> tuple[str, ...]:
    """Return a row's tags as IOB2.

    Example:
        >>> row = SlotRow(
        ...     text="a b c", slots=(), language="en", tokens=("a", "b", "c"), tags=("x", "x", "x"), begins=(0, 2)
        ... )
        >>> iob2_tags(row)
        ('B-x', 'I-x', 'B-x')
    """
    return tuple(
        tag if tag == "O" else f"{'B' if place in row.begins or before != tag else 'I'}-{tag}"
        for place, (before, tag) in enumerate(zip(("O", *row.tags), row.tags, strict=False))
    )


def slots_in(tokens: Sequence[str], tags: Sequence[str], text: str) -> list[tuple[str, str]]:
    """Return (type, value) of each span of IOB2 tags, the value joined as it stands in the text."""
    starts = [place for place, tag in enumerate(tags) if tag[:2] == "B-"]
    slots = []
    for start in starts:
        kind, stop = tags[start][2:], start + 1
        while stop < len(tags) and tags[stop] == f"I-{kind}":
            stop += 1
        joined, apart = "".join(tokens[start:stop]), " ".join(tokens[start:stop])
        slots.append((kind, joined if joined in text and apart not in text else apart))
    return slots


def split_tokens(text: str, language: str) -> tuple[str, ...]:
    """Split a command for span scoring: by blanks, or by character where words are not separated.

    ASCII words stay whole in character languages, as in MASSIVE's scorer.
    """
    if language not in CHARACTER_LANGUAGES:
        return tuple(text.split())
    return tuple(piece for word in text.split() for piece in re.findall(r"[\x21-\x7e]+|[^\x00-\x7f]", word))


def _check_tags(file: DataFile, number: int, tags: Sequence[str]) -> None:
    """Refuse tags of other schemes, whose slots would be taken for words outside."""
    odd = next((tag for tag in tags if not _TAG.fullmatch(tag)), None)
    if odd is not None:
        raise DataError(f"{file.path}:{number}: a tag must be O, B-TYPE or I-TYPE (IOB2), found {odd[:60]!r}.")


def _row_from_bio(tokens: Sequence[str], bio: Sequence[str], text: str, language: str) -> SlotRow:
    tags = tuple(tag[2:] if tag[:2] in ("B-", "I-") else "O" for tag in bio)
    # by `tags`: those that only begin with O are outside
    starts = [i for i, tag in enumerate(tags) if tag != "O" and (bio[i][:2] == "B-" or i == 0 or tags[i - 1] != tag)]
    iob2 = [tag if tag == "O" else f"{'B' if i in starts else 'I'}-{tag}" for i, tag in enumerate(tags)]
    # annotation may be by word where scoring is by character
    pieces = [
        (piece, tag, place in starts and first == 0)
        for place, (token, tag) in enumerate(zip(tokens, tags, strict=True))
        for first, piece in enumerate(split_tokens(token, language))
    ]
    return SlotRow(
        text=text,
        slots=tuple(slots_in(tokens, iob2, text)),
        language=language,
        tokens=tuple(piece for piece, _, _ in pieces),
        tags=tuple(tag for _, tag, _ in pieces),
        begins=tuple(number for number, (_, _, begins) in enumerate(pieces) if begins),
    )


def _conll(file: DataFile) -> Iterator[SlotRow]:
    """XSID: `# key = value` comments, then index, token, intent, tag; rows parted by blank lines."""
    language = row_language(file)
    blocks = groupby(file.lines(), key=lambda item: bool(item[1].strip()))
    for filled, lines in blocks:
        if not filled:
            continue
        text, tokens, tags = "", [], []
        for number, line in lines:
            if line.startswith("#"):
                key, _, value = line[1:].partition("=")
                text = value.strip() if key.strip() == "text" else text
                continue
            columns = line.split("\t")
            if len(columns) < 4:
                raise DataError(f"{file.path}:{number}: xSID rows have 4 columns, found {len(columns)}: {line[:60]!r}.")
            _check_tags(file, number, [columns[3]])
            tokens.append(columns[1])
            tags.append(columns[3])
        if tokens:
            yield _row_from_bio(tokens, tags, text or " ".join(tokens), language)


def _tagged_lines(file: DataFile) -> Iterator[SlotRow]:
    """Text, tags and intent, parted by tabs."""
    language = row_language(file)
    for number, line in file.lines():
        if not line.strip():
            continue
        columns = line.split("\t")
        tokens, tags = columns[0].split(), columns[1].split() if len(columns) > 1 else []
        if len(tokens) != len(tags):
            raise DataError(
                f"{file.path}:{number}: one tag per token is needed, found {len(tokens)} tokens and {len(tags)} tags."
            )
        _check_tags(file, number, tags)
        yield _row_from_bio(tokens, tags, columns[0], language)


def _massive(file: DataFile) -> Iterator[SlotRow | None]:
    """MASSIVE: `annot_utt` such as "wake me at [time : five am]", language in `locale`."""
    for number, row in file.json_rows():
        marked = row.get("annot_utt")
        if not isinstance(marked, str):
            raise DataError(f"{file.path}:{number}: a MASSIVE row must have 'annot_utt'.")
        language = row_language(file, row.get("locale"))
        if not marked.strip():
            yield None
            continue
        tokens: list[str] = []
        tags: list[str] = []
        slots = []
        begins = []
        last = 0
        for match in [*_MASSIVE_SLOT.finditer(marked), None]:
            plain = split_tokens(marked[last : match.start() if match else None], language)
            tokens += plain
            tags += ["O"] * len(plain)
            if match:
                inside = split_tokens(match["value"], language)
                begins += [len(tokens)] if inside else []
                tokens += inside
                tags += [match["type"]] * len(inside)
                slots.append((match["type"], match["value"]))
                last = match.end()
        text = str(row.get("utt") or _MASSIVE_SLOT.sub(lambda found: found["value"], marked))
        yield SlotRow(
            text=text,
            slots=tuple(slots),
            language=language,
            tokens=tuple(tokens),
            tags=tuple(tags),
            begins=tuple(begins),
            cluster=row_cluster(row),
        )


def _spelled_out(file: DataFile) -> Iterator[SlotRow | None]:
    """{"text", "slots": [{"type", "value"}], "language"}: values need not occur in the text."""
    for number, row in file.json_rows():
        try:
            parts = [(slot["type"], slot["value"]) for slot in row["slots"]]
            text = "" if row["text"] is None else row["text"]
            if not all(isinstance(part, str | int | float) for part in (text, *chain.from_iterable(parts))):
                raise TypeError("neither text nor a number")
            slots = tuple((str(kind), str(value)) for kind, value in parts)
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{file.path}:{number}: a row must be {{"text": ..., "slots": [{{"type": ..., "value": ...}}]}}.'
            ) from error
        language = row_language(file, row.get("language"))
        made = SlotRow(text=str(text), slots=slots, language=language, cluster=row_cluster(row))
        yield made if str(text).strip() else None


Reader = Callable[[DataFile], Iterator[SlotRow | None]]


def _reader(file: DataFile) -> Reader:
    """Choose by the first line that is not blank."""
    first = next((line for _, line in file.lines() if line.strip()), None)
    if first is None:
        raise DataError(f"a data file must hold rows, and {file.path} is empty.")
    if first.startswith("{"):
        return _massive if '"annot_utt"' in first else _spelled_out
    columns = first.split("\t")
    if first.startswith("#") or (len(columns) >= 4 and columns[0].isdigit()):
        return _conll
    if len(columns) >= 2:
        return _tagged_lines
    raise DataError(
        f"{file.path}:1: slot data must be xSID CoNLL, 'text TAB tags', MASSIVE JSONL, or JSONL with 'text' and "
        f"'slots', found {first[:60]!r}."
    )


def read_slots(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[SlotRow], list[DataFile]]:
    """Read slot-filling rows.

    Args:
        arguments: `FILE` arguments.
        rows: `START:STOP[:STEP]` of the rows of each file.

    Returns:
        The rows in file order, and the files.

    Raises:
        DataError: a file is missing, empty, malformed, or does not tell its language.
    """
    return pick_rows(find_files(arguments), rows, lambda file: _reader(file)(file))
