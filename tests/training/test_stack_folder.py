"""The folder of a stack: it moves, and is baked, merged, inspected and published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import BakeSettings, PushSettings, bake, inspect, load_adapter, merge, push, train_stack, train_task
from adaptermix.models.base import files_of, fingerprint_of
from adaptermix.models.stack_paths import found_id, stored_id

from ..refusals import refuses
from ..tiny import tiny_causal
from .data import COLOURS
from .stacks import batch_of, loaded, stack_settings, write_texts
from .test_heads import settings_for

LORA = "adapter/adapter_model.safetensors"


def states_of(folder: Path) -> Tensor:
    base = loaded(folder)
    batch = batch_of(base.tokenizer)
    with torch.no_grad():
        states: Tensor = base.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    return states


@pytest.fixture(scope="module")
def home(causal: Path, below: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, and a stack of them in runs/stack; copied by tests that change it."""
    folder = tmp_path_factory.mktemp("home")
    for name, model in (("top", causal), ("below", below)):
        shutil.copytree(model, folder / "models" / name)
    (folder / "runs").mkdir()
    dev = write_texts(folder, "dev.txt", [f"my {colour} house" for colour in COLOURS])
    more: dict[str, Any] = {"dev_texts": [dev], "evaluate_every": 3, "out": str(folder / "runs" / "stack")}
    train_stack(stack_settings(folder / "models" / "top", folder / "models" / "below", folder, **more))
    return folder


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home, tmp_path / "moved")


def test_a_stack_moves_together_with_its_models(home: Path, moved: Path) -> None:
    assert str(home) not in (moved / "runs" / "stack" / "stack.json").read_text()
    assert torch.equal(states_of(moved / "runs" / "stack"), states_of(home / "runs" / "stack"))
    save_file({"other": torch.ones(2)}, moved / "models" / "below" / "other.safetensors")
    with refuses("stack.changed: moved/models/below"):
        loaded(moved / "runs" / "stack")


def test_a_model_is_found_next_to_the_stack_by_its_weights(home: Path, moved: Path) -> None:
    stack = moved / "runs" / "stack"
    (moved / "models" / "below").rename(moved / "runs" / "below")
    (moved / "models" / "top").rename(stack / "top")
    assert torch.equal(states_of(stack), states_of(home / "runs" / "stack"))
    save_file({"other": torch.ones(2)}, moved / "runs" / "below" / "model.safetensors")
    with refuses("stack.part-missing: encoder.*models/below"):
        loaded(stack)


def test_the_new_place_of_a_model_can_be_written_into_the_file(home: Path, moved: Path) -> None:
    stack = moved / "runs" / "stack"
    (moved / "models" / "top").rename(moved / "elsewhere")
    with refuses("stack.part-missing: 'base'"):
        loaded(stack)
    form = json.loads((stack / "stack.json").read_text())
    form["base"]["id"] = "../../elsewhere"
    (stack / "stack.json").write_text(json.dumps(form))
    assert torch.equal(states_of(stack), states_of(home / "runs" / "stack"))


def test_ids_of_the_hub_are_no_paths(tmp_path: Path) -> None:
    assert stored_id("intfloat/e5@main", tmp_path) == found_id("intfloat/e5@main", None, tmp_path) == "intfloat/e5@main"
    assert found_id("../e5", None, tmp_path / "stack") == str(tmp_path.resolve() / "e5")


def test_a_baked_stack_has_its_lora_and_the_adapters_in_the_weights(home: Path, tmp_path: Path) -> None:
    """The oracle adds the matrices to the weights of the model on top by hand."""
    stack, top = home / "runs" / "stack", home / "models" / "top"
    train_task(settings_for(stack, tmp_path, head="auto", steps=2, out=str(tmp_path / "task")))
    settings = BakeSettings(
        base=str(stack), adapter=[str(tmp_path / "task")], without_heads=True, out=str(tmp_path / "baked")
    )
    report = bake(settings)
    before, after = load_file(top / "model.safetensors"), load_file(tmp_path / "baked" / "base" / "model.safetensors")
    own, task = load_adapter(stack / "adapter").updates, load_adapter(tmp_path / "task").updates
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(own) == len(report.modules)
    for path, update in own.items():
        other = next(value for name, value in task.items() if name.endswith(path))
        name = f"model.{path}.weight"
        expected = before[name].double() + update.dense().double() + other.dense().double()
        torch.testing.assert_close(after[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not (tmp_path / "baked" / "adapter").exists()
    seen = json.loads((tmp_path / "baked" / "adaptermix.json").read_text())["data"]
    assert {file["name"] for file in seen} == {"en.txt", "train.en.tsv"}


def test_a_baked_stack_gives_the_states_of_the_stack_wherever_it_is(home: Path, tmp_path: Path) -> None:
    stack = home / "runs" / "stack"
    bake(BakeSettings(base=str(stack), out=str(tmp_path / "first")))
    shutil.copytree(home / "models" / "below", tmp_path / "new" / "below")
    (tmp_path / "first").rename(tmp_path / "new" / "baked")
    baked = tmp_path / "new" / "baked"
    torch.testing.assert_close(states_of(baked), states_of(stack), atol=1e-5, rtol=1e-4)
    assert fingerprint_of(str(baked)) == fingerprint_of(str(stack))  # adapters of one act on the other
    with refuses("bake.no-adapter"):
        bake(BakeSettings(base=str(baked), out=str(tmp_path / "second")))
    with refuses("merge.baked-stack"):
        merge([baked, stack], weights=[0.5], out=tmp_path / "both")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"quantize": "nf4", "strategy": "dequant-16"}, "bake.stack-option: --quantize"),
        ({"strategy": "keep"}, "bake.stack-strategy"),
        ({"calibration": ["x.txt"]}, "bake.stack-option: --calibration"),
    ],
    ids=str,
)
def test_a_stack_is_not_baked_into_4_bits(home: Path, tmp_path: Path, options: dict[str, Any], code: str) -> None:
    with refuses(code):
        bake(BakeSettings(base=str(home / "runs" / "stack"), out=str(tmp_path / "out"), **options))


def test_the_adapter_of_a_stack_is_not_baked_twice(home: Path, tmp_path: Path) -> None:
    stack = home / "runs" / "stack"
    own = {"base": str(stack), "adapter": [str(stack / "adapter")], "allow_base_mismatch": True}
    with refuses("stack.own-adapter"):
        bake(BakeSettings(**own, out=str(tmp_path / "out")))


def test_a_model_is_not_baked_without_an_adapter(causal: Path, tmp_path: Path) -> None:
    with refuses("bake.no-adapter"):
        bake(BakeSettings(base=str(causal), out=str(tmp_path / "out")))


def changed_copy(stack: Path, folder: Path, *, projection: bool) -> Path:
    """Return a copy of a stack whose LoRA is twice as large, and whose projection is another one if requested."""
    copy = shutil.copytree(stack, folder)
    lora = load_file(copy / LORA)
    save_file({k: 2 * v if "lora_B" in k else v for k, v in lora.items()}, copy / LORA, {"format": "pt"})
    if projection:
        tensors = load_file(copy / "projection.safetensors")
        save_file({name: 3 * value for name, value in tensors.items()}, copy / "projection.safetensors")
    return copy


def test_a_run_is_not_resumed_on_a_stack_with_another_lora(home: Path, moved: Path) -> None:
    stack = moved / "runs" / "stack"
    other = changed_copy(stack, moved / "runs" / "other", projection=False)
    assert fingerprint_of(str(other)) == fingerprint_of(str(stack))
    assert files_of(str(other)) != files_of(str(stack)) == files_of(str(home / "runs" / "stack"))


def test_stacks_with_one_projection_merge(home: Path, moved: Path, tmp_path: Path) -> None:
    stack = home / "runs" / "stack"
    other = changed_copy(moved / "runs" / "stack", moved / "runs" / "other", projection=False)
    merge([stack, other], weights=[0.5, 0.5], out=tmp_path / "both")
    for path, update in load_adapter(tmp_path / "both" / "adapter").updates.items():
        expected = 1.5 * load_adapter(stack / "adapter").updates[path].dense()
        torch.testing.assert_close(update.dense(), expected, atol=1e-6, rtol=1e-4)
    assert (tmp_path / "both" / "projection.safetensors").read_bytes() == (
        stack / "projection.safetensors"
    ).read_bytes()
    assert loaded(tmp_path / "both").stack == loaded(stack).stack
    manifest = json.loads((tmp_path / "both" / "adaptermix.json").read_text())
    assert manifest["artifact"] == "stack"
    assert [file["name"] for file in manifest["data"]] == ["en.txt"]


@pytest.mark.parametrize(("saved", "factor"), [("average", 1.5), ("1", 1.0), ("other", 3.0)])
def test_projections_that_differ_are_refused_or_merged_as_requested(
    home: Path, moved: Path, tmp_path: Path, saved: str, factor: float
) -> None:
    stack = home / "runs" / "stack"
    other = changed_copy(moved / "runs" / "stack", moved / "runs" / "other", projection=True)
    with refuses("saved.differ: projection"):
        merge([stack, other], weights=[0.75, 0.25], out=tmp_path / "both")
    assert not (tmp_path / "both").exists()
    merge([stack, other], weights=[0.75, 0.25], saved=saved, out=tmp_path / "both")
    before, after = (load_file(path / "projection.safetensors") for path in (stack, tmp_path / "both"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], factor * value)


def test_stacks_of_two_models_do_not_merge(home: Path, moved: Path, below: Path, tmp_path: Path) -> None:
    tiny_causal(tmp_path / "other", seed=3)
    train_stack(stack_settings(tmp_path / "other", below, tmp_path, steps=1))
    with refuses("merge.stack-forms: model on top"):
        merge([home / "runs" / "stack", tmp_path / "stack"], weights=[0.5], out=tmp_path / "both")
    with refuses("merge.mixed-inputs"):
        merge([home / "runs" / "stack", home / "runs" / "stack" / "adapter"], weights=[0.5], out=tmp_path / "both")


def test_adapters_of_two_stacks_with_one_projection_merge(home: Path, moved: Path, tmp_path: Path) -> None:
    for name, folder in (("one", home), ("two", moved)):
        train_task(settings_for(folder / "runs" / "stack", tmp_path, head="auto", steps=1, out=str(tmp_path / name)))
    merge([tmp_path / "one", tmp_path / "two"], weights=[0.5], saved="average", out=tmp_path / "both")
    assert load_adapter(tmp_path / "both").updates


def test_what_inspect_shows_of_a_stack(home: Path) -> None:
    stack = home / "runs" / "stack"
    document = inspect([stack, stack / "adapter"]).document()
    found, weights = document["stacks"]["stack"], load_file(stack / "projection.safetensors")
    assert (found["width"], found["own_width"]) == (16, 32)
    assert found["norm"] == pytest.approx(float(weights["weight"].double().square().sum().sqrt()))
    assert found["bias_norm"] == pytest.approx(float(weights["bias"].double().square().sum().sqrt()))
    assert (found["attention"], found["pooling"], found["languages"]) == ("causal", "mean", [])
    assert found["base"]["id"] == str(home / "models" / "top")
    history = [json.loads(line) for line in (stack / "history.jsonl").read_text().splitlines()]
    assert found["unexplained"] == [entry["dev_unexplained"] for entry in history if "dev_unexplained" in entry][-1]
    assert document["adapters"]["stack"]["modules"] == document["adapters"]["adapter"]["modules"]


def test_what_is_published_of_a_stack(home: Path, tmp_path: Path) -> None:
    stack = home / "runs" / "stack"
    named = {"base_id": "me/top@v1", "encoder_id": "me/below"}
    for option, code in (("encoder_id", "push.local-part: --encoder-id"), ("base_id", "push.local-part: --base-id")):
        with refuses(code):
            push(PushSettings(folder=str(stack), repo="me/x", dry_run=True, **(named | {option: None})))
    from adaptermix.publish.folder import prepare

    published = prepare(stack, "me/x", **named)
    assert {"stack.json", "projection.safetensors", "config.json", "tokenizer.json", LORA} <= published.files.keys()
    form = json.loads(bytes(published.files["stack.json"]))  # type: ignore[arg-type]
    assert (form["base"]["id"], form["encoder"]["id"]) == ("me/top@v1", "me/below")
    assert form["base"]["fingerprint"] == fingerprint_of(str(home / "models" / "top"))
    for name, content in published.files.items():
        if not name.endswith(".safetensors"):
            text = content.decode() if isinstance(content, bytes) else content.read_text()
            assert str(home) not in text
            assert "home" not in text or name == "tokenizer.json"
    config = json.loads(bytes(published.files["adapter/adapter_config.json"]))  # type: ignore[arg-type]
    assert config["base_model_name_or_path"] == "me/top"
    assert "hf download me/x" in published.card
    assert "- me/below" in published.card


def test_a_baked_stack_is_published_with_its_model(home: Path, tmp_path: Path) -> None:
    bake(BakeSettings(base=str(home / "runs" / "stack"), out=str(tmp_path / "baked")))
    with refuses("push.local-part: --encoder-id"):
        push(PushSettings(folder=str(tmp_path / "baked"), repo="me/x", dry_run=True))
    report = push(PushSettings(folder=str(tmp_path / "baked"), repo="me/x", encoder_id="me/below", dry_run=True))
    names = {name for name, _ in report.files}
    assert {"base/model.safetensors", "base/config.json", "stack.json"} <= names
    assert "adapter/adapter_config.json" not in names
