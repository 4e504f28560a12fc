"""Heads that grade documents: expected relevance, the loss, padding, and parts of speech from a head of plain tags."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptermix import evaluate, train_task
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.options import EvaluateSettings, TaskSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.ranking import RankingRow
from adaptermix.tasks.tagged import TaggedRow

from ...refusals import refuses

TASK = get_task("ranking")
ROWS = [
    RankingRow(query="rad", documents=("Rad Bei uns.", "Rom"), relevance=(3, 0), language="de"),
    RankingRow(query="rom", documents=("Rom", "eine lange Seite", "x"), relevance=(1, 0, 7), language="de"),
]


def loaded(folder: Path, form: str, *labels: str) -> BaseModel:
    return load_base(str(folder), device="cpu", dtype="float32", head=Head(form=HEAD_FORMS[form], labels=labels))


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return loaded(request.getfixturevalue(request.param), "classes", "0", "1", "3")


def test_documents_are_scored_by_their_expected_relevance(base: BaseModel) -> None:
    encoded = HEADS["classes"].encode(base, TASK, ROWS, max_length=64, teach=True)
    base.model.eval()
    with torch.no_grad():
        together, alone = encoded.answers([1, 0]), [encoded.answers([row])[0] for row in (1, 0)]
        logits = [
            [base.model(**base.tokenizer(row.query, text, return_tensors="pt")).logits[0] for text in row.documents]
            for row in ROWS
        ]
        loss = float(encoded.loss([0, 1]))
    for answer, single, row in zip(together, alone, (1, 0), strict=True):
        expected = [float(each.softmax(-1) @ torch.tensor([0.0, 1.0, 3.0])) for each in logits[row]]
        assert [float(number) for number in answer.split()] == pytest.approx(expected, abs=1e-4)
        assert [float(number) for number in single.split()] == pytest.approx(expected, abs=1e-4)
    # The head lacks grade 7, so the last document does not count.
    gold = [(0, 0, 2), (0, 1, 0), (1, 0, 1), (1, 1, 0)]
    assert encoded.terms([0, 1]) == len(gold)
    expected = [-float(logits[row][document].log_softmax(-1)[grade]) for row, document, grade in gold]
    assert loss == pytest.approx(sum(expected) / len(gold), abs=1e-4)
    assert len(encoded.notes) == 1
    assert "1 of 5 (de 1)" in encoded.notes[0]


def test_heads_of_other_labels_cannot_rank(encoder: Path) -> None:
    with refuses("head.no-grades: 'yes'"):
        HEADS["classes"].encode(loaded(encoder, "classes", "0", "yes"), TASK, ROWS, max_length=64)
    with refuses("head.no-label"):
        HEADS["classes"].encode(loaded(encoder, "classes", "4", "5"), TASK, ROWS, max_length=64, teach=True)


def test_a_head_of_plain_tags_gives_each_word_one(encoder: Path) -> None:
    base, task = loaded(encoder, "tokens", "NOUN", "VERB"), get_task("pos")
    row = TaggedRow(text="a b c", tokens=("a", "b", "c"), tags=("NOUN", "VERB", "NOUN"), language="en")
    assert HEADS["tokens"].labels(task, [row]) == ("NOUN", "VERB")
    encoded = HEADS["tokens"].encode(base, task, [row], max_length=4)  # [CLS] a b [SEP]
    with torch.no_grad():
        (answer,) = encoded.answers([0])
    assert set(answer.split()[:2]) <= {"NOUN", "VERB"}
    assert answer.split()[2:] == ["_"]


DATA = {
    "ranking": "".join(
        f"{q}\t{'ja' if good else 'nein'} {q}\t{4 * good}\n" for q in ("rad", "rom", "ei") for good in (0, 1)
    ),
    "pos": "ja\tINTJ\n.\tPUNCT\n\nrot\tADJ\n.\tPUNCT\n",
    "pairs": "rad\tja\tyes\nrad\tnein\tno\nrom\tja\tyes\nrom\tnein\tno\n",
}


@pytest.mark.parametrize("name", DATA)
def test_an_encoder_learns_the_task(encoder: Path, tmp_path: Path, name: str) -> None:
    data, out = tmp_path / "de.tsv", str(tmp_path / "out")
    data.write_text(DATA[name], encoding="utf-8")
    common = {"base": str(encoder), "task": name, "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(train=[str(data)], out=out, steps=60, batch_size=4, learning_rate=1e-2, **common))  # type: ignore[arg-type]
    found = evaluate(EvaluateSettings(data=[str(data)], adapter=out, metric=None, **common))  # type: ignore[arg-type]
    assert found.overall.value == pytest.approx(1)
