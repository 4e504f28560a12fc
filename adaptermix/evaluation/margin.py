"""Margin-based nearest neighbours (xsim), both directions of a pair at once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CHUNK = 1024


def _nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosines and indices of the k rows of y nearest to each row of x, one bounded block at a time."""
    blocks = [(part @ y.T).topk(min(k, len(y)), dim=1) for part in torch.split(x, _CHUNK)]
    return torch.cat([top.values for top in blocks]), torch.cat([top.indices for top in blocks])


def _best(near: Tensor, candidates: Tensor, back: Tensor) -> Tensor:
    margin = near / ((near.mean(1, keepdim=True) + back[candidates]) / 2)
    return candidates.gather(1, margin.argmax(1, keepdim=True)).squeeze(1)


def margin_neighbours(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, k: int = 4
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    r"""Return for each row of x the row of y with the largest ratio margin among its k nearest, and the reverse.

    $score(i, c) = \cos(x_i, y_c) / (\frac{1}{2}(\overline{\cos}_k(x_i) + \overline{\cos}_k(y_c)))$, where the means are
    over the k nearest neighbours in the other set. Only the k forward neighbours are candidates, as in LASER's xsim.
    Both directions need the same two searches, which are computed together.

    Args:
        x: Queries, and candidates of the reverse.
        y: Candidates, and queries of the reverse.
        k: Neighbours; limited to the number of rows.

    Shapes: x [n d], y [m d]; returns n indices below m and m indices below n.

    Reference: Artetxe and Schwenk, Margin-based Parallel Corpus Mining, ACL 2019, arXiv 1811.01136, section 3.
    """
    x, y = (torch.nn.functional.normalize(z.float(), dim=1) for z in (x, y))
    forth, candidates = _nearest(x, y, k)
    back, origins = _nearest(y, x, k)
    return _best(forth, candidates, back.mean(1)), _best(back, origins, forth.mean(1))


def hits(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, k: int = 4
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return for each row whether the retrieved row has the same number: of x in y, and of y in x."""
    right = torch.arange(len(x), device=x.device)
    there, back = margin_neighbours(x, y, k=k)
    return (there == right).cpu(), (back == right).cpu()
