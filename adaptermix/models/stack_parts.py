"""The two models and the projection of a stack: loaded, and refused if they are missing or have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ModelError
from .encoders import encoder_class
from .kinds import is_causal
from .pretrained import load_config, load_model, load_tokenizer
from .stack import PARTS, PROJECTION, STACK, Part, Projected, StackForm, stack_folder
from .stack_paths import is_local

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def encoder_config(reference: str) -> PretrainedConfig:
    """Return the configuration of a model that can be the encoder of a stack.

    Raises:
        ModelError: there is no such model, it is a language model, or it is a stack.
    """
    if stack_folder(reference):
        raise ModelError(
            f"the encoder of a stack must be a plain encoder, and {reference!r} is a stack. Give its encoder.",
            code="stack.encoder-kind",
        )
    config = load_config(reference, what="encoder")
    if is_causal(config):
        raise ModelError(
            f"the encoder of a stack must see whole sentences at each token, and {reference!r} is a language model, "
            "whose tokens see only those before them. Give an encoder, such as multilingual E5, or an encoder-decoder, "
            "such as NLLB.",
            code="stack.encoder-kind",
        )
    return config


def load_encoder(
    reference: str, *, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder of a stack, or the encoder half of an encoder-decoder, with its tokenizer.

    Raises:
        ModelError: there is no such model, it is a language model, or it is a stack.
    """
    what = "encoder"
    config = encoder_config(reference)
    model = load_model(reference, encoder_class(config), what=what, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), load_tokenizer(reference, what=what)


def check_found(folder: Path, form: StackForm) -> None:
    """Refuse a stack one of whose models is a folder that is not there.

    Raises:
        ModelError: a folder is missing.
    """
    for name, what in PARTS.items():
        part: Part = getattr(form, name)
        if is_local(part.id) and not Path(part.id).is_dir():
            raise ModelError(
                f"the stack {folder} needs its {what}, and there is no folder {part.id}. Put the model there or next "
                f"to the stack, or write its folder into {folder / STACK} as the id of '{name}'; its weights are "
                "compared with those that the stack was trained with.",
                code="stack.part-missing",
            )


def check_parts(folder: Path, form: StackForm, hashes: Mapping[str, str | None]) -> None:
    """Refuse a stack one of whose models has other weights now than when the stack was trained.

    Args:
        folder: The stack's folder.
        form: Its form.
        hashes: Hashes of the weight files of "encoder" and "base"; None if they are not on disk.

    Raises:
        ModelError: a hash differs.
    """
    for name, what in PARTS.items():
        part: Part = getattr(form, name)
        if part.fingerprint and hashes[name] and part.fingerprint != hashes[name]:
            raise ModelError(
                f"the stack {folder} needs the weights of {part.id!r} that it was trained with, and the files of this "
                f"{what} have changed. Restore them, or train the stack again.",
                code="stack.changed",
            )


def load_projection(folder: Path, embedding: Projected) -> None:
    """Read U of a stack's folder.

    Raises:
        ModelError: the file is damaged, or the widths differ from those of the two models.
    """
    try:
        tensors = load_file(folder / PROJECTION)
        with torch.no_grad():
            for name, parameter in embedding.stored().items():
                if tensors[name].shape != parameter.shape:
                    raise ValueError(f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}")
                parameter.copy_(tensors[name])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder / PROJECTION} must hold weight and bias of the projection between the two models: "
            f"{' '.join(str(error).split())[:120]}. Make the stack again.",
            code="stack.projection",
        ) from error
