"""LoRA on a live model: put it in, count it, take it out as plain factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterMeta, AdapterModule, AdapterSource, AdapterState, TargetSpec
from ..adapters.keys import PREFIX
from ..algebra import LowRank, concatenate
from ..errors import PlanError
from ..fusion.sources import FUSING
from ..models.base import BaseModel
from ..models.blocks import blocks, linear_names
from ..models.encoders import is_encoder_half
from ..options import FusionSettings, TrainingSettings
from ..options.fields import block_range
from ..options.training import MOVING, beyond_the_layer
from .dropout import quicken

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_NAME = "default"
# PEFT refuses these modules of these models: their kernels read the weights directly and would skip a LoRA.
_STATE_SPACES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_UNSUITED = {"out_proj", "conv1d"}
_WHOLE = f".modules_to_save.{_NAME}"
_TASK_TYPES = {"causal": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


def scales(model: nn.Module) -> dict[str, float]:
    """Return the factor s of the update s*B*A of each adapted module."""
    from peft.tuners.lora import LoraLayer

    return {name: module.scaling[_NAME] for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def chosen_blocks(model: nn.Module, settings: TrainingSettings) -> range:
    """Return the numbers of the blocks to adapt, from 0.

    Raises:
        PlanError: the model has not as many.
    """
    count = len(blocks(model)[1])
    chosen = block_range(settings.blocks) if settings.blocks else range(count)
    if chosen.stop > count:
        raise PlanError(
            f"--blocks must lie within 0-{count - 1} for this base model, got {settings.blocks}.", code="train.blocks"
        )
    return chosen


def check_reach(settings: TrainingSettings, layer: int, *, whole: bool) -> None:
    """Refuse blocks that a loss at a layer does not reach; see `beyond_the_layer`.

    Raises:
        PlanError: there are such blocks.
    """
    if fault := beyond_the_layer(settings.blocks, layer, whole=whole):
        raise PlanError(
            f"{fault}{', those of the adapter in --start-from' if settings.start_from else ''}.",
            code="train.blocks-unreached",
        )


def resolve_targets(model: nn.Module, targets: Sequence[str], chosen: range) -> list[str]:
    """Return module names for the `targets` setting.

    `all-linear` is every linear layer of the chosen blocks that PEFT adapts, `auto` what makes queries and values of
    attention.

    Raises:
        PlanError: a name that occurs in no chosen block.
    """
    refused = _UNSUITED if getattr(model.config, "model_type", "") in _STATE_SPACES else set[str]()
    known = [name for name in linear_names(model, chosen) if name not in refused]
    if list(targets) == ["auto"]:
        fusing = [name for name in known if name in FUSING]
        if not fusing:
            raise PlanError(
                f"--targets must name the queries and values of this base model, which has {', '.join(known)}.",
                code="train.targets-queries",
            )
        return fusing
    if "all-linear" in targets:
        if len(targets) > 1:
            raise PlanError(
                f"--targets all-linear stands alone, got {', '.join(targets)}.", code="train.targets-all-linear"
            )
        return known
    missing = sorted(set(targets) - set(known))
    if missing:
        raise PlanError(
            f"--targets must be all-linear or among {', '.join(known)}, got {', '.join(missing)}.", code="train.targets"
        )
    return list(targets)


def _in_blocks(model: nn.Module, names: Sequence[str], chosen: range) -> dict[str, object]:
    """Return modules of blocks in the form that PEFT takes."""
    pattern = blocks(model)[0].rpartition(".")[2]
    return {"target_modules": list(names), "layers_to_transform": list(chosen), "layers_pattern": pattern}


def _as_in(start: AdapterSource, names: Sequence[str]) -> dict[str, object]:
    """Return the modules and ranks of an adapter in the form that PEFT takes.

    Raises:
        PlanError: the settings name other modules.
    """
    adapted = {path.rpartition(".")[2] for path in start.modules}
    if adapted != set(names):
        raise PlanError(
            f"with --start-from the adapter '{start.name}' decides, so drop --targets {', '.join(names)} (it has "
            f"{', '.join(sorted(adapted))}).",
            code="start-from.targets",
        )
    ranks = {f"^{re.escape(path)}": start.rank(path) for path in start.modules}
    return {"target_modules": list(start.modules), "rank_pattern": ranks}


def inject(
    model: PreTrainedModel,
    settings: TrainingSettings,
    *,
    seed: int,
    head: Sequence[str] = (),
    start: AdapterSource | None = None,
) -> list[str]:
    """Put a fresh LoRA into the model's blocks, or some of them, in place; return the names of the adapted modules.

    The model's output does not change: the update starts at zero, or the base loses what the factors hold,
    see `start_of`. Only LoRA factors and the modules of `head`, which are trained whole, require a gradient.
    For an adapter to start from, modules, ranks and scales are set here, and its factors by `Trainer.start_at`.

    Args:
        model: The base model, with any head.
        settings: The run's settings.
        seed: Seed of the factors.
        head: Names of the head's modules.
        start: The adapter that training starts from, fitted to the model.

    Raises:
        PlanError: targets or blocks that the model has not, or an `init` that does not suit its dtype or its layers.
    """
    from peft import inject_adapter_in_model

    chosen = chosen_blocks(model, settings)
    names = resolve_targets(model, settings.targets, chosen)
    if settings.init in (*MOVING, "orthogonal") and model.dtype != torch.float32:
        raise PlanError(
            f"--init {settings.init} needs --dtype float32, found {str(model.dtype).removeprefix('torch.')}: in half "
            "precision the LoRA would change the model before training.",
            code="train.init-dtype",
        )
    if settings.init == "olora" and any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise PlanError(
            "--init olora needs linear layers that are not transposed (GPT-2 has such): use --init pissa.",
            code="train.init-olora",
        )
    modules = _in_blocks(model, names, chosen) if start is None else _as_in(start, names)
    config = _config(settings, modules_to_save=list(head) or None, **modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for path, header in start.modules.items() if start else ():
        model.get_submodule(path).scaling[_NAME] = header.scale  # exact for any alpha
    quicken(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or is_head(name))
    checkpoint_activations(model, settings)
    return names


def checkpoint_activations(model: PreTrainedModel, settings: TrainingSettings) -> None:
    """Let a model compute its activations twice instead of keeping them, with `gradient_checkpointing`."""
    if settings.gradient_checkpointing:
        # renamed in transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _config(settings: TrainingSettings, **more: Any) -> LoraConfig:
    common: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
    }
    if isinstance(settings, FusionSettings) and settings.peft_settings():
        from ..fusion.lora import FusionConfig

        return FusionConfig(**common, **settings.peft_settings(), **more)
    from peft import LoraConfig

    return LoraConfig(**common, **more)


def config_of(settings: TrainingSettings, base: BaseModel, names: Sequence[str]) -> LoraConfig:
    """Return PEFT's config of a trained adapter.

    Args:
        settings: The run's settings.
        base: The base model it was trained on.
        names: Names of the adapted modules.
    """
    return _config(
        settings,
        modules_to_save=list(base.head_modules) or None,
        **_in_blocks(base.model, names, chosen_blocks(base.model, settings)),
        base_model_name_or_path=base.id,
        revision=base.revision,
        task_type=task_type(base),
    )


def task_type(base: BaseModel) -> str:
    """Return PEFT's task type; with a head of this package, which PEFT does not know, that of models without a head."""
    if base.head:
        return "FEATURE_EXTRACTION" if base.head.reader else base.head.form.task_type
    return _TASK_TYPES[base.kind]


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable factors by parameter name, sorted."""
    return dict(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))


def is_head(name: str) -> bool:
    """Return whether a parameter belongs to a head, which is trained whole."""
    return _WHOLE in name


def stored_name(name: str) -> str:
    """Return the name in PEFT's file of a head's parameter."""
    return PREFIX + name.replace(_WHOLE, "")


def factor_name(module: str, part: str) -> str:
    """Return the name of a LoRA's parameter, whose part is "A", "B" or "magnitude_vector"."""
    return f"{module}.lora_{part}.{_NAME}.weight"


def count_trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in factors(model).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Trained tensors, in float32 on the CPU.

    Args:
        updates: Update per module path.
        magnitudes: DoRA's magnitude per module path.
        saved: Tensors of the head by their name in PEFT's file.
    """

    updates: dict[str, LowRank]
    magnitudes: dict[str, Tensor]
    saved: dict[str, Tensor]


def start_of(model: nn.Module, settings: TrainingSettings) -> dict[str, LowRank]:
    """Return, per module path, the part that a newly injected LoRA took out of the base; empty for most inits.

    Reference: Meng et al., PiSSA, NeurIPS 2024, arXiv 2404.02948; Bueyuekakyuez, OLoRA, 2024, arXiv 2406.01775.
    """
    if settings.init not in MOVING:
        return {}
    return extract({name: value.clone() for name, value in factors(model).items()}, scales(model)).updates


def extract(
    values: dict[str, Tensor], scale_of: Mapping[str, float], start: Mapping[str, LowRank] = MappingProxyType({})
) -> Trained:
    """Return the trained tensors, from parameters by name.

    Args:
        values: The parameters.
        scale_of: Scale of each module's update.
        start: The part that the LoRA took out of the base when it was injected.
    """
    factors_of: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for name, value in values.items():
        if is_head(name):
            saved[stored_name(name)] = value.detach().float().cpu()
            continue
        module, _, rest = name.partition(".lora_")
        factors_of.setdefault(module, {})[rest.partition(".")[0]] = value.detach().float().cpu()
    updates = {name: LowRank(b=parts["B"], a=parts["A"], scale=scale_of[name]) for name, parts in factors_of.items()}
    # The base that the adapter is for still has that part.
    updates |= {module: concatenate([updates[module], taken], [1.0, -1.0]) for module, taken in start.items()}
    magnitudes = {
        module: parts["magnitude_vector"] for module, parts in factors_of.items() if "magnitude_vector" in parts
    }
    return Trained(updates=updates, magnitudes=magnitudes, saved=saved)


def state_of(
    base: BaseModel,
    trained: Trained,
    names: Sequence[str],
    layers: int | None,
) -> AdapterState:
    """Return the trained adapter.

    Args:
        base: The base model it was trained on.
        trained: The trained tensors.
        names: Names of the adapted modules.
        layers: Number of blocks that were run, or None for all of the model's.
    """
    path, stack = blocks(base.model)
    ends = [name.rpartition(".")[2] for name, _ in base.model.named_modules() if not name.startswith(f"{path}.")]
    targets = TargetSpec(modules=tuple(names))
    adapted = {int(name.removeprefix(f"{path}.").partition(".")[0]) for name in trained.updates}
    # a name such as "dense" may occur outside the blocks too, where no module was trained
    if layers is not None or len(adapted) < len(stack) or set(ends) & set(names):
        targets = replace(targets, layers=tuple(sorted(adapted)), layers_pattern=(path.rpartition(".")[2],))
    # An adapter to start from may have gaps. The decoder that belongs to an encoder half has modules of the same names.
    if is_encoder_half(base.model.config) or _reached(base.model, targets) != set(trained.updates):
        targets = TargetSpec(modules=tuple(sorted(trained.updates)))
    meta = AdapterMeta(
        base=base.id,
        revision=base.revision,
        task_type=task_type(base),
        targets=targets,
        dora=bool(trained.magnitudes),
        saved_modules=base.head_modules,
    )
    modules = {
        path: AdapterModule(update=update, magnitude=trained.magnitudes.get(path))
        for path, update in trained.updates.items()
    }
    return AdapterState(meta=meta, modules=modules, saved=trained.saved)


def _reached(model: nn.Module, targets: TargetSpec) -> set[str]:
    """Return the modules of a model that targets by last names and numbers of blocks mean."""
    path = blocks(model)[0]
    inside = tuple(f"{path}.{number}." for number in targets.layers or ())
    return {
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in targets.modules and (not inside or name.startswith(inside))
    }
