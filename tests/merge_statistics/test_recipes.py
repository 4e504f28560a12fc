"""Statistics as steps of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from adaptermix import run_recipe
from tests.factories import peft_lora
from tests.training.data import write_slots

from ..refusals import refuses

RECIPE = """
version: 1
variables: {{base: null, folder: null}}
steps:
  - statistics: {{adapter: "${{folder}}/one", base: "${{base}}", data: ["${{folder}}/one.txt"], device: cpu,
      out: "${{folder}}/made/one.st"}}
  - statistics: {{adapter: "${{folder}}/two", base: "${{base}}", data: ["${{folder}}/train.en.jsonl"], task: slots,
      device: cpu, out: "${{folder}}/made/two.st"}}
  - merge: {{adapters: ["${{folder}}/one", "${{folder}}/two"], weights: [0.5], method: regmean,
      statistics: ["${{folder}}/made/one.st", "${{folder}}/made/two.st"], out: "${{folder}}/made/merged"}}
  - evaluate: {{base: "${{base}}", adapter: "${{folder}}/made/merged", task: slots, data: ["${{folder}}/{data}"],
      split: test, max_new_tokens: 1, device: cpu}}
"""


def test_a_recipe_measures_and_merges_and_may_not_test_what_it_measured(causal: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        peft_lora(causal, tmp_path / name, seed=seed, r=2, target_modules=["q_proj"])
    write_slots(tmp_path)
    other = Path(write_slots(tmp_path, "test.en.jsonl"))
    other.write_text(other.read_text().replace("go ", "walk to "))
    (tmp_path / "one.txt").write_text("".join(f"line {number}\n" for number in range(30)))
    recipe = tmp_path / "recipe.yaml"
    given = {"base": str(causal), "folder": str(tmp_path)}
    recipe.write_text(RECIPE.format(data="train.en.jsonl"))
    with refuses("recipe.split: calibration data"):
        run_recipe(recipe, given)
    assert not (tmp_path / "made").exists()
    recipe.write_text(RECIPE.format(data="test.en.jsonl"))
    run_recipe(recipe, given)
    manifest = json.loads((tmp_path / "made" / "merged" / "adaptermix.json").read_text())
    assert [entry["name"] for entry in manifest["calibration"]] == ["one.txt", "train.en.jsonl"]
    again = run_recipe(recipe, given, resume=True)
    assert [bool(document.get("skipped")) for document in again] == [True, True, True, False]
