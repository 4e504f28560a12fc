"""Natural language inference: three columns, the files of XNLI and MultiNLI, and JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .base import task
from .labels import LabelledRow, LabelledTask
from .prompts import Template, table

LABELS = ("entailment", "neutral", "contradiction")
_NUMBERS = {str(number): name for number, name in enumerate(LABELS)}
# SNLI and MultiNLI write "-" where the annotators did not agree, their copies on the Hub -1.
_UNLABELLED = {"-", "-1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NliRow(LabelledRow):
    """Two sentences, and how the second follows from the first (one of `LABELS`)."""

    premise: str
    hypothesis: str

    @property
    def texts(self) -> tuple[str, ...]:
        return self.premise, self.hypothesis


@task
class Nli(LabelledTask[NliRow]):
    """Natural language inference, scored by accuracy.

    Accuracy is the metric of XNLI (Conneau et al., XNLI, EMNLP 2018, arXiv 1809.05053); `macro_f1` is over those of the
    three relations that a language's gold rows have. An answer that is not a relation is wrong.

    Files have premise, hypothesis and label in this order, or under a header such as XNLI's, or are JSONL with such
    fields. Labels are names, or 0, 1, 2 in the order of `LABELS`. Rows with another label, and rows labelled
    "-", on which the annotators did not agree, are left out.
    """

    name = "nli"
    blank = {"label": "neutral"}
    row = NliRow
    columns = {
        "premise": ("premise", "sentence1"),
        "hypothesis": ("hypothesis", "sentence2", "hypo"),
        "label": ("gold_label", "label"),
    }
    # XNLI's machine-translated training files have `contradictory`.
    spellings = {name: name for name in LABELS} | {"contradictory": "contradiction"}
    templates = table(
        Template(name="plain", prompt="Premise: {premise}\nHypothesis: {hypothesis}\nRelation:", lead=" "),
        Template(
            name="chat",
            prompt="Premise: {premise}\nHypothesis: {hypothesis}",
            chat=True,
            system="Name the relation of the hypothesis to the premise: entailment, neutral or contradiction.",
        ),
    )

    def label_of(self, text: str, where: str) -> str | DataError | None:
        known = self.spellings | _NUMBERS
        if text.lower() in _UNLABELLED:
            return None
        return known.get(text.lower()) or DataError(
            f"{where}: a label must be one of {', '.join(known)}, or - for none, found {text[:60]!r}.", code="row.label"
        )

    def labels(self, rows: Sequence[NliRow]) -> tuple[str, ...]:
        return LABELS

    def cluster(self, row: NliRow) -> str:
        """Return the premise, which XNLI has with three hypotheses."""
        return row.premise
