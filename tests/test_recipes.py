"""Recipes are checked whole, and the shipped ones are valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix import TaskSettings
from adaptermix.commands.recipe_checks import check_places
from adaptermix.commands.recipe_file import Step
from adaptermix.commands.recipes import load_recipe, run_recipe
from adaptermix.errors import ConfigError, ModelError
from adaptermix.progress import Silent
from adaptermix.tasks import ComparableTask, get_task
from tests.factories import write_lora

from .refusals import refuses

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
PATH = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_say_what_they_are(path: Path) -> None:
    assert load_recipe(path)
    head = path.read_text(encoding="utf-8").split("version:")[0]
    for word in ("# Needs:", "# Run:   adaptermix run recipes/"):
        assert word in head


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_choose_without_labels_where_answers_compare(path: Path) -> None:
    for step in load_recipe(path):
        asked = step.settings.model_dump()
        if asked.get("objective") == "agreement":
            assert isinstance(get_task(asked["task"]), ComparableTask)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.name.startswith("mid_align")], ids=lambda p: p.name)
def test_recipes_of_the_paper_train_with_its_settings(path: Path) -> None:
    steps = [step for step in load_recipe(path) if step.command.startswith("train-")]
    assert steps
    for step in steps:
        values = step.settings.model_dump()
        expected = {
            "rank": 8,
            "alpha": 16,
            "dropout": 0.1,
            "learning_rate": 5e-4,
            "schedule": "inverse_sqrt",
            "warmup": 0.03,
            "seed": 1,
        }
        assert {key: values[key] for key in expected} == expected
        assert values["batch_size"] * values["accumulate"] == 128
        if step.command == "train-joint":
            assert (values["alternate"], values["discard"], values["epochs"]) == ("batch", True, 10)
        if step.command != "train-align":
            assert (values["patience"], values["evaluate_every"]) == (5, 200)
        if "temperature" in values:
            assert values["temperature"] == (1.5 if "Qwen" in values["base"] else 0.1)


def test_the_slot_recipe_searches_the_weights_of_the_paper_at_the_middle_layer() -> None:
    steps = load_recipe(next(path for path in RECIPES if path.name == "mid_align_massive.yaml"))
    assert [step.settings.model_dump()["grid"] for step in steps if step.command == "search"] == [[0.5, 0.7, 0.9]] * 2
    layers = {step.settings.model_dump()["layer"] for step in steps if step.command in ("train-align", "train-joint")}
    assert layers == {"middle"}


@pytest.mark.parametrize(
    "step",
    [
        "search: {adapters: [a, b], base: m, task: nli, objective: agreement, pairs: [de-en.tsv], grid: [0.9], out: o}",
        "merge: {adapters: [a, b], weights: [1, 1], method: fuse, base: m, task: nli, objective: agreement, out: o, "
        "pairs: [de-en.tsv]}",
    ],
)
def test_answers_that_cannot_be_compared_are_refused_before_the_first_step(step: str, tmp_path: Path) -> None:
    """A search would say so only once its adapters are trained."""
    path = write(tmp_path, f"version: 1\nsteps:\n  - {step}\n")
    with refuses(r"recipe.invalid: step 1 \((search|merge)\)"):
        load_recipe(path)


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
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path} has {len(lines)} faults:"
    for line, piece in zip(
        lines,
        (
            "  override 'c' meets no variable",
            "  line 1: version must be 1, found 2",
            "  line 2: unknown key 'stpes'. Did you mean 'steps'?",
            "  line 5: step 1 (merge): weights: Field required",
            "  line 5: step 1 (merge): unknown key 'weigths'. Did you mean 'weights'?",
            "  line 6: step 2: unknown command 'mrege'. Did you mean 'merge'?",
            "  line 7: step 3 (search): settings must be a mapping",
            "  line 8: unknown variable ${b}",
        ),
        strict=True,
    ):
        assert line.startswith(piece)


def test_faults_have_the_lines_of_their_options(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "version: 1\nsteps:\n- merge: &m\n    adapters: [a, b]\n    weights: 0.5\n    out: one\n    rank: 0\n"
        "- each: {k: [1, 2]}\n  steps:\n  - merge:\n      <<: *m\n      keep: 7\n      out: 'x${k}'\n- push: {}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    lines = [line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    # the rank of the second merge is written in the first one; its line is that of the step
    assert lines == ["line 7", "line 10", "line 12", "line 14", "line 14"]


def test_a_single_fault_is_told_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nsteps:\n- merge: {adapters: [a, b], weights: 0.5, out: one, rank: 0}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: line 3: step 1 (merge): rank: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("max_residual", "allow_pickle"), ("max-residual", "allow-pickle")])
def test_options_have_the_names_of_the_command_line_too(names: tuple[str, str], tmp_path: Path) -> None:
    settings = f"{{adapters: [a, b], weights: 0.5, out: one, {names[0]}: 0.3, {names[1]}: true}}"
    path = write(tmp_path, f"version: 1\nsteps:\n- merge: {settings}\n")
    (step,) = load_recipe(path, {"merge.max-residual": 0.2})
    assert (step.settings.max_residual, step.settings.allow_pickle) == (0.2, True)  # type: ignore[attr-defined]


def test_an_option_under_both_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nsteps:\n- push: {folder: a, repo: b/c, dry-run: true, dry_run: false}\n")
    with refuses("recipe.invalid: an option must be set once"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "recipe.not-yaml"), ("- 1", "recipe.not-mapping"), ("version: 1\nsteps: []", "recipe.invalid: steps")],
)
def test_what_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with refuses(message):
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


CHAIN = """
version: 1
variables: {{out: {out}}}
steps:
  - train-task: {{base: b, task: slots, train: [x], out: "${{out}}/task"}}
  - train-align: {{base: b, pairs: [x], out: "${{out}}/align"}}
  - merge: {{adapters: ["${{out}}/task", "${{out}}/{read}"], weights: [0.9], out: "${{out}}/{written}"}}
  - evaluate: {{base: b, adapter: "${{out}}/merged", task: slots, data: [x], predictions: "${{out}}/answers.jsonl"}}
"""


class Pretended:
    """Steps that leave their outputs behind; the one asked for fails."""

    def __init__(self, fails_at: int = 0) -> None:
        self.ran: list[Step] = []
        self._fails_at = fails_at

    def __call__(self, step: Step) -> dict[str, Any]:
        if len(self.ran) + 1 == self._fails_at:
            raise ModelError("as asked")
        self.ran.append(step)
        written = getattr(step.settings, "out", None) or step.settings.predictions  # type: ignore[attr-defined]
        Path(written).parent.mkdir(exist_ok=True)
        Path(written).write_text("")
        return {}


def chain(folder: Path, *, read: str = "align", written: str = "merged") -> Path:
    return write(folder, CHAIN.format(out=folder / "out", read=read, written=written))


def test_what_was_trained_with_other_settings_is_not_taken(tmp_path: Path) -> None:
    path = chain(tmp_path)

    def trained(step: Step) -> dict[str, Any]:
        written = Path(getattr(step.settings, "out", None) or step.settings.predictions)  # type: ignore[attr-defined]
        written.mkdir(parents=True)
        (written / "adaptermix.json").write_text(json.dumps({"plan": step.settings.model_dump(mode="json")}))
        return {}

    run_recipe(path, run=trained)
    said: list[str] = []
    watch = type("Notes", (Silent,), {"note": lambda _self, text: said.append(text)})()
    run_recipe(path, run=trained, resume=True, watch=watch)
    assert said[0] == f"train-task: {tmp_path / 'out' / 'task'} is there and is taken"
    assert len(said) == 4
    with refuses(r"resume.settings: align.*objective 'distil', now 'contrastive', temperature 0\.1, now"):
        run_recipe(path, {"train-align.temperature": 0.7}, run=trained, resume=True)
    run_recipe(path, {"train-align.device": "cpu"}, run=trained, resume=True)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_recipe_goes_on_where_it_stopped(fails_at: int, tmp_path: Path) -> None:
    path, first, second = chain(tmp_path), Pretended(fails_at), Pretended()
    with pytest.raises(ModelError):
        run_recipe(path, run=first)
    if fails_at > 1:
        with refuses("recipe.output-exists"):
            run_recipe(path, run=second)
    found = run_recipe(path, run=second, resume=True)
    assert [step.command for step in (*first.ran, *second.ran)] == ["train-task", "train-align", "merge", "evaluate"]
    assert [bool(document.get("skipped")) for document in found] == [number < fails_at for number in (1, 2, 3, 4)]
    for step in second.ran:
        assert getattr(step.settings, "resume", True) is True
    assert run_recipe(path, run=first, resume=True) == [
        {"command": document["command"], "out": str(tmp_path / "out" / name), "skipped": True}
        for document, name in zip(found, ("task", "align", "merged", "answers.jsonl"), strict=True)
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"read": "algin"},
            "step 3 (merge) reads .*algin, which is not there, and no step before it makes it. Did you",
        ),
        ({"written": "task"}, "step 3 (merge) writes .*task, which an earlier step writes too"),
        ({"written": "other"}, "step 4 (evaluate) reads .*merged, which is not there"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_would_fail_in_its_turn_fails_at_once(more: dict[str, str], words: str, dry: bool, tmp_path: Path) -> None:
    run, path = Pretended(), chain(tmp_path, **more)
    with pytest.raises(ConfigError, match=words.replace("(", "[(]").replace(")", "[)]")):
        check_places(path, load_recipe(path)) if dry else run_recipe(path, run=run)
    assert run.ran == []


def test_an_adapter_to_start_from_must_be_made_before(tmp_path: Path) -> None:
    own: dict[str, Any] = {"base": "b", "task": "slots", "train": ["x"]}
    first = Step(command="train-task", settings=TaskSettings(**own, out=str(tmp_path / "one")))
    on = {
        name: TaskSettings(**own, out=str(tmp_path / "two"), start_from=str(tmp_path / name)) for name in ("one", "oen")
    }
    check_places(tmp_path / "r.yaml", [first, Step(command="train-task", settings=on["one"])])
    with refuses("recipe.no-input"):
        check_places(tmp_path / "r.yaml", [first, Step(command="train-task", settings=on["oen"])])


MERGE = "version: 1\nsteps:\n  - merge: {{adapters: [a, b], weights: [0.5], out: {out}}}\n"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
STRINGS = (
    "version: 1\nvariables:\n  a: '" + "x" * 10000 + "'\n  b: '" + "${a}" * 5000 + "'\nsteps: [merge: {out: '${b}'}]\n"
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (LAUGHS, "aliases may expand to at most"),
        (MERGES, "aliases may expand to at most"),
        ("version: 1\nvariables: &v {x: [*v]}\nsteps: []\n", "must not stand for a value that contains it"),
        ("a: &a [*a]\n", "must not stand for a value that contains it"),
        ("steps: " + "[" * 60 + "]" * 60, "nest at most 40 deep"),
        ("steps: " + "[" * 5000, "nest at most|must be YAML"),
        ("steps: " + "{a: " * 3000, "nest at most|must be YAML"),
        ("- " * 3000 + "x", "nest at most|must be YAML"),
        ("version: " + "9" * 5000, "must be YAML"),
        ("version: 0x" + "F" * 5000, "a number must have at most 400 characters, found 5,002"),
        ("version: 1\nvariables: {a: 0b" + "1" * 20000 + "}\nsteps: [merge: {out: 'x${a}'}]", "a number must have"),
        ("version: " + ":".join("1" * 500_000), "a number must have at most 400 characters, found 999,999"),
        ("version: !!float " + ":".join("1" * 500_000), "a number must have"),
        ("version: 2001-99-99", "must be YAML"),
        ("version: !!bool x", "a value cannot be read"),
        ("version: !!int ''", "must be YAML|a value cannot be read"),
        ("version: !!timestamp x", "a value cannot be read"),
        ("version: !!python/object/apply:os.system [true]", "must be YAML"),
        ("x" * 2**21, "at most 1 MiB"),
        ("version: 1\0", "must be YAML"),
        (STRINGS, "variables may expand to at most"),
        (MERGE.format(out='"a\\0b"'), "out: must not hold a NUL character"),
        (MERGE.format(out='"a\\ud800"'), "must be YAML|lone surrogate"),
        (MERGE.format(out="$SCRATCH/x"), "variables of the shell"),
        (MERGE.format(out="x, seed: 1" + "0" * 300), "seed: "),
        (MERGE.format(out="x, seed: 1" + "0" * 4000), "a number must have"),
    ],
    ids=range(26),
)
def test_a_recipe_that_stands_for_too_much_is_told_in_short(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8"))
    with pytest.raises(ConfigError, match=match) as told:
        load_recipe(path)
    assert len(str(told.value)) < 1500
    assert len(str(told.value).splitlines()) <= 3


def test_aliases_of_a_usual_size_are_taken(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "version: 1\nvariables: {w: &w [0.5]}\nsteps:\n"
        "  - merge: &m {adapters: [a, b], weights: *w, out: one}\n  - merge: {<<: *m, out: two}\n",
    )
    assert [step.settings.out for step in load_recipe(path)] == ["one", "two"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("$HOME/x", "/home/me/x"),
        ("a~/x", "a~/x"),
        ("x/~", "x/~"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    ],
)
def test_the_home_folder_is_put_into_paths(
    given: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = MERGE.format(out=f"'{given}'").replace("[a, b]", f"['{given}', b]")
    (step,) = load_recipe(write(tmp_path, text))
    assert step.settings.out == found  # type: ignore[attr-defined]
    assert step.settings.adapters == [found, "b"]  # type: ignore[attr-defined]
    own = {"base": "b", "task": "slots", "out": "o", "train": [f"de={given}"]}
    assert TaskSettings(**own).train == [f"de={found}"]  # type: ignore[arg-type]


def test_a_recipe_that_is_a_device_is_refused() -> None:
    with refuses("recipe.not-file"):
        load_recipe(Path("/dev/zero"))
