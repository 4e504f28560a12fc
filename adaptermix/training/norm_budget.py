"""A bound on how far training may move each weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PlanError
from ..models.quantization import stored_norm
from ..options import TrainingSettings
from .lora import scales

# Rounding a float32 factor adds less than this to a norm.
_MARGIN = 1e-6


def product_norm(b: Float[Tensor, "out r"], a: Float[Tensor, "r into"]) -> Float[Tensor, ""]:
    r"""Return the Frobenius norm of $BA$ in float64, without the product.

    $|BA|_F^2 = tr(A^T B^T B A) = \sum_{ij} (B^T B)_{ij} (A A^T)_{ij}$

    Shapes: b [out r], a [r in]; returns a scalar.
    """
    b, a = b.double(), a.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()


def weight_norm(module: nn.Module, name: str) -> float:
    """Return the Frobenius norm of a linear layer's weight, dequantised where it is quantised.

    Raises:
        PlanError: the weight is quantised in a way that is not understood.
    """
    norm = stored_norm(module)
    if norm is None:
        raise PlanError(
            f"--norm-budget needs the norm of every adapted weight, but that of {name} ({type(module).__name__}) "
            "cannot be computed. Drop --norm-budget or use a base that is not quantised.",
            code="train.norm-budget",
        )
    return norm


class NormBudget:
    r"""Holds each module's update within a share of its weight.

    After a step, where $s|BA|_F > c|W|_F$, B is multiplied by $c|W|_F / (s|BA|_F)$, so the bound holds and the update
    keeps its direction; elsewhere no bit changes. A and the optimizer's moments do not change. A resumed run needs no
    further state: the bound is a function of the base and the factors alone.

    Args:
        model: The base model with its LoRA in.
        settings: The run's settings; `norm_budget` is c, None for no bound.

    Raises:
        PlanError: the norm of a weight cannot be computed.

    Relations: a projection onto a ball per module, as `max_grad_norm` is one for gradients. What `--on-top-of` lays
    under the LoRA counts neither as W nor as update; a head, which is trained whole, has no bound.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        self._limits: dict[tuple[str, str], tuple[float, float]] = {}
        if settings.norm_budget is None:
            return
        modules, scale_of = dict(model.named_modules()), scales(model)
        for b, _ in model.named_parameters():
            name, separator, rest = b.partition(".lora_B.")
            if separator:
                limit = settings.norm_budget * weight_norm(modules[f"{name}.base_layer"], name)
                self._limits[b, f"{name}.lora_A.{rest}"] = limit, scale_of[name]

    @torch.no_grad()
    def apply(self, masters: Mapping[str, Tensor]) -> dict[str, int]:
        """Scale updates back to their bounds, in place; return the log entry: how many were beyond."""
        beyond = []
        for (b, a), (limit, scale) in self._limits.items():
            norm = scale * product_norm(masters[b], masters[a])
            over = norm > limit
            masters[b].mul_(torch.where(over, limit * (1 - _MARGIN) / norm, 1.0))
            beyond.append(over)
        return {"held": int(torch.stack(beyond).sum())} if beyond else {}
