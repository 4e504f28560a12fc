"""Sentence vectors by pooling hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import DataError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def masked_mean(hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows d"]:
    r"""Return the mean of the hidden states over tokens where the mask is 1, in float32.

    $h(x) = \sum_t m_t H_t / \sum_t m_t$, with half-precision states cast up before they are added.
    """
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    total: Tensor = (hidden.float() * weights).sum(1)
    return total / weights.sum(1).clamp_min(1.0)


def pool(
    hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"], pooling: str
) -> Float[Tensor, "rows d"]:
    """Return one state per text: the "mean" over its tokens, the "first" or the "last" one.

    Args:
        hidden: Hidden states.
        mask: 1 for tokens, 0 for padding.
        pooling: "mean", "first" or "last".
    """
    if pooling == "mean":
        return masked_mean(hidden, mask).to(hidden.dtype)
    return token_states(hidden, mask.argmax(1) if pooling == "first" else last_tokens(mask))


def last_tokens(mask: Int[Tensor, "rows tokens"]) -> Int[Tensor, " rows"]:
    """Return the index of the last token of each text; 0 for a text without tokens."""
    return torch.where(mask.bool().any(1), mask.shape[1] - 1 - mask.flip(1).argmax(1), 0)


def token_states(hidden: Float[Tensor, "rows tokens d"], index: Int[Tensor, " rows"]) -> Float[Tensor, "rows d"]:
    """Return the state of one token of each text, by its index."""
    return hidden[torch.arange(len(hidden), device=hidden.device), index.to(hidden.device)]


@dataclass(frozen=True, slots=True)
class Standard:
    """Mean and standard deviation of every dimension of some sentence vectors.

    In language models a few dimensions are many times larger than the others and nearly constant over sentences, so
    they dominate cosines. In z-scores every dimension has the same weight.

    Args:
        mean: [d].
        spread: [d], positive.

    Reference: Timkey and van Schijndel, All Bark and No Bite, EMNLP 2021, arXiv 2109.04404, section 5.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, parts: Sequence[Float[Tensor, "rows d"]]) -> Standard:
        """Measure vectors that are passed in parts, without joining the parts. A constant dimension gets spread 1."""
        count = sum(map(len, parts))
        # In float64, so that the mean of a constant is exactly that constant.
        mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
        squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / count
        spread = torch.where(squares > 0, squares.sqrt(), 1.0)
        return cls(mean.to(parts[0].dtype), spread.to(parts[0].dtype))

    def __call__(self, vectors: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return z-scores."""
        return (vectors - self.mean) / self.spread


LEAST = 16
"""Fewest sentences for which a mean and a standard deviation are meaningful."""


class Standards:
    """The standardisation of each language's vectors; false if z-scores are off.

    Args:
        way: "none"; "all", one measure for all languages; "languages", one per language, which removes differences
            between languages from the z-scores.
        vectors: Some vectors of each language, in parts.

    Raises:
        DataError: there are too few vectors.
    """

    def __init__(self, way: str, vectors: Mapping[str, Sequence[Float[Tensor, "rows d"]]]) -> None:
        self._all, self._by_language = None, {}
        if way == "all":
            self._all = Standard.of(
                self._enough("all languages", [part for parts in vectors.values() for part in parts])
            )
        elif way == "languages":
            self._by_language = {
                language: Standard.of(self._enough(language, parts)) for language, parts in vectors.items()
            }

    @staticmethod
    def _enough(whose: str, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        count = sum(map(len, parts))
        if count < LEAST:
            raise DataError(
                f"--standardize needs at least {LEAST} sentences to measure, and there are {count} of {whose}. "
                "Give more, or use --standardize all or none.",
                code="standardize.too-few",
            )
        return parts

    def __bool__(self) -> bool:
        return bool(self._all or self._by_language)

    def __getitem__(self, language: str) -> Standard:
        """Return the standardisation of a language.

        Raises:
            DataError: the language was not measured.
        """
        standard = self._all or self._by_language.get(language)
        if standard is None:
            raise DataError(
                f"--standardize languages measures the languages of the training pairs ("
                f"{', '.join(self._by_language)}), and {language} is not among them. Use --standardize all, or leave "
                f"{language} out.",
                code="standardize.language",
            )
        return standard


def mean_cosine(vectors: Mapping[str, Float[Tensor, "rows d"]]) -> float:
    """Return the mean cosine between two sentences of a language, averaged over languages with at least two."""
    cosines = []
    for rows in vectors.values():
        unit, count = torch.nn.functional.normalize(rows, dim=-1), len(rows)
        if count > 1:
            cosines.append(float((unit.sum(0).square().sum() - count) / (count * (count - 1))))
    return sum(cosines) / len(cosines) if cosines else 0.0


def require_pooling(pooling: str, kind: str) -> None:
    """Refuse to use the first token of a model in which it attends to no other token.

    Raises:
        PlanError: "bos" for a language model.
    """
    if pooling == "bos" and kind == "causal":
        raise PlanError(
            "--pooling bos needs an encoder: the first token of a language model sees no other token. "
            "Use --pooling mean.",
            code="pooling.bos",
        )


class Pooler:
    """Computes one vector per sentence.

    Args:
        tokenizer: Identifies special tokens.
        pooling: "mean" over the tokens, or "bos", the first token.
        exclude_bos: Leave out the first token if the tokenizer puts a special one there.
        standardize: "none", or the kind of z-scores that the vectors are for, see `Standards`. With z-scores, states
            are scaled to length 1 first, since some tokens (mostly the first) are hundreds of times longer than others.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = "mean",
        exclude_bos: bool = False,
        standardize: str = "none",
    ) -> None:
        self.standardize = standardize
        self._skipped = set(tokenizer.all_special_ids) if exclude_bos else set()
        self._first = pooling == "bos"

    def counted(self, encoded: Sequence[Sequence[int]], mask: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
        """Return the mask of tokens that are pooled; rows are padded on the right."""
        if not self._skipped:
            return mask
        mask = mask.clone()
        mask[[row for row, ids in enumerate(encoded) if ids[0] in self._skipped], 0] = 0
        return mask

    def count(self, ids: Sequence[int]) -> int:
        """Return the number of tokens of a sentence that are pooled."""
        return len(ids) - (ids[0] in self._skipped if ids else 0)

    def __call__(
        self, hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows d"]:
        """Return one vector per row, in float32; `mask` selects the tokens."""
        hidden = torch.nn.functional.normalize(hidden.float(), dim=-1) if self.standardize != "none" else hidden
        return hidden[:, 0].float() if self._first else masked_mean(hidden, mask)


class MeanAndEdge(Pooler):
    """The mean over tokens, joined with the token that a head reads: first of encoders, last of language models.

    The first token of a language model attends to no other token, and its state is often 100 times longer than others
    (an attention sink), so the mean leaves it out unless it is the only one.

    Args:
        tokenizer: Identifies special tokens.
        kind: Kind of the base model, "encoder" or "causal".
        exclude_bos: Leave out the first token if the tokenizer puts a special one there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, kind: str, exclude_bos: bool = False) -> None:
        super().__init__(tokenizer, exclude_bos=exclude_bos)
        self._reads_last = kind == "causal"

    def __call__(
        self, hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows twice_d"]:
        """Return mean and edge token of each row, concatenated, in float32; rows are padded on the right."""
        if not self._reads_last:
            return torch.cat([masked_mean(hidden, mask), hidden[:, 0].float()], -1)
        others = mask.clone()
        others[mask.sum(1) > 1, 0] = 0
        mean = masked_mean(hidden, others)
        return torch.cat([mean, token_states(hidden, last_tokens(mask)).float()], -1)
