"""Show the results of the demo."""

from __future__ import annotations

from typing import Any

from ..demo.words import TITLES, label_of, merge_name, verdict
from ..options import DemoSettings
from .console import Console

Results = dict[str, Any]
"""The document of the demo."""


def show(results: Results, settings: DemoSettings, console: Console) -> None:
    """Show training, retrieval, scores and the verdict."""
    out = settings.out
    console.say(f"\nBase model: {results['base']}\nData: {results['data']}")
    _show_training(results, console)
    _show_retrieval(results, console)
    _show_scores(results, console)
    console.say(f"\n{verdict(results)}")
    parts = {role: results["difference"][role] for role in TITLES if role in results["difference"]}
    for role, interval in parts.items():
        console.say(f"  {TITLES[role]}: {interval['value']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})")
    if interval := results["difference"].get("closed form"):
        console.say(
            f"  alignment in closed form, {results['closed_form']['fit']['seconds']:.0f} s without training, languages "
            f"without task data: {interval['value']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"
        )
    console.say(
        f"\n{results['seconds']:.0f} s in all. In {out}: align/, task/, merged/ (adapters), layers.png, weights.png, "
        f"results.json, data/\nNext: adaptermix inspect {out}/task {out}/align; adaptermix merge --help; "
        "adaptermix run recipes/quickstart.yaml (this demo as a recipe)"
    )


def _show_training(results: Results, console: Console) -> None:
    console.say("\nTraining")
    rows = [
        [
            name,
            str(part["steps"]),
            f"{part['parameters']:,}",
            f"{part['seconds_per_step']:.2f}",
            f"{part['loss']['first']:.3f}",
            f"{part['loss']['last']:.3f}",
        ]
        for name, part in results["train"].items()
    ]
    console.table(["adapter", "steps", "parameters", "s/step", "first loss", "last loss"], rows)


def _show_retrieval(results: Results, console: Console) -> None:
    console.say("\nTranslation retrieval on held-out sentences (accuracy, mean of directions)")
    before, after = (results["retrieval"][name]["layers"] for name in ("before", "after"))
    last = len(before) - 1
    layers_shown = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    rows = [
        [name, *(f"{layers[str(number)]['mean']:.3f}" for number in layers_shown)]
        for name, layers in (("base", before), ("with alignment adapter", after))
    ]
    console.table(["layer", *map(str, layers_shown)], rows)


def _show_scores(results: Results, console: Console) -> None:
    tests, score, closed = results["test"], results["score"], results["closed_form"]
    members = {role: names for role, names in tests["chosen"]["members"].items() if role in TITLES}

    def row(label: str, scores: Results) -> list[str]:
        cells = [label]
        for names in members.values():
            values = [scores[name]["value"] for name in names]
            cells += [f"{value:.2f}" for value in values]
            cells += [f"{sum(values) / len(values):.3f}"] * (len(names) > 1)
        return cells

    header = [""]
    for role, names in members.items():
        header += [*names, TITLES[role]] if len(names) > 1 else [f"{names[0]} ({TITLES[role]})"]
    console.say(f"\nDev {score}, chooses the weight (*)")
    searches = {"alignment": results["search"]} | ({"closed form": closed["search"]} if closed else {})
    dev = {}
    for alignment, search in searches.items():
        for trial in search["trials"]:
            chosen = " *" if trial["weights"] == search["best"]["weights"] else ""
            dev[merge_name(trial["weights"], alignment=alignment) + chosen] = trial["scores"]
    console.table(header, [row(name, scores) for name, scores in dev.items()])
    console.say(f"\nTest {score}")
    tested = {label_of(name, results): document["scores"] for name, document in tests.items()}
    console.table(header, [row(name, scores) for name, scores in tested.items()])
