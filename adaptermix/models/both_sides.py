"""Attention in both directions for decoders that were trained with causal attention, as LLM2Vec has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .stack import Projected

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def see_both_sides(body: PreTrainedModel) -> None:
    """Let each token of a decoder see the tokens after it too, for the life of the model.

    A mask of four dimensions replaces the causal one that transformers would make, for eager and sdpa attention.

    Raises:
        ModelError: the model's attention ignores such a mask, or it has blocks without attention, such as Mamba's.
    """
    if getattr(body, "_is_stateful", False):  # transformers marks models with recurrent states so
        raise ModelError(
            f"--attention both needs a model whose blocks all have attention, and {type(body).__name__} has blocks "
            "that read a text in one direction: use --attention causal, or another model on top.",
            code="stack.attention",
        )
    kind = str(getattr(body.config, "_attn_implementation", "eager"))
    if kind not in ("eager", "sdpa"):
        raise ModelError(
            f"--attention both needs eager or sdpa attention, found {kind}: load the model with one of these.",
            code="stack.attention",
        )

    below = [module for module in body.modules() if isinstance(module, Projected)]

    def open_mask(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or any(each.reads_own for each in below):
            return None  # the teacher is the model as it was pretrained
        dtype = body.dtype
        closed = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, torch.finfo(dtype).min)
        length = mask.shape[1]
        return args, {
            **kwargs,
            "attention_mask": closed[:, None, None, :].expand(-1, 1, length, -1),
            "use_cache": False,
        }

    body.register_forward_pre_hook(open_mask, with_kwargs=True)
    if not _sees_later_tokens(body):
        raise ModelError(
            "--attention both needs a model that accepts a mask with a value for each pair of tokens, and "
            f"{type(body).__name__} does not: use --attention causal, or another model on top.",
            code="stack.attention",
        )


def _sees_later_tokens(body: PreTrainedModel) -> bool:
    """Return whether a model with an open mask runs, and whether a change of the last token moves the first one.

    OPT and models with ALiBi compute positions from a mask of two dimensions, and fail with another one.
    """
    width = cast(nn.Embedding, body.get_input_embeddings()).weight.shape[1]
    vectors = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    vectors[1, -1] *= -1
    vectors = vectors.to(body.device, body.dtype)
    mask = torch.ones(2, 4, dtype=torch.long, device=body.device)
    try:
        with torch.no_grad():
            states = body(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return not torch.equal(states[0, 0], states[1, 0])
