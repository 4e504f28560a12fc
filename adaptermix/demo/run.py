"""The main job from end to end on a small real model, stage by stage, each kept so that a stopped demo goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters import AdapterSource, open_adapter
from ..compose.attach import Attachment
from ..errors import OutputError
from ..evaluation.answering import Answering
from ..evaluation.retrieval import retrieve_with
from ..evaluation.run import Evaluation, score_answers
from ..evaluation.score import paired_difference
from ..files import output_lock, partial_path, remove_output, write_whole
from ..heads.brought import template_of
from ..models import BaseModel, load_base
from ..progress import SILENT, Watcher
from ..settings import AlignSettings, DemoSettings, GenerationSettings, RetrieveSettings, SearchSettings, TaskSettings
from ..study.preparing import prepare
from ..study.run import search_with
from ..tasks import get_task
from ..train import train_align, train_task
from .base import demo_base
from .plan import DemoPlan, own_data, real_data

GRID = (0.5, 0.7, 0.9, 1.0)  # 1.0 is the task adapter alone, so that no merge can be the answer too
_GENERATION = {"batch_size": 72, "max_new_tokens": 24}
_TRAINING = {"learning_rate": 2e-3, "dropout": 0.0, "schedule": "linear", "checkpoint_every": 5}
_KEY = "key.json"
_STAGES = {_KEY}
_STAGES |= {
    f"{name}.json"
    for name in (
        *("retrieval-before", "align", "retrieval-after", "task", "search"),
        *("test-base", "test-task", "test-chosen"),
    )
}
"""Names of the files in the folder `stages`."""
_ALIGN_STEPS, _TASK_STEPS = 20, 28


def _is_own(out: Path) -> bool:
    """Return whether a folder is empty or of a demo: many projects have a folder `stages` for files of their own."""
    if not out.is_dir():
        return False
    names, stages = {path.name for path in out.iterdir()}, out / "stages"
    if not names:
        return True
    if not stages.is_dir() or stages.is_symlink():
        return False
    # a kill can leave a hidden file, and the key is written after the data
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
                f"the demo needs a folder of its own, and {self.out} holds other things. Choose another --out."
            )
        if self.settings.fresh and (self.out / "stages").exists():
            for part in ("align", "task", "merged"):
                remove_output(self.out / part)
                shutil.rmtree(partial_path(self.out / part), ignore_errors=True)
            for name in _STAGES:
                (self.out / "stages" / name).unlink(missing_ok=True)
        self.stages = self.out / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)

    @cached_property
    def plan(self) -> DemoPlan:
        """The data."""
        return real_data(Path(self.settings.data)) if self.settings.data else own_data(self.out / "data")

    @cached_property
    def base_reference(self) -> str:
        """Folder or id of the base model."""
        return self.settings.base or str(demo_base(watch=self.watch))

    @cached_property
    def base(self) -> BaseModel:
        """The loaded base model, shared by all measurements."""
        return load_base(self.base_reference, device=self.settings.device, dtype=self.settings.dtype)

    @property
    def _placed(self) -> dict[str, Any]:
        return {"device": self.settings.device, "dtype": self.settings.dtype, "seed": self.settings.seed}

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides the results; an earlier run in the folder must have had the same.

        Raises:
            OutputError: it had another.
        """
        key = {"base": self.base_reference, "data": self.plan.entry(), **self._placed}
        path = self.stages / _KEY
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != key:
            raise OutputError(
                f"{self.out} holds a demo of another model, data, device, dtype or seed. Pass --fresh to start again."
            )
        write_whole(path, json.dumps(key).encode())
        return key

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage, or read what an earlier run with the same data, model and seed found."""
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

    def retrieval(self, *adapters: str) -> dict[str, Any]:
        """Measure retrieval per layer, with adapters or without."""
        files, rows = self.plan.retrieval
        settings = RetrieveSettings(base=self.base_reference, data=files, rows=rows, **self._placed)
        with Attachment(self.base.model, [source.read() for source in self._adapters(*adapters)]):
            return retrieve_with(self.base, settings, watch=self.watch).document()

    def _training(self, name: str) -> dict[str, Any]:
        return {"base": self.base_reference, "out": str(self.out / name), "resume": True, **_TRAINING, **self._placed}

    def align(self) -> dict[str, Any]:
        """Train the alignment adapter."""
        remove_output(self.out / "align")
        files, rows = self.plan.pairs
        settings = AlignSettings(pairs=files, rows=rows, steps=_ALIGN_STEPS, batch_size=24, **self._training("align"))
        return train_align(settings, watch=self.watch).document()

    def task(self) -> dict[str, Any]:
        """Train the task adapter."""
        remove_output(self.out / "task")
        files, rows = self.plan.train
        settings = TaskSettings(
            task="slots", train=files, rows=rows, steps=_TASK_STEPS, batch_size=16, **self._training("task")
        )
        return train_task(settings, watch=self.watch).document()

    def search(self) -> dict[str, Any]:
        """Find the weight on dev and write the merged adapter."""
        files, rows = self.plan.dev
        settings = SearchSettings(
            adapters=[str(self.out / "task"), str(self.out / "align")],
            base=self.base_reference,
            task="slots",
            dev=files,
            rows=rows,
            grid=list(GRID),
            out=str(self.out / "merged"),
            overwrite=True,
            **_GENERATION,
            **self._placed,
        )
        return search_with(self.base, prepare(settings), settings, watch=self.watch).document()

    def test(self, label: str, *adapters: str) -> dict[str, Any]:
        """Score the test rows, with adapters or without."""
        task = get_task("slots")
        files, row_range = self.plan.test
        rows, _ = task.read(files, rows=row_range)
        trained = self._adapters("task", "align")
        roles = {
            "supervised": trained[0].meta.manifest["languages"]["supervised"],
            "aligned": trained[1].meta.manifest["languages"]["aligned"],
        }
        settings = GenerationSettings(**_GENERATION, **self._placed)
        with Attachment(self.base.model, [source.read() for source in self._adapters(*adapters)]):
            template = template_of(task, trained, None)
            answering = Answering(self.base, task, rows, settings, template=template, watch=self.watch)
            answers = answering(f"test {label}")
        result: Evaluation = score_answers(task, rows, answers, roles, seed=self.settings.seed)
        counts = {name: list(found) for name, found in result.counts.items()}
        return result.document() | {"counts": counts, "supervised": roles["supervised"]}


def difference(
    first: dict[str, Any], second: dict[str, Any], languages: list[str], seed: int
) -> dict[str, float | int | None]:
    """Return by how much the second test result exceeds the first over some languages, with its paired interval."""
    sides = [[result["counts"][name] for name in languages] for result in (first, second)]
    return paired_difference(get_task("slots").metrics([])[0], *sides, seed=seed).document()


def run_demo(settings: DemoSettings, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Run the demo and return its results; also written as `results.json`, `layers.png` and `weights.png`.

    Raises:
        AdapterMixError: the model or the data cannot be had, or another process works in the folder.
    """
    with output_lock(Path(settings.out)):
        return _run(settings, watch)


def _run(settings: DemoSettings, watch: Watcher) -> dict[str, Any]:
    from .figures import draw

    demo = Demo(settings=settings, watch=watch)
    watch.note(f"data: {demo.plan.note}")
    before = demo.stage("retrieval-before", demo.retrieval)
    align = demo.stage("align", demo.align)
    after = demo.stage("retrieval-after", lambda: demo.retrieval("align"))
    task = demo.stage("task", demo.task)
    search = demo.stage("search", demo.search)
    tests = {
        "base": demo.stage("test-base", lambda: demo.test("base")),
        "task only": demo.stage("test-task", lambda: demo.test("task only", "task")),
    }
    if search["best"]["weights"][0] == 1.0:  # the task adapter alone, which was just scored
        tests["chosen"] = tests["task only"] | {"seconds": 0.0}
    else:
        tests["chosen"] = demo.stage("test-chosen", lambda: demo.test("chosen weight", "merged"))
    results = {
        "base": demo.base_reference,
        "data": demo.plan.note,
        "retrieval": {"before": before, "after": after},
        "train": {"align": align, "task": task},
        "search": search,
        "test": tests,
        "difference": _differences(tests, settings.seed),
        "seconds": sum(part["seconds"] for part in (before, align, after, task, search, *tests.values())),
    }
    draw(results, demo.out)
    write_whole(demo.out / "results.json", (json.dumps(results, ensure_ascii=False, indent=1) + "\n").encode())
    return results


def _differences(tests: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Chosen weight minus task only, on test, over all languages and over those without task training."""
    languages = list(tests["chosen"]["scores"])
    manifest_groups = {"all": languages, "not in task training": _untrained(tests["chosen"])}
    return {
        name: difference(tests["task only"], tests["chosen"], members, seed)
        for name, members in manifest_groups.items()
        if members
    }


def _untrained(result: dict[str, Any]) -> list[str]:
    return [language for language in result["scores"] if language not in result["supervised"]]
