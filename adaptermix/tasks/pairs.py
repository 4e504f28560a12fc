"""Pairs of texts with labels of any kind: paraphrases, questions with answers, queries with advertisements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError
from .base import task
from .data.files import DataFile
from .data.tables import is_json, table_cells
from .labels import FreelyLabelledTask, LabelledRow
from .prompts import Template, table


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow(LabelledRow):
    """Two texts with their label.

    Args:
        first: The first text, such as a question.
        second: The second text, such as an answer.
        detail: What the second text continues with, such as the description of an advertisement after its title.
    """

    first: str
    second: str
    detail: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.first, f"{self.second} {self.detail}".strip()


def _check_texts(file: DataFile, texts: Sequence[str]) -> None:
    if len(texts) > 1 and all(text.isdecimal() for text in texts):
        raise DataError(
            f"{file.path}: the first text of a row must be a text, and all of them are numbers. Put a header before "
            "the rows, such as id, sentence1, sentence2, label.",
            code="pairs.numbered",
        )


@task
class Pairs(FreelyLabelledTask[PairRow]):
    """Classification of two texts together, scored by accuracy.

    For PAWS-X (Yang et al., EMNLP 2019, arXiv 1908.11828), question and answer matching and query and advertisement
    matching (QAM and QADSM of XGLUE, Liang et al., EMNLP 2020, arXiv 2004.01401), and other pairs. `macro_f1` is over
    the labels that a language's gold rows have. An answer that is not a label of any row is wrong.

    Files are TSV or CSV with a header such as PAWS-X's, or JSONL with such fields. Without a header the columns are
    first text, second text and label, or four: query, title, description and label, where title and description
    become one text. Labels are read as they are written.
    """

    name = "pairs"
    blank = {"label": "-"}
    row = PairRow
    columns = {
        "first": ("sentence1", "text1", "first", "question", "query", "premise"),
        "second": ("sentence2", "text2", "second", "answer", "ad_title", "title", "hypothesis"),
        "label": ("label", "gold_label", "relevance_label", "relevance"),
    }
    optional = {"detail": ("ad_description", "description", "detail")}
    templates = table(
        Template(name="plain", prompt="First: {first}\nSecond: {second}\nLabel:", lead=" "),
        Template(
            name="chat",
            prompt="First: {first}\nSecond: {second}",
            chat=True,
            system="Classify how the two texts are related and answer with nothing but the label.",
        ),
    )

    def order_of(self, file: DataFile) -> tuple[str, ...]:
        """Return the fields in the order of the columns, with the description where there are four."""
        cells = [] if is_json(file) else next(table_cells(file), (0, []))[1]
        return ("first", "second", "detail", "label") if len(cells) == 4 else ("first", "second", "label")

    def rows_of(self, file: DataFile) -> Iterator[PairRow | None]:
        """Yield the rows; refuse a file whose first texts are all numbers, which are numbers of rows."""
        texts: list[str] = []
        try:
            for row in super().rows_of(file):
                texts += [row.first] if row else []
                yield row
        except GeneratorExit:  # `--rows` needs no further rows: check those that were read
            _check_texts(file, texts)
            raise
        _check_texts(file, texts)

    def fields(self, row: PairRow) -> Mapping[str, str]:
        first, second = row.texts
        return {"first": first, "second": second}

    def with_source(self, row: PairRow, source: PairRow) -> PairRow:
        first, second = (f"{theirs} {ours}" for theirs, ours in zip(source.texts, row.texts, strict=True))
        return replace(row, first=first, second=second, detail="")

    def cluster(self, row: PairRow) -> str:
        """Return the first text: a question may have several answers."""
        return row.first
