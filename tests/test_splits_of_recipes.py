"""Recipes whose test data another step trains or chooses on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipes import load_recipe, run_recipe
from adaptermix.errors import ConfigError
from adaptermix.tuning import plan, tune

from .refusals import refuses
from .test_splits import as_test, slots

RECIPE = """
version: 1
variables: {{out: unset}}
steps:
  - train-task: {{base: b, task: slots, train: [{train}], dev: [{dev}], out: "${{out}}/task"}}
  - train-align: {{base: b, pairs: [x-en.tsv], dev_pairs: [{dev_pairs}], out: "${{out}}/align"}}
  - search: {{adapters: ["${{out}}/task", "${{out}}/align"], base: b, task: slots, dev: [{searched}], grid: [0.5],
             out: "${{out}}/found"}}
  - evaluate: {{base: b, adapter: "${{out}}/found", task: slots, data: [{data}], split: {middle}}}
  - evaluate: {{base: b, adapter: "${{out}}/found", task: slots, data: [{last}], split: {split}}}
"""


FREE = {name: f"{name}.jsonl" for name in ("train", "dev", "dev_pairs", "searched", "data", "last")}


def recipe(folder: Path, **files: str) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(**{"split": "dev", "middle": "test"} | FREE | files))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("name", "step", "use"),
    [
        ("train", "1 (train-task)", "training data"),
        ("dev", "1 (train-task)", "dev data"),
        ("dev_pairs", "2 (train-align)", "dev data"),
        ("searched", "3 (search)", "dev data"),
        ("last", "5 (evaluate)", "dev data"),
    ],
)
def test_a_recipe_that_uses_its_test_data_for_something_else_is_refused(
    name: str, step: str, use: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = slots(tmp_path, "de.test.jsonl", "rot")
    copied = shutil.copy(data, tmp_path / "copy.de.jsonl")
    path = recipe(tmp_path, data=data, **{name: str(copied)})
    ran: list[Any] = []
    with pytest.raises(ConfigError) as caught:
        run_recipe(path, run=lambda step: ran.append(step) or {})  # type: ignore[func-returns-value]
    # commands are not pairs, so that the file counts as a whole there
    rows = f"{copied} is" if name == "dev_pairs" else f"1 of 1 rows of {copied} are"
    fault = f"{path}: step {step}: {use} must not be test data, and {rows} test data of step 4."
    assert str(caught.value) == f"{fault} Give other data or other rows, or drop split: test in step 4."
    assert ran == []
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "--dry-run"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {fault}")
    yet_to_be_made = recipe(tmp_path, data="made/./de.jsonl", **{name: "de=made/de.jsonl"})
    with refuses(r"recipe.split: made/de\.jsonl is test data of step 4"):
        load_recipe(yet_to_be_made)
    on_the_hub = recipe(tmp_path, data='"hf:me/data:de:test"', **{name: '"hf:me/data:de:test"'})
    with refuses("recipe.split: hf:me/data:de:test is test data of step 4"):
        load_recipe(on_the_hub)
    load_recipe(recipe(tmp_path, data=data))
    if name == "last":
        load_recipe(recipe(tmp_path, data=data, last=str(copied), split="test"))


def test_a_recipe_on_what_was_evaluated_before_is_refused_unless_allowed(tmp_path: Path) -> None:
    data = slots(tmp_path, "de.test.jsonl", "rot")
    as_test(data)
    load_recipe(recipe(tmp_path, data=data))
    with refuses("recipe.split: 3.*search.*were evaluated as test.*allow_tested: true there"):
        load_recipe(recipe(tmp_path, searched=data))
    load_recipe(recipe(tmp_path, searched=data), {"search.allow_tested": True})
    with refuses("recipe.split: 5.*evaluate"):
        load_recipe(recipe(tmp_path, last=data))


def test_settings_are_not_searched_on_test_data(tmp_path: Path) -> None:
    data = slots(tmp_path, "de.jsonl", "rot")
    vary = {"train-align.temperature": [0.1, 0.2]}
    with refuses("tune.test-split: the last step must be on dev data, since its score decides"):
        plan(recipe(tmp_path, split="test", middle="dev"), vary, tmp_path / "out")
    with refuses("tune.test-split: must not look at test data once per candidate.*4.*evaluate"):
        plan(recipe(tmp_path, split="null", data=data, last=data), vary, tmp_path / "out")
    as_test(data)
    ran: list[Any] = []
    with refuses("recipe.split: were evaluated as test"):
        tune(
            recipe(tmp_path, split="null", middle="null", last=data),
            vary,
            out=tmp_path / "out",
            run=lambda step: ran.append(step) or {},  # type: ignore[func-returns-value]
        )
    assert ran == []
