"""The protocol of heads: which tasks it suits, how rows are encoded, their loss and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import TypeVar

from ...models.base import BaseModel
from ...models.head_forms import HeadForm
from ...models.languages import Text
from ...models.positions import readable
from .. import Task
from ..data.report import by_language
from ..data.tables import Row

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORED = -100
Features = Mapping[str, list[int]]
"""Inputs of a model for one text, by the names of the tokenizer."""


class HeadRows(Protocol):
    """Rows encoded for a model with a head."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""

    @property
    def texts(self) -> Sequence[Sequence[Features]]:
        """Inputs of each row: one or several texts, in the order of the passes."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the rows were encoded."""

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the loss of rows by their numbers, a scalar in float32."""

    def terms(self, rows: Sequence[int]) -> int:
        """Return how many terms the loss of rows is a mean over."""

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the answers to rows by their numbers, in the form in which the task scores them."""


@runtime_checkable
class Predicting(HeadRows, Protocol):
    """Rows of a head that says how likely each of its labels is: of a text, or of each of its words."""

    def predictions(self, rows: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities of rows by their numbers, in float32, each [texts or words, labels]."""


T_contra = TypeVar("T_contra", bound=Task, contravariant=True, default=Any)
"""Tasks that a kind of head suits."""


class HeadKind(Protocol[T_contra]):
    """An entry of the table of heads."""

    @property
    def form(self) -> HeadForm:
        """Its name, title, PEFT task type and model class."""

    @property
    def needs(self) -> str:
        """The tasks that it needs, for messages: "a task whose answers are ..."."""

    @property
    def closed(self) -> bool:
        """Whether rows are refused if the head lacks all of their labels."""

    def suits(self, task: Task) -> bool:
        """Whether it can give the task's answers."""

    def labels(self, task: T_contra, rows: Sequence[Row]) -> tuple[str, ...]:
        """Return the labels of a head that learns these rows.

        Raises:
            DataError: a row lacks what the head reads.
        """

    def encode(
        self, base: BaseModel, task: T_contra, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> HeadRows:
        """Encode rows for a model that ends in such a head.

        Args:
            base: The model.
            task: A task that the head suits.
            rows: The task's rows.
            max_length: Most tokens that the model sees at once.
            teach: Whether the loss of the rows is needed.
        """


def pad(base: BaseModel, features: Sequence[Features]) -> BatchEncoding:
    """Return a batch of tokenized texts, padded on the right, on the model's device."""
    return pad_to(base.tokenizer, features, None).to(base.device)


def pad_to(tokenizer: PreTrainedTokenizerBase, features: Sequence[Features], length: int | None) -> BatchEncoding:
    """Return a batch of tokenized texts, padded on the right to a length, or to the longest text for None."""
    to = {"padding": "max_length", "max_length": length} if length else {}
    return tokenizer.pad(list(features), padding_side="right", return_tensors="pt", **to)


def tokens_of(rows: HeadRows) -> list[list[int]]:
    """Return the tokens of each text of each row."""
    return [[len(text["input_ids"]) for text in texts] for texts in rows.texts]


LONGEST = 512
"""Most tokens that a model with a head sees at once; there texts are cut, or read in windows."""


def longest(base: BaseModel) -> int:
    """Return the most tokens that a model with a head reads at once."""
    return readable(base.model, int(min(LONGEST, base.tokenizer.model_max_length)))


def cut_warning(languages: Sequence[str], rows: int, max_length: int, lost: str, what: str = "rows") -> str:
    """Return the note on rows that were too long, with the language of each; `what` is their name in the plural."""
    return f"{by_language(languages, rows)} {what} are longer than {max_length} tokens (--max-length) and lose {lost}."


def cut_languages(
    base: BaseModel, texts: Sequence[Text], languages: Sequence[str], encoded: Sequence[Features], length: int
) -> list[str]:
    """Return the language of each text that was cut to `length` tokens."""
    full = [row for row, tokens in enumerate(encoded) if len(tokens["input_ids"]) == length]
    spoken = [languages[row] for row in full]
    whole = base.encode([texts[row] for row in full], spoken, verbose=False)
    return [language for language, row in zip(spoken, whole, strict=True) if len(row["input_ids"]) > length]


def cross_entropy(logits: Tensor, gold: Tensor) -> Tensor:
    """Return the mean cross-entropy in float32 over positions whose gold is not IGNORED; 0 without any.

    Shapes: logits [positions outputs], gold [positions]; returns a scalar.
    """
    total = torch.nn.functional.cross_entropy(logits.float(), gold, ignore_index=IGNORED, reduction="sum")
    return total / (gold != IGNORED).sum().clamp(min=1)
