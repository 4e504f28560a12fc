"""Classification heads: trained whole, travelling with the adapter, through merging and search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    JointSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    load_adapter,
    merge,
    search,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.adapters.paths import prefix_between

from ..refusals import refuses
from .data import Notes, write_pairs, write_slots
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS = [("red sky", "warm"), ("blue sea", "cold"), ("red sea", "warm"), ("blue sky", "cold")] * 3


def write_labels(folder: Path, name: str = "train.en.tsv", rows: Any = ROWS) -> str:
    (folder / name).write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return str(folder / name)


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    own: dict[str, object] = {"task": "classify", "train": [write_labels(folder)], "head": "classes", "steps": 30}
    return TaskSettings(**values(base, folder, **(own | more)))


def evaluated(base: Path, adapter: Path, data: str) -> EvaluateSettings:
    return EvaluateSettings(
        base=str(base), adapter=str(adapter), task="classify", data=[data], dtype="float32", device="cpu"
    )


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    train_task(settings_for(base, folder))
    return folder / "out"


def by_peft(base: Path, adapter: Path, texts: list[str]) -> list[str]:
    """Labels that PEFT and transformers alone give."""
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, adapter).eval()
    labels = json.loads((adapter / "adaptermix.json").read_text())["task"]["labels"]
    with torch.no_grad():
        return [labels[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] for text in texts]


def test_the_head_is_learned_and_peft_alone_loads_it(base: Path, trained: Path, tmp_path: Path) -> None:
    data = write_labels(tmp_path, "test.de.tsv")
    found = evaluate(evaluated(base, trained, data))
    assert found.scores["de"].value == 1.0
    texts = [text for text, _ in ROWS] + ["red", "blue", "green hill", "x"]
    assert list(found.answers) == by_peft(base, trained, texts)[: len(ROWS)]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    manifest = json.loads((trained / "adaptermix.json").read_text())
    assert manifest["task"] == {
        "name": "classify",
        "template": "plain",
        "head": "classes",
        "labels": ["cold", "warm"],
    }


def test_a_head_reads_no_prompt(trained: Path, base: Path, encoder: Path, tmp_path: Path) -> None:
    data = write_labels(tmp_path, "test.de.tsv")
    asked = evaluated(base, trained, data).model_copy(update={"template": "plain"})
    with refuses("head.no-template"):
        evaluate(asked)
    for dry_run in (True, False):  # an encoder has a head unless it is told not to
        with refuses("head.no-template"):
            train_task(settings_for(encoder, tmp_path, head="auto", template="plain", dry_run=dry_run))


def test_merged_with_an_alignment_adapter_the_head_stays(base: Path, trained: Path, tmp_path: Path) -> None:
    align = AlignSettings(**values(base, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align")))
    train_align(align)
    report = merge([trained, tmp_path / "align"], weights=[0.9], out=tmp_path / "merged")
    both = {module for module, found in report.modules.items() if all(found.weights)}
    assert len(both) == len(load_adapter(tmp_path / "align").updates)
    merged, head = load_adapter(tmp_path / "merged"), load_adapter(trained)
    assert merged.meta.task_type == "SEQ_CLS"
    assert all(torch.equal(merged.saved[key], tensor) for key, tensor in head.saved.items())
    data = write_labels(tmp_path, "test.de.tsv")
    found = evaluate(evaluated(base, tmp_path / "merged", data))
    assert list(found.answers) == by_peft(base, tmp_path / "merged", [text for text, _ in ROWS])
    # the order does not matter for what it is
    merge([tmp_path / "align", trained], weights=[0.1], out=tmp_path / "turned")
    assert load_adapter(tmp_path / "turned").meta.task_type == "SEQ_CLS"
    result = search(
        SearchSettings(
            adapters=[str(trained), str(tmp_path / "align")],
            base=str(base),
            task="classify",
            dev=[data],
            grid=[1.0, 0.9],
            out=str(tmp_path / "best"),
            dtype="float32",
            device="cpu",
        )
    )
    assert list(result.trials[1].answers) == list(found.answers)
    assert list(result.trials[0].answers) == list(evaluate(evaluated(base, trained, data)).answers)


def test_heads_of_other_labels_are_not_averaged(base: Path, trained: Path, tmp_path: Path) -> None:
    rows = [(text, label.upper()) for text, label in ROWS]
    train_task(settings_for(base, tmp_path, train=[write_labels(tmp_path, "other.en.tsv", rows)], steps=1))
    with refuses("adapters.head-labels"):
        merge([trained, tmp_path / "out"], weights=[0.5], saved="average", out=tmp_path / "merged")
    train_task(settings_for(base, tmp_path, seed=1, steps=1, out=str(tmp_path / "same")))
    report = merge([trained, tmp_path / "same"], weights=[0.5], saved="average", out=tmp_path / "merged")
    assert any("averaged" in note for note in report.notes)
    assert evaluate(evaluated(base, tmp_path / "merged", write_labels(tmp_path, "test.de.tsv"))).task == "classify"


def test_the_card_loads_what_it_says(base: Path, trained: Path) -> None:
    text = (trained / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained('BASE MODEL', num_labels=2)" in text
    assert str(base) not in text  # a folder of this machine
    assert "labels = ['cold', 'warm']" in text


def test_a_head_on_top_of_an_alignment_adapter(base: Path, tmp_path: Path) -> None:
    align = AlignSettings(**values(base, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align")))
    train_align(align)
    report = train_task(settings_for(base, tmp_path, on_top_of=str(tmp_path / "align"), steps=60))
    assert report.history[-1]["loss"] < 0.1
    merge([tmp_path / "out", tmp_path / "align"], weights=[1.0, 1.0], out=tmp_path / "both")
    found = evaluate(evaluated(base, tmp_path / "both", write_labels(tmp_path, "test.de.tsv")))
    assert found.scores["de"].value == 1.0


def test_a_head_is_drawn_by_the_seed_alone(base: Path, trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    train_task(settings_for(base, tmp_path))
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()
    train_task(settings_for(base, tmp_path, seed=1, out=str(tmp_path / "other")))
    assert (tmp_path / "other" / name).read_bytes() != (trained / name).read_bytes()


def test_a_head_has_a_learning_rate_of_its_own(base: Path, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate times the sign of the gradient."""
    found = []
    for times in (None, 2, 8):
        rate = times and 1e-3 * times
        out = tmp_path / str(times)
        train_task(settings_for(base, tmp_path, steps=1, learning_rate=1e-3, head_learning_rate=rate, out=str(out)))
        found.append(load_file(out / "adapter_model.safetensors"))
    plain, twice, eight = found
    for key, value in plain.items():
        if "lora_" in key:
            torch.testing.assert_close(eight[key], value)
        else:
            assert float((twice[key] - value).abs().max()) > 5e-4
            torch.testing.assert_close(eight[key] - value, 7 * (twice[key] - value), rtol=1e-2, atol=1e-5)


def test_encoders_get_a_head_and_language_models_answer(encoder: Path, causal: Path, tmp_path: Path) -> None:
    train_task(settings_for(encoder, tmp_path, head="auto", steps=1, out=str(tmp_path / "e")))
    assert load_adapter(tmp_path / "e").meta.task_type == "SEQ_CLS"
    train_task(settings_for(causal, tmp_path, head="auto", steps=1, out=str(tmp_path / "c")))
    assert load_adapter(tmp_path / "c").meta.task_type == "CAUSAL_LM"


def test_joint_training_has_the_head_too(encoder: Path, tmp_path: Path) -> None:
    joint = JointSettings(
        **values(
            encoder,
            tmp_path,
            task="classify",
            train=[write_labels(tmp_path)],
            pairs=write_pairs(tmp_path),
            dev=[write_labels(tmp_path, "dev.en.tsv")],
            dev_pairs=write_pairs(tmp_path),
            patience=3,
            evaluate_every=10,
            steps=60,
            select="sum",
        )
    )
    train_joint(joint)
    found = evaluate(evaluated(encoder, tmp_path / "out", write_labels(tmp_path, "test.de.tsv")))
    assert found.scores["de"].value == 1.0


def test_what_does_not_fit_is_refused(encoder: Path, causal: Path, trained: Path, tmp_path: Path) -> None:
    headed = settings_for(causal, tmp_path, task="slots", train=[write_slots(tmp_path)])
    with refuses("train.head-kind: classes.*a task whose answers are labels"):
        train_task(headed)
    slots = settings_for(encoder, tmp_path, task="slots", train=[write_slots(tmp_path)], head="auto")
    with refuses("head.no-tokens"):
        train_task(slots)
    with refuses("model.not-causal"):
        train_task(slots.model_copy(update={"head": "none"}))
    with refuses("train.head-learning-rate"):
        train_task(settings_for(causal, tmp_path, head="none", head_learning_rate=0.1))
    other = settings_for(encoder, tmp_path, dev=[write_labels(tmp_path, "dev.en.tsv", [("grey fog", "mild")])])
    with refuses("train.dev-labels"):
        train_task(other)
    some = write_labels(tmp_path, "some.en.tsv", [("grey fog", "mild"), ("red sky", "warm")])
    partly, notes = settings_for(encoder, tmp_path, dev=[some], out=str(tmp_path / "partly"), steps=1), Notes()
    assert "dev_loss" in train_task(partly, watch=notes).history[-1]
    assert any("'mild'; the loss passes over them" in note for note in notes.said)
    asked = evaluated(causal, trained, write_slots(tmp_path, "test.en.jsonl")).model_copy(update={"task": "slots"})
    with refuses("head.task: a classification head"):
        evaluate(asked)
    other_labels = evaluated(causal, trained, write_labels(tmp_path, "o.en.tsv", [("grey fog", "mild")]))
    with refuses("head.row-labels"):
        evaluate(other_labels)
    base = Path(json.loads((trained / "adaptermix.json").read_text())["base"]["id"])
    found = evaluate(evaluated(base, trained, some), watch=notes)
    assert (found.scores["en"].value, found.scores["en"].n) in ((0.0, 2), (0.5, 2))
    assert [a in ("cold", "warm") for a in found.answers] == [True, True]
    assert any("'mild'; every answer to them is wrong" in note for note in notes.said)
    alone = evaluated(causal, trained, write_labels(tmp_path)).model_copy(update={"against": "base"})
    with refuses("compare.head"):
        evaluate(alone)


@pytest.mark.parametrize(
    ("inner", "outer", "prefix"),
    [
        (["encoder.layer.0.x"], ["bert.encoder.layer.0.x"], "bert."),
        (["encoder.layer.0.x", "encoder.layer.1.x"], ["bert.encoder.layer.0.x"], "bert."),
        (["layers.0.q"], ["layers.0.q", "model.layers.0.q"], None),
        (["layers.0.q"], ["model.layers.0.k"], "model."),  # no module in common, but the list of blocks
        (["layers.0.q"], ["a.layers.0.q", "b.layers.0.q"], None),
        ([], ["a"], None),
        (["0.q", "1.q"], ["m.0.q", "m.1.q", "m.2.q"], "m."),
        # neither a module nor a list of blocks in common
        (["attentions.0.q_lin"], ["transformer.ffns.2.lin2"], "transformer."),
        (["encoder.blocks.0.0.attention.q_head"], ["funnel.decoder.layers.1.ffn.linear_2"], "funnel."),
        (["feature_projection.projection"], ["wav2vec2.encoder.layers.0.attention.q_proj"], "wav2vec2."),
    ],
)
def test_what_stands_before_the_paths(inner: list[str], outer: list[str], prefix: str | None) -> None:
    assert prefix_between(inner, outer) == prefix
