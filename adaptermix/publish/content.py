"""The content of published files: without local paths, and with the Hub id of the base model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import PublishError, as_line
from ..io.files import MANIFEST
from ..io.json_types import JsonObject
from ..provenance import manifest as manifests
from .private import text_without_paths, without_paths

README = "README.md"
CONFIG = "adapter_config.json"
_TEXTS = (".json", ".jsonl", ".html")
_MODEL_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file")
_MODULES = (
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("rank_pattern", "alpha_pattern", "layers_pattern", "layers_to_transform", "layer_replication"),
)
"""Entries of an adapter's config that name modules, with patterns that may look like paths."""
_MOST_TEXT = 2**26


def _check_metadata(path: Path) -> None:
    """Refuse weights whose header contains a local path, since some trainers write their settings there."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PublishError(
            f"{path} must be a safetensors file: {as_line(error)}. Write it again, or remove it.",
            code="push.safetensors",
        ) from error
    for name, text in metadata.items():
        if without_paths({name: text}) != {name: text}:
            raise PublishError(
                f"{path} names a path of this machine in its header ({as_line(name, 60)}), which would be published. "
                "Save the file again without that entry.",
                code="push.header-path",
            )


def content_of(
    path: Path, name: str, public: manifests.Manifest, *, base: str | None, local: str, repo: str
) -> bytes | Path:
    """Return the content to publish: the file, or its text without local paths.

    Args:
        path: The file.
        name: Its name in the repository.
        public: The manifest as it is published.
        base: Id of the base model on the Hub.
        local: The base model as the folder names it.
        repo: The repository, which is the base of a residual LoRA.

    Raises:
        PublishError: the file is damaged, or the header of its weights names a local path.
    """
    if path.suffix == ".safetensors":
        _check_metadata(path)
    if path.suffix not in _TEXTS or name in (MANIFEST, README) or path.stat().st_size > _MOST_TEXT:
        return path
    if path.suffix == ".html":
        text = path.read_text(encoding="utf-8", errors="replace")
        cleaned = text_without_paths(text)
        return path if cleaned == text else cleaned.encode()
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            cleaned_rows = without_paths(rows, base=base, local=local)
            return path if cleaned_rows == rows else "".join(json.dumps(row) + "\n" for row in cleaned_rows).encode()
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PublishError(
            f"{path} must be JSON: {as_line(error)}. Write it again, or remove it.", code="push.json"
        ) from error
    if not isinstance(document, dict):
        return path
    cleaned_document: JsonObject
    if path.name == CONFIG:
        cleaned_document = (
            _config(document, {"id": repo})
            if name.startswith("residual/")
            else _config(document, public["base"], local)
        )
    elif name in (MANIFEST, "results.json") or path.name == MANIFEST:
        cleaned_document = without_paths(document, base=base, local=local)
    else:  # other entries of a model, such as chat templates and tokens, may look like paths
        named = {key: document[key] for key in _MODEL_PATHS if isinstance(document.get(key), str)}
        cleaned_document = document | without_paths(named, base=base, local=local)
    return path if cleaned_document == document else (json.dumps(cleaned_document, indent=2) + "\n").encode()


def _config(document: JsonObject, base: manifests.Manifest, local: str = "") -> JsonObject:
    """Return an adapter's config with the Hub id of its base model."""
    others = {key: value for key, value in document.items() if key not in _MODULES}
    cleaned: JsonObject = document | without_paths(others, base=base.get("id"), local=local)
    if base.get("id"):
        cleaned["base_model_name_or_path"] = base["id"]
        if document.get("revision") != base.get("revision"):
            cleaned["revision"] = base.get("revision")
    return cleaned
