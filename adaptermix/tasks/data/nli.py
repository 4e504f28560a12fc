"""Premises and hypotheses: three columns, the files of XNLI and MultiNLI, and JSONL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files
from .tables import CLUSTER_NAMES, LANGUAGE_NAMES, pick_rows, records, row_language, usable

LABELS = ("entailment", "neutral", "contradiction")
# XNLI's machine-translated training files say `contradictory`
SPELLINGS = {name: name for name in LABELS} | {"contradictory": "contradiction"}
_NUMBERS = {str(number): name for number, name in enumerate(LABELS)}
# SNLI and MultiNLI write "-" where the annotators did not agree, their copies on the Hub -1
_UNLABELLED = {"-", "-1"}
_NAMES = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2", "hypo"),
    "label": ("gold_label", "label"),
    "language": LANGUAGE_NAMES,
    "cluster": CLUSTER_NAMES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NliRow:
    """Two sentences and how the second follows from the first.

    Args:
        premise: The first sentence.
        hypothesis: The second.
        label: One of `LABELS`.
        language: Language code.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    premise: str
    hypothesis: str
    label: str
    language: str
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.premise, self.hypothesis))


def _read(file: DataFile) -> Iterator[NliRow | DataError | None]:
    known = SPELLINGS | _NUMBERS
    for number, record in records(file, _NAMES, order=("premise", "hypothesis", "label"), label="label"):
        written = "-" if record is None else record["label"].lower()
        if record is None or written in _UNLABELLED:
            yield None
            continue
        if written not in known:
            yield DataError(
                f"{file.path}:{number}: a label must be one of {', '.join(known)}, or - for none, found "
                f"{record['label'][:60]!r}."
            )
            continue
        yield NliRow(
            premise=record["premise"],
            hypothesis=record["hypothesis"],
            label=known[written],
            language=row_language(file, record.get("language")),
            cluster=record.get("cluster", ""),
        )


def read_nli(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[NliRow], list[DataFile]]:
    """Read pairs of sentences for natural language inference.

    Args:
        arguments: `FILE` arguments: TSV or CSV with premise, hypothesis and label in this order or under a header
            (also `sentence1`, `sentence2`, `gold_label`, `language`, as in XNLI: Conneau et al., EMNLP 2018,
            arXiv 1809.05053), or JSONL with such fields. Labels are names, or 0, 1, 2 in the order of `LABELS`.
        rows: `START:STOP[:STEP]` of the rows of each file.

    Returns:
        The rows in file order, and the files. Rows labelled "-", where annotators did not agree, are left out as is
        usual, and so are rows with an unknown label; they count as rows.

    Raises:
        DataError: a file is missing, empty, malformed, has unknown labels only, or does not tell its language.
    """
    files = find_files(arguments)
    return pick_rows(files, rows, lambda file: usable(_read(file)))
