"""PEFT LoRA folders, written so that PEFT alone loads them: scale 1, one module in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..algebra import LowRank, all_finite
from ..algebra.storage import scaled, to_storage
from ..errors import InvalidValueError, OutputError
from ..io.safetensors_writer import Headers, TensorFile, file_size, tensor_file
from ..io.weight_files import WEIGHTS
from .keys import FACTORS, PREFIX, lacks_head
from .lora_config import CONFIG, dump_config
from .module import LINEAR, AdapterModule, ModuleHeader
from .paths import two_roots
from .state import AdapterMeta, AdapterState
from .targets import unreached, written_targets

METADATA = {"format": "pt"}
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """What the weights file of an adapter will hold, known before any module is computed.

    Args:
        meta: Description of the adapter.
        modules: Header per module path; its rank is the rank of the factors to be written.
        saved: Whole tensors by their name in the file.
        dtype: Storage dtype of factors and biases; magnitudes are float32 or wider, whole tensors keep theirs.
        compact: Keep each module's own rank, in `rank_pattern` and `alpha_pattern`, but for experts.
    """

    meta: AdapterMeta
    modules: Mapping[str, ModuleHeader]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    compact: bool = False

    @classmethod
    def of(cls, state: AdapterState, *, dtype: torch.dtype = torch.float32, compact: bool = False) -> AdapterFile:
        """Return the file of an adapter that is in memory."""
        return cls(meta=state.meta, modules=state.headers, saved=state.saved, dtype=dtype, compact=compact)

    @cached_property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(header.rank for header in self.modules.values())

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank that each module has in the file."""
        most = self.rank
        # PEFT joins the experts of a layer into one module, whose rank it takes from `r`.
        return {
            path: header.rank if self.compact and not _EXPERT.search(path) else most
            for path, header in self.modules.items()
        }

    @cached_property
    def has_biases(self) -> bool:
        """Whether modules have biases inside the LoRA: PEFT needs them in all modules or in none."""
        return any(header.bias for header in self.modules.values())

    @cached_property
    def has_magnitudes(self) -> bool:
        """Whether modules have DoRA magnitudes."""
        return any(header.magnitude for header in self.modules.values())

    @cached_property
    def headers(self) -> Headers:
        """Dtype and shape of every tensor by its name in the file."""
        headers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for path, rank in self.ranks.items():
            for part, (dtype, shape) in self._parts(self.modules[path], rank).items():
                headers[f"{PREFIX}{path}.{part}"] = dtype, shape
        return headers | {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in self.saved.items()}

    def _parts(self, header: ModuleHeader, rank: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        kernel = header.layout.kernel
        first, second = FACTORS[header.layout.kind]
        parts = {
            first: (self.dtype, (rank, header.into // torch.Size(kernel).numel(), *kernel)),
            second: (self.dtype, (header.out, rank, *(1,) * len(kernel))),
        }
        if self.has_biases:
            parts[_BIAS] = self.dtype, (header.out,)
        if self.has_magnitudes:
            # The delta is a small difference of rows this long, and 16 bits would round it away.
            parts[_MAGNITUDE] = torch.promote_types(self.dtype, torch.float32), (header.out,)
        return parts

    def size(self) -> int:
        """Return the size of the file in bytes."""
        return file_size(self.headers, METADATA)

    def check(self) -> None:
        """Refuse an adapter that PEFT could not load, or of which it would load a part only.

        Raises:
            OutputError: it is one.
        """
        self._check_parts()
        clash = two_roots([*self.modules, *(key.removeprefix(PREFIX) for key in self.saved)])
        if clash is not None:
            raise OutputError(
                f"all modules of an adapter must be those of one model class, and '{clash[0]}' and '{clash[1]}' are of "
                "two. Save the adapters that it is made from with one class of the base model.",
                code="write.model-classes",
            )
        left_out = unreached(replace(self.meta, targets=written_targets(self.meta, self.modules)), self.modules)
        if left_out:
            raise OutputError(
                f"module '{left_out[0]}' has a LoRA, so it must not belong to the fully trained modules "
                f"({', '.join(self.meta.saved_modules)}), which PEFT never adapts. Leave one of the adapters out.",
                code="write.saved-and-adapted",
            )

    def _check_parts(self) -> None:
        if self.meta.initial is not None or self.meta.peft_type != "LORA":
            raise OutputError(
                f"factors that are not the delta ({self.meta.initial or self.meta.peft_type}) must be converted to a "
                "plain delta before they are written.",
                code="write.unconverted-factors",
            )
        without = sorted(path for path, header in self.modules.items() if not header.magnitude)
        if self.meta.dora != self.has_magnitudes:
            raise OutputError(
                f"an adapter must have magnitudes where it is a DoRA and only there, found dora={self.meta.dora} and "
                f"{len(self.modules) - len(without)} magnitudes.",
                code="write.magnitudes",
            )
        odd = sorted(path for path, header in self.modules.items() if header.layout != LINEAR)
        embedding = [path for path in odd if self.modules[path].layout.kind == "embedding"]
        if self.has_biases and embedding:
            raise OutputError(
                f"PEFT has no bias inside the LoRA of an embedding, and '{embedding[0]}' is one while other modules "
                "have biases. Merge the adapters without one or the other.",
                code="write.embedding-bias",
            )
        if self.has_magnitudes and odd:
            raise OutputError(
                f"only linear modules can be DoRA, and '{odd[0]}' is a {self.modules[odd[0]].layout}.",
                code="write.dora-kind",
            )
        if self.has_magnitudes and without:
            raise OutputError(
                f"a DoRA must have a magnitude for every module, but {', '.join(without[:3])} lacks it. "
                "Give such modules the row norms of their weight plus update.",
                code="write.no-magnitude",
            )


class AdapterWriter:
    """Writes the modules of an adapter into its file, in any order.

    Args:
        plan: What the file holds.
        file: The open file.
    """

    def __init__(self, plan: AdapterFile, file: TensorFile) -> None:
        self._plan, self._file = plan, file
        self._headers = plan.headers
        self._missing = set(plan.modules)

    def add(self, path: str, module: AdapterModule) -> None:
        """Write one module, with zeros up to the rank that it has in the file.

        Raises:
            OutputError: a factor overflows the storage dtype.
            ValueError: the module has another shape than announced.
        """
        plan, update = self._plan, module.update
        first, second = (f"{PREFIX}{path}.{part}" for part in FACTORS[module.layout.kind])
        rank = self._headers[first][1][0]
        announced = plan.modules[path]
        shape = (announced.out, announced.into)
        if (update.shape, module.layout) != (shape, announced.layout):
            raise InvalidValueError(
                f"module {path!r} must have the announced shape {list(shape)} ({announced.layout}), and has "
                f"{list(update.shape)} ({module.layout})",
                code="tensor-file.shape",
            )
        if update.rank > rank:
            raise InvalidValueError(
                f"module {path!r} must have at most the announced rank, and has {update.rank}", code="tensor-file.rank"
            )
        written = stored(update, rank=rank, dtype=plan.dtype)
        self._write(first, written.a)
        self._write(second, written.b)
        if plan.has_biases:
            self._write(f"{PREFIX}{path}.{_BIAS}", torch.zeros(len(update.b)) if module.bias is None else module.bias)
        if module.magnitude is not None:
            self._write(f"{PREFIX}{path}.{_MAGNITUDE}", module.magnitude)
        self._missing.discard(path)

    def finish(self) -> None:
        """Write the whole tensors.

        Raises:
            ValueError: a module is missing.
        """
        if self._missing:
            raise InvalidValueError(
                f"every announced module must be written, and {min(self._missing)!r} is missing",
                code="tensor-file.missing",
            )
        for key, tensor in sorted(self._plan.saved.items()):
            self._write(key, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self._headers[name]
        stored = tensor.to(dtype).reshape(shape)
        if stored.is_floating_point() and not all_finite(stored):
            raise OutputError(
                f"{_owner(name)} must be finite in {str(dtype).removeprefix('torch.')}, and overflow it. "
                "Choose a wider dtype or smaller weights.",
                code="write.overflow",
            )
        self._file.write(name, stored)


def _in_storage_dtype(update: LowRank, dtype: torch.dtype) -> LowRank:
    """Round factors to 16 bits with care for their product; wider dtypes need none."""
    if dtype.itemsize >= 4 or (update.scale == 1 and update.a.dtype == update.b.dtype == dtype):
        return update
    return to_storage(update, dtype)[0]


def stored(update: LowRank, *, rank: int, dtype: torch.dtype) -> LowRank:
    """Return an update in the form that files have: scale 1, in a storage dtype, with zeros up to a rank.

    Args:
        update: The update, of at most that rank.
        rank: Rank of the result.
        dtype: The storage dtype; values that overflow it become infinite.
    """
    update = _in_storage_dtype(update, dtype)
    a, missing = scaled(update.a, update.scale), rank - update.rank
    padded = LowRank(
        a=pad(a, (0, 0, 0, missing)) if missing else a, b=pad(update.b, (0, missing)) if missing else update.b
    )
    return padded.to(dtype)


def _owner(name: str) -> str:
    module, mark, _ = name.removeprefix(PREFIX).partition(".lora_")
    return f"the factors of module '{module}'" if mark else f"the entries of '{name}'"


@contextmanager
def adapter_writer(folder: Path, plan: AdapterFile) -> Iterator[AdapterWriter]:
    """Open an adapter folder for writing; the block adds every module.

    PEFT's file has scale 1: alpha equals rank, and each update's scale is multiplied into its A. Every module gets the
    largest rank, by zeros in its factors: many programs apply one alpha and one rank to all modules and ignore the
    patterns, so only this form means the same to each of them.

    Args:
        folder: An existing folder.
        plan: What its files hold. Modules without a bias get one of zeros where others have one.

    Raises:
        OutputError: a factor overflows the storage dtype, magnitudes for some modules only, factors that are not the
            delta, or a combination that PEFT cannot load.
    """
    plan.check()
    with tensor_file(folder / WEIGHTS, plan.headers, METADATA) as file:
        writer = AdapterWriter(plan, file)
        yield writer
        writer.finish()
    # Without a task type PEFT loads the LoRA alone, on a model with a head or without.
    meta = replace(plan.meta, task_type=None) if lacks_head(plan.meta.task_type, plan.saved) else plan.meta
    (folder / CONFIG).write_bytes(dump_config(meta, plan.ranks, lora_bias=plan.has_biases))


def write_adapter(
    folder: Path, state: AdapterState, *, dtype: torch.dtype = torch.float32, compact: bool = False
) -> None:
    """Write an adapter that is in memory as a PEFT LoRA folder; see `adapter_writer`.

    Args:
        folder: An existing folder.
        state: The adapter.
        dtype: Storage dtype.
        compact: Keep each module's own rank.

    Raises:
        OutputError: as `adapter_writer`.
    """
    with adapter_writer(folder, AdapterFile.of(state, dtype=dtype, compact=compact)) as writer:
        for path in sorted(state.modules):
            writer.add(path, state.modules[path])
