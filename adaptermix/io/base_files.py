"""Checks of a base model's JSON files before transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import ModelError, as_line

CONFIG = "config.json"
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json")
_MODEL = ("generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = {"config": (CONFIG,), "tokenizer": _TOKENIZER, "model": _MODEL}
"""Names of the files to check for each part of a base model."""

_MOST_BYTES, _MOST_TABLE_BYTES = 2**24, 2**29
_TABLES = ("tokenizer.json", "vocab.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_LARGE_BYTES = 2**22
_MOST_DEPTH = 64
_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 10_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim", "embedding_size"), 1_000_000),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "vocab_size"), 100_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31),
}
"""Largest sizes that a config may contain, far above those of any published model."""
_MAPPINGS = ("auto_map", "id2label", "label2id", "quantization_config", "rope_scaling", "rope_parameters")
_PARTS = ("text_config", "vision_config", "audio_config")
_TEXTS = ("model_type", "dtype", "torch_dtype", "transformers_version")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".h5", ".msgpack")
# An embedding takes at least half a byte per number. Other parts of a model, such as a head, may be missing from
# the files; the embedding may not.
_MOST_NUMBERS_PER_BYTE, _FEW_NUMBERS = 4, 10**8


def check_base_files(folder: Path, part: str) -> None:
    """Refuse a model folder with JSON files that transformers would misread or fail on.

    Args:
        folder: The model's folder.
        part: Key of `FILES`: the part that is about to be loaded.

    Raises:
        ModelError: a file is not a JSON object, is nested too deeply or too large, or a field has an impossible type or
            size.
    """
    for name in FILES[part]:
        path = folder / name
        if not path.is_file():
            continue
        document = _object(path)
        if name == CONFIG:
            _check_config(path, document)
            _check_sizes(folder, document)
        elif name.endswith(".index.json"):
            _check_index(path, document)
        elif part == "tokenizer" and name == "tokenizer_config.json":
            _check_tokenizer(path, document)


def _object(path: Path) -> Mapping[str, object]:
    limit = _MOST_TABLE_BYTES if path.name in _TABLES else _MOST_BYTES
    try:
        if path.stat().st_size > limit:
            raise ModelError(
                f"{path} must have at most {limit:,} bytes, and has {path.stat().st_size:,}. Fetch the model again.",
                code="base-config.too-large",
            )
        if (
            path.name in ("tokenizer.json", "vocab.json")
            and path.stat().st_size > _LARGE_BYTES
            and _starts_as_object(path)
        ):
            return {}  # The tokenizers library reads it faster, and its errors are caught as well.
        document = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise _too_deep(path) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} must be JSON in UTF-8: {as_line(error)}. Fetch the model again.", code="base-config.not-json"
        ) from error
    if not isinstance(document, dict):
        raise ModelError(
            f"{path} must be a JSON object, found {_kind(document)}. Fetch the model again, or give another base "
            "model.",
            code="base-config.not-object",
        )
    if path.name not in _TABLES and _is_deeper(document, _MOST_DEPTH):
        raise _too_deep(path)
    return document


def _starts_as_object(path: Path) -> bool:
    """Return whether a file starts like a JSON object."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def _too_deep(path: Path) -> ModelError:
    return ModelError(
        f"{path} must be nested at most {_MOST_DEPTH} levels deep, and is deeper. Fetch the model again.",
        code="base-config.too-deep",
    )


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            entry
            for container in level
            if isinstance(container, dict | list)
            for entry in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return any(isinstance(container, dict | list) for container in level)


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _refuse(path: Path, field: str, expected: str, actual: object) -> ModelError:
    value = f" {as_line(actual, 60)}" if isinstance(actual, str | int | float) and not isinstance(actual, bool) else ""
    return ModelError(
        f"{path}: {as_line(field, 60)!r} must be {expected}, found {_kind(actual)}{value}. Fetch the model again, or "
        "give another base model.",
        code="base-config.value",
    )


def _check_mappings(path: Path, document: Mapping[str, object], names: tuple[str, ...]) -> None:
    for name in names:
        if document.get(name) is not None and not isinstance(document[name], dict):
            raise _refuse(path, name, "an object", document[name])


def _check_tokenizer(path: Path, document: Mapping[str, object]) -> None:
    _check_mappings(path, document, ("auto_map", "added_tokens_decoder"))
    length = document.get("model_max_length")
    if length is not None and (not isinstance(length, int | float) or not length >= 1):  # `not` is true for NaN too.
        raise _refuse(path, "model_max_length", "a number of at least 1", length)


def _check_config(path: Path, document: Mapping[str, object]) -> None:
    _check_mappings(path, document, _MAPPINGS)
    for name in _TEXTS:
        if document.get(name) is not None and not isinstance(document[name], str):
            raise _refuse(path, name, "a text", document[name])
    named = document.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise _refuse(path, "architectures", "a list of class names", named)
    for name, limit in _LIMITS.items():
        entry = document.get(name)
        for value in entry if isinstance(entry, list) else [entry]:
            if value is not None and (type(value) is not int or not 0 <= value <= limit):
                raise _refuse(path, name, f"a whole number of at most {limit:,}", value)
    _check_parts(path, document)


def _check_parts(path: Path, document: Mapping[str, object]) -> None:
    for name, value in document.items():
        if name in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise ModelError(
                f"{path}: {name!r} must name an attention implementation of transformers, found "
                f"{as_line(value, 60)!r}, which is Hub code and never run. Remove the entry or use another model.",
                code="base-config.attention",
            )
        if name in _PARTS and isinstance(value, dict):
            _check_config(path, value)
        elif name in _PARTS and value is not None:
            raise _refuse(path, name, "an object", value)


def _check_sizes(folder: Path, document: Mapping[str, object]) -> None:
    """Refuse an embedding that cannot be in the weight files: transformers would initialise it and fill the memory."""
    if (folder / "stack.json").is_file():  # a stack has the config of its base model, and no weights of it
        return
    inner = document.get("text_config")
    text = inner if isinstance(inner, dict) and inner else document
    sizes = [text.get(name) for name in ("embedding_size", *_WIDTHS)]
    width = next((size for size in sizes if isinstance(size, int)), 0)
    rows = text.get("vocab_size")
    numbers = width * rows if isinstance(rows, int) else 0
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    if stored and numbers > max(_FEW_NUMBERS, _MOST_NUMBERS_PER_BYTE * stored):
        raise ModelError(
            f"{folder / CONFIG} names an embedding of {numbers:,} numbers, but the weight files next to it have only "
            f"{stored:,} bytes. Fetch the model again, or give another base model.",
            code="base-config.embedding-size",
        )


def _check_index(path: Path, document: Mapping[str, object]) -> None:
    files = document.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise _refuse(path, "weight_map", "an object of file names", files)
    for file in files.values():
        if Path(file).name != file:
            raise ModelError(
                f"{path} must name files in its folder, found {as_line(file)!r}. Fetch the model again.",
                code="base-config.index",
            )
    if document.get("metadata") is not None and not isinstance(document["metadata"], dict):
        raise _refuse(path, "metadata", "an object", document["metadata"])


def unreachable(reference: str, error: Exception, what: str = "base model") -> ModelError:
    """Return the error for a model that does not load.

    Args:
        reference: The model's folder or Hub id.
        error: The error that the libraries raised.
        what: The model's role.
    """
    name = as_line(reference)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{what} {name!r} needs its own Python code (auto_map in its files), which is never run. Give a model that "
            "transformers has a class for.",
            code="base.own-code",
        )
    reason = as_line((str(error).strip() or type(error).__name__).splitlines()[0], 300)
    if isinstance(error, KeyError | TypeError | AttributeError | IndexError | RecursionError):
        reason = f"{type(error).__name__}: {reason}"
    if Path(reference).is_dir():
        return ModelError(f"{what} {name!r} cannot be loaded from this folder: {reason}", code="base.unloadable")
    if reference.startswith((".", "/", "~")):
        return ModelError(
            f"{what} {name!r} must be a model folder or a Hub id, and there is no such folder.", code="base.not-found"
        )
    return ModelError(
        f"{what} {name!r} must be a model folder or a Hub id that can be reached: there is no such folder here, and "
        f"the Hub answers: {reason}",
        code="base.unreachable",
    )
