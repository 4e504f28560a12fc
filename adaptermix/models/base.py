"""Loading base models and addressing their blocks, for every architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters import AdapterSource
from ..errors import ModelError, as_line
from ..io.fingerprints import companion_digest, fingerprint
from ..io.json_types import JsonObject
from ..progress import Watcher
from ..provenance.manifest import Origin, origin_of
from .blocks import blocks
from .both_sides import see_both_sides
from .devices import pick_device, pick_dtype
from .encoders import encoder_class
from .formats import FORMATS
from .head_forms import Head
from .headed import fitting_head, load_headed
from .kinds import Kind, kind_of, loader_of
from .languages import Tagged, Text, language_tags
from .mixed_rows import MixedRows, mount_mixed
from .own_heads import add_own_head
from .pretrained import cached_file, load_config, load_model, load_tokenizer, split_revision
from .quantization import check_reading, compute_in, identity, keep_codes, loading_options, round_weights, stored_format
from .stack import ADAPTER, PARTS, StackForm, embedding_of, mount, stack_folder
from .stack_adapter import add_own_adapter, open_own_adapter
from .stack_parts import check_found, check_parts, load_encoder, load_projection

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


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
        quantized: Format of its linear layers, such as "nf4" or "int4"; "none" if they are not quantised.
        tags: Language tags that the tokenizer writes, by language; see `Tagged`.
        stack: The two models of a stack; None for others.
        mixed: How a stack that generates reads prompts; None for others.
    """

    id: str
    revision: str | None
    fingerprint: str | None
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head | None = None
    head_modules: tuple[str, ...] = ()
    quantized: str = "none"
    tags: Mapping[str, str] = field(default_factory=dict)
    stack: StackForm | None = None
    mixed: MixedRows | None = None

    def encode(self, texts: Sequence[Text], languages: Sequence[str], **options: object) -> list[BatchEncoding]:
        """Return the tokens of each text, with its language's tag if the tokenizer has language tags.

        Args:
            texts: Texts, pairs of texts, or lists of words with `is_split_into_words=True`.
            languages: Language of each text.
            options: Further arguments of the tokenizer.

        Raises:
            ModelError: the tokenizer has no tag for a language, or the model is a stack that generates.
        """
        if self.mixed:
            raise ModelError(
                f"{self.id!r} is a stack that generates answers to prompts, and a text alone cannot be encoded for it. "
                "Use it with train-task and evaluate and without a head, or make a stack with --mode states.",
                code="stack.generates",
            )
        tagged = Tagged(tokenizer=self.tokenizer, tags=self.tags)
        if (language := tagged.without_tag(languages)) is not None:
            raise ModelError(
                f"base model {self.id!r} reads a language tag with each text, and has no tag for {language!r}. "
                "Leave the language out, or name a related language with LANGUAGE=FILE.",
                code="model.language",
            )
        return tagged.encode(texts, languages, **options)

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

    def entry(self) -> JsonObject:
        """Return the base model's entry of a manifest."""
        return {
            "id": self.id,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "class": self.kind,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        } | ({"quantization": identity(self.quantized)} if self.quantized != "none" else {})


def fingerprint_of(reference: str) -> str | None:
    """Return the fingerprint of a base model; None if its files are not on disk."""
    folder = model_folder(reference)
    return fingerprint(folder) if folder else None


def model_folder(reference: str) -> Path | None:
    """Return the folder of `MODEL` or `MODEL@REVISION`; None if its weights are not on disk."""
    name, revision = split_revision(reference)
    if Path(name).is_dir():
        return Path(name)
    files = ("model.safetensors", "model.safetensors.index.json")
    return next((cached.parent for file in files if (cached := cached_file(name, file, revision))), None)


def model_origins(reference: str) -> list[Origin]:
    """Return a base model's folder with its manifest, if it is on disk; models of `bake` have seen data files."""
    with suppress(ValueError):  # A name that the Hub does not allow is refused when the model is loaded.
        folder = model_folder(reference)
        return [origin_of(folder)] if folder else []
    return []


def files_of(reference: str) -> list[str] | None:
    """Return hashes of a base model's weights, and of its configuration and tokenizer, if they are on disk.

    The weights of a stack are its projection and the LoRA in its folder; `stack.json` has the hashes of its two models.
    """
    folder = model_folder(reference)
    if folder is None:
        return None
    loras = [folder / ADAPTER] if stack_folder(reference) and (folder / ADAPTER).is_dir() else []
    return [*(fingerprint(each) or "" for each in (folder, *loras)), companion_digest(folder)]


def model_kind(reference: str) -> Kind:
    """Return the kind of a base model, from its configuration only.

    Raises:
        ModelError: there is no such model, or its kind is not supported.
    """
    if folder := stack_folder(reference):
        return _kind_of_stack(StackForm.read(folder))
    return kind_of(load_config(reference), reference)


def _kind_of_stack(form: StackForm) -> Kind:
    return "causal" if form.generates else "encoder"


def class_modules(folder: Path) -> list[str]:
    """Return the paths of all modules of the class in a model folder's config; an empty list for an unknown class.

    Names in the checkpoint's files may differ, since transformers converts them on loading.
    """
    import transformers

    try:
        config = load_config(str(folder))
        made = getattr(transformers, str((config.architectures or [""])[0]))
        with torch.device("meta"):
            return [name for name, _ in made(config).named_modules()]
    except Exception:  # The class may be of another release or come with the model, so any error is possible.
        return []


def _check_padding(
    reference: str, tokenizer: PreTrainedTokenizerBase, kind: Kind, model: PreTrainedModel | None
) -> None:
    """Give a tokenizer a padding token if it lacks one.

    Args:
        reference: The base model, for messages.
        tokenizer: Its tokenizer.
        kind: Kind of the model.
        model: The model that reads its tokens; None if it is unknown, as in a stack.

    Raises:
        ModelError: it cannot pad or end a text, or the model has no embedding for the padding token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None or (kind == "causal" and tokenizer.eos_token is None):
        raise ModelError(
            f"base model {reference!r}: its tokenizer must have an end-of-sequence and a padding token, and lacks one. "
            "Set eos_token and pad_token in tokenizer_config.json.",
            code="model.special-tokens",
        )
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None) if model else None
    if rows is not None and not 0 <= tokenizer.pad_token_id < rows:
        raise ModelError(
            f"base model {reference!r}: its padding token must be one of the {rows:,} tokens that the model has an "
            f"embedding for, and {as_line(tokenizer.pad_token, 60)!r} has the number {tokenizer.pad_token_id:,}. "
            "Correct pad_token in tokenizer_config.json.",
            code="model.padding-token",
        )


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
        quantize: `none` or the name of a format; see `quantization.loading_options`.
        head: The head to put on the model, if any.
        seed: Seed of the weights of a head that the checkpoint does not have.

    Raises:
        ModelError: there is no such model, its kind is not supported, or its files do not load.
    """
    name, revision = split_revision(reference)
    target = pick_device(device)
    folder = stack_folder(reference)
    form = _form_of(folder) if folder else None
    weights = form.base.id if form else reference
    config = load_config(weights)
    kind: Kind = _kind_of_stack(form) if form else kind_of(config, reference)
    wide = pick_dtype(dtype, target)
    whole = head.form.modules if head else () if kind == "encoder" else None
    options = loading_options(quantize, target, wide, whole=whole)
    tokenizer = load_tokenizer(reference)
    modules: tuple[str, ...] = ()
    if head:
        head = fitting_head(reference, config, tokenizer, head, stack_pooling=form.pooling if form else None)
    if head and not head.reader:
        model, modules = load_headed(reference, head, seed=seed, dtype=wide, **options)
    else:
        model = load_model(weights, encoder_class(config) if head else loader_of(kind, config), dtype=wide, **options)
    _check_padding(reference, tokenizer, kind, None if form else model)
    if stored_format(config) != quantize:
        round_weights(model, quantize, whole)
    quantized = quantize if quantize != "none" else stored_format(config)
    if quantized != "none" and FORMATS[quantized].package is not None:
        compute_in(model, wide)
        keep_codes(model)
        check_reading(model)
    else:
        model = model.to(target)
    mixed = _mount(folder, form, model, tokenizer, wide) if folder and form else None
    if head and head.reader:
        model, modules = add_own_head(model, head, kind=kind, seed=seed)
    if head:
        model.config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(
        id=name,
        revision=revision,
        fingerprint=fingerprint_of(reference),
        kind=kind,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        head=head,
        head_modules=modules,
        quantized=quantized,
        tags=language_tags(tokenizer),
        stack=form,
        mixed=mixed,
    )


def _form_of(folder: Path) -> StackForm:
    form = StackForm.read(folder)
    check_found(folder, form)
    return form


def _mount(
    folder: Path, form: StackForm, body: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> MixedRows | None:
    """Put the encoder of a stack's folder under the model on top, with the stack's projection and LoRA.

    Returns:
        How a stack that generates reads prompts; None for others.
    """
    encoder, below = load_encoder(form.encoder.id, device=body.device, dtype=dtype)
    # Files that loading has fetched from the Hub are there only now.
    check_parts(folder, form, {name: fingerprint_of(getattr(form, name).id) for name in PARTS})
    if form.generates:
        mixed = mount_mixed(body, encoder, below, augments=form.mode == "augment")
        if mixed.offset != form.offset:
            raise ModelError(
                f"the stack {folder} was trained with {form.offset} embeddings of its model on top, and "
                f"{form.base.id!r} has {mixed.offset}. Restore that model, or train the stack again.",
                code="stack.changed",
            )
        load_projection(folder, embedding_of(body))
        return mixed
    load_projection(folder, mount(body, encoder, tokenizer))
    if form.attention == "both":
        see_both_sides(body)
    if form.lora:
        add_own_adapter(body, open_own_adapter(folder))
    return None


def backbone(base: BaseModel) -> PreTrainedModel:
    """Return the part of the model that computes hidden states, without any head."""
    if base.head:
        return base.model.base_model
    return base.model.get_decoder() if base.kind == "causal" else base.model


def reading(base: BaseModel) -> dict[str, bool]:
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
