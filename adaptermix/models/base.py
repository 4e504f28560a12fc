"""Loading base models and addressing their blocks, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adapters import AdapterSource
from ..errors import ModelError
from ..io.fingerprints import companion_digest, fingerprint
from ..progress import Watcher
from ..provenance.manifest import Origin, origin_of
from .head_forms import Head
from .headed import check_head, load_headed
from .pretrained import cached_file, load_config, load_model, load_tokenizer, split_revision
from .quantization import check_reading, compute_in, identity, keep_codes, loading_options, stored_format

Kind = Literal["causal", "encoder"]
AUTO_CLASSES: dict[Kind, str] = {"causal": "AutoModelForCausalLM", "encoder": "AutoModel"}
"""Class of transformers that loads each kind without a head for a task."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model with its tokenizer.

    Args:
        id: Hub id or folder, as the user wrote it.
        revision: Pinned revision, if any.
        fingerprint: Hash of its weight files; None if they are not on disk.
        kind: "causal" for language models, "encoder" for bidirectional ones.
        model: The transformers model, in eval mode, without trainable parameters.
        tokenizer: Its tokenizer; a pad token is always set.
        head: The task head, if the model has one.
        head_modules: Names of the head's modules, which are trained in full.
        quantized: "nf4", "fp4" or "int8" if its linear layers are quantised, else "none".
    """

    id: str
    revision: str | None
    fingerprint: str | None
    kind: Kind
    model: Any
    tokenizer: Any
    head: Head | None = None
    head_modules: tuple[str, ...] = ()
    quantized: str = "none"

    @property
    def labels(self) -> tuple[str, ...]:
        """The head's labels; empty without a head."""
        return self.head.labels if self.head else ()

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    @property
    def layers(self) -> int:
        """Number of blocks n; hidden states are numbered 0 (embeddings) to n."""
        return len(blocks(self.model)[1])

    def entry(self) -> dict[str, Any]:
        """Return the base model's entry of a manifest."""
        return {
            "id": self.id,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "class": self.kind,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        } | ({"quantization": identity(self.quantized)} if self.quantized != "none" else {})


def pick_device(device: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelError: there is no such CUDA device, or the name is unknown.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"--device must be auto, cpu, cuda or cuda:N, got {device!r}.", code="device.unknown"
        ) from error
    if picked.type not in ("cpu", "cuda"):
        raise ModelError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}.", code="device.unknown")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"--device {device} needs a CUDA device, and {torch.cuda.device_count()} CUDA devices are available. "
            "Choose one of those, or --device cpu.",
            code="device.not-there",
        )
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `auto`, `float32`, `bfloat16` or `float16`.

    `auto` is bfloat16 on hardware with native bfloat16 products (CUDA, CPUs with AVX512-BF16 or AMX), else float32.
    """
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def fingerprint_of(reference: str) -> str | None:
    """Return the fingerprint of a base model; None if its files are not on disk."""
    folder = model_folder(reference)
    return fingerprint(folder) if folder else None


def model_folder(reference: str) -> Path | None:
    """Return the folder of `MODEL` or `MODEL@REVISION`; None if its weights are not on disk."""
    return _folder(*split_revision(reference))


def model_origins(reference: str) -> list[Origin]:
    """Return a base model's folder with its manifest, if it is on disk; models of `bake` have seen data files."""
    with suppress(ValueError):  # A name that the Hub does not allow is refused when the model is loaded.
        folder = model_folder(reference)
        return [origin_of(folder)] if folder else []
    return []


def files_of(reference: str) -> list[str] | None:
    """Return hashes of a base model's weights, and of its configuration and tokenizer, if they are on disk."""
    folder = model_folder(reference)
    return [fingerprint(folder) or "", companion_digest(folder)] if folder else None


def _folder(name: str, revision: str | None) -> Path | None:
    """Return the folder with a model's weights, if it is on disk."""
    if Path(name).is_dir():
        return Path(name)
    for file in ("model.safetensors", "model.safetensors.index.json"):
        if cached := cached_file(name, file, revision):
            return cached.parent
    return None


def _kind(config: Any, reference: str) -> Kind:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{reference}: encoder-decoder models are not supported yet; give a language model or an encoder.",
            code="model.encoder-decoder",
        )
    named = " ".join(config.architectures or ())
    if "ForCausalLM" in named or "LMHead" in named:
        return "causal"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise ModelError(
        f"{reference}: a language model or an encoder is needed, found model type {config.model_type!r}.",
        code="model.type",
    )


def model_kind(reference: str) -> Kind:
    """Return the kind of a base model, from its configuration only.

    Raises:
        ModelError: there is no such model, or its kind is not supported.
    """
    return _kind(load_config(reference), reference)


def class_modules(folder: Path) -> list[str]:
    """Return the paths of all modules of the class in a model folder's config; an empty list for an unknown class.

    Names in the checkpoint's files may differ, since transformers converts them on loading.
    """
    import transformers

    try:
        config = load_config(str(folder))
        made: Any = getattr(transformers, str((config.architectures or [""])[0]))
        with torch.device("meta"):
            return [name for name, _ in made(config).named_modules()]
    except Exception:  # The class may be of another release or come with the model, so any error is possible.
        return []


def load_base(
    reference: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    head: Head | None = None,
    seed: int = 0,
) -> BaseModel:
    """Load a base model and its tokenizer.

    Args:
        reference: A folder or a Hub id, optionally with `@REVISION`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; see `pick_dtype`.
        quantize: `none`, `nf4`, `fp4` or `int8`; see `quantization.loading_options`.
        head: The head to put on the model, if any.
        seed: Seed of the weights of a head that the checkpoint does not have.

    Raises:
        ModelError: there is no such model, its kind is not supported, or its files do not load.
    """
    name, revision = split_revision(reference)
    target = pick_device(device)
    config = load_config(reference)
    kind = _kind(config, reference)
    wide = pick_dtype(dtype, target)
    whole = head.form.modules if head else () if kind == "encoder" else None
    options = loading_options(quantize, target, wide, whole=whole)
    tokenizer = load_tokenizer(reference)
    modules: tuple[str, ...] = ()
    if head is None:
        model = load_model(reference, AUTO_CLASSES[kind], dtype=wide, **options)
    else:
        check_head(reference, config, tokenizer, head)
        model, modules = load_headed(reference, head, seed=seed, dtype=wide, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None or (kind == "causal" and tokenizer.eos_token is None):
        raise ModelError(
            f"base model {reference!r}: its tokenizer must have an end-of-sequence and a padding token, and lacks one. "
            "Set eos_token and pad_token in tokenizer_config.json.",
            code="model.special-tokens",
        )
    quantized = quantize if quantize != "none" else stored_format(config)
    if quantized != "none":
        compute_in(model, wide)
        keep_codes(model)
        check_reading(model)
    if head:
        model.config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(
        id=name,
        revision=revision,
        fingerprint=fingerprint_of(reference),
        kind=kind,
        model=(model.to(target) if quantized == "none" else model).eval().requires_grad_(False),
        tokenizer=tokenizer,
        head=head,
        head_modules=modules,
        quantized=quantized,
    )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's blocks: the outermost module list with one entry per layer.

    Raises:
        ModelError: there is no such list.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} must have a list of {count} blocks, and has no such list.", code="model.no-blocks"
        )
    return min(lists, key=lambda item: item[0].count("."))


def block_index(layer: int | Literal["middle", "last"], count: int, *, option: str = "--layer") -> int:
    """Return the number of blocks to run, 1 to n, for a layer: a number, `middle` (n/2, rounded down) or `last`.

    Raises:
        ModelError: the layer is not among 1 to n.
    """
    named = {"middle": max(1, count // 2), "last": count}
    number = named[layer] if isinstance(layer, str) else layer
    if not 1 <= number <= count:
        raise ModelError(
            f"{option} must be from 1 to {count} for this base model, got {number}.", code="model.block-index"
        )
    return number


def keep_blocks(model: nn.Module, count: int) -> None:
    """Remove all blocks after the first `count` permanently, which saves their memory and time."""
    path, stack = blocks(model)
    _set_blocks(model, path, stack[:count])


@contextmanager
def first_blocks(model: nn.Module, count: int) -> Iterator[None]:
    """Run only the model's first `count` blocks while the context is open."""
    path, stack = blocks(model)
    if count == len(stack):
        yield
        return
    config: Any = model.config
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    _set_blocks(model, path, stack[:count])
    try:
        yield
    finally:
        _set_blocks(model, path, stack)
        if types:
            _set_types(text, types)


def _set_blocks(model: nn.Module, path: str, stack: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, stack)
    config: Any = model.config
    text = config.get_text_config()
    text.num_hidden_layers = len(stack)
    if types := getattr(text, "layer_types", None):
        _set_types(text, types[: len(stack)])


def _set_types(text: Any, types: Sequence[str]) -> None:
    # Mamba, Falcon-H1 and Bamba compute the list from the number of blocks, so it cannot be set.
    with suppress(AttributeError):
        text.layer_types = types


def backbone(base: BaseModel) -> nn.Module:
    """Return the part of the model that computes hidden states, without any head."""
    module: nn.Module
    if base.head:
        module = base.model.base_model
        return module
    module = base.model.get_decoder() if base.kind == "causal" else base.model
    return module


def reading(base: BaseModel) -> dict[str, Any]:
    """Return extra forward arguments for inference without generation: language models get `use_cache=False`."""
    return {"use_cache": False} if base.kind == "causal" else {}


def require_causal(reference: str, what: str) -> None:
    """Refuse a model that cannot generate, before it is loaded.

    Raises:
        ModelError: the model is an encoder, or does not exist.
    """
    if model_kind(reference) != "causal":
        raise ModelError(
            f"{what} generates text and needs a causal language model; {reference!r} is an encoder.",
            code="model.not-causal",
        )


def note_other_base(base: BaseModel, sources: Sequence[AdapterSource], watch: Watcher) -> None:
    """Warn about adapters that were trained on different weights than those of this base model."""
    for source in sources:
        trained = source.meta.base_fingerprint
        if trained and base.fingerprint and trained != base.fingerprint:
            watch.note(
                f"warning: adapter '{source.name}' was trained on '{source.meta.base}', whose weight files differ from "
                f"those of '{base.id}'; scores may be worse than on its base model."
            )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, including quantised ones and Conv1D, judged by its attributes."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def linear_names(model: nn.Module, chosen: range | None = None) -> list[str]:
    """Return the last names of all linear layers in the blocks, or in a range of blocks; heads are left out."""
    stack = [block for number, block in enumerate(blocks(model)[1]) if chosen is None or number in chosen]
    return sorted(
        {name.rsplit(".", 1)[-1] for block in stack for name, module in block.named_modules() if is_linear(module)}
    )
