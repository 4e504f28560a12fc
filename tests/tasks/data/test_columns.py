"""Data whose columns have other names than the fields of the task."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from adaptermix import EvaluateSettings, evaluate
from adaptermix.commands.recipe_checks import check_data
from adaptermix.commands.recipe_file import read_recipe
from adaptermix.errors import ConfigError
from adaptermix.tasks import get_task
from tests.cli.test_commands import run
from tests.refusals import refuses

ROWS = [("wake me", "alarm", "en"), ("weck mich", "alarm", "de"), ("es regnet, oder", "weather", "de")]
COLUMNS = {"text": "said", "label": "what", "language": "tongue"}
NAMES = list(COLUMNS.values())


def as_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"id": 7, **dict(zip(NAMES, row, strict=True))}) for row in ROWS), "utf-8")
    return path


def as_gzip(path: Path) -> Path:
    text = "\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def as_tsv(path: Path) -> Path:
    path.write_text("\n".join("\t".join(("7", *row)) for row in (NAMES, *ROWS)), encoding="utf-8")
    return path


def as_csv(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([NAMES, *ROWS])
    return path


def as_parquet(path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list([dict(zip(NAMES, row, strict=True)) for row in ROWS]).to_parquet(path)
    return path


FORMS = {"x.jsonl": as_jsonl, "x.jsonl.gz": as_gzip, "x.tsv": as_tsv, "x.csv": as_csv, "x.parquet": as_parquet}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_read_by_the_names_of_their_columns(name: str, tmp_path: Path) -> None:
    path = FORMS[name](tmp_path / name)
    rows, files = get_task("classify", COLUMNS).read([str(path)])
    assert [(row.text, row.label, row.language) for row in rows] == ROWS
    assert files[0].entry()["rows"] == len(ROWS)
    picked, _ = get_task("classify", COLUMNS).read([str(path)], rows="1:2")
    assert [row.text for row in picked] == ["weck mich"]


def test_the_task_itself_stays_as_it_is() -> None:
    assert get_task("classify", COLUMNS) is not get_task("classify")
    assert get_task("classify").named_columns == {}  # type: ignore[attr-defined]


def test_a_language_before_the_file_counts_more_than_a_column(tmp_path: Path) -> None:
    rows, _ = get_task("classify", COLUMNS).read([f"nl={as_tsv(tmp_path / 'x.tsv')}"])
    assert {row.language for row in rows} == {"nl"}


@pytest.mark.parametrize("name", FORMS)
def test_a_column_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    path = FORMS[name](tmp_path / name)
    with pytest.raises(Exception, match=r"'uttered' is missing; its columns are .*said, what, tongue"):
        get_task("classify", {**COLUMNS, "text": "uttered"}).read([str(path)])


def test_other_tasks_take_them_too(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "rot", "b": "blau", "c": "neutral", "l": "de"}))
    (row,) = get_task("nli", {"premise": "a", "hypothesis": "b", "label": "c", "language": "l"}).read([str(path)])[0]
    assert (row.premise, row.hypothesis, row.label, row.language) == ("rot", "blau", "neutral", "de")
    path = tmp_path / "de-en.tsv"
    path.write_text("id\tus\tthem\n1\tbye\ttschau\n", encoding="utf-8")
    (pair,) = get_task("translate", {"source": "them", "target": "us"}).read([str(path)])[0]
    assert (pair.source, pair.target) == ("tschau", "bye")


def test_the_command_line_recipes_and_python_take_one_form(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ",".join(f"{field}={column}" for field, column in COLUMNS.items())
    data = as_csv(tmp_path / "x.csv")
    common = ["--base", causal, "--task", "classify", "--data", data, "--device", "cpu", "--dtype", "float32"]
    code, out, _ = run(capsys, "evaluate", *common, "--columns", text, "--max-new-tokens", "2", "--json")
    scores = json.loads(out)["scores"]
    assert (code, {name: score["n"] for name, score in scores.items()}) == (0, {"de": 2, "en": 1})
    for columns in (COLUMNS, text, text.split(",")):
        settings = EvaluateSettings(base=causal, task="classify", data=data, columns=columns)
        assert settings.columns == COLUMNS
    found = evaluate(
        base=causal, task="classify", data=data, columns=COLUMNS, max_new_tokens=2, device="cpu", dtype="float32"
    )
    assert found.document()["scores"] == scores


@pytest.mark.parametrize("columns", ["text", "text=", "=utt", "text=a,text=b"])
def test_other_forms_are_refused(columns: str) -> None:
    with refuses("option.columns"):
        EvaluateSettings(base="b", task="classify", data="x", columns=columns)


def test_a_dry_run_of_a_recipe_reads_the_columns(tmp_path: Path) -> None:
    data = as_csv(tmp_path / "x.csv")
    columns = "{{text: {1}, label: what, language: tongue}}"
    step = f"train-task: {{{{base: m, task: classify, train: {{0}}, out: x, columns: {columns}}}}}"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nsteps:\n- " + step.format(data, "said"))
    check_data(recipe, read_recipe(recipe).steps)
    recipe.write_text("version: 1\nsteps:\n- " + step.format(data, "uttered"))
    with pytest.raises(ConfigError, match="'uttered' is missing"):
        check_data(recipe, read_recipe(recipe).steps)
