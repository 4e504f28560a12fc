"""The kinds of heads, and how a head of this package reads hidden states. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import get_args

from ..errors import ModelError
from ..options.fields import HEAD_LAYERS, Aggregate, Gate, HeadNorm, HeadPooling


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """A kind of head.

    Args:
        name: Name in `--head`.
        title: Name in messages, with its article.
        task_type: PEFT's task type; empty for a head that PEFT does not know.
        auto_class: Class of transformers that loads a base model with such a head; empty for a head that transformers
            does not have, which is always one of this package.
        modules: Names of the head's modules in transformers.
        outputs: Number of outputs, if it is not one per label.
        fast: Whether it needs a fast tokenizer, for the offsets of tokens in the text.
        pipeline: The Hub's `pipeline_tag` of a model with it; empty if the Hub has no such task.
    """

    name: str
    title: str
    task_type: str = ""
    auto_class: str = ""
    modules: tuple[str, ...] = ()
    outputs: int | None = None
    fast: bool = False
    pipeline: str = ""


_ALL = (
    HeadForm(
        name="classes",
        title="a classification head",
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        modules=("classifier", "score"),
        pipeline="text-classification",
    ),
    HeadForm(
        name="tokens",
        title="a token classification head",
        task_type="TOKEN_CLS",
        auto_class="AutoModelForTokenClassification",
        modules=("classifier", "score"),
        fast=True,
        pipeline="token-classification",
    ),
    HeadForm(
        name="span",
        title="a question answering head",
        task_type="QUESTION_ANS",
        auto_class="AutoModelForQuestionAnswering",
        modules=("qa_outputs",),
        outputs=2,
        fast=True,
        pipeline="question-answering",
    ),
    HeadForm(name="choices", title="a head that scores choices", outputs=1, fast=True),
)
HEAD_FORMS: dict[str, HeadForm] = {form.name: form for form in _ALL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How a head of this package reads hidden states: a linear layer without bias on states of one or more blocks.

    Blocks are numbered as transformers numbers `hidden_states`: 0 for the embeddings, n for the last block.

    Args:
        pooling: "mean" over the tokens, the "first" or the "last" token of a text; "auto" is "first" for encoders and
            "last" for language models. A head that labels tokens reads each token.
        layers: "last"; "K", block K alone, and the blocks above are not computed; "last+K", the last block fused with
            block K; "last+search", a learned mean of all blocks.
        aggregate: How "last+K" fuses the last state h and the lower state l, with a gate a of h + l: "aff",
            a h + (1 - a) l; "se", a (h + l); "add", h + l; "mean"; "concat".
        gate: What the gate reads: each token ("local"), the mean of the text ("global"), or the sum of both ("both").
        gate_ratio: Width of the states divided by the width inside the gate.
        norm: What fused states pass through first, since they differ in scale: "own", a layer norm without parameters;
            "final", the final norm of the model for the lower state; "none".

    Reference: Dai et al., Attentional Feature Fusion, WACV 2021, arXiv 2009.14082 (`aff` and the gate); Hu et al.,
        Squeeze-and-Excitation Networks, CVPR 2018, arXiv 1709.01507 (`se`); Peters et al., NAACL 2018, arXiv 1802.05365
        (`last+search`).
    """

    pooling: str = "auto"
    layers: str = "last"
    aggregate: str = "aff"
    gate: str = "both"
    gate_ratio: int = 16
    norm: str = "own"

    @property
    def lower(self) -> int | None:
        """The lower block of "last+K" or the only block of "K"; None without one."""
        number = self.layers.removeprefix("last+")
        return int(number) if number.isdigit() else None

    @property
    def stops_early(self) -> bool:
        """Whether the blocks above `lower` are not computed."""
        return self.layers.isdigit()

    @property
    def mixes(self) -> bool:
        """Whether the head reads a learned mean of all blocks."""
        return self.layers == "last+search"

    def document(self) -> dict[str, str | int]:
        """Return the reader's entry of a manifest."""
        return asdict(self)

    @classmethod
    def of(cls, document: object) -> Reader | None:
        """Return the reader of a manifest's entry; None without an entry.

        Raises:
            ModelError: the entry is not one of a reader.
        """
        if document is None:
            return None
        kinds = {field.name: int if field.name == "gate_ratio" else str for field in fields(cls)}
        if not isinstance(document, Mapping) or any(
            name not in kinds or not isinstance(value, kinds[name]) for name, value in document.items()
        ):
            raise ModelError(
                f"the entry task.reader of an adaptermix.json must hold {', '.join(kinds)}, found {document!r}.",
                code="head.reader",
            )
        reader = cls(**document)
        for name, known in CHOICES.items():
            if getattr(reader, name) not in known:
                raise ModelError(
                    f"the entry task.reader.{name} of an adaptermix.json must be one of {', '.join(known)}, found "
                    f"{getattr(reader, name)!r}.",
                    code="head.reader",
                )
        if not HEAD_LAYERS.fullmatch(reader.layers) or reader.gate_ratio < 1:
            raise ModelError(
                "the entry task.reader of an adaptermix.json must have layers such as last, 6 or last+6 and a positive "
                f"gate_ratio, found {reader.layers!r} and {reader.gate_ratio}.",
                code="head.reader",
            )
        return reader


CHOICES: dict[str, tuple[str, ...]] = {
    "pooling": get_args(HeadPooling),
    "aggregate": get_args(Aggregate),
    "gate": get_args(Gate),
    "norm": get_args(HeadNorm),
}
"""Values of a reader's settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's head.

    Args:
        form: Its kind.
        labels: Its labels: classes or tags in the order of its outputs; for a span head the kinds of answers in its
            training data.
        reader: How it reads hidden states; None for a head of transformers.
    """

    form: HeadForm
    labels: tuple[str, ...]
    reader: Reader | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.form.outputs or len(self.labels)
