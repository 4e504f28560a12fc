"""The kinds of heads: name, PEFT task type, and transformers class. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """A kind of head.

    Args:
        name: Name in `--head`.
        title: Name in messages, with its article.
        task_type: PEFT's task type.
        auto_class: Class of transformers that loads a base model with such a head.
        modules: Names of the head's modules in transformers.
        outputs: Number of outputs, if it is not one per label.
        fast: Whether it needs a fast tokenizer, for the offsets of tokens in the text.
    """

    name: str
    title: str
    task_type: str
    auto_class: str
    modules: tuple[str, ...]
    outputs: int | None = None
    fast: bool = False


_ALL = (
    HeadForm(
        name="classes",
        title="a classification head",
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        modules=("classifier", "score"),
    ),
    HeadForm(
        name="tokens",
        title="a token classification head",
        task_type="TOKEN_CLS",
        auto_class="AutoModelForTokenClassification",
        modules=("classifier", "score"),
        fast=True,
    ),
    HeadForm(
        name="span",
        title="a question answering head",
        task_type="QUESTION_ANS",
        auto_class="AutoModelForQuestionAnswering",
        modules=("qa_outputs",),
        outputs=2,
        fast=True,
    ),
)
HEAD_FORMS: dict[str, HeadForm] = {form.name: form for form in _ALL}


def form_of(task_type: str | None) -> HeadForm | None:
    """Return the kind of head for a PEFT task type; None for a type without a head."""
    return next((form for form in _ALL if form.task_type == task_type), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's head.

    Args:
        form: Its kind.
        labels: Its labels: classes or tags in the order of its outputs; for a span head the kinds of answers in its
            training data.
    """

    form: HeadForm
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.form.outputs or len(self.labels)
