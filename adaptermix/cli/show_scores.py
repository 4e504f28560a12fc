"""Show scores, comparisons and retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..evaluation import Comparison, Evaluation, Prediction, Retrieval, Systems
    from ..evaluation.score import Score
    from ..options import CompareSettings, EvaluateSettings, PredictSettings, RetrieveSettings


def show_evaluation(result: Evaluation, settings: EvaluateSettings, console: Console) -> None:
    """Show one row per language and one per group."""
    titles = ["language", result.metric, "95 % interval", *result.others, "rows"]
    rows = []
    for language, score in result.scores.items():
        others = [f"{scores[language].value:.3f}" if language in scores else "-" for scores in result.others.values()]
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
    groups = ", ".join(
        f"{role} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
        for role, score in result.group_scores.items()
        if role != "all"
    )
    if groups:
        console.say(f"  means: {groups}")
    if result.against:
        _show_against(result.against, console)
    _say_without_split(settings.split, console)


def _show_against(result: Comparison, console: Console) -> None:
    """Show by how much the first system is better, per language."""
    rows = [
        [language, f"{score.value:+.3f}", f"{score.low:+.3f} to {score.high:+.3f}"]
        for language, score in [*result.languages.items(), ("mean", result.overall)]
    ]
    console.table(["language", f"less '{result.name}'", "95 % interval"], rows)


def _say_without_split(split: str | None, console: Console) -> None:
    if split is None:
        console.say("  note: rows are recorded only with --split; --split test keeps these rows out of later training.")


def show_prediction(result: Prediction, _settings: PredictSettings, console: Console) -> None:
    """Show a row per text and a column per system."""
    rows = [[text, *answers] for text, *answers in zip(result.texts, *result.answers.values(), strict=True)]
    console.table(["text", *result.answers], rows)


def show_comparison(result: Systems, settings: CompareSettings, console: Console) -> None:
    """Show the tables of several systems."""
    for table in result.tables():
        console.table(*table)
    if result.baseline:
        console.say(
            "  p: two-sided, corrected for the number of systems (Holm); *: a language that differs from "
            f"'{result.baseline}' at 5 %, corrected for systems times languages; ±: standard deviation over runs"
        )
    for note in result.notes:
        console.note(note, "  ")
    for path in filter(None, (settings.markdown, settings.document)):
        console.say(f"wrote {path}")


def show_retrieval(result: Retrieval, settings: RetrieveSettings, console: Console) -> None:
    """Show the accuracy per layer."""
    systems = [result, *([result.base] if result.base else [])]
    titles = ["layer", "accuracy", "95 % interval", "base", "95 % interval"]
    console.table(
        titles[: 1 + 2 * len(systems)],
        [
            [str(n), *(cell for system in systems for cell in _cells(system.score([n])))]
            for n in range(len(result.layers))
        ],
    )
    headlines = ", base ".join(f"{system.headline():.3f}" for system in systems)
    console.say(f"  mean of even layers: {headlines} over {len(result.n)} directions")
    if above := result.above_base():
        console.say(f"  above the base: {above.value:+.3f} ({above.low:+.3f} to {above.high:+.3f}), paired by sentence")
    for system, ours in zip(systems, ("", "base "), strict=False):
        for group, score in system.group_scores().items():
            console.say(f"  {ours}group {group}: {score.value:.3f} ({score.low:.3f} to {score.high:.3f})")
    if result.correlation:
        correlation = result.correlation
        console.say(
            f"  correlation with transfer over {len(correlation.languages)} languages: Pearson "
            f"{correlation.pearson:.2f} (p {correlation.p:.3f}), Spearman {correlation.spearman:.2f}"
        )
    if settings.plot:
        console.say(f"wrote {settings.plot}")
    _say_without_split(settings.split, console)


def _cells(score: Score) -> tuple[str, str]:
    return f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}"
