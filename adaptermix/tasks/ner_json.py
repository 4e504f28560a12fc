"""Named entities, generated as a JSON list or tagged."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .data import DataFile, NerRow, read_ner
from .data.ner import entities_in, entity_spans, strict_tags, tag_entities
from .data.slots import split_tokens
from .metrics import Counts, Metric, f1_ends, micro_f1
from .prompts import Template, table
from .tagged import Tagged, require_tokens

_STRING = r'"((?:[^"\\]|\\.)*)"'
_KIND, _TEXT = rf'"TypeName"\s*:\s*{_STRING}', rf'"Text"\s*:\s*{_STRING}'
_PAIR = re.compile(rf"{_KIND}\s*,\s*{_TEXT}|{_TEXT}\s*,\s*{_KIND}", re.DOTALL)


def format_entities(entities: Sequence[tuple[str, str]]) -> str:
    """Return the answer for these entities, in one line.

    Example:
        >>> format_entities([("PER", "Ada Lovelace")])
        '[{"TypeName": "PER", "Text": "Ada Lovelace"}]'
    """
    return json.dumps([{"TypeName": kind, "Text": value} for kind, value in entities], ensure_ascii=False)


def parse_entities(answer: str) -> list[tuple[str, str]]:
    """Read an answer back: its first JSON value if this is a list of entities or one entity, else what looks like one.

    So words around the list do no harm, and neither does an end that is cut off. Items without type or text are
    dropped.

    Example:
        >>> parse_entities('Sure: [{"Text": "Ada", "TypeName": "PER"}, {"TypeName": "LOC", "Text": "Lon')
        [('PER', 'Ada')]
    """
    value = _first_json(answer)
    if value == []:
        return []
    found = _entities(value if isinstance(value, list) else [value])
    return found or _entities(
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


def _entities(items: Iterable[Any]) -> list[tuple[str, str]]:
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


def count_entities(gold: Sequence[tuple[str, str]], predicted: Sequence[tuple[str, str]]) -> Counts:
    """Compare bags of (type, text); case counts, how blanks are written does not."""
    want, have = (
        Counter((kind.strip(), " ".join(value.split())) for kind, value in entities) for entities in (gold, predicted)
    )
    hit = sum((want & have).values())
    return Counts(hit, sum(have.values()) - hit, sum(want.values()) - hit)


def _tuple_counts(row: NerRow, answer: str) -> Counts:
    return count_entities(row.entities, answer.pairs if isinstance(answer, Tagged) else parse_entities(answer))


def _type_counts(row: NerRow, answer: str) -> Counts:
    """Compare bags of the entities' types alone."""
    found = answer.pairs if isinstance(answer, Tagged) else parse_entities(answer)
    return count_entities([(kind, "") for kind, _ in row.entities], [(kind, "") for kind, _ in found])


def _tags(row: NerRow, answer: str) -> Sequence[str]:
    if isinstance(answer, Tagged):
        return answer.tags
    return tag_entities(row.tokens, [(kind.strip(), value) for kind, value in parse_entities(answer)])


def _span_counts(row: NerRow, answer: str) -> Counts | None:
    if not row.tokens:
        return None
    gold, guess = set(entity_spans(row.tags)), set(entity_spans(_tags(row, answer)))
    hit = len(gold & guess)
    return Counts(hit, len(guess) - hit, len(gold) - hit)


class NerJson:
    """Named entity recognition, scored by micro F1.

    `tuple_f1` compares bags of (type, text), as Liu and Niehues do (ACL 2025). `entity_f1` compares token spans as
    seqeval's strict IOB2 does, with each predicted text at its first place that is still free; texts that do not occur
    cost nothing there. It needs tokens.
    """

    name = "ner-json"
    one_line = False  # chat models like to spread JSON over lines
    is_open = False
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="Text: {text}\nEntities:", lead=" "),
        # the form of the answer is that of Liu and Niehues, the wording of the system turn is ours
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

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[NerRow], list[DataFile]]:
        """Read sentences with named entities; see `adaptermix.tasks.data.ner`."""
        return read_ner(arguments, rows=rows)

    def fields(self, row: NerRow) -> Mapping[str, str]:
        """Return the sentence."""
        return {"text": row.text}

    def texts(self, row: NerRow) -> tuple[str, ...]:
        """Return the sentence."""
        return (row.text,)

    def answer(self, row: NerRow) -> str:
        """Return the entities as JSON."""
        return format_entities(row.entities)

    def words(self, row: NerRow) -> tuple[str, ...]:
        """Return the sentence's tokens."""
        return require_tokens(row.tokens, row.text)

    def tags(self, row: NerRow) -> tuple[str, ...]:
        """Return the tokens' tags; an `I-` that continues no entity is outside, as it is to the score."""
        self.words(row)
        return strict_tags(row.tags)

    def tagged(self, row: NerRow, tags: Sequence[str]) -> Tagged:
        """Return the entities that are tagged, as text and by place."""
        entities = entities_in(row.tokens, tags, row.text, row.language)
        return Tagged(format_entities(entities), tags=tags, pairs=entities)

    def evidence(self, row: NerRow) -> tuple[str, ...]:
        """Return the entities."""
        return tuple(value for _, value in row.entities)

    def language(self, row: NerRow) -> str:
        """Return the sentence's language."""
        return row.language

    def metrics(self, rows: Sequence[NerRow]) -> tuple[Metric, ...]:
        """Return tuple F1 and, where a row has tokens, span F1."""
        tuples = Metric(name="tuple_f1", count=_tuple_counts, value=micro_f1, ends=f1_ends)
        spans_too = any(row.tokens for row in rows)
        return (
            (tuples, Metric(name="entity_f1", count=_span_counts, value=micro_f1, ends=f1_ends))
            if spans_too
            else (tuples,)
        )

    def unlabelled(self, text: str, language: str) -> NerRow:
        """Return a row without entities, its tokens split at blanks (Chinese and Japanese by character)."""
        tokens = split_tokens(text, language)
        return NerRow(text=text, entities=(), language=language, tokens=tokens, tags=("O",) * len(tokens))

    def labelled(self, row: NerRow, answer: str) -> NerRow:
        """Return the row with the entities of an answer."""
        entities = answer.pairs if isinstance(answer, Tagged) else tuple(parse_entities(answer))
        return replace(row, entities=entities)

    def agreement(self, rows: Sequence[NerRow]) -> tuple[Metric, ...]:  # noqa: ARG002
        """Return type F1: names are spelled as the language of the sentence has them, so only their types compare."""
        return (Metric(name="type_f1", count=_type_counts, value=micro_f1, ends=f1_ends),)
