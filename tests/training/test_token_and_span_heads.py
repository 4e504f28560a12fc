"""Tagging and pointing heads: learned by heart, loaded by PEFT alone, through merging and search."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForQuestionAnswering, AutoPeftModelForTokenClassification, PeftModel

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
from adaptermix.adapters import open_adapter
from adaptermix.merging.on_model import acting
from adaptermix.models.base import load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head

from ..refusals import refuses
from .data import write_pairs
from .test_heads import write_labels
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

COMMANDS = [
    ("go to rome now", "O O B-city B-time"),
    ("fly oslo to bern", "O B-city O B-city"),
    ("new york today", "B-city I-city B-time"),
    ("go now", "O B-time"),
]


def write_slots(folder: Path, name: str) -> str:
    (folder / name).write_text("".join(f"{text}\t{tags}\tx\n" for text, tags in COMMANDS * 2))
    return str(folder / name)


def write_ner(folder: Path, name: str) -> str:
    name = name.replace("tsv", "iob2")
    rows = [zip(text.split(), tags.split(), strict=True) for text, tags in COMMANDS * 2]
    (folder / name).write_text("\n".join("".join(f"{word}\t{tag}\n" for word, tag in row) for row in rows))
    return str(folder / name)


def write_qa(folder: Path, name: str) -> str:
    name = name.replace("tsv", "jsonl")
    rows = [
        {"question": "who?", "context": "ada met eve", "answers": [{"text": "ada", "answer_start": 0}]},
        {"question": "whom?", "context": "ada met eve", "answers": [{"text": "eve", "answer_start": 8}]},
        {"question": "where?", "context": "bob is in rome", "answers": ["rome"]},
        {"question": "who?", "context": "bob is in rome", "answers": ["bob"]},
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task with its head."""

    task: str
    head: str
    write: Callable[[Path, str], str]
    task_type: str
    labels: list[str]
    auto: Any
    steps: int = 60


SLOTS = Case(
    task="slots",
    head="tokens",
    write=write_slots,
    task_type="TOKEN_CLS",
    labels=["O", "B-city", "I-city", "B-time", "I-time"],
    auto=AutoPeftModelForTokenClassification,
)
NER = Case(
    task="ner-json",
    head="tokens",
    write=write_ner,
    task_type="TOKEN_CLS",
    labels=SLOTS.labels,
    auto=AutoPeftModelForTokenClassification,
)
QA = Case(
    task="qa",
    head="span",
    write=write_qa,
    task_type="QUESTION_ANS",
    labels=["span"],
    auto=AutoPeftModelForQuestionAnswering,
    steps=150,
)


@pytest.fixture(scope="module", params=[SLOTS, NER, QA], ids=lambda case: case.task)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def settings_for(case: Case, base: Path, folder: Path, **more: object) -> TaskSettings:
    own: dict[str, object] = {
        "task": case.task,
        "train": [case.write(folder, "train.en.tsv")],
        "steps": case.steps,
        "rank": 8,
        "max_length": 64,
    }
    return TaskSettings(**values(base, folder, **(own | more)))


def evaluated(case: Case, base: Path, adapter: Path, folder: Path) -> EvaluateSettings:
    data = [case.write(folder, "test.de.tsv")]
    return EvaluateSettings(
        base=str(base), adapter=str(adapter), task=case.task, data=data, dtype="float32", device="cpu"
    )


@pytest.fixture(scope="module")
def trained(case: Case, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    train_task(settings_for(case, encoder, folder))  # `auto`: a head, on an encoder
    return folder / "out"


def logits(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**batch)
    return [found[name] for name in ("logits", "start_logits", "end_logits") if name in found]


def test_the_head_is_learned_by_heart(case: Case, encoder: Path, trained: Path, tmp_path: Path) -> None:
    found = evaluate(evaluated(case, encoder, trained, tmp_path))
    assert found.scores["de"].value == 1.0
    assert all(scores["de"].value == 1.0 for scores in found.others.values())
    task = json.loads((trained / "adaptermix.json").read_text())["task"]
    assert task == {"name": case.task, "template": "plain", "head": case.head, "labels": case.labels}
    form = HEAD_FORMS[case.head]
    assert f"{form.auto_class}.from_pretrained('BASE MODEL', num_labels=" in (trained / "README.md").read_text()


def test_peft_alone_loads_the_same_model(case: Case, encoder: Path, trained: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["task_type"] == case.task_type
    form = HEAD_FORMS[case.head]
    base = load_base(
        str(encoder), device="cpu", dtype="float32", head=Head(form=form, labels=tuple(case.labels)), seed=5
    )
    batch = dict(base.tokenizer("go to rome", return_tensors="pt"))
    with acting(base, [open_adapter(trained)]):
        ours = logits(base.model, batch)
    theirs = case.auto.from_pretrained(trained, num_labels=form.outputs or len(case.labels)).eval()
    for one, other in zip(ours, logits(theirs, batch), strict=True):
        torch.testing.assert_close(one, other)
    bare = load_base(str(encoder), device="cpu", dtype="float32", head=base.head, seed=6).model
    wrapped = PeftModel.from_pretrained(bare, trained).eval()
    for one, other in zip(ours, logits(wrapped, batch), strict=True):
        torch.testing.assert_close(one, other)


def test_merged_with_an_alignment_adapter_the_head_stays(
    case: Case, encoder: Path, trained: Path, tmp_path: Path
) -> None:
    align = values(encoder, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align"), learning_rate=1e-3)
    train_align(AlignSettings(**align))
    report = merge([trained, tmp_path / "align"], weights=[0.9], out=tmp_path / "merged")
    assert sum(all(found.weights) for found in report.modules.values()) == len(load_adapter(tmp_path / "align").updates)
    merged, head = load_adapter(tmp_path / "merged"), load_adapter(trained)
    assert merged.meta.task_type == case.task_type
    assert head.saved
    assert all(torch.equal(merged.saved[key], tensor) for key, tensor in head.saved.items())
    found = evaluate(evaluated(case, encoder, tmp_path / "merged", tmp_path))
    assert found.scores["de"].value == 1.0
    result = search(
        SearchSettings(
            adapters=[str(trained), str(tmp_path / "align")],
            base=str(encoder),
            task=case.task,
            dev=[case.write(tmp_path, "dev.de.tsv")],
            grid=[1.0, 0.9, 0.0],
            out=str(tmp_path / "best"),
            dtype="float32",
            device="cpu",
        )
    )
    assert list(result.trials[1].answers) == list(found.answers)
    assert result.scores[2].value < 1.0
    against = evaluated(case, encoder, tmp_path / "merged", tmp_path).model_copy(update={"against": str(trained)})
    compared = evaluate(against)
    assert compared.against is not None
    assert compared.against.overall.value == 0.0


@pytest.mark.parametrize("more", [{"dora": True}, {"quantize": "none", "patience": 9}], ids=["dora", "early stopping"])
def test_other_ways_of_training_have_the_head_too(encoder: Path, tmp_path: Path, more: dict[str, object]) -> None:
    dev = {"dev": [SLOTS.write(tmp_path, "dev.en.tsv")], "evaluate_every": 20} if "patience" in more else {}
    train_task(settings_for(SLOTS, encoder, tmp_path, **(more | dev)))
    assert evaluate(evaluated(SLOTS, encoder, tmp_path / "out", tmp_path)).scores["de"].value == 1.0


def test_language_models_tag_too_if_asked(causal: Path, tmp_path: Path) -> None:
    train_task(settings_for(SLOTS, causal, tmp_path, head="tokens", steps=1))
    assert load_adapter(tmp_path / "out").meta.task_type == "TOKEN_CLS"
    assert evaluate(evaluated(SLOTS, causal, tmp_path / "out", tmp_path)).task == "slots"
    train_task(settings_for(SLOTS, causal, tmp_path, steps=1, out=str(tmp_path / "generates")))
    assert load_adapter(tmp_path / "generates").meta.task_type == "CAUSAL_LM"
    train_task(settings_for(QA, causal, tmp_path, head="span", steps=1, out=str(tmp_path / "span")))
    manifest = json.loads((tmp_path / "span" / "adaptermix.json").read_text())
    assert manifest["task"]["reader"]["layers"] == "last"


def test_joint_training_has_the_head_too(encoder: Path, tmp_path: Path) -> None:
    plain = settings_for(SLOTS, encoder, tmp_path, steps=120).model_dump(exclude={"on_top_of"})
    train_joint(JointSettings(**plain | {"pairs": write_pairs(tmp_path)}))
    assert evaluate(evaluated(SLOTS, encoder, tmp_path / "out", tmp_path)).scores["de"].value > 0.8


def test_unlike_heads_are_not_merged(case: Case, encoder: Path, trained: Path, tmp_path: Path) -> None:
    classes = values(encoder, tmp_path, task="classify", train=[write_labels(tmp_path)], steps=1)
    train_task(TaskSettings(**classes))
    for saved in ("refuse", "average", "1"):
        with refuses("adapters.heads"):
            merge([trained, tmp_path / "out"], weights=[0.5], saved=saved, out=tmp_path / "merged")
    asked = evaluated(case, encoder, trained, tmp_path).model_copy(update={"against": str(tmp_path / "out")})
    with refuses("head.task: a classification head"):
        evaluate(asked)


def test_heads_that_do_not_suit_the_task_are_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with refuses("train.head-kind: tokens.*a task whose answers are tags of words.*qa"):
        train_task(settings_for(QA, nowhere, tmp_path, head="tokens"))
    with refuses("train.head-kind: span.*a task whose answers are parts of a text.*slots"):
        train_task(settings_for(SLOTS, nowhere, tmp_path, head="span"))


def test_cut_words_and_unknown_tags_are_told(encoder: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    class Listening:
        def __getattr__(self, name: str) -> Any:
            from adaptermix.progress import SILENT

            return notes.append if name == "note" else getattr(SILENT, name)

    (tmp_path / "dev.en.tsv").write_text("go\tB-new\tx\nnow\tB-time\tx\n")
    more = {"dev": [str(tmp_path / "dev.en.tsv")], "steps": 1, "max_length": 8}
    train_task(settings_for(SLOTS, encoder, tmp_path, **more), watch=Listening())
    assert any("words in 6 rows are beyond 8 tokens" in note for note in notes)
    assert any("1 words have tags that the head does not have, such as B-new" in note for note in notes)
