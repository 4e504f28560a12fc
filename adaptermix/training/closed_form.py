"""An alignment LoRA in closed form: a ridge map between pooled states, written into one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..adapters import AdapterMeta, AdapterState, TargetSpec
from ..algebra import LowRank
from ..algebra.ridge import AffineMap, Products, choose_penalty, reduced_rank, ridge_map
from ..io.json_types import JsonObject
from ..merging.attach import Attachment
from ..progress import Watcher
from .displacement import Reader, Rows, Sentence, displacements
from .losses import bounded
from .residual_writer import Writer

MAP_PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge penalties of the map that are tried, relative to the mean squared singular value of the pooled states."""
LAYER_PENALTIES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridge penalties of the layer's update that are tried, relative to the mean square of its inputs."""
HEAD_WEIGHT = 1.0
"""Weight of the token that heads read, relative to all tokens of a sentence together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """An alignment in closed form.

    Args:
        map: Maps standardised pooled states to standardised displacements.
        spread: Standard deviations that both are divided by.
        module: The layer that writes the states.
        update: Update of that layer.
        penalty: Ridge penalty of the update, relative to the mean square of the layer's inputs.
        share: Share of the displacements of held-out tokens that the layer's inputs explain, at full rank.
        share_with_bias: The same with a bias, at the penalty that suits it best.

    Shapes: spread [d], update [d inputs].
    """

    map: AffineMap
    spread: Float[Tensor, " d"]
    module: str
    update: LowRank
    penalty: float
    share: float
    share_with_bias: float

    def document(self) -> JsonObject:
        """Return the manifest's entry on the fit."""
        return {
            "map": {"penalty": self.map.penalty, "explained_left_out": self.map.left_out},
            "layer_update": {
                "rank": self.update.rank,
                "penalty": self.penalty,
                "explained_left_out": self.share,
                "explained_left_out_with_bias": self.share_with_bias,
            },
        }

    def displacement(self, states: Tensor) -> Tensor:
        """Return the map's displacement of each state, in float64.

        Shapes: [... d].
        """
        return self.map(states.double() / self.spread) * self.spread


def common_spread(rows: Rows) -> Float[Tensor, " d"]:
    """Return a standard deviation per dimension: the root of the mean over roles of the variance within the role.

    A few dimensions of language models vary hundreds of times more than others. Divided by this, all have the same
    weight. The loss of the distillation has a spread for each role (`losses.spread_of`); here one map is applied to
    tokens of all roles, so there is one spread.
    """
    variances = [rows.x[rows.roles == role].var(0, correction=0) for role in torch.unique(rows.roles)]
    return bounded(torch.stack(variances).mean(0).sqrt())


def fit_map(rows: Rows, spread: Float[Tensor, " d"], *, shift_only: bool) -> AffineMap:
    """Return the map of standardised pooled states to standardised displacements: affine, or one constant."""
    x, y = rows.x / spread, rows.y / spread
    if shift_only:
        weights = (rows.weights * rows.moving)[:, None]
        zero = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
        return AffineMap(zero, zero[0], (weights * y).sum(0) / weights.sum())
    return ridge_map(x, y, groups=rows.groups, weights=rows.weights, penalties=MAP_PENALTIES)


def fit_closed_form(
    reader: Reader,
    writer: Writer,
    sentences: Sequence[Sentence],
    *,
    rank: int,
    shift_only: bool,
    watch: Watcher,
) -> Fitted:
    r"""Fit the map, and the update of one layer that moves every token as the map does.

    The update is computed from sums of products of the layer's inputs with the mapped states. The map is affine, so
    these sums can be computed from products with the states themselves, before the map is known. Therefore every
    sentence is run once, and no states of tokens are stored.

    Args:
        reader: Reads the sentences.
        writer: The layer.
        sentences: Sentences and their translations.
        rank: Rank of the update.
        shift_only: Whether all states move by the mean displacement.
        watch: Receives progress.
    """
    pooled: Tensor | None = None
    parts: list[Products] = []
    with watch.track("states", len(sentences)) as advance:
        for batch in reader.split(sentences):
            tokens = reader.read(sentences, batch)
            vectors = tokens.pooled(tokens.states, reader.roles)
            if pooled is None:
                pooled = vectors.new_zeros(len(sentences), *vectors.shape[1:])
                shape = tokens.inputs.shape[-1], tokens.states.shape[-1] + 1
                parts = [Products.empty(*shape, vectors.device) for _ in range(2)]
            pooled[torch.tensor(batch)] = vectors
            weights = tokens.token_weights(sentences, HEAD_WEIGHT, reader.roles[-1])
            # Attention sinks do not move, so their states and the constant count as zero.
            states = torch.nn.functional.pad(tokens.states.double(), (0, 1), value=1.0) * ~tokens.sinks[..., None]
            folds = torch.tensor([sentences[row].group % 2 for row in batch], device=weights.device)
            for fold, part in enumerate(parts):
                here = tokens.here & (folds == fold)[:, None]
                part.add(tokens.inputs[here], states[here], weights[here])
            advance(len(batch), "")
    assert pooled is not None  # noqa: S101  (there are sentences)
    rows = displacements(sentences, pooled)
    spread = common_spread(rows)
    affine = fit_map(rows, spread, shift_only=shift_only)
    matrix = torch.cat([affine.weight / spread[:, None], (affine.offset - affine.center @ affine.weight)[None]])
    biased = [part.mapped(matrix) for part in parts]
    plain = [Products(part.inner[:-1, :-1], part.cross[:-1], part.outer) for part in biased]
    penalty, share = choose_penalty(plain, LAYER_PENALTIES)
    update = reduced_rank(plain[0] + plain[1], rank=rank, penalty=penalty)
    back = spread * writer.per_state(spread)
    return Fitted(
        map=affine,
        spread=spread,
        module=writer.path,
        update=LowRank(b=(update.b * back[:, None]).float().cpu(), a=update.a.float().cpu()),
        penalty=penalty,
        share=share,
        share_with_bias=choose_penalty(biased, LAYER_PENALTIES)[1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Shares of the displacements of held-out sentences that the fit explains.

    All are 1 - (squared error) / (squared displacement), in standardised dimensions; unchanged states give 0.

    Args:
        map: Share of the sentences' displacements that the map explains.
        adapter: Share that the model with the adapter explains.
        roles: The same by role: mean over the tokens, first or last token.
        tokens: Share of the map's displacements of tokens that the model with the adapter explains.
        targets_moved: Squared displacement of translations, which should stay, relative to that of their sources.
    """

    map: float
    adapter: float
    roles: dict[str, float]
    tokens: float
    targets_moved: float

    def document(self) -> JsonObject:
        """Return the shares as plain data."""
        return {
            "map": self.map,
            "adapter": self.adapter,
            "adapter_by_role": self.roles,
            "adapter_tokens": self.tokens,
            "targets_moved": self.targets_moved,
        }


def explained(
    model: nn.Module, reader: Reader, fitted: Fitted, sentences: Sequence[Sentence], watch: Watcher
) -> Explained:
    """Run sentences with and without the adapter, and return how much of their displacements is explained.

    Args:
        model: The base model.
        reader: Reads its states.
        fitted: The fit.
        sentences: Sentences that were not used in the fit, and their translations.
        watch: Receives progress.
    """
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=(fitted.module,)))
    state = AdapterState.of_updates(meta, {fitted.module: fitted.update})
    vectors: list[list[Tensor]] = [[], []]
    numbers: list[int] = []
    error = whole = 0.0
    with Attachment(model, [state]) as attached, watch.track("held-out pairs", len(sentences)) as advance:
        for batch in reader.split(sentences):
            attached.set_weights([0.0])
            tokens = reader.read(sentences, batch)
            attached.set_weights([1.0])
            after = reader.read(sentences, batch).states.double()
            numbers += batch
            for pooled_states, states in zip(vectors, (tokens.states.double(), after), strict=True):
                pooled_states.append(tokens.pooled(states, reader.roles))
            target = fitted.displacement(tokens.states) * ~tokens.sinks[..., None] / fitted.spread
            missed = target - (after - tokens.states.double()) / fitted.spread
            weights = tokens.token_weights(sentences, HEAD_WEIGHT, reader.roles[-1]) * tokens.here
            error += float((weights * missed.square().sum(-1)).sum())
            whole += float((weights * target.square().sum(-1)).sum())
            advance(len(batch), "")
    back = torch.tensor(numbers).argsort()
    pooled, moved = (torch.cat(parts)[back] for parts in vectors)
    rows = displacements(sentences, pooled)
    y = rows.y / fitted.spread
    change = ((moved - pooled).flatten(0, 1)) / fitted.spread

    def share(missed: Tensor, chosen: Tensor) -> float:
        weights = rows.weights * chosen
        return 1 - float(
            (weights * missed.square().sum(1)).sum() / (weights * y.square().sum(1)).sum().clamp_min(1e-30)
        )

    every = torch.ones_like(rows.moving)
    return Explained(
        map=share(y - fitted.displacement(rows.x) / fitted.spread, every),
        adapter=share(y - change, every),
        roles={role: share(y - change, rows.roles == number) for number, role in enumerate(reader.roles)},
        tokens=1 - error / (whole or 1.0),
        targets_moved=1 - share(change * ~rows.moving[:, None], every),
    )
