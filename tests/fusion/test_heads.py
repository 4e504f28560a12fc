"""Fusion where a head tags words or points at a part of a text: planted tasks that only the source tells."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from adaptermix.evaluation import evaluate
from adaptermix.fusion import read_sources
from adaptermix.fusion.bank import SourceBank
from adaptermix.fusion.source_rows import encode_sources
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.options import EvaluateSettings, FusionSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.heads.span import cut_windows
from adaptermix.training.fusion import train_fusion

from .test_laws import fuse

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NOISE = ["xqx", "zwz", "kvk", "jhj"]
PLAIN = {"fusion_alignment": "position", "fusion_norm": True, "fusion_offset": 0}


def write_slots(folder: Path, seed: int = 0, rows: int = 48, words: int = 5) -> None:
    """Tags by chance, words of the target by chance, and words of the source that say the tags."""
    draw = random.Random(seed)
    sides: dict[str, list[str]] = {"jv": [], "en": []}
    for _ in range(rows):
        tags = [draw.choice(["O", "B-city", "B-time"]) for _ in range(words)]
        says = {"O": "the", "B-city": "rom", "B-time": "now"}
        for side, text in (("jv", [draw.choice(NOISE) for _ in tags]), ("en", [says[tag] for tag in tags])):
            sides[side].append(f"{' '.join(text)}\t{' '.join(tags)}\tx\n")
    for side, lines in sides.items():
        (folder / f"{side}.tsv").write_text("".join(lines))


def write_ner(folder: Path, seed: int = 0) -> None:
    """The same, a word on a line."""
    write_slots(folder, seed)
    for side in ("jv", "en"):
        rows = [line.split("\t") for line in (folder / f"{side}.tsv").read_text().splitlines()]
        pairs = [zip(text.split(), tags.split(), strict=True) for text, tags, _ in rows]
        text = "\n".join("".join(f"{word}\t{tag}\n" for word, tag in row) for row in pairs)
        (folder / f"{side}.iob2").write_text(text)


def write_qa(folder: Path, seed: int = 0, rows: int = 24, words: int = 6, more: int = 0) -> None:
    """A place by chance, which the source marks; its text may have more words."""
    draw = random.Random(seed)
    sides: dict[str, list[dict[str, Any]]] = {"jv": [], "en": []}
    for _ in range(rows):
        place = draw.randrange(words)
        target = [f"{draw.choice(NOISE)}{number % 10}" for number in range(words)]
        source = ["...." if number != place else "this" for number in range(words)] + ["...."] * more
        for side, text in (("jv", target), ("en", source)):
            answer = {"text": text[place], "answer_start": 5 * place}
            sides[side].append({"question": "who?", "context": " ".join(text), "answers": [answer]})
    for side, found in sides.items():
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def write_long_qa(folder: Path, seed: int = 0) -> None:
    """The same in texts that are longer than a window, the source's more so."""
    write_qa(folder, seed, rows=32, words=20, more=6)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task with its head."""

    task: str
    write: Callable[..., None]
    suffix: str
    steps: int = 150


SLOTS = Case(task="slots", write=write_slots, suffix="tsv", steps=300)
NER = Case(task="ner-json", write=write_ner, suffix="iob2", steps=300)
QA = Case(task="qa", write=write_qa, suffix="jsonl")
LONG = Case(task="qa", write=write_long_qa, suffix="jsonl", steps=250)


def settings(case: Case, base: Path, folder: Path, **more: Any) -> FusionSettings:
    common = {
        "base": str(base),
        "task": case.task,
        "train": [str(folder / f"jv.{case.suffix}")],
        "source": [str(folder / f"en.{case.suffix}")],
        "out": str(folder / "fused"),
        "device": "cpu",
        "dtype": "float32",
        "rank": 16,
        "dropout": 0.0,
        "learning_rate": 2e-2,
        "steps": case.steps,
        "batch_size": 8,
        "max_length": 64,
        "targets": ["query", "key", "value"],
    }
    return FusionSettings(**{**common, **more})


def answers(case: Case, base: Path, folder: Path, *, sources: bool = True, **more: Any) -> tuple[float, list[str]]:
    """Return the score and the answers on the rows that are in the folder now."""
    asked = EvaluateSettings(
        base=str(base),
        adapter=str(folder / "fused"),
        task=case.task,
        data=[str(folder / f"jv.{case.suffix}")],
        source=[str(folder / f"en.{case.suffix}")] if sources else [],
        device="cpu",
        dtype="float32",
        **more,
    )
    found = evaluate(asked)
    return found.overall.value, list(found.answers)


@pytest.mark.parametrize("case", [SLOTS, NER, QA, LONG], ids=["slots", "ner", "qa", "windows"])
def test_what_only_the_source_tells_is_found_on_other_rows(
    case: Case, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermix.tasks.heads.base.LONGEST", 64)
    case.write(tmp_path)
    train_fusion(settings(case, encoder, tmp_path))
    case.write(tmp_path, seed=1)
    value, found = answers(case, encoder, tmp_path)
    assert value > 0.9
    for size in (1, 5):
        assert answers(case, encoder, tmp_path, batch_size=size)[1] == found
    assert answers(case, encoder, tmp_path, sources=False)[0] < 0.6


@pytest.mark.parametrize("case", [SLOTS, LONG], ids=["slots", "windows"])
def test_gradient_checkpointing_gives_the_same_adapter(case: Case, encoder: Path, tmp_path: Path) -> None:
    """Activations are computed anew with the sources of the pass that they are of: of all windows."""
    case.write(tmp_path)
    dev = {"dev": [str(tmp_path / f"jv.{case.suffix}")], "dev_source": [str(tmp_path / f"en.{case.suffix}")]}
    found = []
    for twice in (False, True):
        more = {"steps": 5, "evaluate_every": 2, "overwrite": True, **dev}
        report = train_fusion(settings(case, encoder, tmp_path, gradient_checkpointing=twice, **more))
        assert any("dev_loss" in entry for entry in report.history)
        found.append(load_file(tmp_path / "fused" / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.fixture
def pointing(encoder: Path) -> BaseModel:
    """A base with a fused LoRA and a head that points."""
    head = Head(form=HEAD_FORMS["span"], labels=("span",))
    base = load_base(str(encoder), device="cpu", dtype="float32", head=head)
    fuse(base.model)
    return base


def test_windows_stand_beside_each_other_in_proportion(pointing: BaseModel, tmp_path: Path) -> None:
    """Three windows beside seven: the first, the third and the fifth."""
    task, base = get_task("qa"), pointing
    write_qa(tmp_path, rows=2, words=18, more=24)
    sides = {side: task.read([str(tmp_path / f"{side}.jsonl")], rows=None)[0] for side in ("jv", "en")}
    windows = {
        side: [cut_windows(base, *task.question_and_context(row), 64) for row in rows] for side, rows in sides.items()
    }
    counts = {side: [len(of_row) for of_row in found] for side, found in windows.items()}
    assert counts == {"jv": [3, 3], "en": [7, 7]}
    bank = SourceBank(
        base,
        encode_sources(base, task, "plain", sides["en"], 64),
        [[len(window.spans) for window in of_row] for of_row in windows["jv"]],
        PLAIN | {"fusion_alignment": "end"},
    )
    found = bank.of([1, 0])
    chosen = [windows["en"][row][place] for row in (1, 0) for place in (0, 2, 4)]
    targets = [window for row in (1, 0) for window in windows["jv"][row]]
    assert len(found.mask) == 6
    for place, (window, target) in enumerate(zip(chosen, targets, strict=True)):
        alone = {name: torch.tensor([values]) for name, values in window.features.items()}
        wanted = read_sources(base.model, alone, run=lambda given=alone: base.model.base_model(**given))
        count = len(window.spans)
        assert int(found.mask[place].sum()) == count
        assert int(found.lead[place]) == len(target.spans) - count  # last tokens beside each other
        for block, states in found.states.items():
            torch.testing.assert_close(states[place, :count], wanted.states[block][0], rtol=1e-4, atol=1e-5)
            assert not states[place, count:].any()


def test_texts_of_pairs_are_read_with_their_types(pointing: BaseModel, encoder: Path) -> None:
    """BERT tells the first text of a pair from the second by token types."""
    base = pointing
    pair, other = (
        dict(base.tokenizer(asked, "ada met eve", return_token_type_ids=True))
        for asked in ("who?", "and whom, if any?")
    )
    assert set(pair["token_type_ids"]) == {0, 1}
    found = SourceBank(base, [[pair], [other]], [[5], [5]], PLAIN).of([0, 1])
    plain = AutoModel.from_pretrained(encoder).eval()
    inputs = {name: torch.tensor([values]) for name, values in pair.items()}
    with torch.no_grad():
        states = plain(**inputs, output_hidden_states=True).hidden_states
        without = plain(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states
    for number, own in enumerate(found.states.values()):
        torch.testing.assert_close(own[0, : len(pair["input_ids"])], states[number][0], rtol=1e-4, atol=1e-5)
        assert float((states[number] - without[number]).abs().max()) > 1e-3
