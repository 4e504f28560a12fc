"""Draw translations together, push other sentences of the batch apart."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def contrastive_loss(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    same: Bool[Tensor, "n n"] | None = None,
) -> Float[Tensor, ""]:
    r"""Return the InfoNCE loss of sentence vectors against their translations in the batch.

    With $S_{ij} = \cos(h(s_i), h(t_j)) / \tau$, in float32,

        $L = \frac{1}{n} \sum_i -\log \frac{e^{S_{ii}}}{\sum_j e^{S_{ij}}}$

    Args:
        source: Anchors; row i belongs to row i of `target`.
        target: Candidates.
        temperature: $\tau$; 0.1 for Llama 3 and 1.5 for Qwen 2.5 in the paper.
        symmetric: Average with the loss of the transposed matrix.
        same: True where candidate j is the same sentence as candidate i; such j != i are not counted as negatives.

    Shapes: source and target [n d], same [n n]; returns a scalar.
    Inputs: | anchors (usually not English) | translations (usually English) |
    Relations: one direction only, as published; `symmetric` is CLIP's form. Negatives are those of the batch.
    Differs from the paper: cosine is computed in float32; the release computes it in the model's dtype. Masking of
    duplicates is off by default, as in the release.
    Reference: Liu and Niehues, Middle-Layer Representation Alignment, ACL 2025, arXiv 2502.14830, equation 1.
    """
    source, target = (torch.nn.functional.normalize(side.float(), dim=1) for side in (source, target))
    with torch.autocast(source.device.type, enabled=False):  # cosines in half precision differ by more than they mean
        similarity = source @ target.T / temperature
    if same is not None:
        others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        similarity = similarity.masked_fill(others, float("-inf"))
    gold = torch.arange(len(similarity), device=similarity.device)
    loss = torch.nn.functional.cross_entropy(similarity, gold)
    if symmetric:
        loss = (loss + torch.nn.functional.cross_entropy(similarity.T, gold)) / 2
    return loss


def retrieved(source: Float[Tensor, "n d"], target: Float[Tensor, "n d"], same: Bool[Tensor, "n n"]) -> float:
    """Return how many pairs find each other by cosine among the sentences of the batch, the mean of both directions.

    Unlike the loss it is of the same meaning at every temperature.

    Args:
        source: Row i belongs to row i of `target`.
        target: Candidates, and in the other direction anchors.
        same: True where two targets are the same sentence, either of which will do.

    Shapes: source and target [n d], same [n n].

    Example:
        >>> pairs, apart = torch.eye(3), torch.eye(3, dtype=torch.bool)
        >>> retrieved(pairs, pairs[[1, 0, 2]], apart), retrieved(pairs, pairs, apart)
        (1.0, 3.0)
    """
    source, target = (torch.nn.functional.normalize(side.float(), dim=1) for side in (source, target))
    with torch.autocast(source.device.type, enabled=False):
        similarity = source @ target.T
    hits = [same.gather(1, way.argmax(1, keepdim=True)).sum() for way in (similarity, similarity.T)]
    return float(sum(hits)) / 2
