"""Heads of adapters that plain peft trained: their labels, and the same answers as plain transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from adaptermix import evaluate, merge, predict, search
from tests.factories import write_lora
from tests.refusals import refuses

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LABELS = ["neutral", "negative", "positive"]
TEXTS = ["rot und blau", "blau", "ein rotes Haus", "heute nicht", "ja", "nein danke", "gut gut gut"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def save_plain(base: Path, out: Path, *, seed: int = 0, tokens: bool = False) -> Path:
    """Train a LoRA and a head with plain peft for some steps, and save both."""
    torch.manual_seed(seed)
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    task_type = TaskType.TOKEN_CLS if tokens else TaskType.SEQ_CLS
    model = auto.from_pretrained(base, num_labels=len(TAGS if tokens else LABELS))
    live = get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=["query", "value"]))
    batch = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([weight for weight in live.parameters() if weight.requires_grad], lr=0.03)
    for _ in range(40):
        logits = live(**batch).logits
        goal = torch.arange(len(TEXTS)) % logits.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits[:, 0] if tokens else logits, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    live.save_pretrained(out)
    return out


def plain_answers(base: Path, adapter: Path) -> list[str]:
    """Return the labels that transformers and peft give to the texts."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    live = PeftModel.from_pretrained(model, adapter).eval()
    batch = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return [LABELS[number] for number in live(**batch).logits.argmax(-1).tolist()]


@pytest.fixture(scope="module")
def plain(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(encoder, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "de.jsonl"
    rows = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def common(encoder: Path) -> dict[str, object]:
    return {"base": encoder, "task": "classify", "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("labels", [LABELS, ",".join(LABELS), [", ".join(LABELS)]])
def test_answers_are_those_of_peft_and_transformers(
    labels: object, encoder: Path, plain: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    evaluate(adapter=plain, data=data, labels=labels, predictions=out, **common(encoder))
    answers = [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert answers == plain_answers(encoder, plain)
    assert len(set(answers)) > 1
    shown = predict(TEXTS, adapter=plain, labels=labels, **common(encoder)).document()
    assert list(shown["answers"].values()) == [answers]


def test_labels_come_from_the_configuration_of_the_base(encoder: Path, plain: Path, data: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3, id2label=dict(enumerate(LABELS)))
    model.save_pretrained(named)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(named)
    shown = predict(TEXTS, adapter=plain, **common(named)).document()
    assert list(shown["answers"].values()) == [plain_answers(encoder, plain)]


def test_two_of_them_are_searched_and_merged(encoder: Path, plain: Path, data: Path, tmp_path: Path) -> None:
    other = save_plain(encoder, tmp_path / "other", seed=1)
    merge([plain, other], weights=0.5, saved="average", out=tmp_path / "merged")
    found = evaluate(adapter=tmp_path / "merged", data=data, labels=LABELS, **common(encoder)).document()
    assert found["scores"]["de"]["n"] == len(TEXTS)
    align = tmp_path / "align"
    write_lora(align, {"encoder.layer.0.attention.self.query": (32, 32, 2)}, alpha=4)
    chosen = search(
        [plain, align],
        dev=data,
        grid=[0.5, 1.0],
        labels=LABELS,
        allow_base_mismatch=True,
        out=tmp_path / "chosen",
        **common(encoder),
    )
    assert {"weights", "value"} <= set(chosen.document()["best"])
    shown = predict(TEXTS, adapter=tmp_path / "chosen", labels=LABELS, **common(encoder)).document()
    assert set(next(iter(shown["answers"].values()))) <= set(LABELS)


@pytest.mark.parametrize(("saved", "number"), [("other", 1), ("1", 0)])
def test_a_search_keeps_the_head_of_the_adapter_that_is_named(
    saved: str, number: int, encoder: Path, plain: Path, data: Path, tmp_path: Path
) -> None:
    other = save_plain(encoder, tmp_path / "other", seed=1)
    shared = {"dev": data, "grid": [0.5, 1.0], "labels": LABELS, "out": tmp_path / "chosen", **common(encoder)}
    with refuses("saved.differ"):
        search([plain, other], **shared)
    with refuses("search.saved"):
        search([plain, other], saved="average", **shared)
    found = search([plain, other], saved=saved, **shared)
    heads = [load_file(folder / "adapter_model.safetensors") for folder in (plain, other, tmp_path / "chosen")]
    names = [name for name in heads[number] if "classifier" in name]
    assert names
    for name in names:
        assert torch.equal(heads[2][name], heads[number][name])
    scored = evaluate(adapter=tmp_path / "chosen", data=data, labels=LABELS, **common(encoder)).document()
    assert scored["scores"]["de"]["value"] == pytest.approx(found.document()["best"]["value"])


def test_tags_of_a_token_classifier_need_their_names(encoder: Path, tmp_path: Path) -> None:
    adapter = save_plain(encoder, tmp_path / "tags", tokens=True)
    path = tmp_path / "de.iob2"
    path.write_text("Ada\tB-PER\nging\tO\n\nBath\tB-LOC\n", encoding="utf-8")
    shared = {"adapter": adapter, "data": path, **common(encoder), "task": "ner-json"}
    with refuses("head.unknown-labels"):
        evaluate(**shared)
    assert evaluate(labels=TAGS, **shared).document()["scores"]["de"]["n"] == 2


def test_what_cannot_be_is_refused(encoder: Path, plain: Path, data: Path) -> None:
    shared = {"data": data, **common(encoder)}
    with refuses("head.unknown-labels"):
        evaluate(adapter=plain, **shared)
    with refuses("head.label-count"):
        evaluate(adapter=plain, labels="a,b", **shared)
    with refuses("head.row-labels"):
        evaluate(adapter=plain, labels="a,b,c", **shared)
    with refuses("head.no-head-labels"):
        evaluate(labels=LABELS, **shared)
