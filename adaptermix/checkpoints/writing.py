"""Write a full checkpoint tensor by tensor: base tensors plus deltas, rounded once, in files of limited size."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..algebra import LowRank
from ..errors import ModelError, PlanError
from ..io.checkpoint_files import INDEX, SINGLE, Checkpoint
from ..io.disk import check_space
from ..io.json_types import JsonObject
from ..io.safetensors_writer import DTYPE_NAMES, Headers, TensorFile, file_order, tensor_file
from ..io.threads import torch_threads
from ..progress import SILENT, Advance, Watcher
from .adding import Crew, write_sum
from .reading import FLOATS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Storage dtypes by name."""
Delta = Callable[[], Tensor | LowRank | None]
"""Computes the delta of one tensor, as a matrix or as factors; None copies the tensor."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_STORED = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_COMPANIONS = {".json", ".model", ".txt", ".jinja", ".py", ".tiktoken", ".spm", ".bpe"}
_TEMPLATES = "additional_chat_templates"
_NOT_COPIED = {
    *("adapter_config.json", "adaptermix.json", "requirements.txt", "trainer_state.json"),
    *("quantize_config.json", "quant_config.json"),  # of GPTQ and AWQ models, which are never written
}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def parse_size(size: int | str) -> int:
    """Return a number of bytes; "5GB" is 5 * 10^9 and "5GiB" is 5 * 2^30, as transformers reads them.

    Raises:
        PlanError: the text is not a size.

    Example:
        >>> parse_size("5GB"), parse_size("1KiB"), parse_size(7)
        (5000000000, 1024, 7)
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?)B?", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) < 1:
        raise PlanError(
            f"a shard size must be a number of bytes such as 5GB or 500MiB, got {size!r}.", code="checkpoint.shard-size"
        )
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a checkpoint, planned.

    Args:
        file: Its name.
        headers: Dtype and shape per tensor.
    """

    file: str
    headers: Headers


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts block 10 after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _bytes(header: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return header[0].itemsize * math.prod(header[1])


def plan_shards(base: Checkpoint, *, dtype: torch.dtype | None, shard_size: int | str) -> list[Shard]:
    """Assign tensors to files, from the headers of the base.

    Args:
        base: The base model.
        dtype: Storage dtype of float tensors; None keeps that of each.
        shard_size: Size that no file exceeds, unless a single tensor does.

    Raises:
        ModelError: a tensor is empty, or of a dtype that cannot be stored.
        PlanError: the shard size is invalid.
    """
    limit = parse_size(shard_size)
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name in sorted(base.tensors, key=_natural):
        header = base.tensors[name]
        if header.dtype not in _STORED or 0 in header.shape:
            raise ModelError(
                f"{base.path}: '{name}' must be of one of the dtypes {', '.join(_STORED)} and not be empty, found "
                f"{header.dtype} {list(header.shape)}. Give an unquantised model.",
                code="checkpoint.dtype",
            )
        stored = dtype if dtype is not None and header.dtype in FLOATS else _STORED[header.dtype]
        entry = (stored, header.shape)
        if groups[-1] and filled + _bytes(entry) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += _bytes(entry)
    return named_shards(groups)


def named_shards(groups: Sequence[Headers]) -> list[Shard]:
    """Return the files of a checkpoint with their names: one, or numbered ones.

    Args:
        groups: Headers of the tensors of each file.
    """
    if len(groups) == 1:
        return [Shard(file=SINGLE, headers=groups[0])]
    stem, ending = SINGLE.split(".", 1)
    return [
        Shard(file=f"{stem}-{number:05d}-of-{len(groups):05d}.{ending}", headers=group)
        for number, group in enumerate(groups, start=1)
    ]


def _check_deltas(base: Checkpoint, names: Collection[str]) -> None:
    for name in names:
        if name not in base.tensors:
            raise ModelError(
                f"the base model {base.path} must have the tensor '{name}', to which a delta is added, but does not.",
                code="base.no-tensor",
            )
        if base.tensors[name].dtype not in FLOATS:
            raise ModelError(
                f"{base.path}: '{name}' must be of a float dtype to be added to, found {base.tensors[name].dtype}. "
                "Give an unquantised base model.",
                code="base.not-float",
            )


class CheckpointWriter:
    r"""Writes $W_0 + \Delta$ as a full checkpoint with the base's config, tokenizer and licence files.

    Shards are planned from headers; then one tensor at a time is read, summed in float32 (float64 if a tensor is
    float64), rounded and written. Tensors without a delta are copied bit for bit.

    Use as a context manager: `add` deltas inside, in the order of `order`.

    Args:
        base: The base model.
        folder: An existing folder.
        names: Names of the tensors that get a delta.
        dtype: Storage dtype of float tensors; None keeps each tensor's dtype.
        shard_size: Size that no file exceeds, unless a single tensor does; one file if everything fits.
        advance: Called with each written tensor, `len(base.tensors)` times.

    Raises:
        ModelError: a delta does not fit the base, a tensor cannot be stored, or a link leads out of the base.
        OutputError: the disk has too little space for the result.
        PlanError: the shard size is invalid.
    """

    def __init__(
        self,
        base: Checkpoint,
        folder: Path,
        names: Collection[str],
        *,
        dtype: torch.dtype | None = None,
        shard_size: int | str = "5GB",
        advance: Advance = lambda _count, _what: None,
    ) -> None:
        _check_deltas(base, names)
        companions(base.path)
        self._base, self._folder, self._dtype, self._advance = base, folder, dtype, advance
        self._shards = plan_shards(base, dtype=dtype, shard_size=shard_size)
        headers = [header for shard in self._shards for header in shard.headers.values()]
        check_space(folder, sum(map(_bytes, headers)))
        self._rest = deque((shard, name) for shard in self._shards for name in file_order(shard.headers))
        chosen = set(names)
        self.order = [name for _, name in self._rest if name in chosen]
        self._shard: Shard | None = None
        self._file: TensorFile | None = None
        self._open, self._crew = ExitStack(), Crew()

    def __enter__(self) -> Self:
        self._crew.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._copy_until(None)
                self._close()
        except BaseException as failure:
            kind, error, trace = type(failure), failure, failure.__traceback__
            raise
        finally:
            self._crew.__exit__(kind, error, trace)
            self._open.__exit__(kind, error, trace)
        if error is None:
            write_index(self._folder, self._shards)
            copy_companions(self._base, self._folder, dtype=self._dtype)

    def add(self, name: str, delta: Tensor | LowRank | None) -> None:
        """Write a tensor plus its delta, after the tensors that precede it in the files.

        Args:
            name: Name of the tensor.
            delta: The delta, as a matrix or as factors, of the shape of the tensor; None copies the tensor.

        Raises:
            ModelError: the delta has another shape.
            OutputError: a sum overflows the storage dtype; a later call may raise this.
        """
        self._copy_until(name)
        self._write(delta)

    def _copy_until(self, name: str | None) -> None:
        while self._rest and self._rest[0][1] != name:
            self._write(None)

    def _write(self, delta: Tensor | LowRank | None) -> None:
        shard, name = self._rest.popleft()
        file = self._file_of(shard)
        stored, shape = shard.headers[name]
        if delta is not None and tuple(delta.shape) != tuple(shape):
            raise ModelError(
                f"the delta of '{name}' must have the shape of the base's tensor, {list(shape)}, got "
                f"{list(delta.shape)}. Give the base model that it belongs to.",
                code="base.delta-shape",
            )
        write_sum(self._crew, partial(file.write, name), self._base.load(name), delta, stored=stored, name=name)
        self._advance(1, name)

    def _file_of(self, shard: Shard) -> TensorFile:
        if self._file is None or shard is not self._shard:
            self._close()
            self._shard = shard
            opened = tensor_file(self._folder / shard.file, shard.headers, {"format": "pt"})
            self._file = self._open.enter_context(opened)
        return self._file

    def _close(self) -> None:
        """Wait for the threads, and close the current file."""
        self._crew.finish()
        self._open.close()
        self._file = None


def write_checkpoint(
    base: Checkpoint,
    out_folder: Path,
    delta_of: Mapping[str, Delta],
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    maker_threads: int | None = None,
    watch: Watcher = SILENT,
) -> None:
    """Write a full checkpoint, and compute its deltas one after the other; see `CheckpointWriter`.

    Args:
        base: The base model.
        out_folder: An existing folder.
        delta_of: Functions that compute the deltas, by tensor name; each is called once, in the order of the files.
        dtype: Storage dtype of float tensors; None keeps that of each.
        shard_size: Size that no file exceeds, unless a single tensor does.
        maker_threads: Threads that compute a delta while others add the previous one; default torch's number.
        watch: Receives progress.

    Raises:
        AdapterMixError: as `CheckpointWriter`.
    """
    with watch.track("write", len(base.tensors)) as advance:
        writer = CheckpointWriter(
            base, out_folder, delta_of.keys(), dtype=dtype, shard_size=shard_size, advance=advance
        )
        with writer, torch_threads(maker_threads):
            for name in writer.order:
                writer.add(name, delta_of[name]())


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index from tensors to files, if there are several files."""
    if len(shards) == 1:
        return
    headers = [header for shard in shards for header in shard.headers.values()]
    where = {name: shard.file for shard in shards for name in shard.headers}
    metadata = {
        "total_parameters": sum(math.prod(shape) for _, shape in headers),
        "total_size": sum(_bytes(header) for header in headers),
    }
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
    (folder / INDEX).write_bytes(index.encode())


def copy_companions(base: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Copy the base's config, tokenizer, generation, code and licence files.

    Args:
        base: The base model.
        folder: The target folder.
        dtype: Storage dtype to name in the config; None does not change the config.
    """
    for path in companions(base.path):
        target = folder / path.relative_to(base.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        _name_dtype(config, str(dtype).removeprefix("torch."))
    if base.aliases and config.is_file():
        _untie(config)


def companions(base: Path) -> list[Path]:
    """Return the files of a model folder that are copied together with its weights.

    Links may point into the folder itself or, in the Hub's cache, into the same repository. Other links could point to
    private files, which would be published with the result.

    Raises:
        ModelError: a link leads elsewhere.
    """
    parts = _parts_of(base)
    files: list[Path] = []
    for path in sorted(base.iterdir()):
        if path.is_dir() and (path.name == _TEMPLATES or path.name in parts):
            files += sorted(inner for inner in path.rglob("*") if inner.is_file())
        elif path.is_file() and path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            files += [path] if path.suffix in _COMPANIONS or path.name.upper().startswith(_LEGAL) else []
    roots = [base.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append((roots[0].parents[1] / "blobs").resolve())
    for path in files:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ModelError(
                f"the files of the base model {base} that are copied must lie in its folder, and '"
                f"{path.relative_to(base)}' is a link to a file outside of it. Copy the file there, or remove the "
                "link.",
                code="base.outside-link",
            )
    return files


def _parts_of(folder: Path) -> set[str]:
    """Return the folders of the sentence-transformers modules that follow the model, such as its pooling."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _untie(path: Path) -> None:
    """Set in a config that the output head is not tied."""
    config: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "tie_word_embeddings" in part)]
    for part in parts:
        part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name_dtype(path: Path, name: str) -> None:
    """Set the storage dtype in a config; transformers loads a model in that dtype."""
    config: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    path.write_text(json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n", encoding="utf-8")
