"""Teach the answer, not the prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100


def answer_loss(
    model: Any,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"],
    labels: Int[Tensor, "rows tokens"],
    position_ids: Int[Tensor, "rows tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the labelled tokens, each predicted from the tokens before it.

    Logits are computed only at positions where some row has a label to predict: with large vocabularies the output
    layer is most of the work.

    Args:
        model: A causal language model of transformers that takes `logits_to_keep`.
        input_ids: Prompt and answer; padded on the left, answers end together and the fewest logits are needed.
        attention_mask: 1 for tokens, 0 for padding.
        labels: Token ids of the answer at their own places, -100 elsewhere.
        position_ids: Places of the tokens, needed where rows are padded on the left.

    Shapes: all [rows tokens]; returns a scalar in float32.
    Reference: Liu and Niehues, ACL 2025, arXiv 2502.14830, section 3; loss on the answer alone as in their release.
    """
    wanted = labels[:, 1:]  # the token at t is predicted from position t - 1
    places = (wanted != IGNORED).any(0).nonzero().squeeze(1)
    extra = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=places, use_cache=False, **extra
    ).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, places].flatten(), ignore_index=IGNORED)
