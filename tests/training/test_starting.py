"""Training that begins from an adapter: it begins exactly there, and the adapter decides what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    TaskSettings,
    evaluate,
    merge,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.adapters import AdapterSource, open_adapter
from adaptermix.models.base import load_base
from adaptermix.provenance.manifest import carry_on
from adaptermix.training.trainer import Interrupted

from ..factories import WEIGHTS, adapter_deltas, load_with_peft, peft_lora, write_lora
from ..refusals import refuses
from ..tiny import tiny_causal
from .data import Notes, write_pairs, write_slots
from .test_heads import settings_for as headed
from .test_heads import write_labels
from .test_joint import settings_for as joint
from .test_joint import values

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
ROLES = ("data", "dev", "calibration", "tested")
STILL = 1e-30
"""A learning rate that moves no weight."""
Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
SHAPES = {Q: (32, 32), V: (16, 32), UP: (64, 32)}


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    """Settings that leave to the adapter what it decides."""
    own = values(base, folder, **({"task": "slots", "train": [write_slots(folder)], "steps": 1} | more))
    return TaskSettings(**{name: value for name, value in own.items() if name in more or name != "rank"})


def first_stage(base: Path, folder: Path, **more: object) -> Path:
    train_task(settings_for(base, folder, out=str(folder / "first"), **({"rank": 4, "alpha": 6.0, "steps": 3} | more)))
    return folder / "first"


def with_gaps(folder: Path, base: Path) -> Path:
    """Other modules, ranks and alphas in every block."""
    modules = {
        f"model.layers.{n}.{name}": (*SHAPES[name], rank) for n, name, rank in ((0, Q, 3), (0, V, 2), (2, UP, 5))
    }
    alphas = dict(zip(modules, (3.0, 7.0, 1.0), strict=True))
    write_lora(folder, modules, alpha=alphas, rslora=True, base=str(base), target_modules=list(modules))
    return folder


def logits_in_training(settings: TaskSettings) -> torch.Tensor:
    """What the model in training gives after the last step."""
    import adaptermix.training.runner as module

    seen: list[torch.Tensor] = []
    original = module.state_of

    def look(base: Any, *rest: Any) -> Any:
        with torch.no_grad():
            seen.append(base.model.eval()(torch.arange(3, 20)[None]).logits)
        return original(base, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "state_of", look)
        train_task(settings)
    return seen[0]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "layers_to_transform": [0, 1, 3],
    },
}


@pytest.mark.parametrize("kind", [*KINDS, "gaps"])
def test_it_begins_as_peft_loads_the_adapter_and_ends_as_peft_loads_the_result(
    kind: str, causal: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    if kind == "gaps":
        with_gaps(start, causal)
    else:
        peft_lora(causal, start, **KINDS[kind])
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = load_with_peft(causal, start)(tokens).logits
    found = logits_in_training(settings_for(causal, tmp_path, start_from=str(start), learning_rate=STILL))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before, after = adapter_deltas(start) if kind == "gaps" else {}, adapter_deltas(tmp_path / "out")
    for module, delta in before.items():
        torch.testing.assert_close(after[module], delta, rtol=1e-6, atol=1e-7)
    assert not before or set(before) == set(after)
    # one real step, and PEFT alone acts as the model in training did
    moved = logits_in_training(settings_for(causal, tmp_path, start_from=str(start), out=str(tmp_path / "moved")))
    assert (moved - expected).abs().max() > 1e-3
    with torch.no_grad():
        alone = load_with_peft(causal, tmp_path / "moved")(tokens).logits
    torch.testing.assert_close(alone, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "bfloat16"}, {"quantize": "nf4"}, {"quantize": "fp4"}, {"quantize": "int8"}], ids=str
)
def test_nothing_is_lost_of_the_factors(more: dict[str, str], wide: Path, tmp_path: Path) -> None:
    if "quantize" in more:
        pytest.importorskip("bitsandbytes")
    start = first_stage(wide, tmp_path)
    train_task(settings_for(wide, tmp_path, start_from=str(start), learning_rate=STILL, **more))
    assert (start / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert (start / "adapter_config.json").read_bytes() == (tmp_path / "out" / "adapter_config.json").read_bytes()
    train_task(settings_for(wide, tmp_path, start_from=str(start), out=str(tmp_path / "moved"), **more))
    assert (start / WEIGHTS).read_bytes() != (tmp_path / "moved" / WEIGHTS).read_bytes()


def test_a_merged_adapter_is_trained_on_at_its_own_rank(causal: Path, tmp_path: Path) -> None:
    start = first_stage(causal, tmp_path)
    train_align(AlignSettings(**values(causal, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align"))))
    merge([start, tmp_path / "align"], weights=[0.8], out=tmp_path / "merged")
    on = settings_for(causal, tmp_path, start_from=str(tmp_path / "merged"), learning_rate=STILL)
    train_task(on)
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    plan = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["plan"]
    assert (plan["rank"], plan["alpha"], plan["blocks"]) == (8, 8.0, "0-3")
    dry = train_task(on.model_copy(update={"dry_run": True, "overwrite": True}))
    stored = load_file(tmp_path / "out" / WEIGHTS).values()
    # The zeros that fill up the upper blocks, which only one of the two adapts, are not trained.
    assert dry.document()["lora_parameters"] == sum(int(tensor.count_nonzero()) for tensor in stored)


def test_a_resumed_run_goes_on_to_the_same_weights(causal: Path, tmp_path: Path) -> None:
    import adaptermix.training.trainer as module

    start = first_stage(causal, tmp_path)
    more = {"start_from": str(start), "steps": 4, "checkpoint_every": 1, "dropout": 0.2}
    train_task(settings_for(causal, tmp_path, **more))
    broken = settings_for(causal, tmp_path, **more, out=str(tmp_path / "again"))
    before = module.Trainer._step

    def step(self: Any, loss_of: Any) -> Any:
        if self.done == 2:
            raise Interrupted
        return before(self, loss_of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Trainer, "_step", step)
        with pytest.raises(Interrupted):
            train_task(broken)
    other = first_stage(causal, tmp_path / "other", seed=1) if (tmp_path / "other").mkdir() is None else start
    with refuses("run.settings"):
        train_task(broken.model_copy(update={"resume": True, "start_from": str(other)}))
    train_task(broken.model_copy(update={"resume": True}))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_what_was_seen_before_is_recorded_and_told(causal: Path, tmp_path: Path) -> None:
    start = first_stage(causal, tmp_path, template="mid-align")
    other = tmp_path / "train.de.jsonl"
    other.write_text(json.dumps({"text": "geh rot", "slots": [{"type": "c", "value": "t"}]}) + "\n")
    train_task(settings_for(causal, tmp_path, start_from=str(start), train=[str(other)]))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert {entry["name"] for entry in manifest["data"]} == {"train.en.jsonl", "train.de.jsonl"}
    assert manifest["languages"] == {"supervised": ["de", "en"]}
    assert manifest["task"]["template"] == "mid-align"
    (entry,) = manifest["inputs"]
    assert (entry["name"], entry["use"]) == ("first", "start")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Training started from the adapter `first` (sha256 `{entry['weights_sha256'][:12]}`)." in card
    assert "## Made from" not in card
    notes = Notes()
    place = {"base": str(causal), "dtype": "float32", "device": "cpu"}
    data = {"task": "slots", "data": [str(tmp_path / "train.en.jsonl")], "max_new_tokens": 2}
    evaluate(EvaluateSettings(adapter=str(tmp_path / "out"), **place, **data), watch=notes)  # type: ignore[arg-type]
    assert any("train.en.jsonl" in note for note in notes.said)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_head_of_the_task_is_taken_over(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(kind)
    train_task(headed(base, tmp_path, out=str(tmp_path / "first"), steps=3))
    # fewer labels, and none is named to be a head: the adapter tells
    data = write_labels(tmp_path, "warm.en.tsv", [("red sky", "warm"), ("red sea", "warm")])
    more = {"task": "classify", "train": [data], "start_from": str(tmp_path / "first")}
    notes = Notes()
    train_task(settings_for(base, tmp_path, **more, learning_rate=STILL), watch=notes)
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    entry = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["task"]
    assert entry["labels"] == ["cold", "warm"]
    partly = write_labels(tmp_path, "partly.en.tsv", [("red sky", "hot"), ("red sea", "warm")])
    train_task(settings_for(base, tmp_path, **(more | {"train": [partly], "out": str(tmp_path / "p")})), watch=notes)
    assert any("1 of 2 (en 1) rows have labels that the head does not have, such as 'hot'" in n for n in notes.said)
    assert json.loads((tmp_path / "p" / "adaptermix.json").read_text())["rows"]["taught"] == 1
    new = write_labels(tmp_path, "new.en.tsv", [("red sky", "hot"), ("red sea", "hotter")])
    for wrong, message in (
        ({"train": [new]}, "head.row-labels: first"),
        ({"task": "slots", "train": [write_slots(tmp_path)], "head": "auto"}, "head.task"),
        ({"head": "none"}, "start-from.head-option: none"),
    ):
        with refuses(message):
            train_task(settings_for(base, tmp_path, **(more | wrong), dry_run=True, overwrite=True))
    pairs = {"pairs": write_pairs(tmp_path), "start_from": str(tmp_path / "first"), "out": str(tmp_path / "a")}
    with refuses("start-from.head"):
        train_align(AlignSettings(base=str(base), **pairs))


def test_alignment_and_a_task_go_on_from_each_other_where_their_blocks_allow(causal: Path, tmp_path: Path) -> None:
    own = values(causal, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align"))
    train_align(AlignSettings(**own))
    del own["rank"]
    train_align(AlignSettings(**own | {"start_from": str(tmp_path / "align"), "out": str(tmp_path / "more")}))
    task = settings_for(causal, tmp_path, start_from=str(tmp_path / "align"))
    train_task(task)
    assert {name.split(".")[4] for name in load_file(tmp_path / "out" / WEIGHTS)} == {"0", "1"}
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert set(manifest["languages"]) == {"aligned", "supervised"}
    assert manifest["vectors"]["pooling"] == "mean"
    start = str(first_stage(causal, tmp_path))
    with refuses("train.blocks-unreached: those of the adapter in --start-from"):
        train_align(AlignSettings(**own | {"start_from": start, "out": str(tmp_path / "x")}))
    both = joint(causal, tmp_path, start_from=start, learning_rate=STILL, out=str(tmp_path / "joint"))
    train_joint(both)
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "joint" / WEIGHTS).read_bytes()


def test_options_that_contradict_the_adapter_are_refused(causal: Path, tmp_path: Path) -> None:
    start = str(peft_lora(causal, tmp_path / "start", **KINDS["patterns"]))
    for more, message in (
        ({"rank": 8}, r"start-from.option: --rank 8 \(it has 4 and 2\)"),
        ({"alpha": 5.0, "rslora": True}, "start-from.option: --alpha 5"),
        ({"blocks": "0-2"}, r"start-from.option: --blocks 0-2 \(it has 0-3\)"),
        ({"dora": True}, r"start-from.option: --dora True \(it has False\)"),
        ({"targets": ["all-linear"]}, "start-from.targets: q_proj, v_proj"),
    ):
        for dry_run in (True, False):
            with refuses(message):
                train_task(settings_for(causal, tmp_path, start_from=start, dry_run=dry_run, **more))
    train_task(settings_for(causal, tmp_path, start_from=start, targets=["v_proj", "q_proj"], blocks="0-3"))
    again = settings_for(causal, tmp_path, start_from=str(tmp_path / "out"), alpha=8.0, out=str(tmp_path / "again"))
    with refuses("start-from.option"):
        train_task(again)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_what_cannot_be_gone_on_from_is_refused(causal: Path, encoder: Path, tmp_path: Path) -> None:
    start = str(first_stage(causal, tmp_path))
    with refuses("train.start-from-init: gaussian"):
        settings_for(causal, tmp_path, start_from=start, init="gaussian")
    with refuses("train.base-mismatch"):
        settings_for(causal, tmp_path, allow_base_mismatch=True)
    with refuses("start-from.same-adapter: first"):
        train_task(settings_for(causal, tmp_path, start_from=start, on_top_of=start))
    dora = str(peft_lora(causal, tmp_path / "dora", **KINDS["dora"]))
    with refuses("start-from.dora: --norm-budget.*dora"):
        train_task(settings_for(causal, tmp_path, start_from=dora, norm_budget=0.1))
    for name, settings in {
        "biases": {"lora_bias": True, "target_modules": ["q_proj"]},
        "a start from the base": {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
        "modules outside the blocks": {"target_modules": ["q_proj", "lm_head"]},
        "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    }.items():
        other = peft_lora(causal, tmp_path / name.replace(" ", "-"), r=2, **settings)
        with refuses(f"start-from.kind: {name}"):
            train_task(settings_for(causal, tmp_path, start_from=str(other)))
    other_base = tiny_causal(tmp_path / "other", chat=True, seed=5)
    asked = settings_for(other_base, tmp_path, start_from=start)
    for dry_run in (True, False):
        with refuses("base.mismatch"):
            train_task(asked.model_copy(update={"dry_run": dry_run}))
    train_task(asked.model_copy(update={"allow_base_mismatch": True}))
    pairs = {"pairs": write_pairs(tmp_path), "start_from": start, "allow_base_mismatch": True}
    with refuses("start-from.shape: the model lacks the module"):
        train_align(AlignSettings(base=str(encoder), out=str(tmp_path / "x"), **pairs))


def test_the_norm_budget_holds_with_the_scales_of_the_adapter(causal: Path, tmp_path: Path) -> None:
    start = with_gaps(tmp_path / "start", causal)
    train_task(settings_for(causal, tmp_path, start_from=str(start), norm_budget=0.05))
    model = load_base(str(causal), dtype="float32", device="cpu").model
    for module, delta in adapter_deltas(tmp_path / "out").items():
        assert float(delta.norm()) <= 0.05 * float(model.get_submodule(module).weight.norm()) * (1 + 1e-6)


def test_data_files_of_both_adapters_below_stay_known_in_every_role(tmp_path: Path) -> None:
    """Also those that were evaluated as test before, which an adapter was trained on all the same."""

    def below(name: str) -> AdapterSource:
        write_lora(tmp_path / name, {f"model.layers.0.{Q}": (32, 32, 2)})
        document = {role: [{"name": f"{role}.{name}", "sha256": f"{role} {name}"}] for role in ROLES}
        (tmp_path / name / "adaptermix.json").write_text(json.dumps({"kind": "train-task", **document}))
        return open_adapter(tmp_path / name)

    own = {role: [{"name": f"{role}.own", "sha256": f"{role} own"}] for role in ROLES}
    start, on = below("start"), below("on")
    for given, names in (
        ((None, None), ["own"]),
        ((start, None), ["own", "start"]),
        ((None, on), ["own", "on"]),
        ((start, on), ["own", "start", "on"]),
    ):
        found = carry_on({**own, "languages": {}}, *given)
        assert {role: [entry["name"] for entry in found[role]] for role in ROLES} == {
            role: [f"{role}.{name}" for name in names] for role in ROLES
        }
    assert carry_on({"data": own["data"], "languages": {}}, start)["tested"][0]["name"] == "tested.start"
