"""Attach adapters to a live model while they are measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import AdapterSource, write_adapter
from ..adapters.keys import PREFIX, is_embedding
from ..adapters.lora_config import CONFIG
from ..adapters.paths import fitted
from ..errors import IncompatibleAdapters, PlanError
from ..fusion.extra_modules import remove_parts
from ..io.temporary import temporary_folder
from ..io.weight_files import Renamed
from ..models.base import BaseModel
from ..models.stack import ADAPTER, stack_folder
from ..models.stack_adapter import open_own_adapter
from .attach import Attachment
from .whole_tensors import REFUSE, merge_saved


@contextmanager
def acting(
    base: BaseModel, sources: Sequence[AdapterSource], *, heads: bool = True, saved: str | int = REFUSE
) -> Iterator[Attachment]:
    """Attach adapters to the model until the context ends, and yield the attachment that sets their weights.

    LoRAs on linear layers, with or without a head, are attached. A single adapter of another kind is loaded by PEFT;
    its weight cannot be set.

    Args:
        base: The model.
        sources: The adapters.
        saved: Policy for fully trained tensors that differ; see `merge_saved`.
        heads: Whether every fully trained tensor must be in the model; if not, tensors of a missing head are left out.

    Raises:
        IncompatibleAdapters: an adapter does not fit the model; several bring different heads, or are of another kind.
        PlanError: an adapter is that of the stack, which acts already.
    """
    refuse_own_adapter(base.id, sources)
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


def refuse_own_adapter(base: str, sources: Sequence[AdapterSource]) -> None:
    """Refuse the adapter that belongs to a stack, and merges of it: the stack has it already, so it would act twice.

    Args:
        base: Folder or Hub id of the base model.
        sources: The adapters that are to act on it.

    Raises:
        PlanError: an adapter is that of the stack, or a merge that contains it.
    """
    folder = stack_folder(base)
    if not folder or not sources or not (folder / ADAPTER / CONFIG).is_file():
        return
    stack_hash = _weights_hash(open_own_adapter(folder))
    for source in sources:
        inputs = source.meta.manifest.get("inputs")
        parts = [part for part in inputs if isinstance(part, Mapping)] if isinstance(inputs, list) else []
        merged = {part.get("weights_sha256") for part in parts if part.get("weight") != 0}
        if stack_hash in {_weights_hash(source), *merged}:
            what = "is" if stack_hash not in merged else "contains"
            raise PlanError(
                f"an adapter on the stack {base!r} must be trained on top of it, and '{source.name}' {what} "
                "the stack's own adapter, which acts already and would act twice. Leave it out.",
                code="stack.own-adapter",
            )


def _weights_hash(source: AdapterSource) -> str:
    return source.digest.partition("+")[0]


def _headless(source: AdapterSource, base: BaseModel) -> AdapterSource:
    parameters = dict(base.model.named_parameters())
    kept = {key: header for key, header in source.saved_headers.items() if _plain_name(key) in parameters}
    return replace(source, saved_headers=kept)


def _plain_name(key: str) -> str:
    """Return the model's name of a whole tensor; PEFT moves the weights of an adapted module to `base_layer`."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


@contextmanager
def _whole_tensors(base: BaseModel, sources: Sequence[AdapterSource], saved: str | int) -> Iterator[None]:
    """Replace tensors of the model by fully trained ones, such as those of a head."""
    _check_tokens(sources)
    tensors = merge_saved(sources, [1.0] * len(sources), saved)
    stored = dict(base.model.named_parameters()) | dict(base.model.named_buffers())
    tied = base.model.get_output_embeddings() if hasattr(base.model, "get_output_embeddings") else None
    if tied is not None and base.model.get_input_embeddings().weight is tied.weight:
        stored |= {f"{name}.weight": tied.weight for name, module in base.model.named_modules() if module is tied}
    targets: dict[str, Tensor] = {}
    for key in tensors:
        name = _plain_name(key)
        if name in stored and stored[name].shape == tensors[key].shape and is_embedding(name.rpartition(".")[0]):
            if torch.equal(stored[name].to(tensors[key]), tensors[key]):  # PEFT's copy of the base's tensor
                continue
            if tied is not None and stored[name] is tied.weight:
                raise IncompatibleAdapters(
                    f"'{name}' of an adapter must equal the base model's tensor, since {base.id!r} ties it to another "
                    "table, but it differs. Give the base model that the adapter was trained on.",
                    code="adapter.tied-table",
                )
        if name not in stored or stored[name].shape != tensors[key].shape:
            raise IncompatibleAdapters(
                f"'{name}' of an adapter is {list(tensors[key].shape)}, and {base.id!r} has "
                f"{list(stored[name].shape) if name in stored else 'no such tensor'}. Give the task that the adapter "
                "was trained for, and its base model.",
                code="adapter.whole-tensor-shape",
            )
        targets[key] = stored[name]
    before = {key: target.detach().clone() for key, target in targets.items()}
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    try:
        yield
    finally:
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(before[key])


def _check_tokens(sources: Sequence[AdapterSource]) -> None:
    for source in sources:
        if source.meta.trainable_tokens:
            raise IncompatibleAdapters(
                f"adapter '{source.name}' trains token embeddings (trainable_token_indices), so it can only be used "
                "alone. Leave it out, or merge it with the others and pass the result.",
                code="adapter.tokens-alone",
            )


@contextmanager
def _stored(source: AdapterSource) -> Iterator[Path]:
    """Yield a folder with the adapter under its current module paths, by which PEFT finds the modules."""
    if not isinstance(source.file, Renamed):
        yield source.path
        return
    if source.meta.initial is not None or source.meta.fusion:
        raise IncompatibleAdapters(
            f"adapter '{source.name}' must have been trained on the class of this model, whose modules have other "
            "paths. Convert it to a plain LoRA: adaptermix merge --base.",
            code="adapter.model-class",
        )
    with temporary_folder() as folder:
        write_adapter(folder, source.read())
        yield folder


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
