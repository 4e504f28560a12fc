"""One self-contained page on a search: the result, the trials, and pictures of them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..io.markup import as_html
from ..pictures.page import page
from .decision import CONTROL_NAME
from .figures import pictures
from .space import label_of

if TYPE_CHECKING:
    from ..evaluation.score import Score
    from .result import SearchResult

_TITLES = {
    "weights": "Weights and scores",
    "languages": "Score per language, with 95 % intervals",
    "parameters": "All parameters; dark lines scored higher",
    "layers": "Chosen weights over the layers",
    "cost": "Best score against cost",
}


def report_files(result: SearchResult, *, name: str) -> dict[str, bytes]:
    """Return the files of a report: `report.html`, which is self-contained, and the pictures as PNGs."""
    drawn = pictures(result)
    files = {f"{picture}.png": content for picture, content in drawn.items()}
    return {"report.html": _page(result, name, drawn).encode()} | files


def _page(result: SearchResult, name: str, drawn: Mapping[str, bytes]) -> str:
    answered = sum(trial.rows for trial in result.trials)
    rows = len(result.trials) * len(result.baseline.answers)
    seconds = sum(trial.seconds for trial in result.trials)
    parts = [
        f'<p class="verdict">{as_html(_capital(result.sentence()))}</p>',
        f"<p>Chosen on {as_html(result.chosen_on)} ({as_html(result.rule)}, "
        f"{as_html(result.objective)} of {as_html(result.metric)}): <b>"
        f"{as_html(label_of(result.chosen.candidate))}</b>, {_score(result.chosen_score)}. "
        f"Task adapter alone: {_score(result.baseline_score)}.</p>",
        *([f"<p>{as_html(_capital(result.dev.sentence()))}</p>"] if result.dev else []),
        f"<p>{len(result.trials)} trials asked {answered} rows ({answered / max(rows, 1):.0%} of all) in "
        f"{seconds:.0f} s.</p>",
    ]
    for picture, content in drawn.items():
        data = base64.b64encode(content).decode()
        title = as_html(_TITLES[picture])
        parts.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Trials</h2>", f'<div class="wide">{_table(result)}</div>']
    return page(name, parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _score(score: Score) -> str:
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


def _table(result: SearchResult) -> str:
    languages = list(result.baseline_languages)

    def row(name: str, score: Score, scores: Mapping[str, Score], rows: int | str = "", style: str = "") -> str:
        values = [f"{scores[language].value:.3f}" if language in scores else "" for language in languages]
        return f"<tr{style}>{_cells('td', [name, _score(score), rows, *values])}</tr>"

    body = [row("task adapter alone", result.baseline_score, result.baseline_languages)]
    if control := result.verdict.control:
        body.append(row(CONTROL_NAME, control.score, control.languages))
    for trial, score, scores in zip(result.trials, result.scores, result.languages, strict=True):
        style = ' class="chosen"' if trial is result.chosen else ""
        body.append(row(label_of(trial.candidate), score, scores, trial.rows, style))
    head = _cells("th", ["weights", result.objective, "rows", *languages])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cells(tag: str, values: Sequence[object]) -> str:
    return "".join(f"<{tag}>{as_html(value)}</{tag}>" for value in values)
