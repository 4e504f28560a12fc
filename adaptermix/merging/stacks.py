"""Merge stacks of the same two models: their own LoRAs as adapters, and their projections as fully trained tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor

from ..adapters import AdapterMeta, AdapterSource, StoredTensor, open_adapter
from ..checkpoints.stack_files import copy_stack
from ..errors import IncompatibleAdapters, PlanError
from ..io.checkpoint_files import Checkpoint, open_tensors
from ..io.files import MANIFEST, ROWS_FILE, check_not_input, whole_folder, write_whole
from ..models.stack import ADAPTER, PROJECTION, StackForm, stack_folder
from ..options import MergeSettings
from ..options.roles import Role, marked
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import write_documents
from .merge_adapters import merge
from .report import MergeReport
from .whole_tensors import merge_saved

_PREFIX = "projection."


@dataclass(frozen=True, kw_only=True)
class StackSource:
    """A stack as `merge_saved` reads it: its projection is the fully trained part.

    Args:
        folder: The stack's folder.
        form: Its form.
        lora: Its LoRA.
    """

    folder: Path
    form: StackForm
    lora: AdapterSource

    @classmethod
    def open(cls, path: str | Path) -> StackSource:
        """Open a stack.

        Raises:
            PlanError: it is not a stack, or its LoRA is in the weights of its model on top.
        """
        folder = stack_folder(str(path))
        if folder is None:
            raise PlanError(
                f"inputs must be all stacks or all adapters, and {path} is not a stack. The LoRA of a stack alone is "
                f"the adapter in its folder {ADAPTER}.",
                code="merge.mixed-inputs",
            )
        form = StackForm.read(folder)
        if form.generates:
            raise PlanError(
                f"stacks must have a LoRA to be merged, and {folder} (--mode {form.mode}) has a projection only. Merge "
                "adapters that were trained on it.",
                code="merge.generating-stack",
            )
        if not form.lora:
            raise PlanError(
                f"the stack {folder} has its LoRA in the weights of its model on top, so it cannot be merged: give the "
                "stack that it was baked from.",
                code="merge.baked-stack",
            )
        return cls(folder=folder, form=form, lora=open_adapter(folder / ADAPTER))

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def meta(self) -> AdapterMeta:
        """Metadata of the LoRA."""
        return self.lora.meta

    @cached_property
    def _file(self) -> Checkpoint:
        return open_tensors(self.folder / PROJECTION)

    @property
    def saved_headers(self) -> Mapping[str, StoredTensor]:
        """Dtype and shape of the tensors of the projection."""
        return {
            f"{_PREFIX}{name}": StoredTensor(dtype=header.dtype, shape=header.shape)
            for name, header in self._file.tensors.items()
        }

    def load_saved(self, key: str) -> Tensor:
        """Read a tensor of the projection."""
        return self._file.load(key.removeprefix(_PREFIX))


def merge_stacks(settings: MergeSettings, *, watch: Watcher = SILENT) -> MergeReport:
    """Merge stacks into one.

    Projections with equal values are copied; others are refused unless `saved` says how to merge them, since a LoRA
    was trained for the inputs that its own projection makes.

    Raises:
        IncompatibleAdapters: the stacks are of other models or another form, or their projections differ.
        PlanError: an input is not a stack, or an option does not apply to stacks.
    """
    sources = [StackSource.open(path) for path in settings.adapters]
    _check_forms(sources)
    if settings.form == "dense":
        raise PlanError(
            "a merge of stacks is a stack, which --form dense is not: bake the merged stack instead.",
            code="merge.dense-stack",
        )
    plain = settings.model_dump(exclude=marked(settings, Role.LEARNING) | {"adapters", "out", "dry_run", "overwrite"})
    folders = [source.folder / ADAPTER for source in sources]
    # The policy is for the projections: names of stacks are not those of the LoRAs in them, which have no heads.
    plain |= {"saved": "refuse", "allow_base_mismatch": True}
    if settings.dry_run:
        report = merge(folders, out=None, watch=watch, **plain)
        merge_saved(sources, report.weights, settings.saved)
        return report
    out = Path(settings.out)
    check_not_input(out, [source.folder for source in sources])
    with whole_folder(out, overwrite=settings.overwrite) as folder:
        report = merge(folders, out=folder / ADAPTER, watch=watch, **plain)
        projection = merge_saved(sources, report.weights, settings.saved)
        form = sources[0].form
        copy_stack(sources[0].folder, folder, form)
        tensors = {key.removeprefix(_PREFIX): value.contiguous() for key, value in projection.items()}
        write_whole(folder / PROJECTION, to_bytes(tensors))
        document = _document(folder / ADAPTER, sources, settings)
        write_documents(folder, document | {"stack": form.document()}, name=out.name)
    return replace(report, out=out)


def _document(adapter: Path, sources: Sequence[StackSource], settings: MergeSettings) -> dict[str, object]:
    """Return the manifest of the merged stack; that of the merged LoRA, and its card, are removed."""
    merged = dict(manifest.origin_of(adapter).manifest)
    for name in (MANIFEST, ROWS_FILE, "README.md"):
        with suppress(FileNotFoundError):
            (adapter / name).unlink()
    merged.pop("files", None)
    files = manifest.files_of([manifest.origin_of(source.folder) for source in sources], merged)
    plan = settings.model_dump(mode="json", exclude={"out", *marked(settings, Role.HANDLING, Role.LEARNING)})
    return merged | {"artifact": "stack", "plan": plan} | {name: value for name, value in files.items() if value}


def _check_forms(sources: Sequence[StackSource]) -> None:
    first = sources[0]

    def key(source: StackSource) -> dict[str, object]:
        form = source.form
        parts: dict[str, object] = {
            what: part.fingerprint or part.id for what, part in (("encoder", form.encoder), ("model on top", form.base))
        }
        return parts | {"attention": form.attention, "pooling": form.pooling}

    for other in sources[1:]:
        if differing := [name for name, value in key(first).items() if key(other)[name] != value]:
            raise IncompatibleAdapters(
                f"stacks must have the same two models, attention and pooling to be merged, and '{first.name}' and "
                f"'{other.name}' differ in the {' and the '.join(differing)}. Leave one of them out.",
                code="merge.stack-forms",
            )
