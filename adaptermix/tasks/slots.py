"""Slot filling: xSID CoNLL, `text TAB tags TAB intent`, MASSIVE JSONL, and JSONL with the slots spelled out.

Answers are generated as `type: value; type: value` or `None`, or tagged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

from ..errors import DataError
from .base import task
from .data.files import DataFile
from .data.tables import named_language, row_cluster, row_language
from .metrics import Counts, Metric, f1_ends, micro_f1
from .prompts import Template, table
from .tagged import Pairs, Tagged, TaggedRow, TaggedTask, check_tags, count_bags, iob2_spans, split_tokens

NO_SLOTS = "None"
# xSID's English training set has 330 tags such as "Orecurring_datetime", which are outside.
_TAG = re.compile(r"O\S*|[BI]-\S+")
_MASSIVE_SLOT = re.compile(r"\[\s*(?P<type>[^\]:]+?)\s*:\s*(?P<value>[^\]]*?)\s*\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow(TaggedRow):
    """A command with its slots. Its tags are slot types, `O` outside.

    Args:
        slots: (type, value) in order.
        starts: Tokens at which a slot starts, which separate slots of one type that touch.
    """

    slots: tuple[tuple[str, str], ...] = ()
    starts: tuple[int, ...] = ()


def iob2_tags(row: SlotRow) -> tuple[str, ...]:
    """Return a row's tags as IOB2.

    Example:
        >>> row = SlotRow(text="a b c", language="en", tokens=("a", "b", "c"), tags=("x", "x", "x"), starts=(0, 2))
        >>> iob2_tags(row)
        ('B-x', 'I-x', 'B-x')
    """
    return tuple(
        tag if tag == "O" else f"{'B' if index in row.starts or before != tag else 'I'}-{tag}"
        for index, (before, tag) in enumerate(zip(("O", *row.tags), row.tags, strict=False))
    )


def slots_in(tokens: Sequence[str], tags: Sequence[str], text: str) -> list[tuple[str, str]]:
    """Return (type, value) of each span of IOB2 tags, the value spelled as in the text."""
    slots = []
    for kind, start, stop in iob2_spans(tags):
        joined, apart = "".join(tokens[start:stop]), " ".join(tokens[start:stop])
        slots.append((kind, joined if joined in text and apart not in text else apart))
    return slots


def _row_from_iob2(tokens: Sequence[str], iob2: Sequence[str], text: str, language: str) -> SlotRow:
    tags = tuple(tag[2:] if tag[:2] in ("B-", "I-") else "O" for tag in iob2)
    # Start a slot by `tags`, since tags such as "Orecurring" are outside.
    starts = [i for i, tag in enumerate(tags) if tag != "O" and (iob2[i][:2] == "B-" or i == 0 or tags[i - 1] != tag)]
    strict = [tag if tag == "O" else f"{'B' if i in starts else 'I'}-{tag}" for i, tag in enumerate(tags)]
    # Annotation may be by word where scoring is by character.
    pieces = [
        (piece, tag, index in starts and first == 0)
        for index, (token, tag) in enumerate(zip(tokens, tags, strict=True))
        for first, piece in enumerate(split_tokens(token, language))
    ]
    return SlotRow(
        text=text,
        slots=tuple(slots_in(tokens, strict, text)),
        language=language,
        tokens=tuple(piece for piece, _, _ in pieces),
        tags=tuple(tag for _, tag, _ in pieces),
        starts=tuple(number for number, (_, _, starts) in enumerate(pieces) if starts),
    )


def _conll(file: DataFile) -> Iterator[SlotRow]:
    """Yield rows of xSID: `# key = value` comments, then index, token, intent, tag; blank lines separate rows."""
    language = row_language(file)
    for filled, lines in groupby(file.lines(), key=lambda item: bool(item[1].strip())):
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
                raise DataError(
                    f"{file.path}:{number}: xSID rows have 4 columns, found {len(columns)}: {line[:60]!r}.",
                    code="slots.columns",
                )
            check_tags(file, number, [columns[3]], _TAG)
            tokens.append(columns[1])
            tags.append(columns[3])
        if tokens:
            yield _row_from_iob2(tokens, tags, text or " ".join(tokens), language)


def _tagged_lines(file: DataFile) -> Iterator[SlotRow]:
    """Yield rows of text, tags and intent, separated by tabs."""
    language = row_language(file)
    for number, line in file.lines():
        if not line.strip():
            continue
        columns = line.split("\t")
        tokens, tags = columns[0].split(), columns[1].split() if len(columns) > 1 else []
        if len(tokens) != len(tags):
            raise DataError(
                f"{file.path}:{number}: one tag per token is needed, found {len(tokens)} tokens and {len(tags)} tags.",
                code="slots.tag-count",
            )
        check_tags(file, number, tags, _TAG)
        yield _row_from_iob2(tokens, tags, columns[0], language)


def _massive(file: DataFile) -> Iterator[SlotRow | None]:
    """Yield rows of MASSIVE: `annot_utt` such as "wake me at [time : five am]", language in `locale`."""
    for number, row in file.json_rows():
        marked = row.get("annot_utt")
        if not isinstance(marked, str):
            raise DataError(f"{file.path}:{number}: a MASSIVE row must have 'annot_utt'.", code="slots.massive")
        language = row_language(file, row.get("locale"))
        if not marked.strip():
            yield None
            continue
        tokens: list[str] = []
        tags: list[str] = []
        slots, starts = [], []
        last = 0
        for match in [*_MASSIVE_SLOT.finditer(marked), None]:
            plain = split_tokens(marked[last : match.start() if match else None], language)
            tokens += plain
            tags += ["O"] * len(plain)
            if match:
                inside = split_tokens(match["value"], language)
                starts += [len(tokens)] if inside else []
                tokens += inside
                tags += [match["type"]] * len(inside)
                slots.append((match["type"], match["value"]))
                last = match.end()
        yield SlotRow(
            text=str(row.get("utt") or _MASSIVE_SLOT.sub(lambda match: match["value"], marked)),
            slots=tuple(slots),
            language=language,
            tokens=tuple(tokens),
            tags=tuple(tags),
            starts=tuple(starts),
            cluster=row_cluster(row),
        )


def _spelled_out(file: DataFile) -> Iterator[SlotRow | None]:
    """Yield rows of {"text", "slots": [{"type", "value"}], "language"}; values need not occur in the text."""
    for number, row in file.json_rows():
        try:
            if not isinstance(listed := row["slots"], Iterable):
                raise TypeError("not a list")
            parts = [(slot["type"], slot["value"]) for slot in listed]
            text = "" if row["text"] is None else row["text"]
            if not all(isinstance(part, str | int | float) for part in (text, *chain.from_iterable(parts))):
                raise TypeError("neither text nor a number")
            slots = tuple((str(kind), str(value)) for kind, value in parts)
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{file.path}:{number}: a row must be {{"text": ..., "slots": [{{"type": ..., "value": ...}}]}}.',
                code="slots.json",
            ) from error
        language = row_language(file, named_language(row))
        made = SlotRow(text=str(text), slots=slots, language=language, cluster=row_cluster(row))
        yield made if str(text).strip() else None


def _tagged_rows(file: DataFile) -> Iterator[SlotRow | None]:
    """Yield rows of {"tokens", "slots" or "tags", "text", "language"} with an IOB2 tag for each token."""
    for number, row in file.json_rows():
        tokens, tags = row.get("tokens"), row.get("tags", row.get("slots"))
        is_tagged = isinstance(tokens, list) and isinstance(tags, list) and len(tokens) == len(tags)
        listed = [*tokens, *tags] if isinstance(tokens, list) and isinstance(tags, list) else []
        if not is_tagged or not all(isinstance(item, str) for item in listed):
            raise DataError(
                f"{file.path}:{number}: a row must have 'tokens' and as many 'slots' or 'tags', all of them text.",
                code="slots.tokens-tags",
            )
        words, marks = list(map(str, listed[: len(listed) // 2])), list(map(str, listed[len(listed) // 2 :]))
        check_tags(file, number, marks, _TAG)
        text, language = row.get("text"), row_language(file, named_language(row))
        made = _row_from_iob2(words, marks, text if isinstance(text, str) else " ".join(words), language)
        yield replace(made, cluster=row_cluster(row)) if words else None


def _reader(file: DataFile) -> Callable[[DataFile], Iterator[SlotRow | None]]:
    """Choose by the first line that is not blank."""
    first = next((line for _, line in file.lines() if line.strip()), None)
    if first is None:
        raise DataError(f"a data file must hold rows, and {file.path} is empty.", code="data.empty")
    if first.startswith("{"):
        if '"annot_utt"' in first:
            return _massive
        return _tagged_rows if '"tokens"' in first and '"slots": [{' not in first else _spelled_out
    columns = first.split("\t")
    if first.startswith("#") or (len(columns) >= 4 and columns[0].isdigit()):
        return _conll
    if len(columns) >= 2:
        return _tagged_lines
    raise DataError(
        f"{file.path}:1: slot data must be xSID CoNLL, 'text TAB tags', MASSIVE JSONL, or JSONL with 'text' and "
        f"'slots', found {first[:60]!r}.",
        code="slots.format",
    )


def format_slots(slots: Pairs) -> str:
    """Return the answer for these slots.

    Example:
        >>> format_slots([("time", "five am"), ("date", "this week")])
        'time: five am; date: this week'
    """
    return "; ".join(f"{kind}: {value}" for kind, value in slots) or NO_SLOTS


def parse_slots(answer: str) -> list[tuple[str, str]]:
    """Read the first line of an answer; parts that are not `type: value` are dropped.

    As in MASSIVE's scorer a part must split on ": " into exactly two.

    Example:
        >>> parse_slots("time: five am; date this week; city: ")
        [('time', 'five am')]
    """
    lines = answer.strip().splitlines()
    if not lines or lines[0].strip().lower() == NO_SLOTS.lower():
        return []
    parts = [part.split(": ") for part in lines[0].split("; ")]
    return [(p[0].strip(), p[1].strip()) for p in parts if len(p) == 2 and p[0].strip() and p[1].strip()]


def count_pairs(gold: Pairs, predicted: Pairs) -> Counts:
    """Compare bags of (type, value), ignoring case."""
    want, have = ([(kind, value.lower()) for kind, value in pairs] for pairs in (gold, predicted))
    return count_bags(want, have)


def iob2_of(tokens: Sequence[str], slots: Pairs, language: str) -> list[str]:
    """Return IOB2 tags of a command's tokens from predicted slots.

    Every occurrence of a value is tagged, ignoring case; later slots overwrite earlier ones; values that do not occur
    are ignored.
    """
    lowered = [token.lower() for token in tokens]
    tags = ["O"] * len(tokens)
    for kind, value in slots:
        phrase = [piece.lower() for piece in split_tokens(value, language)]
        for start in range(len(lowered) - len(phrase) + 1):
            if phrase and lowered[start : start + len(phrase)] == phrase:
                tags[start : start + len(phrase)] = [f"B-{kind}", *[f"I-{kind}"] * (len(phrase) - 1)]
    return tags


def merged_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, start, stop) of every run of one type; equal neighbours are one span, as in MASSIVE's scorer."""
    spans, start = [], 0
    for kind, run in groupby(tag if tag == "O" else tag[2:] for tag in tags):
        stop = start + len(list(run))
        if kind != "O":
            spans.append((kind, start, stop))
        start = stop
    return spans


_SCORERS = {"merged": merged_spans, "strict": iob2_spans}
"""From IOB2 tags to the spans that are compared."""
_SYSTEM = (
    "Given a command from the user, a voice assistant will extract entities essential for carry out the command. "
    "Your task is to extract the entities as words from the command if they fall under a predefined list of "
    "entity types."
)


@task
class Slots(TaggedTask[SlotRow]):
    """Slot filling, scored by micro F1.

    `pair_f1` compares (type, value) pairs, also if values do not occur in the command. `span_f1` compares token spans
    as MASSIVE's scorer does (FitzGerald et al., MASSIVE, ACL 2023, arXiv 2204.08582), or with `--scorer strict` as xSID
    does (van der Goot et al., NAACL 2021, arXiv 2105.07316), where equal neighbours are two spans; it needs annotated
    tokens. `type_f1` compares the types alone, so it distinguishes commands that were understood and answered in
    another language (`time: tomorrow` for `time: morgen`) from those that were not.
    """

    name = "slots"
    text_field = "text"
    blank = {"slots": []}
    row = SlotRow
    no_answer = NO_SLOTS
    scorers = tuple(_SCORERS)
    format, parse, count = staticmethod(format_slots), staticmethod(parse_slots), staticmethod(count_pairs)
    templates = table(
        Template(name="plain", prompt="Command: {text}\nSlots:", lead=" "),
        # Appendix D.2 of Liu and Niehues (ACL 2025), after He and Garner (2023); the wording is theirs.
        Template(name="mid-align", prompt="{text}", chat=True, system=_SYSTEM),
        # Their released Llama adapters were trained with a line break after each turn.
        Template(name="mid-align-eot", prompt="{text}", chat=True, system=_SYSTEM, broken_after="<|eot_id|>"),
    )

    def rows_of(self, file: DataFile) -> Iterator[SlotRow | None]:
        return _reader(file)(file)

    def pairs(self, row: SlotRow) -> Pairs:
        return row.slots

    def with_pairs(self, row: SlotRow, pairs: tuple[tuple[str, str], ...]) -> SlotRow:
        return replace(row, slots=pairs)

    def tags(self, row: SlotRow) -> tuple[str, ...]:
        self.words(row)
        return iob2_tags(row)

    def tagged_pairs(self, row: SlotRow, tags: Sequence[str]) -> Pairs:
        return slots_in(row.tokens, tags, row.text)

    def metrics(self, rows: Sequence[SlotRow], scorer: str = "merged") -> tuple[Metric, ...]:
        spans = _SCORERS[scorer]

        def by_pair(row: SlotRow, answer: str) -> Counts:
            # A tagged answer is spelled as tokens are: Chinese and Japanese are annotated by word, tagged by character.
            gold = self.tagged_pairs(row, iob2_tags(row)) if isinstance(answer, Tagged) else row.slots
            return count_pairs(gold, self.predicted(answer))

        def by_span(row: SlotRow, answer: str) -> Counts | None:
            if not row.tokens:
                return None
            if isinstance(answer, Tagged):
                return count_bags(spans(iob2_tags(row)), spans(answer.tags))
            return count_bags(spans(iob2_tags(row)), spans(iob2_of(row.tokens, parse_slots(answer), row.language)))

        counts: dict[str, Callable[[SlotRow, str], Counts | None]] = {"pair_f1": by_pair, "type_f1": self.count_types}
        if any(row.tokens for row in rows):
            counts["span_f1"] = by_span
        return tuple(Metric(name=name, count=count, value=micro_f1, ends=f1_ends) for name, count in counts.items())
