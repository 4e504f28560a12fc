"""Full checkpoints on disk: safetensors files, single or sharded by an index, read one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from .base_files import check_base_files, unreachable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FETCHED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
_STACK = "stack.json"
"""File by which a stack is recognised, which has no weights of a whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor's entry in a file's header.

    Args:
        file: Name of the file that contains it.
        shape: Its shape.
        dtype: Its dtype, as safetensors names it (F32, BF16, ...).
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Size in bytes, for the dtypes that weights have."""
        bits = int("".join(filter(str.isdigit, self.dtype.partition("_")[0])) or 8)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder with its headers read; tensors are read on demand.

    Args:
        path: The folder.
        tensors: Header per tensor, sorted by name.
        aliases: Name in the files of each tensor that has a different name there, such as a head tied to embeddings.
        metadata: Strings of the file's `__metadata__`, for a single-file checkpoint; see `open_tensors`.
    """

    path: Path
    tensors: Mapping[str, TensorHeader]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name for tables: the folder's name."""
        return self.path.resolve().name

    def files(self) -> dict[str, list[str]]:
        """Return the names of the tensors in each file, both sorted."""
        by_file: dict[str, list[str]] = {}
        for key, header in self.tensors.items():
            by_file.setdefault(header.file, []).append(key)
        return dict(sorted(by_file.items()))

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """Open one file of the checkpoint; `get_tensor(name)` of the result reads a tensor.

        Raises:
            ModelError: the file is damaged.
        """
        try:
            with safe_open(self.path / file, framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path / file, error) from error

    def load(self, key: str) -> Tensor:
        """Read one tensor, in the dtype of the file.

        Raises:
            ModelError: there is no such tensor, or the file is damaged.
        """
        if key not in self.tensors:
            raise ModelError(f"the checkpoint {self.path} has no tensor {key!r}.", code="checkpoint.no-tensor")
        with self.open(self.tensors[key].file) as handle:
            tensor: Tensor = handle.get_tensor(self.aliases.get(key, key))
            return tensor


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} must be a whole safetensors file: {error}. Fetch or save it again.", code="checkpoint.damaged"
    )


def _headers(path: Path) -> dict[str, TensorHeader]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  (no mapping)
                piece = handle.get_slice(key)
                tensors[key] = TensorHeader(file=path.name, shape=tuple(piece.get_shape()), dtype=piece.get_dtype())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return tensors


def _files(folder: Path) -> list[str]:
    """Return the names of the weight files. The index may only name files of this folder."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{folder / INDEX} must be JSON with a weight_map: {error}. Fetch it again.",
                code="checkpoint.index-json",
            ) from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(
                    f"{folder / INDEX} must name files in the same folder, found {str(file)[:200]!r}.",
                    code="checkpoint.index-names",
                )
            if not (folder / file).is_file():
                raise ModelError(
                    f"{folder} has no file {file}, which its index names. Fetch it again.", code="checkpoint.no-shard"
                )
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    hint = " It is a stack: give its model on top, or bake the stack first." if (folder / _STACK).is_file() else ""
    raise ModelError(
        f"a checkpoint must be a folder with {SINGLE} or {INDEX}, and {folder} has neither.{hint}",
        code="checkpoint.no-weights",
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder and read its headers, but no tensors.

    Raises:
        ModelError: there is no such folder, it has no safetensors files, or a file or the config is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"a checkpoint must be a folder with {SINGLE} or {INDEX}, and {folder} is not a folder.",
            code="checkpoint.not-folder",
        )
    check_base_files(folder, "config")
    tensors: dict[str, TensorHeader] = {}
    for file in _files(folder):
        tensors |= _headers(folder / file)
    return Checkpoint(path=folder, tensors=dict(sorted(tensors.items())))


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of `config.json`; empty if it is missing or invalid."""
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def open_tensors(path: str | Path) -> Checkpoint:
    """Open one safetensors file as a checkpoint.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"there is no file {file}: give a safetensors file.", code="checkpoint.no-file")
    tensors = dict(sorted(_headers(file).items()))
    with safe_open(file, framework="pt") as handle:
        return Checkpoint(path=file.parent, tensors=tensors, metadata=dict(handle.metadata() or {}))


def resolve_checkpoint(reference: str) -> Path:
    """Return the folder of `MODEL` or `MODEL@REVISION`; a Hub model is downloaded if it is not cached.

    Raises:
        ModelError: there is no such model, or the Hub cannot be reached.
    """
    if Path(reference).is_dir():
        return Path(reference)
    if reference.startswith((".", "/", "~")) or "\\" in reference:
        raise ModelError(
            f"{reference!r} must be a model folder, and there is no such folder.", code="checkpoint.not-folder"
        )
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FETCHED))
    except Exception as error:  # The Hub client raises many classes, for network, login and names.
        raise unreachable(reference, error, "model") from error


@lru_cache(maxsize=2)
def loaded_names(folder: Path, names: tuple[str, ...]) -> tuple[Callable[[str], str], dict[str, str]]:
    """Return a function that renames tensors as transformers does on loading, and the file's name of each model tensor.

    Tensors that transformers builds from several others are left out. For models that it does not know, names stay
    unchanged.

    Args:
        folder: A model folder.
        names: Names of the tensors in its files.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = transformers.CONFIG_MAPPING[document["model_type"]].from_dict(document)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        steps = get_model_conversion_mapping(model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        prefix, state = model.base_model_prefix, model.state_dict()
        renamed = {name: rename_source_key(name, renamings, converters, prefix, state) for name in names}
    except Exception:  # Raised inside another library, so it can be of any class. Names then stay as in the files.
        return str, {}
    return (
        lambda name: str(rename_source_key(name, renamings, converters, prefix, state)[0]),
        {new: name for name, (new, converter) in renamed.items() if converter is None},
    )
