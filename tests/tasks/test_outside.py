"""A task of another package trains, searches and evaluates as our own do, from its entry point alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptermix.tasks import TASKS, get_task
from adaptermix.testing import TaskLaws

from ..cli.test_commands import run

MODULE = """
from dataclasses import dataclass

from adaptermix.tasks import Template
from adaptermix.tasks.labels import LabelledRow, LabelledTask


@dataclass(frozen=True, slots=True, kw_only=True)
class MoodRow(LabelledRow):
    words: str

    @property
    def texts(self):
        return (self.words,)


class Mood(LabelledTask):
    name = "mood"
    row = MoodRow
    columns = {"words": ("words",), "label": ("mood",)}
    templates = {"plain": Template(name="plain", prompt="Words: {words}\\nMood:", lead=" ")}

    def labels(self, rows):
        return ("bad", "good")
"""
DATA = "words,mood\nwie schön,good\nach nein,bad\nsehr gut,good\ngar nicht,bad\n"


@pytest.fixture
def mood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a package with a task."""
    folder = tmp_path / "installed"
    info = folder / "adaptermix_mood-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "adaptermix_mood.py").write_text(MODULE, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adaptermix-mood\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[adaptermix.tasks]\nmood = adaptermix_mood:Mood\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    data = tmp_path / "de.csv"
    data.write_text(DATA, encoding="utf-8")
    yield data
    TASKS.pop("mood", None)
    sys.modules.pop("adaptermix_mood", None)


def test_a_task_of_another_package_works_in_every_command(
    mood: Path, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def done(*arguments: object) -> dict[str, Any]:
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        document: dict[str, Any] = json.loads(out)
        return document

    common = ["--base", causal, "--task", "mood", "--device", "cpu", "--dtype", "float32"]
    for seed in (1, 2):
        done("train-task", *common, "--train", mood, "--out", tmp_path / f"{seed}", "--steps", 1, "--seed", seed)
    found = done(
        "search", tmp_path / "1", tmp_path / "2", *common, "--dev", mood, "--grid", "0.3,0.7", "--out",
        tmp_path / "merged", "--max-new-tokens", 2,
    )  # fmt: skip
    assert [trial["rows"] for trial in found["trials"]] == [4, 4]
    recipe = tmp_path / "recipe.yaml"
    evaluate = {
        "base": str(causal), "adapter": str(tmp_path / "merged"), "task": "mood", "data": [str(mood)],
        "device": "cpu", "dtype": "float32", "max_new_tokens": 2,
    }  # fmt: skip
    recipe.write_text(json.dumps({"version": 1, "steps": [{"evaluate": evaluate}]}), encoding="utf-8")
    (step,) = done("run", recipe)["steps"]
    assert '"task": "mood", "metric": "accuracy"' in json.dumps(step)


def test_an_unknown_task_is_refused_with_all_names(mood: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "evaluate", "--base", "x", "--task", "mod", "--data", mood)
    assert code == 2
    names = "choice, classify, ner-json, nli, pairs, pos, qa, ranking, sft, slots, translate, mood"
    assert f"--task must be one of {names}, got 'mod'" in err


def test_it_is_listed_once_it_is_used_and_keeps_the_laws(mood: Path, tmp_path: Path) -> None:
    assert "mood" in TASKS
    assert "mood" not in list(TASKS)  # other packages are not imported before they are used
    laws = TaskLaws()
    laws.task, laws.data = get_task("mood"), {"de.csv": DATA}
    rows = laws.task.read([str(mood)])[0]
    laws.test_rows_have_texts_a_language_and_an_answer(rows)
    laws.test_every_template_can_be_filled_in(rows)
    laws.test_right_answers_have_the_best_score(rows)
    laws.test_labels_are_the_answers(rows)
