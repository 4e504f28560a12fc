"""Displacements of sentences' states to those of their translations, and the tokens that they are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tasks.data import Pair
from .residual_writer import Tap

_SINK = 4.0
"""Tokens whose states are this many times longer than the median token's are attention sinks (Sun et al., Massive
Activations in Large Language Models, COLM 2024, arXiv 2402.17762): they mean little and would outweigh all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence of some pairs.

    Args:
        ids: Its tokens.
        weight: Weight of its pairs.
        group: Number of the group of pairs with one translation; no fit is judged by a group that it has seen.
        target: Number of its translation; None for a translation, which does not move.
    """

    ids: list[int]
    weight: float
    group: int
    target: int | None = None


def groups_of(pairs: Sequence[Pair]) -> list[int]:
    """Return the group of each pair: pairs with one translation, in any languages, are one group.

    Sources are not looked at: through sources that have several translations most pairs of a large file would end in a
    single group, and nothing could be left out. If all pairs have the same translation, each pair is a separate group.

    Example:
        >>> texts = [("ja", "yes"), ("oui", "yes"), ("oui", "yeah"), ("nein", "no")]
        >>> groups_of([Pair(languages=("x", "en"), source=source, target=target) for source, target in texts])
        [0, 0, 1, 2]
    """
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(pair.target, len(numbers)) for pair in pairs]
    return groups if len(numbers) > 1 else list(range(len(pairs)))


def pair_weights(pairs: Sequence[Pair], balance: str) -> list[float]:
    """Return the weight of each pair, 1 on average: equal, or so that every two languages weigh the same."""
    counts: dict[tuple[str, str], int] = {}
    for pair in pairs:
        counts[pair.languages] = counts.get(pair.languages, 0) + 1
    share = len(pairs) / len(counts)
    return [share / counts[pair.languages] if balance == "languages" else 1.0 for pair in pairs]


def sentences_of(
    pairs: Sequence[Pair],
    sources: Sequence[list[int]],
    targets: Sequence[list[int]],
    *,
    weights: Sequence[float],
    groups: Sequence[int],
) -> list[Sentence]:
    """Return the sentences of pairs, each translation once, first those.

    Args:
        pairs: The pairs.
        sources: Token ids of their sources.
        targets: Token ids of their targets.
        weights: Weight of each pair.
        groups: Group of each pair.
    """
    numbers: dict[tuple[str, str], int] = {}
    number = [numbers.setdefault((pair.languages[1], pair.target), len(numbers)) for pair in pairs]
    total = [0.0] * len(numbers)
    for target, weight in zip(number, weights, strict=True):
        total[target] += weight
    first = {target: row for row, target in reversed(list(enumerate(number)))}
    translations = [
        Sentence(ids=targets[row], weight=total[target], group=groups[row]) for target, row in sorted(first.items())
    ]
    rows = zip(sources, weights, groups, number, strict=True)
    return translations + [
        Sentence(ids=ids, weight=weight, group=group, target=target) for ids, weight, group, target in rows
    ]


class Reader:
    """Reads token states in batches of like length, and pools them.

    Args:
        tap: Reads states and inputs.
        batch_size: Sentences a batch.
        pooling: "mean": the mean over tokens and the token that heads read; "bos": that token alone.
        last: Whether heads read the last token, as language models do; else the first.
    """

    def __init__(self, tap: Tap, *, batch_size: int, pooling: str, last: bool) -> None:
        self._tap, self._size, self._last = tap, batch_size, last
        self.roles = (["mean"] if pooling == "mean" else []) + ["last" if last else "first"]

    def split(self, sentences: Sequence[Sentence]) -> list[list[int]]:
        """Return numbers of sentences in batches of like length."""
        order = sorted(range(len(sentences)), key=lambda row: len(sentences[row].ids))
        return [order[start : start + self._size] for start in range(0, len(order), self._size)]

    def read(self, sentences: Sequence[Sentence], rows: list[int]) -> Tokens:
        """Return the tokens of a batch of sentences."""
        encoded = [sentences[row].ids for row in rows]
        with torch.no_grad():
            states, counted, inputs = self._tap(encoded)
        lengths = torch.tensor([len(ids) for ids in encoded], device=states.device)
        here = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        length = states.double().norm(dim=-1)
        sinks = here & (length > _SINK * length[here].median())
        return Tokens(rows, states, inputs, here, counted.bool() & ~sinks, sinks, lengths - 1 if self._last else None)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token states of some sentences.

    Args:
        rows: Numbers of the sentences.
        states: States after the block.
        inputs: Inputs of the layer that writes them, over the norm's scale.
        here: Which tokens are there.
        counted: Which of them a mean counts.
        sinks: Which are attention sinks, which do not move.
        last: Place of the last token, where heads read that one.

    Shapes: states [rows tokens d], inputs [rows tokens i], here, counted and sinks [rows tokens], last [rows].
    """

    rows: Sequence[int]
    states: Tensor
    inputs: Tensor
    here: Tensor
    counted: Tensor
    sinks: Tensor
    last: Tensor | None

    def pooled(self, states: Tensor, roles: Sequence[str]) -> Float[Tensor, "rows roles d"]:
        """Return one vector per sentence and role, in float64."""
        weights = torch.stack([self.role_weights(role) for role in roles], dim=1)
        return weights @ states.double()

    def role_weights(self, role: str) -> Float[Tensor, "rows tokens"]:
        """Return the weights of the tokens in the vector of a role; they sum to 1, or to 0 if no token counts."""
        if role == "mean":
            counted = self.counted.double()
            return counted / counted.sum(1, keepdim=True).clamp_min(1.0)
        positions = torch.zeros_like(self.here[:, 0], dtype=torch.long) if self.last is None else self.last
        return torch.nn.functional.one_hot(positions, self.here.shape[1]).double()

    def token_weights(self, sentences: Sequence[Sentence], head: float, role: str) -> Float[Tensor, "rows tokens"]:
        """Return the weight of each token: its share of its sentence, and `head` more for the one that heads read."""
        weights = torch.tensor(
            [sentences[row].weight for row in self.rows], dtype=torch.float64, device=self.here.device
        )
        shares = self.here.double() / self.here.double().sum(1, keepdim=True)
        return weights[:, None] * (shares + head * self.role_weights(role) * ~self.sinks)


@dataclass(frozen=True, slots=True)
class Rows:
    """Pooled states of sentences with their displacements.

    Args:
        x: Pooled states, one row per sentence and role.
        y: Displacement of each, to its translation.
        weights: Weight of each row.
        groups: Group of each row.
        roles: Role of each row.
        moving: Whether it is to move at all: targets stay.

    Shapes: x and y [n d], the others [n].
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]
    weights: Float[Tensor, " n"]
    groups: Int[Tensor, " n"]
    roles: Int[Tensor, " n"]
    moving: Tensor


def displacements(sentences: Sequence[Sentence], pooled: Float[Tensor, "n roles d"]) -> Rows:
    """Return the displacement of each sentence: to its translation's states, none for the translation itself."""
    count, roles, width = pooled.shape
    target = torch.tensor([row if s.target is None else s.target for row, s in enumerate(sentences)])
    moving = torch.tensor([s.target is not None for s in sentences])
    y = pooled[target.to(pooled.device)] - pooled

    def spread(values: Tensor) -> Tensor:
        return values.to(pooled.device)[:, None].expand(count, roles).reshape(-1)

    return Rows(
        x=pooled.reshape(-1, width),
        y=y.reshape(-1, width),
        weights=spread(torch.tensor([s.weight for s in sentences], dtype=torch.float64)),
        groups=spread(torch.tensor([s.group for s in sentences])),
        roles=torch.arange(roles, device=pooled.device).repeat(count),
        moving=spread(moving),
    )
