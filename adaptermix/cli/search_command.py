"""`search`."""

from __future__ import annotations

from ..settings import SearchSettings
from .console import Console
from .options import settings_command


@settings_command(
    SearchSettings,
    name="search",
    text="Example: adaptermix search task align --base MODEL --task slots --dev de.valid.conll nl.valid.conll "
    "--grid 0.5,0.7,0.9 --out merged",
)
def search(settings: SearchSettings, console: Console) -> None:
    """Find the weight of a pair."""
    from ..study import search as work
    from ..study import search_dry

    if settings.dry_run:
        document = search_dry(settings)
        console.say(f"would try {len(settings.grid)} weights on {document['rows']} dev rows and write {settings.out}")
        console.document(document)
        return
    result = work(settings, watch=console.watch)
    languages = list(result.chosen.result.scores)
    rows = [
        [
            f"{trial.weights[0]:g} / {trial.weights[1]:g}" + (" *" if trial is result.chosen else ""),
            f"{trial.value:.3f}",
            f"{trial.result.overall.low:.3f} to {trial.result.overall.high:.3f}",
            *(f"{trial.result.scores[language].value:.3f}" for language in languages),
        ]
        for trial in result.trials
    ]
    console.table(["weights", "mean", "95 % interval", *languages], rows)
    console.say(f"best on dev: {result.chosen.weights[0]:g} (mean {result.chosen.value:.3f}); wrote {result.out}")
    console.document(result.document())
