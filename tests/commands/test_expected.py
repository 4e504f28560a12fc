"""`expect` puts the figures of a paper beside those of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.cli import main
from adaptermix.commands.expected import figure_of
from adaptermix.commands.recipe_file import Step, read_recipe
from adaptermix.commands.recipes import check_outputs, run_checked
from tests.refusals import refuses
from tests.training.data import write_slots


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(f"version: 1\n{text}")
    return folder / "recipe.yaml"


RECIPE = """
variables: {{out: {out}, seeds: [0, 1]}}
steps:
  - each: {{seed: "${{seeds}}"}}
    steps:
      - name: joint
        evaluate: {{base: b, task: slots, data: [x], seed: "${{seed}}", predictions: "${{out}}/${{seed}}.jsonl"}}
  - name: late
    evaluate: {{base: b, task: slots, data: [x]}}
  - compare: {{systems: ["a b=x"], task: slots, data: [x]}}
  - retrieve: {{base: b, data: [x]}}
expect:
  - title: table of ${{out}}
    unit: percent
    columns: {{all: overall, de: scores.de, avg: [scores.de, scores.fr], other: scores.xx}}
    rows:
      joint: [50, 40.5, null, 1]
      late: [10, null, 30, null]
  - title: systems
    step: compare
    columns: {{all: "systems.${{row}}.groups.all"}}
    rows: {{a b: [0.5]}}
  - title: layers
    step: retrieve
    columns: {{mean: "layers.${{row}}.mean", back: "layers.${{row}}.directions.de-en"}}
    rows: {{8: [0.5, 0.25]}}
"""


def documents(step: Step) -> dict[str, Any]:
    """Documents of the form that commands print."""
    settings: Any = step.settings
    if step.command == "evaluate":
        if settings.predictions:
            Path(settings.predictions).parent.mkdir(exist_ok=True)
            Path(settings.predictions).write_text("{}\n")
        value = 0.5 + settings.seed / 10
        return {
            "overall": {"value": value, "low": 0, "high": 1},
            "scores": {"de": {"value": 0.4}, "fr": {"value": 0.1}},
        }
    if step.command == "compare":
        return {"systems": {"a b": {"groups": {"all": {"value": 0.75}}}}}
    return {"layers": {"8": {"mean": 0.5, "directions": {"de-en": 1}}}}


def cells(found: Any) -> list[list[Any]]:
    return [
        [cell.row, cell.column, cell.theirs, cell.ours, cell.runs] for table in found.expected for cell in table.cells
    ]


def test_figures_are_found_scaled_and_averaged_over_runs(tmp_path: Path) -> None:
    """Two steps of one name are two runs: overall .5 and .6."""
    path = write(tmp_path, RECIPE.format(out=tmp_path / "o"))
    recipe = read_recipe(path)
    found = run_checked(recipe, run=documents)
    expected = [
        ["joint", "all", 50, pytest.approx(55), 2],
        ["joint", "de", 40.5, pytest.approx(40), 2],
        ["joint", "other", 1, None, 0],
        ["late", "all", 10, pytest.approx(50), 1],
        ["late", "avg", 30, pytest.approx(25), 1],
        ["a b", "all", 0.5, 0.75, 1],
        ["8", "mean", 0.5, 0.5, 1],
        ["8", "back", 0.25, 1.0, 1],
    ]
    assert cells(found) == expected
    assert found.expected[0].title == f"table of {tmp_path / 'o'}"
    assert found.expected[0].table()[1][:3] == [
        ["joint", "all", "50.0", "55.0", "+5.0", "2"],
        ["joint", "de", "40.5", "40.0", "-0.5", "2"],
        ["joint", "other", "1.0", "no such figure", "", ""],
    ]
    written = json.loads((tmp_path / "o" / "expected.json").read_text())
    assert written == {"expected": [table.document() for table in found.expected]}
    assert written["expected"][0]["cells"][1]["difference"] == pytest.approx(-0.5)
    assert "| joint | all | 50.0 | 55.0 | +5.0 | 2 |" in (tmp_path / "o" / "expected.md").read_text().splitlines()
    # outputs that --resume takes keep their figures, and without a record of them a figure was not run
    assert cells(run_checked(recipe, run=documents, resume=True)) == expected
    for record in (tmp_path / "o").glob(".*step*"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "document": None}))
    again = run_checked(recipe, run=documents, resume=True)
    assert cells(again)[:2] == [["joint", "all", 50, None, 0], ["joint", "de", 40.5, None, 0]]
    assert again.expected[0].table()[1][0] == ["joint", "all", "50.0", "not run", "", ""]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("joint: [50", "jiont: [50", "table 1: a row must name a step, and no step is named 'jiont'. Did you mean"),
        ("step: compare", "step: evaluate", "no step is named 'evaluate'"),
        ("null, 1]", "null]", "table 1: rows: 'joint' must have a figure for each of the 4 columns, found 3"),
        ("unit: percent", "unit: per cent", "table 1: unit:"),
        ("title: systems", "tilte: systems", "table 2: unknown key 'tilte'. Did you mean 'title'?"),
        ("[0.5]", "[much]", "table 2: rows.a b.0: "),
        ("[0.5]", "[.nan]", "table 2: rows.a b.0: "),
        ("title: layers", "title: ${nowhere}", "unknown variable ${nowhere}"),
        ("{mean: ", "{}  # ", "table 3: columns: "),
    ],
)
def test_faults_of_a_table_are_listed_before_the_first_step(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = RECIPE.format(out=tmp_path / "o")
    assert old in text
    with refuses("recipe.invalid") as caught:
        read_recipe(write(tmp_path, text.replace(old, new, 1)))
    assert words in str(caught.value)


def test_expect_that_is_not_a_list_of_tables_is_refused(tmp_path: Path) -> None:
    steps = "steps: [push: {folder: a, repo: me/x}]\n"
    for text in ("expect: {title: x}\n", "expect: [3]\n"):
        with refuses("recipe.invalid: expect.* must be a"):
            read_recipe(write(tmp_path, steps + text))


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, RECIPE.format(out=tmp_path / "o")))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "expected.md").write_text("my own notes")
    with refuses("expect.other-file"):
        check_outputs(recipe)
    assert (tmp_path / "o" / "expected.md").read_text() == "my own notes"


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("a", 0.5),
        ("b", None),
        ("b.c", 2.0),
        ("b.c.d", 3.0),
        ("b.x", None),
        ("flag", None),
        ("text", None),
        ("model.layers.0.q.ratio", 4.0),
        ("", None),
        ("a.value", 0.5),
    ],
)
def test_a_figure_is_found_by_its_key(key: str, figure: float | None) -> None:
    document = {
        "a": {"value": 0.5, "low": 0.1},
        "b": {"c": 2, "c.d": {"value": 3}},
        "flag": True,
        "text": "1",
        "model.layers.0.q": {"ratio": 4.0},
    }
    assert figure_of(document, key) == figure


def test_a_run_prints_the_figures_of_its_own_steps(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, pairs = write_slots(tmp_path), tmp_path / "de-en.tsv"
    pairs.write_text("".join(f"{word}\t{word}\n" for word in ("one", "two", "three")))
    out = tmp_path / "o"
    path = write(
        tmp_path,
        f"""
variables: {{out: {out}}}
steps:
  - name: base
    evaluate: {{base: {causal}, task: slots, data: [{rows}], max_new_tokens: 2, predictions: "${{out}}/a.jsonl"}}
  - compare: {{systems: ["tiny=${{out}}/a.jsonl"], task: slots, data: [{rows}]}}
  - retrieve: {{base: {causal}, data: [{pairs}]}}
expect:
  - {{title: one, unit: percent, columns: {{en: scores.en}}, rows: {{base: [12.5]}}}}
  - {{title: two, step: compare, columns: {{all: "systems.${{row}}.groups.all"}}, rows: {{tiny: [0.5]}}}}
  - {{title: three, step: retrieve, columns: {{mean: "layers.${{row}}.mean"}}, rows: {{2: [0.5]}}}}
""",
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "--json"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    evaluated, compared, retrieved = document["steps"]
    ours = [table["cells"][0]["ours"] for table in document["expect"]]
    score = evaluated["scores"]["en"]["value"]
    all_languages = compared["systems"]["tiny"]["groups"]["all"]["value"]
    assert ours == [pytest.approx(100 * score), all_languages, retrieved["layers"]["2"]["mean"]]
    assert retrieved["layers"]["2"]["mean"] > 0
    assert "== one (percent)" in said.err
