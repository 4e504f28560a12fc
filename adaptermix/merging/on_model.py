"""Adapters on a live model for as long as they are measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapters import AdapterSource, write_adapter
from ..adapters.keys import PREFIX, is_embedding
from ..adapters.paths import fitted
from ..errors import IncompatibleAdapters
from ..fusion.extra_modules import remove_parts
from ..io.weight_files import Renamed
from ..models.base import BaseModel
from .attach import Attachment
from .whole_tensors import REFUSE, merge_saved


@contextmanager
def acting(
    base: BaseModel, sources: Sequence[AdapterSource], *, heads: bool = True, saved: str | int = REFUSE
) -> Iterator[Attachment]:
    """Let adapters act on the model until the context ends, and yield what sets their weights.

    LoRAs on linear layers, with a head or without, are attached; a single adapter of another kind acts through PEFT,
    with no weight to set.

    Args:
        base: The model.
        sources: The adapters.
        saved: What becomes of fully trained tensors that differ; see `merge_saved`.
        heads: Whether fully trained tensors must be in the model; else those that are not, of a head, are left out.

    Raises:
        IncompatibleAdapters: an adapter does not fit the model; several bring different heads, or are of another kind.
    """
    names = [name for name, _ in base.model.named_modules()]
    fitting = [fitted(source, names) for source in sources]
    if not heads:
        fitting = [_headless(source, base) for source in fitting]
    bare = [replace(source, saved_headers={}) for source in fitting]
    if len(sources) == 1 and (bare[0].beyond_linear or bare[0].meta.trainable_tokens):
        with _stored(fitting[0]) as folder, _through_peft(base, fitting[0], folder):
            yield Attachment(base.model, [])
        return
    with Attachment(base.model, [source.read() for source in bare]) as attached, _whole_tensors(base, fitting, saved):
        yield attached


def _headless(source: AdapterSource, base: BaseModel) -> AdapterSource:
    own = dict(base.model.named_parameters())
    kept = {key: header for key, header in source.saved_headers.items() if _plain_name(key) in own}
    return replace(source, saved_headers=kept)


def _plain_name(key: str) -> str:
    """Return the model's own name of a whole tensor; PEFT puts what a LoRA is built on below `base_layer`."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


@contextmanager
def _whole_tensors(base: BaseModel, sources: Sequence[AdapterSource], saved: str | int) -> Iterator[None]:
    """Put fully trained tensors, such as those of a head, in the place of the model's own."""
    _check_tokens(sources)
    tensors = merge_saved(sources, [1.0] * len(sources), saved)
    own = dict(base.model.named_parameters()) | dict(base.model.named_buffers())
    tied = base.model.get_output_embeddings() if hasattr(base.model, "get_output_embeddings") else None
    if tied is not None and base.model.get_input_embeddings().weight is tied.weight:
        own |= {f"{name}.weight": tied.weight for name, module in base.model.named_modules() if module is tied}
    places: dict[str, Any] = {}
    for key in tensors:
        name = _plain_name(key)
        if name in own and own[name].shape == tensors[key].shape and is_embedding(name.rpartition(".")[0]):
            if torch.equal(own[name].to(tensors[key]), tensors[key]):  # PEFT's copy of the base's own
                continue
            if tied is not None and own[name] is tied.weight:
                raise IncompatibleAdapters(
                    f"'{name}' of an adapter must be the base model's own, since {base.id!r} ties it to another table, "
                    "and it is not. Give the base model that the adapter was trained on.",
                    code="adapter.tied-table",
                )
        if name not in own or own[name].shape != tensors[key].shape:
            raise IncompatibleAdapters(
                f"'{name}' of an adapter is {list(tensors[key].shape)}, and {base.id!r} has "
                f"{list(own[name].shape) if name in own else 'nothing of that name'}. Give the task that the adapter "
                "was trained for, and its base model.",
                code="adapter.whole-tensor-shape",
            )
        places[key] = own[name]
    before = {key: place.detach().clone() for key, place in places.items()}
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
    try:
        yield
    finally:
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(before[key])


def _check_tokens(sources: Sequence[AdapterSource]) -> None:
    for source in sources:
        if source.meta.trainable_tokens:
            raise IncompatibleAdapters(
                f"adapter '{source.name}' trains tokens of its own (trainable_token_indices), and such an adapter acts "
                "alone only. Leave it out, or merge it with the others and give the result.",
                code="adapter.tokens-alone",
            )


@contextmanager
def _stored(source: AdapterSource) -> Iterator[Path]:
    """Yield a folder with the adapter under its present paths, which PEFT needs to find every module."""
    if not isinstance(source.file, Renamed):
        yield source.path
        return
    if source.meta.initial is not None or source.meta.fusion:
        raise IncompatibleAdapters(
            f"adapter '{source.name}' must have been trained on the model class that it is to act on, and its modules "
            "have other paths there. Convert it to a plain LoRA: adaptermix merge --base.",
            code="adapter.model-class",
        )
    with TemporaryDirectory(prefix="adaptermix-") as folder:
        write_adapter(Path(folder), source.read())
        yield Path(folder)


@contextmanager
def _through_peft(base: BaseModel, source: AdapterSource, folder: Path) -> Iterator[None]:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
            if source.meta.fusion:
                from ..fusion.lora import load_fusion

                wrapped = load_fusion(base.model, str(folder)).eval()
            else:
                wrapped = PeftModel.from_pretrained(base.model, str(folder)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        remove_parts(base.model)
        reason = " ".join(str(error).split())[:200]
        raise IncompatibleAdapters(
            f"adapter '{source.name}' must fit base model '{base.id}', and PEFT says: {reason}. "
            "Give the base model that it was trained on.",
            code="adapter.not-for-base",
        ) from error
    try:
        yield
    finally:
        wrapped.unload()
        remove_parts(base.model)
