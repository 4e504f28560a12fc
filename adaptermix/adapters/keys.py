"""Names of tensors in PEFT's files, sorted into parts of modules and tensors that are kept whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AdapterFormatError
from ..io.safetensors_writer import DTYPE_NAMES
from ..io.weight_files import FLOATS, Renamed, StoredTensor, WeightsFile
from .state import INPUT_EMBEDDINGS, AdapterMeta

PREFIX = "base_model.model."
MAX_KEY = 1000
MAX_AXES = 8
TOKENS = "token_adapter.trainable_tokens_delta"
FACTORS = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "convolution": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
"""Names of the two factors A and B, per kind of layout."""
_PATH = r"(?P<module>[A-Za-z0-9_][A-Za-z0-9_.-]*)"
LORA_TENSOR = re.compile(
    rf"base_model\.model\.{_PATH}\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_WHOLE = re.compile(rf"base_model\.model\.{_PATH}")
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "embed"}
# Heads that PEFT adds for a task, whether or not the settings name them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# With bias="all" PEFT also stores a head's biases under these names: a second copy, and the base's own.
_DUPLICATES = (".modules_to_save.bias", ".original_module.bias")
# Modules that torch.compile, FSDP and activation checkpointing put around others; saving should have left them out.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A state dict saved without PEFT has the adapter's own name, which is "default" unless a user gave another.
_NAMED = re.compile(
    r"\.(?P<kept>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)\.default(?=\.|$)"
    r"|\.modules_to_save\.default(?=\.)"
)
_OTHER_NAME = re.compile(
    r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?P<name>(?!weight$|bias$)\w+)(?:\.(?:weight|bias))?"
)
_KNOWN = {
    "lora_": "a tensor of a LoRA variant",
    "token_adapter": "a tensor of trainable tokens",
    "modules_to_save": "a fully trained module",
    ".bias": "a trained bias",
}


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors of a file, sorted.

    Args:
        parts: Per module path, the name in the file of each part (lora_A.weight, lora_B.bias, ...).
        saved: Header of each tensor that is kept whole, by its name in the file.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: dict[str, StoredTensor] = field(default_factory=dict)


def plain_path(path: str) -> str:
    """Return a module path without wrapper modules, at any depth, and without repeated PEFT prefixes at its start.

    Example:
        >>> plain_path("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp")
        'model.layers.0.mlp'
    """
    return ".".join(_unwrapped(path)[0])


def _unwrapped(path: str) -> tuple[list[str], bool]:
    """Return the pieces of a path without wrappers, and whether PEFT's prefix was one of them."""
    pieces, prefixed = [piece for piece in path.split(".") if piece not in _WRAPPERS], False
    while len(pieces) > 1 and (pieces[0] == "module" or pieces[:2] == ["base_model", "model"]):
        prefixed = prefixed or pieces[0] != "module"
        pieces = pieces[1 if pieces[0] == "module" else 2 :]
    return pieces, prefixed


def _plain_key(key: str) -> str:
    if len(key) > MAX_KEY:
        return key
    pieces, prefixed = _unwrapped(_NAMED.sub(lambda match: f".{match['kept']}" if match["kept"] else "", key))
    return PREFIX + ".".join(pieces) if prefixed and pieces else key


def plain_names(file: WeightsFile) -> WeightsFile:
    """Return a file whose tensors have the names that PEFT gives them: without wrapper modules and adapter names.

    Raises:
        AdapterFormatError: two tensors of the file would have one name.
    """
    names: dict[str, str] = {}
    for key in file.headers:
        other = names.setdefault(_plain_key(key), key)
        if other != key:
            raise AdapterFormatError(
                f"{file.path}: each tensor must be stored once, and {other[:200]!r} and {key[:200]!r} are the same "
                "one. Save the adapter again with peft.",
                code="adapter-file.tensor-twice",
            )
    return file if all(new == old for new, old in names.items()) else Renamed(file, names)


def take_inventory(file: WeightsFile, meta: AdapterMeta, names: re.Pattern[str]) -> Inventory:
    """Sort the tensors of a file, from their names and headers alone.

    Args:
        file: The file.
        meta: Description of the adapter, which names the whole tensors.
        names: Names of the tensors of modules, with the groups `module` and `part`.

    Raises:
        AdapterFormatError: a name or a tensor that the settings do not mention, a dtype that is not a float
            dtype, or an empty tensor.
    """
    inventory = Inventory()
    for key, header in file.headers.items():
        match = names.fullmatch(key) if len(key) <= MAX_KEY else None
        if match is not None:
            _check_factor(file.path, key, header)
            parts = inventory.parts.setdefault(match["module"], {})
            if match["part"] in parts:
                raise AdapterFormatError(
                    f"{file.path}: {key!r} must occur once. Save the adapter again.",
                    code="adapter-file.tensor-twice",
                )
            parts[match["part"]] = key
        elif meta.bias == "all" and key.endswith(_DUPLICATES):
            continue
        elif meta.fusion and ".lora_fusion." in key:
            continue  # `fusion` reads them
        elif len(key) <= MAX_KEY and _WHOLE.fullmatch(key) and _expected(key.removeprefix(PREFIX), meta):
            _check_whole(file.path, key, header, meta)
            inventory.saved[key] = header
        else:
            raise _refuse(file.path, key)
    _check_tokens(file.path, inventory.saved, meta.trainable_tokens)
    if meta.saved_modules and not any(
        in_modules(key.removeprefix(PREFIX), meta.saved_modules) for key in inventory.saved
    ):
        raise AdapterFormatError(
            f"{file.path} must hold the fully trained modules of modules_to_save "
            f"({', '.join(meta.saved_modules)[:80]}), but lacks them. Save the adapter again with peft.",
            code="adapter-file.no-saved-modules",
        )
    return inventory


def _check_factor(path: Path, key: str, header: StoredTensor) -> None:
    if header.dtype not in FLOATS:
        raise AdapterFormatError(
            f"{path}: {key} must be of a float dtype ({', '.join(FLOATS)}), found {header.dtype}.",
            code="adapter-file.factor-dtype",
        )
    _check_shape(path, key, header.shape)


def _check_shape(path: Path, key: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise AdapterFormatError(
            f"{path}: {key} must not be empty, found shape {str(list(shape))[:80]}. DeepSpeed ZeRO-3 leaves tensors "
            "empty where they are saved without being gathered; save the adapter again with the parameters gathered.",
            code="adapter-file.empty-tensor",
        )
    if len(shape) > MAX_AXES:
        raise AdapterFormatError(
            f"{path}: {key} must have at most {MAX_AXES} axes, found shape {str(list(shape))[:80]}.",
            code="adapter-file.too-many-axes",
        )


def _check_whole(path: Path, key: str, header: StoredTensor, meta: AdapterMeta) -> None:
    _check_shape(path, key, header.shape)
    if header.dtype not in DTYPE_NAMES.values():
        raise AdapterFormatError(
            f"{path}: {key} must be of one of the dtypes {', '.join(DTYPE_NAMES.values())}, found {header.dtype}.",
            code="adapter-file.dtype",
        )
    if meta.initial is not None and key.endswith(".base_layer.weight"):
        raise AdapterFormatError(
            f"{path}: {key} is a copy of a base weight that init_lora_weights={meta.initial!r} has changed, and would "
            "hide the true one. Save the adapter with save_embedding_layers=False.",
            code="adapter-file.changed-base-copy",
        )


def _expected(name: str, meta: AdapterMeta) -> bool:
    """Return whether the settings, or PEFT's own habits, lead to this whole tensor."""
    module, _, last = name.rpartition(".")
    if "lora_" in name or ".modules_to_save." in name or ".original_module." in name:
        return False
    if name.endswith(f".{TOKENS}"):
        return bool(meta.trainable_tokens)
    if last == "bias" and meta.bias != "none":
        return True
    # PEFT stores a copy of an embedding or head that is adapted, or whose vocabulary was resized.
    if is_embedding(module.removesuffix(".base_layer")) and last in ("weight", "bias"):
        return True
    return in_modules(name, (*meta.saved_modules, *_HEADS.get(meta.task_type or "", ())))


def is_embedding(module: str) -> bool:
    """Return whether a module is a table of embeddings or an output head: PEFT stores copies of these."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def lacks_head(task_type: str | None, saved: Iterable[str]) -> bool:
    """Return whether PEFT adds a head for a task type whose tensors are not there, so that it could not load the rest.

    Args:
        task_type: PEFT's task type.
        saved: Names in the file of the whole tensors.
    """
    heads = _HEADS.get(task_type or "", ())
    return bool(heads) and not any(in_modules(key.removeprefix(PREFIX), heads) for key in saved)


def in_modules(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether a tensor belongs to one of these fully trained modules.

    PEFT trains what ends with a name, and stores all below it.

    Args:
        name: Name of the tensor, without PEFT's prefix.
        modules: The names of `modules_to_save`.
    """
    pieces = name.split(".")
    return any(".".join(pieces[:end]).endswith(modules) for end in range(1, len(pieces))) if modules else False


def _refuse(path: Path, key: str) -> AdapterFormatError:
    named = _OTHER_NAME.search(key)
    if named is not None and LORA_TENSOR.fullmatch(key.replace(f".{named['name']}", "", 1)):
        return AdapterFormatError(
            f"{path}: tensor {key[:200]!r} must be named without the adapter's own name, {named['name']!r}, which peft "
            "loads under that name only. Save the adapter again with peft's save_pretrained.",
            code="adapter-file.own-name",
        )
    for mark, what in _KNOWN.items():
        if mark in key and not LORA_TENSOR.fullmatch(key):
            return AdapterFormatError(
                f"{path}: tensor {key[:200]!r} is {what} that the settings do not name, so its module is "
                "unknown. Names have the form base_model.model.MODULE.lora_A.weight; save the adapter again with peft.",
                code="adapter-file.unnamed-part",
            )
    return AdapterFormatError(
        f"{path}: tensor {key[:200]!r} must be named base_model.model.MODULE.lora_A.weight or .lora_B.weight, "
        "or belong to a module that modules_to_save names.",
        code="adapter-file.tensor-name",
    )


def tokens_of(name: str, tokens: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the token ids that belong to a `trainable_tokens_delta` by its name in the file."""
    module = name.removeprefix(PREFIX).removesuffix(f".{TOKENS}")
    for module_name, ids in tokens.items():
        if module_name != INPUT_EMBEDDINGS and (module == module_name or module.endswith(f".{module_name}")):
            return ids
    return tokens.get(INPUT_EMBEDDINGS)


def _check_tokens(path: Path, saved: Mapping[str, StoredTensor], tokens: Mapping[str, tuple[int, ...]]) -> None:
    rows = {key: header for key, header in saved.items() if key.endswith(f".{TOKENS}")}
    if tokens and not rows:
        raise AdapterFormatError(
            f"{path} must hold the rows of trainable_token_indices, and does not. Save it again.",
            code="adapter-file.no-token-rows",
        )
    for key, header in rows.items():
        ids = tokens_of(key, tokens)
        if ids is None or len(header.shape) != 2 or header.shape[0] != len(ids) or header.dtype not in FLOATS:
            count = "none" if ids is None else f"{len(ids)}"
            raise AdapterFormatError(
                f"{path}: {key!r} must be a float matrix with a row per token of trainable_token_indices ({count}), "
                f"found {header.dtype} {list(header.shape)}.",
                code="adapter-file.token-rows-shape",
            )
