"""`merge --method regmean-plus`: merge block by block, each with the inputs from the merged blocks before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ..adapters import AdapterModule, AdapterSource, AdapterState
from ..algebra import LowRank
from ..baking.activations import read_same
from ..errors import DataError, IncompatibleAdapters, UsageError
from ..io.checkpoint_files import Checkpoint, open_tensors
from ..io.files import check_not_input, check_output
from ..io.safetensors_writer import Headers, file_order, stream_tensors, write_tensors
from ..io.temporary import temporary_folder
from ..merge_statistics.passes import Passes, TaskRows, Texts
from ..merge_statistics.second_moments import second_moments
from ..merging.attach import Attachment
from ..merging.execute import merge_module
from ..merging.merge_adapters import make_plan, merge
from ..merging.merge_options import MergeOptions
from ..merging.on_model import acting
from ..merging.output_form import Shape
from ..merging.plan import MergePlan
from ..merging.report import MergeReport
from ..models.base import BaseModel, load_base, note_other_base, require_causal
from ..models.blocks import blocks, first_blocks
from ..models.positions import readable
from ..options import MergeSettings
from ..options.roles import ADAPTER, MODEL, Reads, Role, marked, marks_of
from ..progress import SILENT, Watcher
from ..provenance.manifest import inherit
from ..tasks import Task, get_task
from ..tasks.data import DataFile
from ..tasks.data.tables import Row
from ..tasks.data.texts import texts_of
from ..tasks.heads.from_adapters import head_of, template_of
from ..tasks.splits import CALIBRATION, refuse_tested
from ..training.task import loss_of_rows

_LONGEST = 512
_ROWS_AT_ONCE = 16
_USED = ("train", "texts")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """Texts, or rows of a task, for each adapter."""

    task: Task | None
    rows: Sequence[Sequence[Row]]
    texts: Sequence[Sequence[str]]
    files: Sequence[DataFile]

    @classmethod
    def read(cls, settings: MergeSettings) -> _Data:
        arguments = settings.train or settings.texts
        count = len(settings.adapters)
        if not settings.base:
            raise UsageError(
                f"method '{settings.method}' reads the base model's inputs: add --base MODEL.", code="measured.no-base"
            )
        if bool(settings.train) == bool(settings.texts) or len(arguments) != count:
            raise UsageError(
                f"method '{settings.method}' needs data for each adapter, in their order: pass --texts, or --train "
                f"with --task; each takes one FILE or quoted glob per adapter, {count} here, got {len(arguments)}.",
                code="measured.data",
            )
        if bool(settings.train) != bool(settings.task):
            raise UsageError(
                "--train gives rows of a task and --texts plain texts: pass --task with --train only.",
                code="measured.task",
            )
        if settings.rows and settings.texts:
            raise UsageError(
                "--rows chooses rows of --train: drop it, or cut the text files.", code="option.rows-unused"
            )
        data = [name for name, mark in marks_of(settings, Reads).items() if mark.use not in (ADAPTER, MODEL)]
        if unused := settings.changed([*(name for name in data if name not in _USED), "objective"]):
            option = unused[0].replace("_", "-")
            raise UsageError(
                f"method '{settings.method}' looks at inputs only: drop --{option}.", code="measured.inputs-only"
            )
        task = get_task(settings.task, settings.columns) if settings.task else None
        rows, texts, files = [], [], []
        for name in arguments:
            if task:
                read, used = task.read([name], rows=settings.rows)
                rows.append(read)
            else:
                lines, used = texts_of([name])
                texts.append(lines)
            files += used
            if not (rows or texts)[-1]:
                raise DataError(
                    f"each adapter needs at least one {'row' if task else 'text'}, but {name} is empty.",
                    code="measured.no-data",
                )
        return cls(task=task, rows=rows, texts=texts, files=files)

    def load(self, settings: MergeSettings, sources: Sequence[AdapterSource], watch: Watcher) -> BaseModel:
        """Load the base model, with the head of the adapters for the task."""
        rows = [row for rows in self.rows for row in rows]
        head = head_of(self.task, sources, rows, base=str(settings.base)) if self.task else None
        if self.task and head is None:
            require_causal(str(settings.base), f"without a head for it, task '{self.task.name}'")
        base = load_base(str(settings.base), device=settings.device, head=head)
        note_other_base(base, sources, watch)
        return base

    def passes(self, base: BaseModel, sources: Sequence[AdapterSource], watch: Watcher) -> list[Passes]:
        """Return the forward passes of each adapter's data."""
        if self.task is None:
            return [Texts(base=base, texts=list(texts)) for texts in self.texts]
        task, most = self.task, readable(base.model, _LONGEST)
        template = template_of(task, sources, None)
        return [
            TaskRows(loss=loss_of_rows(base, task, rows, template=template, max_length=most, watch=watch))
            for rows in self.rows
        ]


def merge_block_by_block(settings: MergeSettings, *, watch: Watcher = SILENT) -> MergeReport:
    """Collect statistics of the blocks in their order, then merge with these statistics.

    A dry run does everything but write.

    Raises:
        AdapterMixError: as `merge`; the model or a data file is not valid.
    """
    if not settings.dry_run:
        check_output(Path(settings.out), overwrite=settings.overwrite)
    check_not_input(Path(settings.out), [*settings.adapters, str(settings.base)])
    data = _Data.read(settings)
    merging = settings.model_dump(exclude={"adapters", "statistics", *marked(settings, Role.LEARNING)})
    merging |= {"base": settings.base if settings.form == "dense" else None}
    names = ("weights", "method", "options", "places", "fill", "allow_pickle", "allow_base_mismatch", "seed", "saved")
    planned = {name: merging[name] for name in names}
    plan = make_plan(MergeOptions(adapters=settings.adapters, **planned))
    for source in plan.sources:
        if kinds := replace(source, saved_headers={}).beyond_linear:
            raise IncompatibleAdapters(
                f"inputs are measured of plain LoRAs on linear layers, and '{source.name}' has {', '.join(kinds)}.",
                code="measured.not-lora",
            )
    tested = refuse_tested({CALIBRATION: data.files}, allowed=settings.allow_tested, watch=watch)
    base = data.load(settings, plan.sources, watch)
    modules = [name for name, _ in base.model.named_modules()]
    plan = make_plan(MergeOptions(adapters=settings.adapters, **planned, model_modules=modules))
    with temporary_folder() as folder:
        with acting(base, plan.sources, heads=base.head is not None, saved=settings.saved) as attached:
            attached.set_weights([0.0] * len(plan.sources))  # Only the heads of these act.
            passes = data.passes(base, plan.sources, watch)
            files = _Blocks(base, plan, passes, folder).run(watch)
        entries = [file.entry() for file in data.files]
        inherited = inherit(plan.sources, calibration=entries, tested=tested)
        learned = {name: inherited[name] for name in ("calibration", "tested")}
        # Texts need no head, and without it the module paths are not those of an adapter with a head.
        paths = modules if data.task else []
        learned["measured"] = {"base": base.entry(), "rows": [len(rows) for rows in data.rows or data.texts]}
        return merge(settings.adapters, statistics=files, model_modules=paths, learned=learned, watch=watch, **merging)


@dataclass(slots=True)
class _Blocks:
    """The blocks of a model, merged in their order."""

    base: BaseModel
    plan: MergePlan
    passes: Sequence[Passes]
    folder: Path
    merged: dict[str, LowRank] = field(default_factory=dict)

    def run(self, watch: Watcher) -> list[Path]:
        """Return a file of statistics for each adapter."""
        groups = list(self._groups())
        states = [replace(source, saved_headers={}).read() for source in self.plan.sources]
        files: list[list[Checkpoint]] = [[] for _ in states]
        with watch.track("merge blocks", len(groups) * len(states)) as advance:
            for number, (count, names) in enumerate(groups):
                cut = nullcontext() if count is None else first_blocks(self.base.model, count)
                with cut:
                    for index, state in enumerate(states):
                        path = self.folder / f"{index}-{number}.safetensors"
                        write_tensors(path, self._measured(names, state, self.passes[index]))
                        files[index].append(open_tensors(path))
                        advance(1, names[0])
                plan = replace(self.plan, shape=Shape(), statistics=tuple(parts[-1] for parts in files))
                self.merged |= {name: _factors(merge_module(plan, name)[0]) for name in names}
        return [_joined(parts, self.folder / f"{index}.safetensors") for index, parts in enumerate(files)]

    def _groups(self) -> Iterator[tuple[int | None, list[str]]]:
        """Yield the number of blocks to run and the modules to merge there; None for modules outside the blocks."""
        path, stack = blocks(self.base.model)
        rest = list(self.plan.modules)
        for number in range(len(stack)):
            names = [name for name in rest if name.startswith(f"{path}.{number}.")]
            rest = [name for name in rest if name not in names]
            if names:
                yield number + 1, names
        if rest:
            yield None, rest

    def _measured(self, names: Sequence[str], state: AdapterState, passes: Passes) -> Mapping[str, Tensor]:
        """Return the statistics of modules behind the merged blocks, with one adapter alone on these modules."""
        updates = {name: state.updates[name] for name in names if name in state.updates}
        modules: dict[str, nn.Module] = {name: self.base.model.get_submodule(name) for name in names}
        with Attachment(
            self.base.model, [AdapterState.of_updates(state.meta, {**self.merged, **updates}, state.saved)]
        ):
            firsts = read_same(self.base, "a", modules)[0]
            distinct = {first: modules[first] for first in firsts.values()}
            moments = second_moments(self.base, passes, distinct, size=_ROWS_AT_ONCE)
        return {name: moments[first].cpu() for name, first in firsts.items()}


def _factors(merged: object) -> LowRank:
    if not isinstance(merged, AdapterModule):
        raise TypeError("RegMean keeps the left factors of its updates")
    return merged.update


def _joined(files: Sequence[Checkpoint], path: Path) -> Path:
    """Write the tensors of several files to one, and return its path."""
    homes = {name: file for file in files for name in file.tensors}
    headers: Headers = {name: (home.load(name).dtype, home.tensors[name].shape) for name, home in homes.items()}
    stream_tensors(path, headers, ((name, homes[name].load(name)) for name in file_order(headers)))
    return path
