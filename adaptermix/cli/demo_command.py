"""`demo`."""

from __future__ import annotations

from typing import Any

from ..settings import DemoSettings
from .console import Console
from .options import settings_command


@settings_command(
    DemoSettings,
    name="demo",
    text="Example: adaptermix demo --out demo-out. Stopped with Ctrl-C, it goes on where it was.",
)
def demo(settings: DemoSettings, console: Console) -> None:
    """Run the demo."""
    from ..demo.run import run_demo

    results = run_demo(settings, watch=console.watch)
    show(results, settings.out, console)
    console.document(results)


def show(results: dict[str, Any], out: str, console: Console) -> None:
    """Show what came out."""
    console.say(f"\nBase model {results['base']}\nData: {results['data']}")
    _show_training(results, console)
    _show_retrieval(results, console)
    _show_scores(results, console)
    for name, found in results["difference"].items():
        console.say(
            f"  chosen weight minus task only, {name}: {found['value']:+.3f} "
            f"(95 % interval {found['low']:+.3f} to {found['high']:+.3f})"
        )
    console.say(verdict(results))
    console.say(
        f"\n{results['seconds']:.0f} s in all. In {out}: layers.png, weights.png, results.json, align/, task/, merged/"
    )


def verdict(results: dict[str, Any]) -> str:
    """Return in one sentence what the numbers say about merging here."""
    found = results["difference"]["not in task training"]
    weight = results["search"]["best"]["weights"][0]
    if weight == 1.0:
        return "On dev no merge was better than the task adapter alone, so the task adapter alone was chosen."
    if found["low"] > 0:
        return f"Merging at {weight:g} helped languages without task training, beyond noise."
    if found["high"] < 0:
        return f"Merging at {weight:g} hurt languages without task training, beyond noise."
    return (
        f"Merging at {weight:g} made no difference beyond noise for languages without task training: "
        "on this model and data the test rows cannot tell it from the task adapter alone."
    )


def _show_training(results: dict[str, Any], console: Console) -> None:
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


def _show_retrieval(results: dict[str, Any], console: Console) -> None:
    console.say("\nTranslation retrieval on held-out sentences (accuracy, mean of directions)")
    before, after = (results["retrieval"][name]["layers"] for name in ("before", "after"))
    last = len(before) - 1
    shown = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    rows = [
        [name, *(f"{layers[str(number)]['mean']:.3f}" for number in shown)]
        for name, layers in (("base", before), ("with alignment adapter", after))
    ]
    console.table(["layer", *map(str, shown)], rows)


def _show_scores(results: dict[str, Any], console: Console) -> None:
    trials, tests = results["search"]["trials"], results["test"]
    languages = list(tests["chosen"]["scores"])
    best = results["search"]["best"]["weights"]
    console.say("\nSlot F1 on dev (chooses the weight)")
    rows = [
        [
            f"merged {trial['weights'][0]:g}/{trial['weights'][1]:g}" + (" *" if trial["weights"] == best else ""),
            *(f"{trial['scores'][language]['value']:.2f}" for language in languages),
            f"{trial['value']:.3f}",
        ]
        for trial in trials
    ]
    console.table(["", *languages, "mean"], rows)
    console.say("\nSlot F1 on test")
    rows = [
        [
            f"merged {best[0]:g}/{best[1]:g}" if name == "chosen" else name,
            *(f"{document['scores'][language]['value']:.2f}" for language in languages),
            f"{document['groups']['all']:.3f}",
        ]
        for name, document in tests.items()
    ]
    console.table(["", *languages, "mean"], rows)
