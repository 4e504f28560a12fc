"""`statistics`: write a file about one adapter, with a tensor per module, for `merge --statistics`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import LINEAR, AdapterSource, open_adapter
from ..adapters.paths import fitted
from ..baking.activations import memory_for_moments, read_same, width_of
from ..errors import DataError, IncompatibleAdapters, ModelError, OutputError, PlanError, did_you_mean
from ..io.checkpoint_files import open_tensors
from ..io.disk import sync
from ..io.files import hidden_path, real_path
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..io.safetensors_writer import Headers, TensorFile, file_size, tensor_file
from ..merging.merge_adapters import check_trained_on
from ..merging.on_model import acting
from ..merging.statistics import KIND, document_of, metadata_of
from ..methods.base import METHODS
from ..models.base import BaseModel, fingerprint_of, load_base, model_kind, require_causal
from ..models.positions import readable
from ..options import StatisticsSettings
from ..options.paths import holds_output
from ..options.roles import NO_PART_OF_RESULT, marked
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks import Task, get_task
from ..tasks.base import remarks
from ..tasks.data import DataFile
from ..tasks.data.report import left_out_warnings
from ..tasks.data.tables import Row
from ..tasks.data.texts import texts_of
from ..tasks.heads.from_adapters import head_of, template_of
from ..tasks.splits import CALIBRATION, refuse_tested
from ..training.task import loss_of_rows
from .passes import Passes, TaskRows, Texts
from .second_moments import second_moments
from .squared_gradients import squared_gradients

_LONGEST = 512


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StatisticsReport(ResultView):
    """The report of `statistics`.

    Args:
        method: The merge method that the statistics are for.
        modules: Shape per module path.
        rows: Number of rows or texts.
        bytes: Size of the file.
        out: The file; None after a dry run.
        notes: Notes for the user.
    """

    method: str
    modules: Mapping[str, tuple[int, int]]
    rows: int
    bytes: int
    out: Path | None
    notes: tuple[str, ...] = ()

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix statistics`."""
        return {
            "method": self.method,
            "modules": {path: list(shape) for path, shape in self.modules.items()},
            "rows": self.rows,
            "bytes": self.bytes,
            "out": None if self.out is None else str(self.out),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A checked request, before the model is loaded; it has rows of a task, or texts."""

    source: AdapterSource
    task: Task | None
    rows: Sequence[Row]
    texts: Sequence[str]
    files: Sequence[DataFile]
    tested: Sequence[Mapping[str, object]]


def _read(settings: StatisticsSettings, watch: Watcher) -> _Request:
    source = open_adapter(Path(settings.adapter))
    odd = sorted(path for path, header in source.modules.items() if header.layout != LINEAR)
    if odd and not settings.modules:
        raise IncompatibleAdapters(
            f"only linear layers have statistics, and '{odd[0]}' of '{source.name}' is of another kind "
            f"({source.modules[odd[0]].layout}). Name the modules to measure: --modules GLOB...",
            code="statistics.not-linear",
        )
    if not settings.allow_base_mismatch:
        check_trained_on([source], fingerprint_of(settings.base), settings.base)
    task = None if settings.task is None else get_task(settings.task, settings.columns)
    rows: Sequence[Row] = []
    texts: Sequence[str] = []
    if task is None:
        texts, files = texts_of(settings.data, rows=settings.rows)
    else:
        rows, files = task.read(settings.data, rows=settings.rows)
        for note in [*left_out_warnings(sum(file.left_out for file in files), len(rows)), *remarks(task, rows)]:
            watch.note(note)
    if not (rows or texts):
        raise DataError(
            f"--data must contain at least one {'row' if task else 'text'}, and is empty.", code="statistics.no-data"
        )
    tested = refuse_tested({CALIBRATION: files}, allowed=settings.allow_tested, watch=watch)
    return _Request(source=source, task=task, rows=rows, texts=texts, files=files, tested=tested)


@holds_output
def statistics(settings: StatisticsSettings, *, watch: Watcher = SILENT) -> StatisticsReport:
    """Measure the statistics of an adapter for fisher or regmean, on the base model with the adapter.

    The file has one float32 tensor per module: for regmean the mean of $z z^T$ over the module's input tokens ([in
    in]), for fisher the mean squared gradient of the log-likelihood of the rows' answers ([out in]). Its header names
    the base model, the adapter and the data; a merge that reads the file copies these to its manifest.

    Raises:
        AdapterMixError: the adapter, the model, a data file or the output is invalid.
    """
    out = Path(settings.out)
    _check_out(out, overwrite=settings.overwrite)
    request = _read(settings, watch)
    head = None if request.task is None else head_of(request.task, [request.source], request.rows, base=settings.base)
    if request.task is not None and head is None:
        require_causal(settings.base, f"without a head for it, task '{request.task.name}'")
    if settings.dry_run:
        model_kind(settings.base)
        shapes = _shapes(settings, {path: (h.out, h.into) for path, h in request.source.modules.items()})
        return _report(settings, request, shapes, None, ())
    base = load_base(settings.base, **settings.load_options(), head=head)
    with acting(base, [request.source], heads=head is not None):
        # An output layer with an adapter is run in full, so the loss functions are created with the adapter attached.
        modules = _modules(base, request.source, settings.modules)
        widths = {path: (_height(module), width_of(module)) for path, module in modules.items()}
        shapes = _shapes(settings, widths)
        metadata = metadata_of(_document(settings, request, base))
        with _whole(out) as path, tensor_file(path, _headers(shapes), metadata) as file:
            notes = _measure(
                base, _passes(settings, request, base, watch), modules, shapes, file, settings=settings, watch=watch
            )
    return _report(settings, request, shapes, out, notes)


def _report(
    settings: StatisticsSettings,
    request: _Request,
    shapes: Mapping[str, tuple[int, int]],
    out: Path | None,
    notes: Sequence[str],
) -> StatisticsReport:
    return StatisticsReport(
        method=settings.method,
        modules=shapes,
        rows=len(request.rows or request.texts),
        bytes=file_size(_headers(shapes)) if out is None else out.stat().st_size,
        out=out,
        notes=tuple(notes),
    )


def _headers(shapes: Mapping[str, tuple[int, int]]) -> Headers:
    return {path: (torch.float32, shape) for path, shape in shapes.items()}


def _shapes(settings: StatisticsSettings, widths: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the shape of the statistics of each module, from its numbers of outputs and inputs."""
    is_square = METHODS[settings.method].statistics == "in in"
    return {path: (into, into) if is_square else (out, into) for path, (out, into) in sorted(widths.items())}


def _height(module: nn.Module) -> int:
    """Return the number of outputs of a linear layer, or of GPT-2's, whose weight is [in out]."""
    return int(getattr(module, "out_features", 0)) or module.get_parameter("weight").shape[1]


def _modules(base: BaseModel, source: AdapterSource, globs: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers to measure, by path: those that the adapter adapts, or those that globs name."""
    every = dict(base.model.named_modules())
    adapted = {path: every[path] for path in fitted(source, every).modules if path in every}
    if not globs:
        return adapted
    linear = {
        path: module
        for path, module in every.items()
        if path in adapted or hasattr(module, "in_features") or type(module).__name__ == "Conv1D"
    }
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in linear):
            raise PlanError(
                f"--modules must match linear layers of the model, and {glob!r} matches none; for example "
                f"{next(iter(adapted or linear))!r} is one.{did_you_mean(glob, linear)}",
                code="statistics.modules",
            )
    return {path: module for path, module in linear.items() if any(fnmatchcase(path, glob) for glob in globs)}


def _passes(settings: StatisticsSettings, request: _Request, base: BaseModel, watch: Watcher) -> Passes:
    if request.task is None:
        return Texts(base=base, texts=list(request.texts))
    template = template_of(request.task, [request.source], settings.template)
    most = readable(base.model, _LONGEST)
    return TaskRows(
        loss=loss_of_rows(base, request.task, request.rows, template=template, max_length=most, watch=watch)
    )


def _measure(
    base: BaseModel,
    passes: Passes,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    file: TensorFile,
    *,
    settings: StatisticsSettings,
    watch: Watcher,
) -> list[str]:
    """Write the statistics of all modules, as many at a time as fit the memory; return notes."""
    measure, firsts = squared_gradients, {path: path for path in modules}
    if METHODS[settings.method].statistics == "in in":
        # Modules with the same input, such as query, key and value, are measured once.
        measure, firsts = second_moments, read_same(base, "a", modules)[0]
    unread = []
    for group in _groups(sorted(set(firsts.values())), shapes, memory_for_moments(base.device)):
        measured = {path: modules[path] for path in group}
        statistics_of = measure(base, passes, measured, size=settings.batch_size, watch=watch)
        for path in (path for path, first in firsts.items() if first in measured):
            tensor = statistics_of.get(firsts[path])
            if tensor is None or not bool(tensor.any()):
                unread.append(path)
                tensor = torch.zeros(shapes[path])
            _check_finite(path, tensor)
            file.write(path, tensor.cpu())
    if len(unread) == len(modules):
        raise ModelError(
            "the model must run the modules to measure on these data, and ran none. Name others: --modules GLOB...",
            code="statistics.module-not-run",
        )
    if not unread:
        return []
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    return [f"'{unread[0]}'{more} processed no row: zeros are written, which have no effect in a merge."]


def _check_finite(path: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"statistics must be finite, and those of '{path}' are not. Compute in a wider dtype: --dtype float32.",
            code="statistics.not-finite",
        )


def _groups(names: Sequence[str], shapes: Mapping[str, tuple[int, int]], free: int) -> Iterator[list[str]]:
    """Yield names whose statistics fit the memory together, at least one at a time."""
    group: list[str] = []
    size = 0
    for name in names:
        byte_count = 4 * math.prod(shapes[name])
        if group and size + byte_count > free:
            yield group
            group, size = [], 0
        group.append(name)
        size += byte_count
    yield group


def _document(settings: StatisticsSettings, request: _Request, base: BaseModel) -> JsonObject:
    source = request.source
    entries = [file.entry() for file in request.files]
    return manifest.manifest(
        KIND,
        plan=settings.model_dump(mode="json", exclude={"out", *marked(settings, *NO_PART_OF_RESULT)}),
        base=base.entry(),
        method=settings.method,
        adapter={"name": source.name, "digest": source.digest},
        rows=len(request.rows or request.texts),
        **{name: listed for name, listed in (("calibration", entries), ("tested", list(request.tested))) if listed},
    )


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written or should not be replaced, before any work is done.

    Raises:
        OutputError: it exists and `overwrite` is not set, or it is not a file of statistics.
    """
    if out.is_dir():
        raise OutputError(f"--out must be a file, and {out} is a folder.", code="output.is-folder")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputError(
            f"{out} exists. Pass --overwrite to replace it, or choose another file.", code="output.file-exists"
        )
    try:
        is_own = out.is_file() and not out.is_symlink() and bool(document_of(open_tensors(out)))
    except ModelError:
        is_own = False
    if not is_own:
        raise OutputError(
            f"--overwrite replaces only files that `statistics` wrote, and {out} is not one. Choose another file.",
            code="statistics.overwrite",
        )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` if the block succeeds and is removed if it fails."""
    path = real_path(out)
    temporary = hidden_path(path, "new")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
