"""The dev score of a task before and after baking."""

from __future__ import annotations

from pathlib import Path

from ..evaluation import evaluate
from ..io.json_types import JsonObject
from ..io.temporary import temporary_folder
from ..merging.merge_adapters import merge
from ..options import EvaluateSettings
from ..progress import Watcher
from ..tasks import get_task, metrics_of
from ..tasks.heads.from_adapters import template_of
from ..tasks.splits import DEV, refuse_tested
from .plan import BakePlan


def check_task(plan: BakePlan, watch: Watcher) -> None:
    """Refuse an invalid task or dev data before any slow work.

    Args:
        plan: The bake.
        watch: Receives notes about unreadable records of test data.

    Raises:
        AdapterMixError: there is no such task, or the data are invalid or are test data.
    """
    settings = plan.settings
    task = get_task(settings.task or "", settings.columns)
    rows, files = task.read(settings.dev, rows=settings.rows)
    metrics_of(task, rows, metric=settings.metric, scorer=settings.scorer)
    refuse_tested({DEV: files}, allowed=settings.allow_tested, watch=watch)


def scores(plan: BakePlan, baked: Path, lora: Path | None, watch: Watcher) -> dict[str, float]:
    """Return the dev scores (means over languages) of the unmerged adapters and of the result.

    Args:
        plan: The bake.
        baked: Folder of the result.
        lora: Folder of a LoRA to load with it, if there is one.
        watch: Receives progress.

    Raises:
        AdapterMixError: the task, its data or a model is invalid.
    """
    settings = plan.settings
    task = get_task(settings.task or "", settings.columns)
    common: JsonObject = {
        "task": task.name,
        "data": settings.dev,
        "rows": settings.rows,
        "metric": settings.metric,
        "scorer": settings.scorer,
        "split": None if settings.allow_tested else "dev",
        "max_new_tokens": settings.max_new_tokens,
        "device": settings.device,
        "seed": settings.seed,
        "template": template_of(task, plan.merge.sources, None),
    }
    with temporary_folder() as folder:
        adapter = settings.adapter[0]
        if len(settings.adapter) > 1:
            adapter = str(folder / "sum")
            weights = [1.0] * len(settings.adapter)
            merge(settings.adapter, weights=weights, base=settings.base, out=adapter, allow_base_mismatch=True)
        quantize = "none" if plan.is_quantized_base or plan.strategy == "merge-16" else settings.quantize
        dtype = "auto" if quantize == "none" else plan.pass_dtype()
        unmerged = EvaluateSettings(base=settings.base, adapter=adapter, quantize=quantize, dtype=dtype, **common)
        result = EvaluateSettings(base=str(baked), adapter=None if lora is None else str(lora), **common)
        return {
            "unmerged": evaluate(unmerged, watch=watch).overall.value,
            "baked": evaluate(result, watch=watch).overall.value,
        }
