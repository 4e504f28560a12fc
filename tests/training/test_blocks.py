"""LoRAs in some blocks only: where they lie, that peft loads them, that unlike ones merge exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptermix import JointSettings, TaskSettings, load_adapter, merge, train_joint, train_task
from adaptermix.cli import main
from adaptermix.commands.recipes import load_recipe
from adaptermix.models.base import load_base
from adaptermix.training.lora import resolve_targets

from ..factories import adapter_deltas, load_with_peft
from ..refusals import refuses
from .data import write_pairs, write_slots
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = torch.arange(3, 20)[None]


def command(*arguments: object) -> int:
    """Run the command line; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code: Any = caught.value.code
    return int(code or 0)


def trained(base: Path, folder: Path) -> tuple[Path, Path]:
    """A task adapter in blocks 2-3 and an alignment adapter in blocks 0-1, through the command line."""
    common = ["--base", base, "--steps", 3, "--batch-size", 4, "--rank", 4, "--learning-rate", 0.02, "--device", "cpu"]
    common += ["--dtype", "float32", "--dropout", 0]
    task, align = folder / "task", folder / "align"
    files = write_slots(folder)
    assert command("train-task", *common, "--task", "slots", "--train", files, "--out", task, "--blocks", "2-3") == 0
    pairs = write_pairs(folder)
    assert command("train-align", *common, "--pairs", *pairs, "--out", align, "--layer", 3, "--blocks", "0-1") == 0
    return task, align


def blocks_of(folder: Path) -> set[int]:
    return {int(part) for module in load_adapter(folder).updates for part in module.split(".") if part.isdigit()}


def test_unlike_blocks_are_merged_exactly_and_peft_loads_inputs_and_result(
    causal: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    task, align = trained(causal, tmp_path)
    for folder, blocks in ((task, [2, 3]), (align, [0, 1])):
        assert blocks_of(folder) == set(blocks)
        assert json.loads((folder / "adapter_config.json").read_text())["layers_to_transform"] == blocks
        assert json.loads((folder / "adaptermix.json").read_text())["plan"]["blocks"] == f"{blocks[0]}-{blocks[1]}"
    for first, second, weight in ((task, align, 0.9), (align, task, 0.1)):
        merge([first, second], weights=[weight], out=tmp_path / "merged", overwrite=True)
        merged = adapter_deltas(tmp_path / "merged")
        expected = {name: 0.9 * delta for name, delta in adapter_deltas(task).items()}
        expected |= {name: 0.1 * delta for name, delta in adapter_deltas(align).items()}
        assert set(merged) == set(expected)
        assert len(merged) == 4 * 7
        for name, delta in expected.items():
            assert float(delta.norm()) > 0
            torch.testing.assert_close(merged[name], delta, rtol=1e-5, atol=1e-7)
    plain = load_base(str(causal), dtype="float32", device="cpu").model
    with torch.no_grad():
        for name, delta in expected.items():
            plain.get_submodule(name).weight += delta.float()
        for folder in (task, align):
            assert not torch.equal(load_with_peft(causal, folder)(TOKENS).logits, plain(TOKENS).logits)
        found = load_with_peft(causal, tmp_path / "merged")(TOKENS).logits
        torch.testing.assert_close(found, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "key" in str(w.message)]


@pytest.mark.parametrize("blocks", ["1", "0-2", "3-3"])
def test_peft_alone_acts_as_the_model_in_training_did(blocks: str, any_causal: Path, tmp_path: Path) -> None:
    import adaptermix.training.runner as module

    seen: dict[str, torch.Tensor] = {}
    original = module.state_of

    def look(base: Any, *rest: Any) -> Any:
        with torch.no_grad():
            seen["logits"] = base.model.eval()(TOKENS).logits
        return original(base, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "state_of", look)
        train_task(
            TaskSettings(**values(any_causal, tmp_path, task="slots", train=[write_slots(tmp_path)], blocks=blocks))
        )
    first, _, last = blocks.partition("-")
    assert blocks_of(tmp_path / "out") == set(range(int(first), int(last or first) + 1))
    with torch.no_grad():
        found = load_with_peft(any_causal, tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, seen["logits"], rtol=1e-4, atol=1e-5)


def test_recipes_may_write_one_block_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nsteps:\n  - train-align: {base: b, pairs: [p], out: o, blocks: 3, keeper: 0.5, norm_budget: 0.1}\n"
        "  - train-align: {base: b, pairs: [p], out: o, blocks: 0-3}\n"
    )
    found: list[Any] = [step.settings for step in load_recipe(tmp_path / "recipe.yaml")]
    assert [settings.blocks for settings in found] == ["3-3", "0-3"]
    assert (found[0].keeper, found[0].norm_budget) == (0.5, 0.1)


def test_all_blocks_by_number_are_all_blocks(causal: Path, tmp_path: Path) -> None:
    for name, more in (("all", {}), ("numbered", {"blocks": "0-3"})):
        own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "out": str(tmp_path / name)}
        train_task(TaskSettings(**values(causal, tmp_path, **own, **more)))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "all" / file).read_bytes() == (tmp_path / "numbered" / file).read_bytes()


def test_joint_training_may_go_beyond_the_layer_if_it_begins_below(causal: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "pairs": write_pairs(tmp_path)}
    train_joint(JointSettings(**values(causal, tmp_path, **own, blocks="1-2")))
    assert blocks_of(tmp_path / "out") == {1, 2}
    late = JointSettings(**values(causal, tmp_path, **own, blocks="2-3", overwrite=True))
    with refuses("train.blocks-unreached: --blocks must start below the aligned layer: --layer 2 runs blocks 0-1 only"):
        train_joint(late)


def test_a_target_that_no_chosen_block_has_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = (("one", "two"), ("one",))
            self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2) for name in own}) for own in names)
            self.config: Any = type("C", (), {"num_hidden_layers": 2, "get_text_config": lambda self: self})()

    assert resolve_targets(Model(), ["all-linear"], range(2)) == ["one", "two"]
    assert resolve_targets(Model(), ["all-linear"], range(1, 2)) == ["one"]
    with refuses("train.targets: one.*two"):
        resolve_targets(Model(), ["two"], range(1, 2))


ALIGN = "train-align --base {base} --pairs de-en.tsv --device cpu --out new"
JOINT = "train-joint --base {base} --task slots --train train.en.jsonl --pairs de-en.tsv --device cpu --out new"


@pytest.mark.parametrize(
    ("line", "expected", "words"),
    [
        (ALIGN.format(base="none") + " --blocks 3-1", 2, "--blocks: FIRST-LAST is needed"),
        (ALIGN.format(base="none") + " --blocks 1,2", 2, "--blocks: FIRST-LAST is needed"),
        (ALIGN.format(base="none") + " --blocks low", 2, "--blocks: FIRST-LAST is needed"),
        (ALIGN.format(base="none") + " --layer 8 --blocks 0-8", 2, "--layer 8 runs blocks 0-7 only, and --blocks is"),
        (JOINT.format(base="none") + " --layer 8 --blocks 8-9", 2, "--blocks must start below the aligned layer"),
        (ALIGN + " --blocks 0-2", 1, "--blocks must end below the aligned layer: --layer 2 runs blocks 0-1 only"),
        (JOINT + " --blocks 0-4", 1, "--blocks must lie within 0-3 for this base model, got 0-4"),
    ],
)
def test_blocks_that_do_not_do_are_refused_in_one_sentence(
    line: str,
    expected: int,
    words: str,
    causal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path)
    write_slots(tmp_path)
    assert command(*line.format(base=causal).split(), "--quiet") == expected
    told = capsys.readouterr().err.splitlines()
    assert words in told[-1]
    assert told[-1].startswith("error: ")
    if expected == 2:  # before a model is loaded, whose loading transformers shows
        assert len(told) == 1
    assert not (tmp_path / "new").exists()
