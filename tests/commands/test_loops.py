"""`each` repeats steps for values of variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.commands.loops import MOST_STEPS
from adaptermix.commands.recipe_checks import check_places
from adaptermix.commands.recipe_file import Step
from adaptermix.commands.recipes import load_recipe, run_recipe
from adaptermix.errors import ConfigError, ModelError
from adaptermix.tuning import tune
from tests.factories import write_lora
from tests.refusals import refuses

PATH = "model.layers.0.self_attn.q_proj"


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(f"version: 1\n{text}")
    return folder / "recipe.yaml"


def values(path: Path, *names: str, **overrides: object) -> list[list[object]]:
    """The values of some settings of each step."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return [[getattr(step.settings, name) for name in names] for step in load_recipe(path, dotted)]


ALIGN = 'train-align: {base: b, pairs: [x-en.tsv], layer: "${layer}", seed: "${seed}", out: "o/${layer}-${seed}"}'
GRID = f"""
variables: {{seeds: [0, 1]}}
steps:
  - each: {{layer: [8, middle], seed: "${{seeds}}"}}
    steps:
      - {ALIGN}
"""


def test_every_combination_is_a_step_and_the_last_variable_changes_fastest(tmp_path: Path) -> None:
    path = write(tmp_path, GRID)
    found = values(path, "layer", "seed", "out")
    assert found == [[8, 0, "o/8-0"], [8, 1, "o/8-1"], ["middle", 0, "o/middle-0"], ["middle", 1, "o/middle-1"]]
    assert [step.title for step in load_recipe(path)][1] == "train-align, layer 8, seed 1"
    assert values(path, "layer", "seed", seeds=[5]) == [[8, 5], ["middle", 5]]
    assert [step.settings.rank for step in load_recipe(path, {"train-align.rank": 3})] == [3] * 4  # type: ignore[attr-defined]


def test_loops_nest_and_are_in_any_place_among_the_steps(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
steps:
  - push: {folder: a, repo: me/first}
  - each: {x: [1, 2]}
    steps:
      - push: {folder: "a-${x}", repo: me/outer}
      - each: {y: [b, c]}
        steps:
          - push: {folder: "a-${x}-${y}", repo: me/inner}
  - push: {folder: a, repo: me/last}
""",
    )
    folders = ["a", "a-1", "a-1-b", "a-1-c", "a-2", "a-2-b", "a-2-c", "a"]
    assert [found for [found] in values(path, "folder")] == folders
    assert [step.written for step in load_recipe(path)][:4] == [(1,), (2, 1), (2, 2, 1), (2, 2, 1)]
    assert dict(load_recipe(path)[3].loop) == {"x": 1, "y": "c"}


@pytest.mark.parametrize(
    "each", ["${arms}", "[{arm: low, files: [a-en.tsv, b-en.tsv]}, {arm: high, files: [c-en.tsv]}]"]
)
def test_a_list_of_mappings_gives_values_that_belong_together(each: str, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
variables:
  arms: [{{arm: low, files: [a-en.tsv, b-en.tsv]}}, {{arm: high, files: ["c-en.tsv"]}}]
  common: &common {{base: b, out: "o/${{arm}}"}}
  where: o/${{arm}}
steps:
  - each: {each}
    steps:
      - train-align: {{<<: *common, pairs: "${{files}}"}}
      - push: {{folder: "${{where}}", repo: me/x}}
""",
    )
    steps = load_recipe(path)
    assert [step.settings.model_dump().get("pairs") for step in steps] == [
        ["a-en.tsv", "b-en.tsv"],
        None,
        ["c-en.tsv"],
        None,
    ]
    assert [step.settings.folder for step in steps[1::2]] == ["o/low", "o/high"]  # type: ignore[attr-defined]


LOOP = "steps:\n  - each: {}\n    steps:\n      - push: {{folder: 'a-${{x}}', repo: me/x}}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOOP.format("{}"), "step 1: each must be a mapping such as"),
        (LOOP.format("[1, 2]"), "step 1: each must be a mapping such as"),
        (LOOP.format("[{}]"), "step 1: each must be a mapping such as"),
        (LOOP.format("{x: 3}"), "each: x must be a list of at least one value, found 3"),
        (LOOP.format("{x: []}"), "each: x must be a list of at least one value"),
        (LOOP.format("{'a b': [1]}"), "each: a variable must be named with letters, digits and _, found 'a b'"),
        (LOOP.format("{y: [1]}"), "unknown variable ${x}. Known: y"),
        (LOOP.format("{x: ['${z}']}"), "unknown variable ${z}"),
        ("variables: {x: 1}\n" + LOOP.format("{x: [1]}"), "'x' is a variable already"),
        ("steps:\n  - each: {x: [1]}\n", "step 1: a loop must have 'each' and a list 'steps'"),
        ("steps:\n  - each: {x: [1]}\n    steps: []\n", "step 1: a loop must have 'each' and a list 'steps'"),
        (LOOP.format("{x: [1]}") + "    name: n\n", "found each, steps, name"),
        (LOOP.format("{x: [1]}") + "  - push: {folder: '${x}', repo: me/x}\n", "step 2: ${x} has a value only in"),
        (
            "variables: {v: 'a-${x}'}\n" + LOOP.format("{x: [1]}") + "  - push: {folder: '${v}', repo: me/x}\n",
            "step 2: ${v} has a value only in the steps of the loop that sets x",
        ),
        (LOOP.format(f"{{x: [{'1, ' * 50}], y: [{'1, ' * 50}]}}"), f"at most {MOST_STEPS:,} passes, found 2,500"),
        (
            "steps:\n  - each: {y: ["
            + "1, " * 50
            + "]}\n    steps:\n"
            + LOOP.format(f"{{x: [{'1, ' * 50}]}}")[7:].replace("\n", "\n    ").replace("  -", "      -", 1),
            f"at most {MOST_STEPS:,} steps with all passes",
        ),
    ],
    ids=range(16),
)
def test_a_loop_that_cannot_run_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with refuses("recipe.invalid") as caught:
        load_recipe(write(tmp_path, text))
    assert words in str(caught.value)


def test_a_fault_that_all_passes_share_is_listed_once_and_others_name_their_values(tmp_path: Path) -> None:
    text = GRID.replace("base: b", "bsae: b").replace("[8, middle]", "[8, [9]]")
    with refuses("recipe.invalid") as caught:
        load_recipe(write(tmp_path, text))
    message = str(caught.value)
    assert message.count("unknown key 'bsae'") == 1
    assert "step 1 (train-align, layer 8, seed 0): unknown key 'bsae'" in message
    assert "step 3 (train-align, layer [9], seed 0): layer" in message


@pytest.mark.parametrize(
    "step",
    [
        "train-align: {base: b, pairs: [x-en.tsv], layer: '${layer}', out: o/same}",
        "evaluate: {base: 'b${layer}', task: slots, data: [x], predictions: o/same.jsonl}",
        "compare: {systems: ['a=${layer}.jsonl'], task: slots, data: [x], markdown: o/same.md}",
    ],
)
def test_passes_that_write_the_same_output_are_refused(step: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"steps:\n  - each: {{layer: [1, 2]}}\n    steps:\n      - {step}\n")
    with refuses(r"recipe.output-twice: step 2 \(.*, layer 2\) writes o/same.* Put \$\{layer\} into its path"):
        check_places(path, load_recipe(path))


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (8, 6, 2)}, alpha=4, seed=seed)
    return write(
        tmp_path,
        """
variables: {folder: unset, weights: [0.2, 0.5, 0.9]}
steps:
  - each: {weight: "${weights}"}
    steps:
      - merge: {adapters: ["${folder}/task", "${folder}/align"], weights: ["${weight}"], out: "${folder}/o/${weight}"}
""",
    )


def test_an_interrupted_loop_goes_on_at_its_pass(merges: Path, tmp_path: Path) -> None:
    given = {"folder": str(tmp_path)}
    run_recipe(merges, given | {"weights": [0.2]})
    documents = run_recipe(merges, given, resume=True)
    weights = [document.get("weights", document.get("skipped")) for document in documents]
    assert weights == [True, [0.5, pytest.approx(0.5)], [0.9, pytest.approx(0.1)]]
    written = json.loads((tmp_path / "o" / "0.5" / "adaptermix.json").read_text())
    assert written["plan"]["weights"] == [0.5, 0.5]


def test_a_step_that_fails_is_named_with_its_values(merges: Path, tmp_path: Path) -> None:
    def fails(step: Step) -> dict[str, Any]:
        if step.loop == {"weight": 0.5}:
            raise ModelError("as asked", code="x.y")
        return {}

    with refuses(r"x.y: ^step 2 \(merge, weight 0.5\): as asked$"):
        run_recipe(merges, {"folder": str(tmp_path)}, run=fails)


SEEDS = """
variables: {out: unset, seeds: [0, 1]}
steps:
  - each: {seed: "${seeds}"}
    steps:
      - train-align: {base: b, pairs: [x-en.tsv], seed: "${seed}", out: "${out}/${seed}"}
      - evaluate: {base: b, adapter: "${out}/${seed}", task: slots, data: [x], seed: "${seed}"}
"""


def test_a_search_scores_a_candidate_by_the_mean_over_its_last_loop(tmp_path: Path) -> None:
    ran: list[Step] = []

    def run(step: Step) -> dict[str, Any]:
        ran.append(step)
        settings: Any = step.settings
        if step.command == "train-align":
            Path(settings.out).mkdir(parents=True)
            (Path(settings.out) / "rank").write_text(str(settings.rank))
            return {}
        assert settings.split == "dev"
        value = int((Path(settings.adapter) / "rank").read_text()) / 100 + settings.seed / 10
        overall = {"value": value, "low": value - 0.1, "high": value + 0.2}
        return {"overall": overall, "resamples": [value, value + 0.03, value - 0.01 * settings.seed], "units": 7}

    found = tune(write(tmp_path, SEEDS), {"train-align.rank": [4, 8]}, out=tmp_path / "tuned", run=run)
    assert [candidate.value for candidate in found.candidates] == pytest.approx([0.09, 0.13])
    assert (found.best.low, found.best.high) == pytest.approx((0.03, 0.33))
    assert found.best.resamples == pytest.approx([0.13, 0.16, 0.125])
    assert len(ran) == 8
    assert tune(write(tmp_path, SEEDS), {"train-align.rank": [4, 8]}, out=tmp_path / "tuned", run=run).best.ran == 0
    assert len(ran) == 8


def test_a_search_refuses_test_data_in_a_loop(tmp_path: Path) -> None:
    path = write(tmp_path, SEEDS.replace("task: slots,", "task: slots, split: test,"))
    with pytest.raises(ConfigError, match="the last step must be on dev data"):
        tune(path, {"train-align.rank": [4]}, out=tmp_path / "tuned")
