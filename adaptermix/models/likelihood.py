"""Likelihoods of given continuations under a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..progress import SILENT, Watcher
from .base import BaseModel
from .generate import pad_left

_MOST_LOGITS = 2**27
"""Largest number of logits of a pass: half a gigabyte in float32."""
_Text = tuple[int, tuple[int, ...]]
"""Index of a prompt, and the tokens of a continuation but for its last one."""


@torch.inference_mode()
def log_likelihoods(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    endings: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    before: Callable[[Sequence[int]], None] = lambda _rows: None,
    watch: Watcher = SILENT,
    label: str = "score",
) -> list[list[float]]:
    """Return the logarithm of the probability of each continuation of each prompt.

    Continuations of a prompt that differ only in their last token share a pass, so that numbers of choices cost one
    pass per prompt.

    Args:
        base: A causal language model.
        prompts: Token ids, at least one each.
        endings: For each prompt its continuations as token ids, at least one each.
        batch_size: Texts per batch; texts of similar length are run together.
        before: Called before each pass with the prompt of each text in it, in batch order.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    options_of: dict[_Text, list[int]] = {}
    for row, options in enumerate(endings):
        for number, ending in enumerate(options):
            options_of.setdefault((row, tuple(ending[:-1])), []).append(number)
    order = sorted(options_of, key=lambda text: len(prompts[text[0]]) + len(text[1]))
    keep = 1 + max((len(body) for _, body in order), default=0)
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    size = max(1, min(batch_size, _MOST_LOGITS // (keep * vocabulary)))
    scores = [[0.0] * len(options) for options in endings]
    with watch.track(label, len(order)) as advance:
        for start in range(0, len(order), size):
            texts = order[start : start + size]
            batch = pad_left([[*prompts[row], *body] for row, body in texts], base.tokenizer.pad_token_id, base.device)
            before([row for row, _ in texts])
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            output = base.model(**batch, position_ids=positions, logits_to_keep=keep, use_cache=False)
            logs = output.logits[:, -keep:].float().log_softmax(-1)
            for (row, body), each in zip(texts, logs, strict=True):
                tail = each[-1 - len(body) :]
                for number in options_of[row, body]:
                    ids = torch.tensor([*body, endings[row][number][-1]], device=base.device)
                    scores[row][number] = float(tail.gather(1, ids.unsqueeze(1)).double().sum())
            advance(len(texts), "")
    return scores
