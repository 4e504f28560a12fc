"""Tasks whose answers are typed parts of a sentence, generated as text or tagged by a head: IOB2, rows and answers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import DataError
from ..io.json_types import JsonValue
from .base import BaseTask
from .data.files import DataFile
from .data.tables import Row
from .metrics import Counts, Metric, f1_ends, micro_f1

# MASSIVE counts these by character (He and Garner's scorer; ja-JP, zh-CN, zh-TW).
CHARACTER_LANGUAGES = ("ja", "zh", "zh-Hant")
Pairs = Sequence[tuple[str, str]]
"""(type, text) of each part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedRow(Row):
    """A sentence that may have tags.

    Args:
        text: The sentence.
        tokens: The sentence in tokens, where they are annotated; else empty.
        tags: Tag per token; as long as `tokens`.
    """

    text: str
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)


def split_tokens(text: str, language: str) -> tuple[str, ...]:
    """Split a sentence at blanks, or into characters where words are not separated.

    ASCII words stay whole in character languages, as in MASSIVE's scorer.
    """
    if language not in CHARACTER_LANGUAGES:
        return tuple(text.split())
    return tuple(piece for word in text.split() for piece in re.findall(r"[\x21-\x7e]+|[^\x00-\x7f]", word))


def iob2_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, start, stop) of each span of IOB2 tags, as seqeval's strict mode has them.

    A span goes from a `B-` to the last `I-` of its type. An `I-` that continues no span is outside.

    Example:
        >>> iob2_spans(["B-PER", "I-PER", "I-LOC", "B-LOC"])
        [('PER', 0, 2), ('LOC', 3, 4)]
    """
    spans = []
    for start, tag in enumerate(tags):
        if tag[:2] == "B-":
            stop = start + 1
            while stop < len(tags) and tags[stop] == f"I-{tag[2:]}":
                stop += 1
            spans.append((tag[2:], start, stop))
    return spans


def strict_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags in which an `I-` that continues no entity of its type is `O`.

    Example:
        >>> strict_tags(["B-PER", "I-PER", "I-LOC"])
        ('B-PER', 'I-PER', 'O')
    """
    inside = {index for _, start, stop in iob2_spans(tags) for index in range(start, stop)}
    return tuple(tag if index in inside else "O" for index, tag in enumerate(tags))


def tag_entities(tokens: Sequence[str], entities: Pairs) -> list[str]:
    """Return IOB2 tags for entities given as text, each at its first occurrence that no earlier one took.

    Blanks are ignored, so that "Al-Zaman" matches `Al`, `-`, `Zaman`; case is not. Entities that do not occur get no
    tags.

    Example:
        >>> tag_entities(["Ada", "met", "Ada", "Lovelace"], [("PER", "Ada"), ("PER", "Ada Lovelace")])
        ['B-PER', 'O', 'B-PER', 'I-PER']
    """
    squeezed = ["".join(token.split()) for token in tokens]
    tags = ["O"] * len(tokens)
    for kind, value in entities:
        if occurrence := _find(squeezed, tags, "".join(value.split())):
            start, stop = occurrence
            tags[start:stop] = [f"B-{kind}"] + [f"I-{kind}"] * (stop - start - 1)
    return tags


def _find(tokens: Sequence[str], tags: Sequence[str], phrase: str) -> tuple[int, int] | None:
    for start in range(len(tokens)):
        joined = ""
        for index in range(start, len(tokens)):
            joined += tokens[index]
            if tags[index] != "O" or not joined or not phrase.startswith(joined):
                break
            if joined == phrase:
                return start, index + 1
    return None


def count_bags(gold: Iterable[object], predicted: Iterable[object]) -> Counts:
    """Compare bags of pairs or of spans."""
    want, have = Counter(gold), Counter(predicted)
    hit = (want & have).total()
    return Counts(hit, have.total() - hit, want.total() - hit)


def check_tags(file: DataFile, number: int, tags: Sequence[object], known: re.Pattern[str]) -> None:
    """Refuse tags of other schemes, whose spans would be read as words outside of any span.

    Raises:
        DataError: a tag does not match the pattern.
    """
    for odd in (tag for tag in tags if not isinstance(tag, str) or not known.fullmatch(tag)):
        advice = "Numbers need names: write the tags as text, or read a data set whose features name the classes (hf:)."
        text = repr(odd[:60] if isinstance(odd, str) else odd)
        raise DataError(
            f"{file.path}:{number}: a tag must be O, B-TYPE or I-TYPE (IOB2), found {text}."
            + f" {advice}" * isinstance(odd, int),
            code="row.tag",
        )


class Tagged(str):
    """An answer that a head gave by tagging words.

    The predictions file has the text. Scores use the tags and pairs, since a value may occur twice in a
    sentence, or contain the signs that separate parts of an answer.

    Args:
        text: The answer as text.
        tags: IOB2 tag per token.
        pairs: (type, value) of each span.
    """

    tags: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def __new__(cls, text: str, *, tags: Sequence[str], pairs: Pairs) -> Tagged:
        answer = super().__new__(cls, text)
        answer.tags, answer.pairs = tuple(tags), tuple(pairs)
        return answer


def to_entry(answer: str) -> dict[str, object]:
    """Return an answer as plain data, with its tags and pairs."""
    if not isinstance(answer, Tagged):
        return {"answer": answer}
    return {"answer": str(answer), "tags": list(answer.tags), "pairs": [list(pair) for pair in answer.pairs]}


def from_entry(entry: Mapping[str, JsonValue]) -> str:
    """Return the answer of which `to_entry` made plain data.

    Raises:
        KeyError: there is no answer.
        TypeError: its tags or pairs have another form.
        ValueError: likewise.
    """
    text = str(entry["answer"])
    if "tags" not in entry:
        return text
    tags, pairs = entry["tags"], entry["pairs"]
    if not isinstance(tags, list) or not isinstance(pairs, list):
        raise TypeError("tags and pairs must be lists")
    return Tagged(text, tags=list(map(str, tags)), pairs=[(str(kind), str(value)) for kind, value in pairs])


TR = TypeVar("TR", bound=TaggedRow)


class TaggedTask(BaseTask[TR]):
    """A task whose answers are (type, text) pairs, as text or as IOB2 tags of words."""

    row: type[TR]
    format: Callable[[Pairs], str]
    """From pairs to the answer."""
    parse: Callable[[str], list[tuple[str, str]]]
    """From a generated answer to its pairs."""
    count: Callable[[Pairs, Pairs], Counts]
    """Compares bags of right and predicted pairs."""

    @abstractmethod
    def pairs(self, row: TR) -> Pairs:
        """Return the right pairs of a row."""

    @abstractmethod
    def with_pairs(self, row: TR, pairs: tuple[tuple[str, str], ...]) -> TR:
        """Return the row with these pairs as the right ones."""

    @abstractmethod
    def tagged_pairs(self, row: TR, tags: Sequence[str]) -> Pairs:
        """Return the pairs that IOB2 tags of the row's tokens stand for."""

    def predicted(self, answer: str) -> Pairs:
        """Return the pairs of an answer, generated or tagged."""
        return answer.pairs if isinstance(answer, Tagged) else self.parse(answer)

    def fields(self, row: TR) -> Mapping[str, str]:
        return {"text": row.text}

    def answer(self, row: TR) -> str:
        return self.format(self.pairs(row))

    def evidence(self, row: TR) -> tuple[str, ...]:
        return tuple(value for _, value in self.pairs(row))

    def words(self, row: TR) -> tuple[str, ...]:
        if not row.tokens:
            raise DataError(
                f"a token classification head needs rows with tokens, found one with text only: {row.text[:60]!r}. "
                "Give data in columns or with tokens, or have answers generated: a causal language model with --head "
                "none.",
                code="head.no-tokens",
            )
        return row.tokens

    def answer_from_tags(self, row: TR, tags: Sequence[str]) -> Tagged:
        pairs = self.tagged_pairs(row, tags)
        return Tagged(self.format(pairs), tags=tags, pairs=pairs)

    def unlabelled(self, text: str, language: str) -> TR:
        tokens = split_tokens(text, language)
        return self.row(text=text, language=language, tokens=tokens, tags=("O",) * len(tokens))

    def labelled(self, row: TR, answer: str) -> TR:
        return self.with_pairs(row, tuple(self.predicted(answer)))

    def agreement(self, rows: Sequence[TR]) -> tuple[Metric, ...]:
        """Return type F1: texts are in the language of each sentence, so only their types compare."""
        return (Metric(name="type_f1", count=self.count_types, value=micro_f1, ends=f1_ends),)

    def count_types(self, row: TR, answer: str) -> Counts:
        """Compare bags of the types alone."""
        gold, predicted = self.pairs(row), self.predicted(answer)
        return self.count([(kind, "") for kind, _ in gold], [(kind, "") for kind, _ in predicted])
