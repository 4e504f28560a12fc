"""Teach the answer, not the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor, nn

from ...tasks.heads.base import IGNORED, cross_entropy
from .linear_ce import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_loss(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"],
    labels: Int[Tensor, "rows tokens"],
    position_ids: Int[Tensor, "rows tokens"] | None = None,
    *,
    head: nn.Linear | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the labelled tokens, each predicted from the tokens before it.

    With large vocabularies the output layer is most of the work. With `head` logits are computed for labelled tokens
    only and not kept; else at the positions where some row has a label to predict.

    Args:
        model: A causal language model of transformers that takes `logits_to_keep`.
        input_ids: Prompt and answer; padded on the left, answers end together and the fewest logits are needed.
        attention_mask: 1 for tokens, 0 for padding.
        labels: Token ids of the answer at their positions, -100 elsewhere.
        position_ids: Positions of the tokens, needed if rows are padded on the left.
        head: The model's output layer, where `plain_head` finds that it alone makes the logits.

    Shapes: all [rows tokens]; returns a scalar in float32, 0 where no token is labelled.
    Reference: Liu and Niehues, ACL 2025, arXiv 2502.14830, section 3; loss on the answer alone as in their release.
    """
    gold = labels[:, 1:]  # the token at t is predicted from position t - 1
    extra = {} if position_ids is None else {"position_ids": position_ids}
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **extra}
    if head is not None:
        labelled = gold != IGNORED
        states = model.get_decoder()(**batch).last_hidden_state[:, :-1][labelled]
        return linear_cross_entropy(states, head.weight, gold[labelled], head.bias)
    positions = (gold != IGNORED).any(0).nonzero().squeeze(1)
    logits = model(**batch, logits_to_keep=positions).logits
    return cross_entropy(logits.flatten(0, 1), gold[:, positions].flatten())
