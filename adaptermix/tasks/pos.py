"""Parts of speech: one tag for every token, from CoNLL-U, other columns, or JSONL; tagged by a head, or generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from ..errors import DataError
from ..io.json_types import JsonObject
from .base import BaseTask, task
from .data.files import DataFile
from .data.tables import is_json, named_language, row_cluster, row_language, usable
from .labels import macro_f1
from .metrics import Metric, f1_ends, mean, mean_ends
from .prompts import Template, table
from .tagged import TaggedRow

_CONLLU = 10
"""Columns of CoNLL-U: ID FORM LEMMA UPOS XPOS FEATS HEAD DEPREL DEPS MISC."""
_NONE = "_"
"""What CoNLL-U has for a tag that is not annotated; also the tag of a word that a head cannot see."""
_DOCUMENT = "-DOCSTART-"
_MOST_PARTS = 4
"""Most parts of a token with blanks, such as a number or a Vietnamese word; a sentence usually has more words."""
_TOKEN_NAMES = ("tokens", "words")
_TAG_NAMES = ("upos", "pos", "pos_tags", "tags")
Line = tuple[int, list[str]]


def _row(tokens: Sequence[str], tags: Sequence[str], language: str, cluster: str = "") -> TaggedRow | None:
    """Return a row; None if a token has no tag."""
    if not tokens or _NONE in tags:
        return None
    return TaggedRow(text=" ".join(tokens), tokens=tuple(tokens), tags=tuple(tags), language=language, cluster=cluster)


def _sentences(file: DataFile) -> Iterator[list[Line]]:
    """Yield the lines of each sentence in cells; comments are left out."""
    lines = list(file.lines())
    is_tabbed = any("\t" in line for _, line in lines)
    rows = [(number, line.split("\t") if is_tabbed else line.split(), line) for number, line in lines]
    width = next((len(cells) for _, cells, line in rows if line.strip() and line[0] != "#"), 0)
    for is_filled, block in groupby(rows, key=lambda row: bool(row[2].strip())):
        # A token may be # too, and then has a tag.
        kept = [(number, cells) for number, cells, line in block if line[:1] != "#" or len(cells) == width]
        if is_filled and kept:
            yield kept


def _columns(file: DataFile) -> Iterator[TaggedRow | None]:
    """Yield rows of one token a line; blank lines separate sentences."""
    language = row_language(file)
    width = 0
    for lines in _sentences(file):
        width = width or len(lines[0][1])
        tokens, tags = [], []
        for number, cells in lines:
            if len(cells) != width or width < 2:
                raise DataError(
                    f"{file.path}:{number}: a row must have a token and a tag in as many columns as the first one, "
                    f"found {' '.join(cells)[:60]!r}.",
                    code="pos.columns",
                )
            is_conllu = width == _CONLLU
            if cells[0] == _DOCUMENT or (is_conllu and not cells[0].isdecimal()):
                continue  # CoNLL-U has lines for contracted words (1-2) and omitted ones (1.1) besides their parts
            token, tag = (cells[1], cells[3]) if is_conllu else (cells[0], cells[-1])
            if len(token.split()) > _MOST_PARTS:
                raise DataError(
                    f"{file.path}:{number}: a file of parts of speech must have one token per line with its tag, and "
                    f"a blank line after each sentence (CoNLL-U, or a token, a tab and a tag), found the text "
                    f"{token[:40]!r}. Pass such a file, or the task that this file is for.",
                    code="pos.sentence",
                )
            if not token.strip() or len(tag.split()) != 1:
                raise DataError(
                    f"{file.path}:{number}: a token must have one tag without blanks, found {' '.join(cells)[:60]!r}.",
                    code="pos.tag",
                )
            # CoNLL-U allows blanks inside of numbers, which would look like two tokens.
            tokens.append("".join(token.split()))
            tags.append(tag)
        if tokens:
            yield _row(tokens, tags, language)


def _texts(row: JsonObject, names: Sequence[str]) -> list[str] | None:
    """Return the list of texts in the first of these fields that is there, without blanks; None if it is not one."""
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        return None
    return ["".join(text.split()) for text in value]


def _json(file: DataFile) -> Iterator[TaggedRow | None]:
    """Yield rows of {"tokens" or "words", "upos" or "pos" or "tags", "language"}."""
    for number, row in file.json_rows():
        tokens, tags = _texts(row, _TOKEN_NAMES), _texts(row, _TAG_NAMES)
        if tokens is None or tags is None or len(tokens) != len(tags):
            raise DataError(
                f"{file.path}:{number}: a row must have 'tokens' and as many tags ('upos', 'pos' or 'tags'), all of "
                "them text.",
                code="pos.json",
            )
        yield _row(tokens, tags, row_language(file, named_language(row)), row_cluster(row))


@task
class Pos(BaseTask[TaggedRow]):
    """Part-of-speech tagging, scored by the accuracy of tags.

    Accuracy is over all tokens, as for the POS of XGLUE (Liang et al., EMNLP 2020, arXiv 2004.01401) and as for UPOS in
    evaluations of Universal Dependencies with gold tokens. `macro_f1` is the mean over tags of F1, over the tags that
    a language's gold tokens have. An answer is the tags in order, separated by blanks; a token without a tag is wrong.

    Files are CoNLL-U, whose UPOS is read; other columns, where the token is the first one and the tag the last one; or
    JSONL with tokens and tags. Sentences with a token that has no tag (`_`) are left out.
    """

    name = "pos"
    templates = table(
        Template(name="plain", prompt="Sentence: {text}\nTags:", lead=" "),
        Template(
            name="chat",
            prompt="{text}",
            chat=True,
            system="Answer with the universal part-of-speech tag of each token, in order, separated by blanks.",
        ),
    )

    def rows_of(self, file: DataFile) -> Iterator[TaggedRow | None]:
        return usable((_json if is_json(file) else _columns)(file))

    def fields(self, row: TaggedRow) -> Mapping[str, str]:
        return {"text": row.text}

    def answer(self, row: TaggedRow) -> str:
        return " ".join(row.tags)

    def words(self, row: TaggedRow) -> tuple[str, ...]:
        return row.tokens

    def tags(self, row: TaggedRow) -> tuple[str, ...]:
        return row.tags

    def head_tags(self, rows: Sequence[TaggedRow]) -> tuple[str, ...]:
        """Return the tags of these rows, which are the labels of a head."""
        return tuple(sorted({tag for row in rows for tag in row.tags}))

    def answer_from_tags(self, row: TaggedRow, tags: Sequence[str]) -> str:
        return " ".join(tags)

    def metrics(self, rows: Sequence[TaggedRow]) -> tuple[Metric, ...]:
        offsets = {tag: 3 * index for index, tag in enumerate(self.head_tags(rows))}

        def pairs(row: TaggedRow, answer: str) -> Iterator[tuple[str, str | None]]:
            tags = answer.split()
            return ((tag, tags[index] if index < len(tags) else None) for index, tag in enumerate(row.tags))

        def right(row: TaggedRow, answer: str) -> Sequence[float]:
            return sum(gold == tag for gold, tag in pairs(row, answer)), len(row.tags)

        def by_tag(row: TaggedRow, answer: str) -> Sequence[float]:
            counts = [0.0] * (3 * len(offsets))
            for gold, tag in pairs(row, answer):
                if gold == tag:
                    counts[offsets[gold]] += 1
                    continue
                counts[offsets[gold] + 2] += 1
                if tag in offsets:
                    counts[offsets[tag] + 1] += 1
            return counts

        return (
            Metric(name="accuracy", count=right, value=mean, ends=mean_ends),
            Metric(name="macro_f1", count=by_tag, value=macro_f1, ends=f1_ends),
        )
