"""Natural language inference: the answer, or the class, is the relation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .data import DataFile, NliRow, read_nli
from .data.nli import LABELS, SPELLINGS
from .labels import label_metrics, label_reader
from .metrics import Metric
from .prompts import Template, table


class Nli:
    """Natural language inference, scored by accuracy.

    Accuracy is what XNLI reports (Conneau et al., XNLI, EMNLP 2018, arXiv 1809.05053); `macro_f1` is over those of the
    three relations that a language's gold rows hold. An answer that is no relation is wrong.
    """

    name = "nli"
    one_line = True
    is_open = False
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="Premise: {premise}\nHypothesis: {hypothesis}\nRelation:", lead=" "),
        Template(
            name="chat",
            prompt="Premise: {premise}\nHypothesis: {hypothesis}",
            chat=True,
            system="Name the relation of the hypothesis to the premise: entailment, neutral or contradiction.",
        ),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[NliRow], list[DataFile]]:
        """Read pairs of sentences; see `adaptermix.tasks.data.nli`."""
        return read_nli(arguments, rows=rows)

    def fields(self, row: NliRow) -> Mapping[str, str]:
        """Return premise and hypothesis."""
        return {"premise": row.premise, "hypothesis": row.hypothesis}

    def segments(self, row: NliRow) -> tuple[str, ...]:
        """Return premise and hypothesis."""
        return row.premise, row.hypothesis

    def joined(self, row: NliRow, source: NliRow) -> NliRow:
        """Return a row whose sentences begin with those of its source."""
        return replace(
            row,
            premise=f"{source.premise} {row.premise}",
            hypothesis=f"{source.hypothesis} {row.hypothesis}",
        )

    def labels(self, rows: Sequence[NliRow]) -> tuple[str, ...]:  # noqa: ARG002  (they are fixed)
        """Return the three relations."""
        return tuple(LABELS)

    def texts(self, row: NliRow) -> tuple[str, ...]:
        """Return premise and hypothesis."""
        return (row.premise, row.hypothesis)

    def answer(self, row: NliRow) -> str:
        """Return the relation."""
        return row.label

    def evidence(self, row: NliRow) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: a part of the text may be enough for the answer."""
        return ()

    def language(self, row: NliRow) -> str:
        """Return the sentences' language."""
        return row.language

    def cluster(self, row: NliRow) -> str:
        """Return the premise, which XNLI has with three hypotheses."""
        return row.premise

    def metrics(self, rows: Sequence[NliRow]) -> tuple[Metric, ...]:  # noqa: ARG002  (the labels are fixed)
        """Return accuracy and macro F1."""
        return label_metrics(LABELS, label_reader(LABELS, SPELLINGS))
