"""Train, merge, search and test on a small real model, in stages; a stopped demo continues after its last stage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..adapters import AdapterSource, open_adapter
from ..errors import OutputError
from ..evaluation.answering import Answering
from ..evaluation.retrieval import retrieve_with
from ..evaluation.run import score_answers
from ..evaluation.score import RowStatistics, by_role, paired_difference
from ..io.files import output_lock, partial_path, remove_output, write_whole
from ..merging.on_model import acting
from ..models.base import BaseModel, load_base, model_origins
from ..models.head_forms import Head
from ..options import AlignSettings, DemoSettings, GenerationSettings, RetrieveSettings, SearchSettings, TaskSettings
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks import Metric, Task, get_task
from ..tasks.heads.from_adapters import head_of, template_of
from ..tasks.splits import add_to_record, check_split
from ..training.least_squares import train_align
from ..training.task import train_task
from ..weight_search.prepare import prepare
from ..weight_search.run import search_with
from .base import demo_base
from .kinds import KINDS, DemoKind
from .plan import DemoPlan
from .words import Document, is_task_alone

_KEY = "key.json"
_CLOSED = ("closed-form", "merged-closed-form")
"""Folders of the alignment in closed form and of its merge."""
_STAGES = {_KEY}
_STAGES |= {
    f"{name}.json"
    for name in (
        *("retrieval-before", "align", "closed-form", "retrieval-after", "task", "search", "search-closed-form"),
        *("test-base", "test-task", "test-chosen", "test-closed-form"),
    )
}
"""Names of the files in the folder `stages`."""


def _is_own(out: Path) -> bool:
    """Return whether a folder is empty or a demo's; a folder `stages` is not enough, since other projects have one."""
    if not out.is_dir():
        return False
    names, stages = {path.name for path in out.iterdir()}, out / "stages"
    if not names:
        return True
    if not stages.is_dir() or stages.is_symlink():
        return False
    # a killed demo can leave a hidden file, or data without a key, which is written after the data
    kept = {path.name for path in stages.iterdir() if not path.name.startswith(".")}
    return kept <= _STAGES and (_KEY in kept or names <= {"stages", "data"})


@dataclass(kw_only=True)
class Demo:
    """One demo in one folder.

    Args:
        settings: Its settings.
        watch: Receives progress.
    """

    settings: DemoSettings
    watch: Watcher = field(default=SILENT)

    def __post_init__(self) -> None:
        self.out = Path(self.settings.out)
        if self.out.exists() and not _is_own(self.out):
            raise OutputError(
                f"the demo needs an empty folder, and {self.out} has other content. Choose another --out.",
                code="demo.folder",
            )
        if self.settings.fresh and (self.out / "stages").exists():
            for part in ("align", "task", "merged", *_CLOSED):
                remove_output(self.out / part)
                shutil.rmtree(partial_path(self.out / part), ignore_errors=True)
            for name in _STAGES:
                (self.out / "stages" / name).unlink(missing_ok=True)
        self.stages = self.out / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)

    @property
    def kind(self) -> DemoKind:
        """The kind of demo: its task, its models and its settings."""
        return KINDS[self.settings.task]

    @cached_property
    def plan(self) -> DemoPlan:
        if self.settings.data and self.kind.real_data:
            return self.kind.real_data(Path(self.settings.data))
        return self.kind.own_data(self.out / "data", self.kind.sizes, seed=self.settings.seed)

    @cached_property
    def base_reference(self) -> str:
        return self.settings.base or str(demo_base(self.kind.model, watch=self.watch))

    @property
    def task_form(self) -> Task:
        """The task of this kind of demo."""
        return get_task(self.kind.task)

    @cached_property
    def base(self) -> BaseModel:
        return load_base(self.base_reference, device=self.settings.device, dtype=self.settings.dtype)

    @cached_property
    def head(self) -> Head | None:
        files, chosen = self.plan.dev
        rows, _ = self.task_form.read(files, rows=chosen)
        return head_of(self.task_form, self._adapters("task"), rows)

    @cached_property
    def answering_base(self) -> BaseModel:
        """The base model with the task adapter's head, if it has one, which gives the answers."""
        if self.head is None:
            return self.base
        return load_base(self.base_reference, device=self.settings.device, dtype=self.settings.dtype, head=self.head)

    @property
    def _common(self) -> Document:
        return {"device": self.settings.device, "dtype": self.settings.dtype, "seed": self.settings.seed}

    @cached_property
    def key(self) -> Document:
        """Everything that determines the results; it must equal that of an earlier run in the folder.

        Raises:
            OutputError: the earlier run had other settings.
        """
        key = {"task": self.settings.task, "base": self.base_reference, "data": self.plan.entry(), **self._common}
        path = self.stages / _KEY
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != key:
            raise OutputError(
                f"{self.out} holds a demo of another task, model, data, device, dtype or seed. "
                "Pass --fresh to start again.",
                code="demo.other-settings",
            )
        write_whole(path, json.dumps(key).encode())
        return key

    def stage(self, name: str, work: Callable[[], Document]) -> Document:
        """Run a stage, or read the result of an earlier run with the same data, model and seed."""
        path = self.stages / f"{name}.json"
        key = self.key
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                self.watch.note(f"{name}: done before")
                return dict(kept["result"])
        self.watch.note(f"{name} ...")
        start = time.perf_counter()
        result = work() | {"seconds": time.perf_counter() - start}
        write_whole(path, json.dumps({"key": key, "result": result}, ensure_ascii=False).encode())
        self.watch.note(f"{name}: {result['seconds']:.0f} s")
        return result

    def _adapters(self, *names: str) -> tuple[AdapterSource, ...]:
        return tuple(open_adapter(self.out / name) for name in names)

    def retrieval(self, *adapters: str) -> Document:
        """Measure retrieval per layer, with adapters or without."""
        files, rows = self.plan.retrieval
        settings = RetrieveSettings(base=self.base_reference, data=files, rows=rows, **self._common)
        with acting(self.base, self._adapters(*adapters), heads=False):
            return retrieve_with(self.base, settings, watch=self.watch).document()

    def _training(self, name: str) -> Document:
        remove_output(self.out / name)
        options = {"base": self.base_reference, "out": str(self.out / name), "resume": True}
        return options | dict(self.kind.training) | self._common

    def align(self) -> Document:
        """Train the alignment adapter and return its report."""
        files, rows = self.plan.pairs
        layer = "middle" if self.settings.base else self.kind.align_layer
        settings = AlignSettings(pairs=files, rows=rows, layer=layer, **self._training("align"), **self.kind.align)
        return train_align(settings, watch=self.watch).document()

    @property
    def aligned_layer(self) -> int:
        """Number of blocks up to the states that the alignment adapter was trained on."""
        return int(self._adapters("align")[0].meta.manifest["objective"]["layer"])

    def closed_form(self) -> Document:
        """Compute the alignment adapter in closed form and return its report."""
        out = self.out / _CLOSED[0]
        remove_output(out)
        files, rows = self.plan.pairs
        settings = AlignSettings(
            base=self.base_reference, out=str(out), pairs=files, rows=rows, fit="least-squares", **self._common
        )
        return train_align(settings, watch=self.watch).document()

    def task(self) -> Document:
        """Train the task adapter and return its report."""
        files, rows = self.plan.train
        settings = TaskSettings(
            task=self.kind.task, train=files, rows=rows, **self._training("task"), **self.kind.train
        )
        return train_task(settings, watch=self.watch).document()

    def search(self, align: str = "align", merged: str = "merged") -> Document:
        """Find the weight of an alignment adapter on dev and write the merged adapter."""
        files, rows = self.plan.dev
        settings = SearchSettings(
            adapters=[str(self.out / "task"), str(self.out / align)],
            base=self.base_reference,
            task=self.kind.task,
            dev=files,
            rows=rows,
            out=str(self.out / merged),
            overwrite=True,
            **self.kind.search,
            **self.kind.answering,
            **self._common,
        )
        return search_with(self.answering_base, prepare(settings), settings, watch=self.watch).document()

    def test(self, label: str, *adapters: str) -> Document:
        """Score the test rows, with adapters or without, and record them as test data."""
        files, chosen = self.plan.test
        rows, read = self.task_form.read(files, rows=chosen)
        trained, sources = self._adapters("task", "align"), self._adapters(*adapters)
        roles = {
            "supervised": trained[0].meta.manifest["languages"]["supervised"],
            "aligned": trained[1].meta.manifest["languages"]["aligned"],
        }
        origins = [*map(manifest.origin, sources), *model_origins(self.base_reference)]
        check_split(read, origins, split="test", watch=self.watch)
        base = self.answering_base
        template = template_of(self.task_form, trained, None)
        settings = GenerationSettings(**self.kind.answering, **self._common)
        with acting(base, sources):
            answering = Answering(base, self.task_form, rows, settings, template=template, watch=self.watch)
            answers = answering(f"test {label}")
        result = score_answers(self.task_form, rows, answers, roles, seed=self.settings.seed)
        add_to_record(read, task=self.kind.task, adapter=label, watch=self.watch)
        counts = {
            name: {"rows": list(matches), "clusters": getattr(matches, "clusters", None)}
            for name, matches in result.counts.items()
        }
        members = by_role(list(result.scores), roles["supervised"], roles["aligned"])
        return result.document() | {"counts": counts, "members": members}


def difference(
    metric: Metric, first: Document, second: Document, languages: list[str], seed: int
) -> dict[str, float | int | None]:
    """Return by how much the second test result exceeds the first over some languages, with its paired interval."""
    sides = [
        [RowStatistics(**result["counts"][name]) for name in languages]  # clusters are resampled together
        for result in (first, second)
    ]
    return paired_difference(metric, *sides, seed=seed).document()


def run_demo(settings: DemoSettings, *, watch: Watcher = SILENT) -> Document:
    """Run the demo and return its results; also written as `results.json`, `layers.png` and `weights.png`.

    Raises:
        AdapterMixError: the model or the data are not available, or another process works in the folder.
    """
    with output_lock(Path(settings.out)):
        return _run(settings, watch)


def _run(settings: DemoSettings, watch: Watcher) -> Document:
    from .figures import draw

    demo = Demo(settings=settings, watch=watch)
    watch.note(f"data: {demo.plan.note}")
    before = demo.stage("retrieval-before", demo.retrieval)
    align = demo.stage("align", demo.align)
    after = demo.stage("retrieval-after", lambda: demo.retrieval("align"))
    task = demo.stage("task", demo.task)
    search = demo.stage("search", demo.search)
    closed = _closed_form(demo) if demo.kind.has_closed_form else None
    tests = _tests(demo, search["best"]["weights"], closed)
    results = {
        "task": settings.task,
        "score": demo.kind.score,
        "base": demo.base_reference,
        "data": demo.plan.note,
        "layer": demo.aligned_layer,
        "retrieval": {"before": before, "after": after},
        "train": {"align": align, "task": task},
        "search": search,
        "closed_form": closed,
        "test": tests,
        "difference": _differences(demo, tests),
    }
    parts = (before, align, after, task, search, *(closed or {}).values(), *tests.values())
    results["seconds"] = sum(part["seconds"] for part in parts)
    draw(results, demo.out)
    write_whole(demo.out / "results.json", (json.dumps(results, ensure_ascii=False, indent=1) + "\n").encode())
    return results


def _closed_form(demo: Demo) -> Document:
    return {
        "fit": demo.stage("closed-form", demo.closed_form),
        "search": demo.stage("search-closed-form", lambda: demo.search(*_CLOSED)),
    }


def _tests(demo: Demo, weights: list[float], closed: Document | None) -> Document:
    """Return the test scores of the base (if it answers without a head), the task adapter, and the chosen merges."""
    tests = {}
    if demo.head is None:
        tests["base"] = demo.stage("test-base", lambda: demo.test("base"))
    tests["task only"] = demo.stage("test-task", lambda: demo.test("task only", "task"))
    alone = tests["task only"] | {"seconds": 0.0}  # the stage above scored it
    tests["chosen"] = (
        alone if is_task_alone(weights) else demo.stage("test-chosen", lambda: demo.test("chosen weight", "merged"))
    )
    if closed and not is_task_alone(closed["search"]["best"]["weights"]):
        tests["closed form"] = demo.stage("test-closed-form", lambda: demo.test("closed form", _CLOSED[1]))
    return tests


def _differences(demo: Demo, tests: Document) -> Document:
    """Chosen weight minus task only, on test: all languages, those without task data, and those by role."""
    members = dict(tests["chosen"]["members"])
    members["without task data"] = [*members.get("aligned", ()), *members.get("transfer", ())]
    files, chosen = demo.plan.test
    rows, _ = demo.task_form.read(files, rows=chosen)
    metric = demo.task_form.metrics(rows)[0]
    seed = demo.settings.seed
    result = {
        name: difference(metric, tests["task only"], tests["chosen"], languages, seed)
        for name, languages in members.items()
        if languages
    }
    if "closed form" in tests:
        languages = members["without task data"]
        result["closed form"] = difference(metric, tests["task only"], tests["closed form"], languages, seed)
    return result
