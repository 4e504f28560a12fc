"""Cross-entropy behind a frozen output layer, without ever holding all logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits in memory at a time: 64 MiB on a CPU, 1 GiB on an accelerator, where large products are faster.
_CPU_LOGITS, _DEVICE_LOGITS = 2**24, 2**28


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is computed on the way forward, while a block of logits is in memory."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        count, vocabulary = len(targets), len(weight)
        most = _CPU_LOGITS if states.device.type == "cpu" else _DEVICE_LOGITS
        rows = max(16, most // vocabulary)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if states.requires_grad else None
        room = torch.empty(min(rows, count), vocabulary, dtype=states.dtype, device=states.device)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = torch.mm(states[part], weight.T, out=room[: len(targets[part])])
            if bias is not None:
                logits += bias
            wide = logits.float()  # the same memory where it is float32 already
            gold = targets[part, None]
            spread = wide.logsumexp(-1, keepdim=True)
            total += (spread - wide.gather(1, gold)).sum()
            if gradient is not None:
                wide.sub_(spread).exp_()
                wide.scatter_add_(1, gold, wide.new_full((len(gold), 1), -1.0))
                torch.mm(wide.div_(count).to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total / max(1, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * grad.to(gradient.dtype)), None, None, None


def linear_cross_entropy(
    states: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of `states @ weight.T + bias`, in float32; 0 for no states.

    Logits are made block by block, in memory that is used again; a gradient reaches `states` alone. Under autocast they
    are products in its dtype, as those of a linear layer would be; what follows is in float32 always.

    Args:
        states: Last hidden states, one for each token to predict.
        weight: The output layer's, frozen.
        targets: Token ids.
        bias: The output layer's, frozen.

    Shapes: states [tokens width], weight [vocabulary width], targets [tokens], bias [vocabulary]; returns a scalar.
    Reference: Wijmans et al., 2025, arXiv 2411.09009, section 4, for not keeping the logits.
    """
    kind = states.device.type
    if torch.is_autocast_enabled(kind):  # which does not cover products with `out=`
        dtype = torch.get_autocast_dtype(kind)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    loss: Tensor = _LinearCrossEntropy.apply(states, weight, bias, targets)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the output layer of a causal language model if the logits are exactly its output.

    Some models scale or bound them afterwards. Comparing values shows it for any architecture.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head._forward_hooks:  # hooks: an attached adapter
        return None
    ids = torch.tensor([[1, 2, 3]], device=model.device) % len(head.weight)
    logits = model(input_ids=ids, use_cache=False).logits
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return head if states.shape[-1] == head.in_features and torch.allclose(head(states), logits, rtol=1e-5) else None
