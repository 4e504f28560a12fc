"""Recipes are checked whole, and the shipped ones are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.errors import ConfigError
from adaptermix.recipes import load_recipe, run_recipe
from tests.factories import write_lora

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
PATH = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_say_what_they_are(path: Path) -> None:
    assert load_recipe(path)
    head = path.read_text(encoding="utf-8").split("version:")[0]
    for word in ("# Needs:", "# Run:   adaptermix run recipes/"):
        assert word in head


def test_the_paper_recipe_has_the_settings_of_the_paper() -> None:
    steps = load_recipe(next(path for path in RECIPES if path.name == "mid_align_massive_llama3.yaml"))
    assert [step.command for step in steps[:4]] == ["train-task", "train-align", "train-joint", "search"]
    for step in steps[:3]:
        values = step.settings.model_dump()
        expected = {
            "rank": 8,
            "alpha": 16,
            "dropout": 0.1,
            "learning_rate": 5e-4,
            "schedule": "inverse_sqrt",
            "seed": 1,
        }
        assert {key: values[key] for key in expected} == expected
        assert values["batch_size"] * values["accumulate"] == 128
    assert [step.settings.model_dump()["temperature"] for step in steps[1:3]] == [0.1, 0.1]
    joint = steps[2].settings.model_dump()
    assert {key: joint[key] for key in ("alternate", "discard", "layer", "patience", "evaluate_every")} == {
        "alternate": "batch",
        "discard": True,
        "layer": 16,
        "patience": 5,
        "evaluate_every": 200,
    }
    assert steps[3].settings.model_dump()["grid"] == [0.5, 0.7, 0.9]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_all_faults_are_listed_at_once_with_suggestions(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "version: 2\nstpes: 1\nvariables: {a: 1}\nsteps:\n"
        "  - merge: {adapters: [x], weigths: [1], out: y}\n  - mrege: {}\n  - search: 3\n"
        "  - push: {folder: '${b}', repo: r}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, {"c": 1})
    message = str(caught.value)
    assert "\n" not in message
    for piece in (
        "version must be 1, found 2",
        "unknown key 'stpes'. Did you mean 'steps'?",
        "unknown key 'weigths'. Did you mean 'weights'?",
        "weights: Field required",
        "unknown command 'mrege'. Did you mean 'merge'?",
        "step 3 (search): settings must be a mapping",
        "unknown variable ${b}",
        "override 'c' meets no variable",
    ):
        assert piece in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "must be YAML"), ("- 1", "must be a mapping"), ("version: 1\nsteps: []", "at least one command")],
)
def test_what_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_recipe_runs_with_overrides_of_variables_and_settings(tmp_path: Path) -> None:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (8, 6, 2)}, alpha=4, seed=seed)
    path = write(
        tmp_path,
        "version: 1\nvariables: {folder: nowhere, w: 0.5}\nsteps:\n"
        "  - merge: {adapters: ['${folder}/task', '${folder}/align'], weights: ['${w}'], out: '${folder}/merged'}\n"
        "  - push: {folder: '${folder}/merged', repo: me/merged, dry_run: true}\n",
    )
    documents = run_recipe(path, {"folder": str(tmp_path), "w": 0.9, "merge.rank": 1, "merge.max_residual": 1.0})
    assert [document["command"] for document in documents] == ["merge", "push"]
    assert documents[0]["weights"] == [0.9, 0.1]
    assert documents[0]["modules"][PATH]["rank"] == 1
