"""PEFT LoRA folders: headers first, then one module at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..algebra import LowRank, all_finite
from ..algebra.storage import Zeros, zeros_of
from ..errors import AdapterFormatError
from ..io.files import MANIFEST, sha256
from ..io.json_types import JsonObject
from ..io.weight_files import Renamed, StoredTensor, WeightsFile, one_line, open_weights
from ..options.existing import require_adapter
from .keys import PREFIX, Inventory, plain_names, take_inventory
from .kinds import AdapterKind, kind_of_file, kind_of_type
from .lora_config import CONFIG, LoraSettings, load_config
from .module import AdapterModule, ModuleHeader
from .state import AdapterMeta, AdapterState, beyond_linear
from .targets import selecting

MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter folder whose headers were checked and whose tensors are read on demand.

    Args:
        path: The folder.
        settings: Its LoRA settings.
        modules: Shape per module path, in the order of the paths.
        file: The file of its weights.
        parts: Name in the file of each part of each module.
        saved_headers: Dtype and shape of the tensors that are kept whole, by their name in the file.
        was_moved: Whether its modules have other paths here than in the folder; its targets are listed by path then.
    """

    path: Path
    settings: LoraSettings
    modules: Mapping[str, ModuleHeader]
    file: WeightsFile
    parts: Mapping[str, Mapping[str, str]]
    saved_headers: Mapping[str, StoredTensor] = field(default_factory=dict)
    was_moved: bool = False

    @property
    def meta(self) -> AdapterMeta:
        """Description of the adapter."""
        return self.settings.meta

    @cached_property
    def name(self) -> str:
        """Short name for tables: the name of the folder."""
        return self.path.resolve().name

    @property
    def beyond_linear(self) -> tuple[str, ...]:
        """What it has beyond updates of linear modules, in words; empty for a plain LoRA."""
        return beyond_linear(self.meta, self.modules.values(), saved=bool(self.saved_headers))

    @cached_property
    def digest(self) -> str:
        """Hash of the weights and the settings."""
        return f"{sha256(self.file.path)}+{sha256(self.path / CONFIG)}"

    @cached_property
    def values_digest(self) -> str:
        """Hash of the updates alone: the same however names, settings and dtypes of the same values are written."""
        digest = hashlib.sha256()
        for module, header in self.modules.items():
            update = self.load(module)
            tensors = [update.a, update.b, self.bias(module), self.magnitude(module)]
            digest.update(f"{header.out} {header.into} {update.rank} {header.scale!r}".encode())
            for tensor in tensors:
                if tensor is not None:
                    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
                    digest.update(wide.numpy().tobytes())
        return digest.hexdigest()

    def _read(self, key: str) -> Tensor:
        tensor = self.file.read(key)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise AdapterFormatError(
                f"{self.path}: every weight must be finite, and {key} holds NaN or infinity. "
                "The training run that wrote it diverged; use an earlier checkpoint.",
                code="adapter-file.not-finite",
            )
        return tensor

    def load(self, module: str) -> LowRank:
        """Read the update of one module; a convolution's factors are flattened to matrices.

        Ranks at the end that are zero in both factors, with which a file fills up its modules to one rank, are left
        out, so that methods that look at ranks see those of the adapter.

        Raises:
            AdapterFormatError: a factor holds NaN or infinity.
        """
        a, b = self._factors(module, self._read)
        rank = self._known(module, a, b).rank
        return LowRank(a=a[:rank], b=b[:, :rank], scale=self.modules[module].scale)

    def is_zero(self, module: str) -> bool:
        """Return whether the update of a module is exactly zero; reads little if it is not."""
        return self.modules[module].scale == 0 or self._known(module).zero

    def rank(self, module: str) -> int:
        """Return the rank of a module without ranks at the end that are zero in both factors, at least 1."""
        return self._known(module).rank

    @cached_property
    def _seen(self) -> dict[str, Zeros]:
        """Results of `_known`."""
        return {}

    def _known(self, module: str, *factors: Tensor) -> Zeros:
        if module not in self._seen:
            zeros = zeros_of(*(factors or self._factors(module, self.file.read)))
            # The part of the base that training started from depends on the rank in training.
            whole = self.meta.initial is not None
            self._seen[module] = zeros._replace(rank=self.modules[module].rank) if whole else zeros
        return self._seen[module]

    def _factors(self, module: str, read: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """Read A and B of a module as matrices.

        Shapes: [r in] and [out r].
        """
        parts = {}
        for part, key in self.parts[module].items():
            parts[part] = read(key)
        return kind_of_type(self.meta.peft_type).factors(parts, self.modules[module])

    def bias(self, module: str) -> Tensor | None:
        """Read the output that the bias inside a module's LoRA adds, in float32 or wider; None without a bias.

        PEFT multiplies `lora_B`'s output, bias and all, by the scale, so the bias is scaled too.

        Shapes: [out].

        Raises:
            AdapterFormatError: it holds NaN or infinity.
        """
        key = self.parts[module].get("lora_B.bias")
        if key is None:
            return None
        bias = self._read(key)
        return self.modules[module].scale * bias.to(torch.promote_types(bias.dtype, torch.float32))

    def magnitude(self, module: str) -> Tensor | None:
        """Read the DoRA magnitude of a module; None without one.

        Shapes: [out].

        Raises:
            AdapterFormatError: it holds NaN or infinity.
        """
        key = self.parts[module].get("lora_magnitude_vector")
        return None if key is None else self._read(key)

    def load_saved(self, key: str) -> Tensor:
        """Read a tensor that is kept whole, by its name in the file.

        Raises:
            AdapterFormatError: it holds NaN or infinity.
        """
        return self._read(key)

    def module(self, module: str) -> AdapterModule:
        """Read all parts of one module.

        Raises:
            AdapterFormatError: a part holds NaN or infinity.
        """
        return AdapterModule(
            update=self.load(module),
            bias=self.bias(module),
            magnitude=self.magnitude(module),
            layout=self.modules[module].layout,
        )

    def read(self) -> AdapterState:
        """Read everything."""
        return AdapterState(
            meta=self.meta,
            modules={module: self.module(module) for module in self.modules},
            saved={key: self.load_saved(key) for key in self.saved_headers},
        )


def _modules(
    kind: AdapterKind, file: WeightsFile, inventory: Inventory, settings: LoraSettings
) -> dict[str, ModuleHeader]:
    if not inventory.parts:
        raise AdapterFormatError(
            f"{file.path} must hold at least one LoRA module, it is empty.", code="adapter-file.empty"
        )
    modules = {}
    for module, parts in sorted(inventory.parts.items()):
        shapes = {part: file.headers[key].shape for part, key in parts.items()}
        modules[module] = kind.header(file.path, module, shapes, settings)
    return modules


def _manifest(folder: Path) -> JsonObject:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    if not path.is_file():  # reading a named pipe would wait for ever
        raise AdapterFormatError(
            f"{path} must be a file. Remove it to use the adapter without it.", code="manifest.not-file"
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise AdapterFormatError(
                f"{path} must be at most {MAX_MANIFEST_BYTES} bytes. Remove it, or fetch it again.",
                code="manifest.too-large",
            )
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterFormatError(
            f"{path} must be JSON: {one_line(error)}. Remove it to use the adapter without it.",
            code="manifest.not-json",
        ) from error
    return manifest if isinstance(manifest, dict) else {}


def _selecting(kind: AdapterKind, settings: LoraSettings, file: WeightsFile, inventory: Inventory) -> LoraSettings:
    """Return settings that select every module of the file, or refuse them."""
    stored = {module: next(iter(parts.values())) for module, parts in sorted(inventory.parts.items())}
    if isinstance(file, Renamed):
        stored = {module: file.stored(key) for module, key in stored.items()}
    names = {module: key.removeprefix(PREFIX).partition(kind.mark)[0] for module, key in stored.items()}
    targets = selecting(settings.meta, names, file.path)
    return replace(settings, meta=replace(settings.meta, targets=targets))


def _below(folder: Path) -> str:
    """Return a sentence on the adapters in the folders of a folder; empty if there is no adapter."""
    try:
        names = sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file())
    except OSError:
        return ""
    listed = ", ".join(name[:80] for name in names[:5])
    return f" Its folders hold adapters: {listed}. Give one of these." if listed else ""


def open_adapter(path: str | Path, *, allow_pickle: bool = False) -> AdapterSource:
    """Open a PEFT folder and check its headers; no tensor is read.

    Args:
        path: The folder.
        allow_pickle: Also read an old `adapter_model.bin`, through the unpickler that makes tensors only.

    Raises:
        AdapterFormatError: no such folder, a file is missing or damaged, shapes contradict the settings, or the adapter
            has a part that is not supported and would be lost.
    """
    folder = require_adapter(path)
    if not (folder / CONFIG).is_file():
        raise AdapterFormatError(
            f"an adapter folder must hold {CONFIG}, and {folder} does not.{_below(folder)}", code="adapter.no-config"
        )
    config = load_config(folder / CONFIG)
    kind = kind_of_file(config, folder / CONFIG)
    settings = kind.settings(config, folder / CONFIG, _manifest(folder))
    file = plain_names(open_weights(folder, allow_pickle=allow_pickle))
    inventory = take_inventory(file, settings.meta, kind.parts)
    modules = _modules(kind, file, inventory, settings)
    return AdapterSource(
        path=folder,
        settings=_selecting(kind, settings, file, inventory),
        modules=modules,
        file=file,
        parts=inventory.parts,
        saved_headers=inventory.saved,
    )
