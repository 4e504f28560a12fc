"""`run --resume` takes an output only if its settings and all that it was made from are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adaptermix import merge
from adaptermix.commands.recipe_file import STEPS, Step
from adaptermix.commands.recipes import run_recipe
from adaptermix.errors import OutputError
from adaptermix.options.registries import OneOf
from adaptermix.options.roles import Reads, Writes, marks_of

from .factories import WEIGHTS, write_lora
from .refusals import refuses

PATH = "model.layers.0.self_attn.q_proj"
RECIPE = """
version: 1
variables: {folder: ., w: 0.5}
steps:
  - merge: {adapters: ["${folder}/task", "${folder}/align"], weights: ["${w}"], out: "${folder}/out/merged"}
  - merge: {adapters: ["${folder}/out/merged", "${folder}/align"], weights: [1.0, 1.0], out: "${folder}/out/both"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for number, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (6, 4, 2)}, seed=number)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def value(folder: Path) -> float:
    return float(sum(tensor.abs().sum() for tensor in load_file(folder / WEIGHTS).values()))


def run(recipe: Path, *, resume: bool = True, **variables: Any) -> list[bool]:
    """Run a recipe, and return which steps were passed over."""
    documents = run_recipe(recipe, {"folder": str(recipe.parent)} | variables, resume=resume)
    return [bool(document.get("skipped")) for document in documents]


def test_outputs_of_the_same_settings_and_files_are_taken(recipe: Path) -> None:
    assert run(recipe, resume=False) == [False, False]
    assert run(recipe) == [True, True]


def test_another_weight_is_refused(recipe: Path) -> None:
    run(recipe, resume=False, w=0.5)
    with refuses(r"resume.settings: merged.*weights \[0\.5\], now \[0\.9\]"):
        run(recipe, w=0.9)


def _of_same_size_and_time(path: Path, content: bytes) -> None:
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_adapter_of_the_same_size_and_time_is_refused(recipe: Path, tmp_path: Path) -> None:
    run(recipe, resume=False)
    weights = tmp_path / "align" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    _of_same_size_and_time(weights, bytes(content))
    with refuses("resume.settings: merged.*adapters: other files"):
        run(recipe)


def test_an_output_that_was_made_again_by_hand_is_refused(recipe: Path, tmp_path: Path) -> None:
    run(recipe, resume=False)
    adapters = [tmp_path / "task", tmp_path / "align"]
    merge(adapters, weights=[0.1], out=tmp_path / "out" / "merged", overwrite=True)
    with refuses("resume.not-of-recipe"):
        run(recipe)


def test_an_output_that_was_edited_is_refused(recipe: Path, tmp_path: Path) -> None:
    run(recipe, resume=False)
    config = tmp_path / "out" / "merged" / "adapter_config.json"
    config.write_text(config.read_text().replace("0", "1", 1))
    with refuses("resume.changed"):
        run(recipe)


def test_what_builds_on_another_output_is_refused(recipe: Path, tmp_path: Path) -> None:
    """The first output is removed and made with another weight, so the second is of an adapter that is no more."""
    import shutil

    run(recipe, resume=False, w=0.5)
    shutil.rmtree(tmp_path / "out" / "merged")
    with refuses("resume.settings: both.*adapters: other files"):
        run(recipe, w=0.9)
    shutil.rmtree(tmp_path / "out" / "both")
    assert run(recipe, w=0.9) == [True, False]


def test_a_moved_folder_and_another_working_directory_are_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, resume=False)
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    monkeypatch.chdir(moved / "task")
    documents = run_recipe("../recipe.yaml", {"folder": ".."}, resume=True)
    assert all(document["skipped"] for document in documents)


def test_readme_and_predictions_beside_an_output_change_nothing(recipe: Path, tmp_path: Path) -> None:
    run(recipe, resume=False)
    (tmp_path / "out" / "merged" / "README.md").write_text("mine")
    (tmp_path / "out" / "merged" / "answers.jsonl").write_text("{}")
    assert run(recipe) == [True, True]


@pytest.mark.parametrize("record", ["", "[]", "null", '{"command": 1}', '{"command": "merge", "settings": 1}', "\xff"])
def test_a_record_of_another_form_is_none(recipe: Path, tmp_path: Path, record: str) -> None:
    run(recipe, resume=False)
    (tmp_path / "out" / ".merged.adaptermix-step").write_bytes(record.encode("latin-1"))
    with refuses("resume.not-of-recipe"):
        run(recipe)


KILLED = """
import os, signal, sys
from pathlib import Path
from adaptermix.commands import recipes, step_record
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before":
    recipes.run_step = die
else:
    done = step_record._write
    step_record._write = lambda path, record: die() if record["done"] else done(path, record)
recipes.run_recipe(sys.argv[1], {"folder": str(Path(sys.argv[1]).parent)})
"""


@pytest.mark.parametrize(("when", "passed_over"), [("before", [False, False]), ("after", [True, False])])
def test_a_killed_run_goes_on(recipe: Path, tmp_path: Path, when: str, passed_over: list[bool]) -> None:
    """Killed before a step wrote anything, and after its output was in place but before the record said so."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(recipe), when], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert run(recipe) == passed_over
    assert run(recipe) == [True, True]


def test_an_output_that_was_to_be_replaced_when_the_run_was_killed_is_made_again(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace('merged"}', 'merged", overwrite: true}'))
    merge([tmp_path / "task", tmp_path / "align"], weights=[0.1], out=tmp_path / "out" / "merged")
    old = value(tmp_path / "out" / "merged")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(recipe), "before"], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert run(recipe) == [False, False]
    assert value(tmp_path / "out" / "merged") != old


def test_a_failed_step_leaves_no_record(recipe: Path, tmp_path: Path) -> None:
    def fails(step: Step) -> dict[str, Any]:
        raise OutputError("as asked")

    with pytest.raises(OutputError, match="as asked"):
        run_recipe(recipe, {"folder": str(tmp_path)}, run=fails)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", sorted(STEPS))
def test_every_setting_of_text_is_an_input_an_output_or_a_plain_value(command: str) -> None:
    """A new option that names a file must be marked, or --overwrite and --resume would not see it."""
    plain = {
        *("allow_base_mismatch", "baseline", "ceiling", "supervised", "aligned", "name", "repo", "revision", "message"),
        *("server", "server_model", "columns", "labels"),
        *("task", "template", "device", "rows", "method", "options", "places", "rank", "weights", "modules", "layers"),
        *(
            "include",
            "exclude",
            "shard_size",
            "targets",
            "blocks",
            "head_layers",
            "space",
            "storage",
            "study",
            "vary",
            "groups",
            "to",
        ),
        *("layer", "mixup_layer", "source_tag", "saved", "prompt", "names", "pair_rows"),
        *("metric", "scorer", "base_id", "encoder_id", "license", "tag"),
    }
    plain |= {*marks_of(STEPS[command], OneOf)}  # names in a registry
    paths = {*marks_of(STEPS[command], Reads), *marks_of(STEPS[command], Writes)}
    for name, field in STEPS[command].model_fields.items():
        kind = str(field.annotation)
        if "str" in kind and "Literal" not in kind:
            assert (name in paths) != (name in plain), f"{name} of {command} needs Reads(...) or Writes(...)"
