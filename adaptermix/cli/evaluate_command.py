"""`evaluate` and `retrieve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..settings import EvaluateSettings, RetrieveSettings
from .console import Console
from .options import settings_command

if TYPE_CHECKING:
    from ..evaluation import Evaluation


def show_scores(result: Evaluation, console: Console) -> None:
    """Show one row per language and one per group."""
    titles = ["language", result.metric, "95 % interval", *result.others, "rows"]
    rows = []
    for language, score in result.scores.items():
        others = [f"{found[language].value:.3f}" if language in found else "-" for found in result.others.values()]
        interval = f"{score.low:.3f} to {score.high:.3f}"
        rows.append([language, f"{score.value:.3f}", interval, *others, str(score.n)])
    overall = result.overall
    rows.append(
        [
            "mean",
            f"{overall.value:.3f}",
            f"{overall.low:.3f} to {overall.high:.3f}",
            *["" for _ in result.others],
            str(overall.n),
        ]
    )
    console.table(titles, rows)
    groups = ", ".join(f"{role} {value:.3f}" for role, value in result.groups.items() if role != "all")
    console.say(f"  means: {groups}")


@settings_command(
    EvaluateSettings,
    name="evaluate",
    text="Example: adaptermix evaluate --base MODEL --adapter task --task slots --data de.test.conll nl.test.conll",
)
def evaluate(settings: EvaluateSettings, console: Console) -> None:
    """Evaluate on a task."""
    from ..evaluation import evaluate as work
    from ..files import write_whole

    if settings.predictions and not Path(settings.predictions).absolute().parent.is_dir():
        raise OutputError(f"--predictions must lie in a folder that exists, and {settings.predictions} does not.")
    result = work(settings, watch=console.watch)
    if settings.predictions:
        lines = [json.dumps({"answer": answer}, ensure_ascii=False) + "\n" for answer in result.answers]
        write_whole(Path(settings.predictions), "".join(lines).encode())
    show_scores(result, console)
    console.document(result.document())


@settings_command(
    RetrieveSettings,
    name="retrieve",
    text="Example: adaptermix retrieve --base MODEL --adapter align --data deu-eng.tsv --rows 500:",
)
def retrieve(settings: RetrieveSettings, console: Console) -> None:
    """Measure retrieval."""
    from ..evaluation import retrieve as work

    result = work(settings, watch=console.watch)
    console.table(
        ["layer", "accuracy"], [[str(layer), f"{result.mean(layer):.3f}"] for layer in range(len(result.layers))]
    )
    console.say(f"  mean of even layers: {result.headline():.3f} over {len(result.n)} directions")
    console.document(result.document())
