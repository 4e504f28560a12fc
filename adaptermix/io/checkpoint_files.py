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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What a file's header says of one tensor.

    Args:
        file: Name of the file that holds it.
        shape: Its shape.
        dtype: Its dtype in safetensors' words (F32, BF16, ...).
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Its bytes, of the dtypes that weights have."""
        bits = int("".join(filter(str.isdigit, self.dtype.partition("_")[0])) or 8)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder whose headers were read and whose tensors are read on demand.

    Args:
        path: The folder.
        tensors: Header per tensor, sorted by name.
        aliases: Name in the files of tensors that have another one there, such as a head that is tied to embeddings.
        metadata: Strings of the file's `__metadata__`, of a checkpoint that is one file; see `open_tensors`.
    """

    path: Path
    tensors: Mapping[str, TensorHeader]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name for tables: that of the folder."""
        return self.path.resolve().name

    def files(self) -> dict[str, list[str]]:
        """Return the names of the tensors in each file, both sorted."""
        found: dict[str, list[str]] = {}
        for key, header in self.tensors.items():
            found.setdefault(header.file, []).append(key)
        return dict(sorted(found.items()))

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """Open one file of the checkpoint; `get_tensor(name)` reads a tensor of it.

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
            raise ModelError(f"the checkpoint {self.path} must hold {key!r}, and does not.")
        with self.open(self.tensors[key].file) as handle:
            tensor: Tensor = handle.get_tensor(self.aliases.get(key, key))
            return tensor


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} must be a whole safetensors file: {error}. Fetch or save it again.")


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
    """Return the names of the weight files; the index may name files of this folder only."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX} must be JSON with a weight_map: {error}. Fetch it again.") from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{folder / INDEX} must name files of its own folder, found {str(file)[:200]!r}.")
            if not (folder / file).is_file():
                raise ModelError(f"{folder} must hold {file}, which its index names, and does not. Fetch it again.")
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ModelError(f"a checkpoint is a folder with {SINGLE} or {INDEX}, and {folder} holds neither.")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder and read its headers; no tensor is read.

    Raises:
        ModelError: no such folder, no safetensors in it, or a damaged file or config.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"a checkpoint is a folder with {SINGLE} or {INDEX}, and {folder} is no folder.")
    check_base_files(folder, "config")
    tensors: dict[str, TensorHeader] = {}
    for file in _files(folder):
        tensors |= _headers(folder / file)
    return Checkpoint(path=folder, tensors=dict(sorted(tensors.items())))


def open_tensors(path: str | Path) -> Checkpoint:
    """Open one safetensors file as a checkpoint of its own.

    Raises:
        ModelError: no such file, or it is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"there is no file {file}: give a safetensors file.")
    tensors = dict(sorted(_headers(file).items()))
    with safe_open(file, framework="pt") as handle:
        return Checkpoint(path=file.parent, tensors=tensors, metadata=dict(handle.metadata() or {}))


def resolve_checkpoint(reference: str) -> Path:
    """Return the folder of `MODEL` or `MODEL@REVISION`: a local one, or the Hub's, fetched if it is not there yet.

    Raises:
        ModelError: no such model, or the Hub cannot be reached.
    """
    if Path(reference).is_dir():
        return Path(reference)
    if reference.startswith((".", "/", "~")) or "\\" in reference:
        raise ModelError(f"{reference!r} must be a model folder, and there is no such folder.")
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FETCHED))
    except Exception as error:  # the Hub client's many kinds: network, login, names
        raise unreachable(reference, error, "model") from error


@lru_cache(maxsize=2)
def loaded_names(folder: Path, names: tuple[str, ...]) -> tuple[Callable[[str], str], dict[str, str]]:
    """Return what renames tensors as transformers does on loading, and the names in the files by those in the model.

    Tensors that are made from several ones are left out. Nothing is renamed where transformers does not know the model.

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
        found = {name: rename_source_key(name, renamings, converters, prefix, state) for name in names}
    except Exception:  # of any class, from the inside of another library: names are then taken as they are
        return str, {}
    return (
        lambda name: str(rename_source_key(name, renamings, converters, prefix, state)[0]),
        {new: name for name, (new, converter) in found.items() if converter is None},
    )
