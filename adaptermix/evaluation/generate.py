"""Greedy, batched, left-padded generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..models import BaseModel
from ..progress import SILENT, Watcher

_FIRST_ROUND = 16
"""Tokens of the first round; each further one doubles the length."""


def _stop_ids(base: BaseModel, *, one_line: bool) -> list[int]:
    """Token ids that end an answer: the model's own ends, and a line break where answers are one line."""
    config = base.model.generation_config.eos_token_id
    ends = [] if config is None else [config] if isinstance(config, int) else list(config)
    breaks = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\n\n") if one_line]
    return sorted({*ends, base.tokenizer.eos_token_id, *(ids[0] for ids in breaks if len(ids) == 1)})


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` [rows longest]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _settings(max_new_tokens: int, stops: set[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=sorted(stops), pad_token_id=pad
    )


@contextmanager
def _plainly(base: BaseModel, settings: Any) -> Iterator[None]:
    """Put the model's own generation settings aside: a repetition penalty, say, would fill what is left open."""
    own = base.model.generation_config
    base.model.generation_config = settings
    try:
        yield
    finally:
        base.model.generation_config = own


@torch.inference_mode()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    one_line: bool = True,
    watch: Watcher = SILENT,
    label: str = "generate",
) -> list[str]:
    """Return one greedy continuation per prompt, up to an end token.

    In rounds: answers that have not ended after 16 tokens go on together, up to 32, 64, ..., so that a batch does not
    wait for its longest. A round reads prompts and beginnings anew, which mostly costs less than rows that have ended.

    Args:
        base: A causal language model.
        prompts: Token ids; rows of like length are batched together, the order of the results is that of the prompts.
        max_new_tokens: Most tokens to generate per row.
        batch_size: Rows per batch.
        one_line: End at a line break too.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    stops = set(_stop_ids(base, one_line=one_line))
    pad = base.tokenizer.pad_token_id
    found: list[list[int]] = [[] for _ in prompts]
    waiting, length = list(range(len(prompts))), 0
    first = _FIRST_ROUND if batch_size > 1 else max_new_tokens
    with watch.track(label, len(prompts)) as advance:
        while waiting:
            more = min(length or first, max_new_tokens - length)
            length += more
            settings = _settings(more, stops, pad)
            going_on = []
            order = sorted(waiting, key=lambda row: len(prompts[row]) + len(found[row]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = _pad_left([[*prompts[row], *found[row]] for row in rows], pad, base.device)
                with _plainly(base, settings):
                    output = base.model.generate(**batch)
                for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    end = next((i for i, token in enumerate(ids) if token in stops), None)
                    found[row] += ids[:end]
                    if end is None and length < max_new_tokens:
                        going_on.append(row)
                    else:
                        advance(1, "")
            waiting = going_on
    return [base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
