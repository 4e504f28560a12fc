"""PEFT's LoRA with a fusion in its bottleneck. Import this module late, since it imports PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from ..adapters.keys import PREFIX
from ..errors import InvalidValueError
from .extra_modules import PROJECTION, add_parts
from .functions import FUSIONS, Bottleneck, SoftAlignment
from .mixup import MIXUP
from .sources import ALIGNMENTS, LAST

__all__ = ["load_fusion"]

_PART = re.compile(r"\.lora_fusion\.(?:[^.]+\.)?(fuse|align)\.")


@dataclass
class FusionConfig(LoraConfig):  # type: ignore[misc]
    """A LoRA whose bottleneck fuses source and target; PEFT alone loads it as a plain LoRA.

    "The paper" is FLARE's, "the release" its authors' published code.

    Args:
        fusion: Name of the fusion; `x-mixup` mixes in one block and does not change the LoRAs.
        fusion_alignment: `position`, `end`, `row-end`, `last`, `index`, or `soft`, which is learned.
        fusion_norm: Whether source states are read after the norm layer in front of a module.
        fusion_offset: Where source states are read: 0 at a block's input, 1 at its output.
        fusion_pads: Whether padding of a source counts as a token, as in the release.
        fusion_dropout: Whether sources are read with the base's dropout in training, as in the release.
        fusion_encoder: Encoder whose states are the sources, if not the base's.
        fusion_tag: Language tag of all texts for this encoder; default the tag of each text's language.
        fusion_layer: Number of the block where `x-mixup` mixes.

    Raises:
        ValueError: there is no such fusion or alignment.
    """

    fusion: str = field(default="add")
    fusion_alignment: str = field(default="position")
    fusion_norm: bool = field(default=True)
    fusion_offset: int = field(default=0)
    fusion_pads: bool = field(default=False)
    fusion_dropout: bool = field(default=False)
    fusion_encoder: str | None = field(default=None)
    fusion_tag: str | None = field(default=None)
    fusion_layer: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise InvalidValueError(
                "a fusion LoRA must not have magnitudes (use_dora): these rescale a weight, and a fusion does "
                "not change a weight",
                code="fusion.dora",
            )
        wrong = "fusions and their alignments must be among {}, got {!r}"
        if self.fusion != MIXUP and self.fusion not in FUSIONS:
            raise InvalidValueError(
                wrong.format(", ".join([*FUSIONS.names(), MIXUP]), self.fusion), code="fusion.unknown"
            )
        alignments = [*ALIGNMENTS, LAST, "soft"]
        if self.fusion_alignment not in alignments:
            raise InvalidValueError(wrong.format(", ".join(alignments), self.fusion_alignment), code="fusion.unknown")
        if self.fusion in FUSIONS:
            self._register_custom_module({nn.Linear: FusionLinear})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> FusionConfig:
        """Return the config from an adapter's JSON, which names PEFT's original type."""
        return cls(**{name: value for name, value in kwargs.items() if name in cls.__dataclass_fields__})

    @classmethod
    def release(cls, **more: Any) -> FusionConfig:
        """Return the released code's configuration: raw states before a block, aligned by index, with padding.

        This is the release's setting for encoders. Its decoders, padded on the left, train with
        `fusion_alignment="row-end"` and answer with `"last"`.
        """
        settings = {"fusion_norm": False, "fusion_offset": 0, "fusion_alignment": "index", "fusion_pads": True}
        return cls(**{**settings, "fusion_dropout": True, **more})

    @classmethod
    def paper(cls, **more: Any) -> FusionConfig:
        """Return the configuration of the paper: as in the release, with states after a block."""
        return cls.release(**{"fusion_offset": 1, **more})


class FusionVariant(LoraVariant):  # type: ignore[misc]
    """Implementation of PEFT's interface for LoRA variants."""

    @staticmethod
    def init(module: FusionLinear, adapter_name: str, config: FusionConfig, **_: object) -> None:
        """Add a fusion to an adapter's factors."""
        rank, like = module.r[adapter_name], module.lora_A[adapter_name].weight
        parts = {"fuse": FUSIONS[config.fusion](rank)}
        if config.fusion_alignment == "soft":
            parts["align"] = SoftAlignment(rank)
        if not hasattr(module, "lora_fusion"):  # PEFT's layer resets its contents here
            module.lora_fusion, module.fusion_pads = nn.ModuleDict({}), {}
        module.lora_fusion[adapter_name] = nn.ModuleDict(parts).to(like.device, like.dtype)
        module.fusion_pads[adapter_name] = config.fusion_pads

    @staticmethod
    def forward(module: FusionLinear, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """Return the base's output plus the LoRA's, fused if there is a source."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        target = down(dropout(x.to(down.weight.dtype)))
        if module.fusion_sources is not None and target.dim() == 3:
            states, mask, indices, note = module.fusion_sources
            if len(states) != len(target):
                raise InvalidValueError(
                    f"there must be a source for each of {len(target)} rows, and there are {len(states)}",
                    code="fusion.source-count",
                )
            source = down(dropout(states.to(down.weight.dtype)))
            if module.fusion_pads[active_adapter]:  # padding counts too, in rows that have a source
                mask = mask.any(-1, keepdim=True).expand_as(mask)
            bottleneck = align(target, source, mask, indices)
            parts = module.lora_fusion[active_adapter]
            target = parts["fuse"](parts["align"](bottleneck) if "align" in parts else bottleneck)
            note()
        fused_result: Tensor = result + (up(target) * scale).to(result.dtype)
        return fused_result

    @staticmethod
    def merge_safe(module: FusionLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:  # noqa: ARG004
        """Always refuse: a fusion is not a change of a weight."""
        raise InvalidValueError(
            "a fused LoRA depends on a source text, so it cannot be merged into a weight", code="fusion.not-mergeable"
        )

    merge_unsafe = unmerge = merge_safe


class FusionLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer with an attribute for the source states of a pass; it also serves layers in 4 and 8 bits."""

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_fusion")
    fusion_sources: tuple[Tensor, Tensor, Tensor, Callable[[], None]] | None = None

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: object) -> LoraVariant | None:
        """Return the fusion variant for adapters that have one."""
        if isinstance(config, FusionConfig) and config.fusion in FUSIONS:
            return FusionVariant()
        return super().resolve_lora_variant(config=config, **kwargs)


def align(target: Tensor, source: Tensor, mask: Tensor, indices: Tensor) -> Bottleneck:
    """Align source tokens with target tokens.

    Args:
        target: Down-projections of target tokens.
        source: Down-projections of source tokens.
        mask: Which source tokens count.
        indices: Index of the source token for each target token; it may be out of range.

    Shapes: `target` [rows tokens rank], `source` [rows others rank], `mask` [rows others], `indices` [rows tokens].
    """
    tokens, others = target.shape[1], source.shape[1]
    inside = indices.clamp(0, others - 1)
    present = (indices == inside) & mask.gather(1, inside)
    aligned = source.gather(1, inside[..., None].expand(-1, -1, source.shape[-1]))
    # A source ends with the prompt, or is read before its target, so it never contains the answer.
    visible = mask[:, None, :].expand(-1, tokens, -1)
    return Bottleneck(target=target, source=source, visible=visible, aligned=aligned, present=present)


def load_fusion(model: nn.Module, folder: str, *, name: str = "default", trainable: bool = False) -> PeftModel:
    """Load a fusion LoRA onto its base model, or next to the LoRAs that it has.

    Args:
        model: The base model, or a model of PEFT with fusion LoRAs in it.
        folder: The adapter's folder.
        name: The adapter's name in the model.
        trainable: Whether it will be trained.

    Raises:
        ValueError: the file lacks a part of a fusion, or the model has LoRAs that cannot fuse.
    """
    config = FusionConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    stored = load_peft_weights(folder, device="cpu")
    projection = stored.get(f"{PREFIX}{PROJECTION}.weight")
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    add_parts(bare, vars(config), latent=0 if projection is None else projection.shape[1])
    with warnings.catch_warnings():
        # For some models PEFT renames only the LoRA keys that it recognises, and warns about the others.
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        if isinstance(model, PeftModel):
            loaded = model
            loaded.add_adapter(name, config)
            set_peft_model_state_dict(loaded, stored, adapter_name=name)
        else:
            loaded = PeftModel.from_pretrained(model, folder, adapter_name=name, config=config, is_trainable=trainable)
    # PEFT keeps the adapter's name in names that it does not recognise.
    parts = {_PART.sub(r".lora_fusion.\1.", key): value for key, value in stored.items()}
    parameters = {path: parameter for path, parameter in loaded.named_parameters() if f".lora_fusion.{name}." in path}
    if len({_PART.sub(r".lora_fusion.\1.", path) for path in parameters}) < sum(
        ".lora_fusion." in key for key in parts
    ):
        raise InvalidValueError(
            f"fused LoRAs must be loaded before plain ones, and this model has plain ones already: load {folder} first",
            code="fusion.load-order",
        )
    for path, parameter in parameters.items():
        key = _PART.sub(r".lora_fusion.\1.", path)
        if key not in parts:
            raise InvalidValueError(f"{folder} must hold {key}, and does not", code="fusion.weights")
        with torch.no_grad():
            parameter.copy_(parts[key])
        parameter.requires_grad_(trainable)
    return loaded
