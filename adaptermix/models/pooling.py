"""One vector per sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import DataError, PlanError


def masked_mean(hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows d"]:
    r"""Return the mean of the hidden states over tokens where the mask is 1, in float32.

    $h(x) = \sum_t m_t H_t / \sum_t m_t$, with half-precision states cast up before they are added.
    """
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    total: Tensor = (hidden.float() * weights).sum(1)
    return total / weights.sum(1).clamp_min(1.0)


@dataclass(frozen=True, slots=True)
class Standard:
    """Mean and standard deviation of every dimension of some sentence vectors.

    A few dimensions of language models are many times longer than the others and alike in all sentences; cosines see
    nothing else. In z-scores every dimension counts the same.

    Args:
        mean: [d].
        spread: [d], above zero.

    Reference: Timkey and van Schijndel, All Bark and No Bite, EMNLP 2021, arXiv 2109.04404, section 5.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, parts: Sequence[Float[Tensor, "rows d"]]) -> Standard:
        """Measure vectors, in parts that are never joined; a dimension that does not vary is left as it is."""
        count = sum(map(len, parts))
        # in float64, so that the mean of a value that does not vary is that value
        mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
        squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / count
        spread = torch.where(squares > 0, squares.sqrt(), 1.0)
        return cls(mean.to(parts[0].dtype), spread.to(parts[0].dtype))

    def __call__(self, vectors: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return z-scores."""
        return (vectors - self.mean) / self.spread


LEAST = 16
"""Sentences without which a mean and a standard deviation say too little."""


class Standards:
    """What the vectors of each language are measured by; false where there are no z-scores.

    Args:
        way: "none"; "all", one measure for all languages; "languages", one for each, so that what tells languages apart
            is no part of the z-scores.
        vectors: Some vectors of each language, in parts.

    Raises:
        DataError: too few vectors.
    """

    def __init__(self, way: str, vectors: Mapping[str, Sequence[Float[Tensor, "rows d"]]]) -> None:
        self._all, self._own = None, {}
        if way == "all":
            self._all = Standard.of(
                self._enough("all languages", [part for parts in vectors.values() for part in parts])
            )
        elif way == "languages":
            self._own = {language: Standard.of(self._enough(language, parts)) for language, parts in vectors.items()}

    @staticmethod
    def _enough(whose: str, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        count = sum(map(len, parts))
        if count < LEAST:
            raise DataError(
                f"--standardize needs at least {LEAST} sentences to measure, and there are {count} of {whose}. "
                "Give more, or use --standardize all or none."
            )
        return parts

    def __bool__(self) -> bool:
        return bool(self._all or self._own)

    def __getitem__(self, language: str) -> Standard:
        """Return the measure of a language.

        Raises:
            DataError: the language was not measured.
        """
        found = self._all or self._own.get(language)
        if found is None:
            raise DataError(
                f"--standardize languages measures the languages of the training pairs ({', '.join(self._own)}), and "
                f"{language} is not among them. Use --standardize all, or leave {language} out."
            )
        return found


def mean_cosine(vectors: Mapping[str, Float[Tensor, "rows d"]]) -> float:
    """Return the mean cosine of two sentences of a language, the mean over languages that have two."""
    found = []
    for own in vectors.values():
        unit, count = torch.nn.functional.normalize(own, dim=-1), len(own)
        if count > 1:
            found.append(float((unit.sum(0).square().sum() - count) / (count * (count - 1))))
    return sum(found) / len(found) if found else 0.0


def require_pooling(pooling: str, kind: str) -> None:
    """Refuse vectors of a first token that sees no other.

    Raises:
        PlanError: "bos" for a language model.
    """
    if pooling == "bos" and kind == "causal":
        raise PlanError(
            "--pooling bos needs an encoder: the first token of a language model sees no other token. "
            "Use --pooling mean."
        )


class Pooler:
    """How a sentence becomes a vector.

    Args:
        tokenizer: Tells special tokens.
        pooling: "mean" over the tokens, or "bos", the first token.
        exclude_bos: Leave the first token out of the mean where the tokenizer puts a special one there.
        standardize: "none", or whose z-scores the vectors are for, see `Standards`: then it is the mean of directions,
            of states of length 1, since some tokens (the first, mostly) are hundreds of times longer than others.
    """

    def __init__(
        self, tokenizer: Any, *, pooling: str = "mean", exclude_bos: bool = False, standardize: str = "none"
    ) -> None:
        self.standardize = standardize
        self._skipped = set(tokenizer.all_special_ids) if exclude_bos else set()
        self._first = pooling == "bos"

    def counted(self, encoded: Sequence[Sequence[int]], mask: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
        """Return which tokens count, of those that are there; rows are padded on the right."""
        if not self._skipped:
            return mask
        mask = mask.clone()
        mask[[row for row, ids in enumerate(encoded) if ids[0] in self._skipped], 0] = 0
        return mask

    def count(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a sentence count."""
        return len(ids) - (ids[0] in self._skipped if ids else 0)

    def __call__(
        self, hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows d"]:
        """Return one vector per row, in float32; `mask` says which tokens count."""
        hidden = torch.nn.functional.normalize(hidden.float(), dim=-1) if self.standardize != "none" else hidden
        return hidden[:, 0].float() if self._first else masked_mean(hidden, mask)


class MeanAndEdge(Pooler):
    """The mean over tokens beside the token that a head reads: the first of encoders, the last of language models.

    The first token of language models sees no other token, and its state is often a hundred times longer than others
    (an attention sink), so the mean leaves it out unless it is the only one.

    Args:
        tokenizer: Tells special tokens.
        kind: Kind of the base model, "encoder" or "causal".
        exclude_bos: Leave the first token out of the mean where the tokenizer puts a special one there.
    """

    def __init__(self, tokenizer: Any, *, kind: str, exclude_bos: bool = False) -> None:
        super().__init__(tokenizer, exclude_bos=exclude_bos)
        self._reads_last = kind == "causal"

    def __call__(
        self, hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows twice_d"]:
        """Return mean and edge token of each row side by side, in float32; rows are padded on the right."""
        if not self._reads_last:
            return torch.cat([masked_mean(hidden, mask), hidden[:, 0].float()], -1)
        others = mask.clone()
        others[mask.sum(1) > 1, 0] = 0
        mean = masked_mean(hidden, others)
        # a row whose only token is left out has that one, the first
        last = torch.where(mask.bool().any(1), mask.shape[1] - 1 - mask.flip(1).argmax(1), 0).to(hidden.device)
        return torch.cat([mean, hidden[torch.arange(len(hidden), device=hidden.device), last].float()], -1)
