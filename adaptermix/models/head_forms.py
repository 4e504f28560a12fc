"""What a head is to the outside: its name, PEFT's task type, the class of transformers. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """A kind of head.

    Args:
        name: Name in `--head`.
        title: What it is called in messages, with its article.
        task_type: PEFT's task type.
        auto_class: Class of transformers that loads a base model with such a head.
        modules: Names that the head's modules have in transformers.
        outputs: Number of outputs where it is not one per label.
        fast: Whether it needs a fast tokenizer, which knows where tokens stand in the text.
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
    """Return the kind of head that adapters of a PEFT task type end in, None for those without a head."""
    return next((form for form in _ALL if form.task_type == task_type), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a model ends in.

    Args:
        form: Its kind.
        labels: What it tells apart: classes and tags in the order of its outputs; of a span head the kinds of answers
            that it was taught.
    """

    form: HeadForm
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.form.outputs or len(self.labels)
