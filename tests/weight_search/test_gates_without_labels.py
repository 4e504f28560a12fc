"""`merge --method fuse --objective agreement|entropy`: gates that are learned on pairs or texts without labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    merge_learned,
    search,
    train_align,
    train_task,
)
from adaptermix.adapters import open_adapter
from adaptermix.merging.on_model import acting
from adaptermix.models.base import load_base
from adaptermix.options import MergeSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.data import Pair
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.heads.from_adapters import head_of
from adaptermix.tasks.heads.tokens import repair
from adaptermix.weight_search.gate_data import AgreementLoss, EntropyLoss, Pairs
from adaptermix.weight_search.gates import group_of
from adaptermix.weight_search.pair_rows import PairRows
from tests.training.data import Notes, write_slots

from ..refusals import refuses
from .test_agreement import folder as folder  # noqa: PLC0414  (a fixture)
from .test_agreement import pairs_of, run

CLASSIFY = get_task("classify")


class Said:
    """Rows of which a head says what the test wants."""

    def __init__(self, probabilities: Sequence[Any]) -> None:
        self._logs = [torch.tensor(each, dtype=torch.float64).log() for each in probabilities]
        self.lengths = [1] * len(probabilities)
        self.texts: list[Any] = []
        self.notes = ()

    def loss(self, rows: Sequence[int]) -> Tensor:
        raise AssertionError("labels are not looked at")

    def terms(self, rows: Sequence[int]) -> int:
        raise AssertionError("labels are not looked at")

    def answers(self, rows: Sequence[int]) -> list[str]:
        raise AssertionError("answers are not looked at")

    def predictions(self, rows: Sequence[int]) -> list[Tensor]:
        return [self._logs[row] for row in rows]


def test_the_divergence_is_from_the_source_side_pooled_over_words() -> None:
    """Two source sides (of two and of one word) and two other sides, by float64 loops."""
    said = [[[0.8, 0.2], [0.4, 0.6]], [[0.1, 0.9]], [[0.7, 0.3]], [[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=2))
    loss = AgreementLoss(Said(said), pairs, Notes())
    means = [[sum(word[label] for word in row) / len(row) for label in range(2)] for row in said]
    rows = [3, 0, 2]
    wanted = 0.0
    for row in rows:
        teacher = means[(0, 1, 0, 1)[row]]
        wanted += sum(p * math.log(p / q) for p, q in zip(teacher, means[row], strict=True)) / len(rows)
    found = loss(rows)
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)
    assert found.terms == loss.terms(rows) == 3
    assert float(loss([0, 1]).loss) == pytest.approx(0, abs=1e-12)  # the source side agrees with itself


def test_the_entropy_is_that_of_each_word() -> None:
    said = [[[0.8, 0.2], [0.4, 0.6]], [[0.1, 0.9]]]
    words = [word for row in said for word in row]
    wanted = sum(-p * math.log(p) for word in words for p in word) / 3
    loss = EntropyLoss(Said(said))
    assert float(loss([0, 1]).loss) == pytest.approx(wanted, abs=1e-12)
    assert loss([0, 1]).terms == loss.terms([0, 1]) == 3


def test_gates_have_the_slope_of_the_divergence(encoder: Path, folder: Path) -> None:
    """Against an explicit computation: logits of each text by itself, probabilities and divergence in float64."""
    sources = [open_adapter(folder / name) for name in ("task", "align")]
    base = load_base(str(encoder), device="cpu", dtype="float32", head=head_of(CLASSIFY, sources, []))
    texts = {"de": ["gut 1", "schlecht 2 und mehr"], "en": ["good 1", "bad 2"]}
    found = [Pair(languages=("de", "en"), source=a, target=b) for a, b in zip(texts["de"], texts["en"], strict=True)]
    pairs = PairRows.of(CLASSIFY, found)

    def probabilities(text: str) -> Tensor:
        logits: Tensor = base.model(**base.tokenizer(text, return_tensors="pt")).logits[0]
        return logits.double().softmax(-1)

    with acting(base, sources) as attached:
        attached.set_weights([1.0, 0.0])
        encoded = HEADS["classes"].encode(base, CLASSIFY, pairs.rows, max_length=64)
        loss = AgreementLoss(encoded, pairs, Notes())
        with torch.no_grad():
            teacher = [probabilities(text) for text in texts["en"]]
        gates = attached.learn(lambda module: group_of("layer", module), [0.5, -0.5])
        loss([0, 1, 2, 3]).loss.backward()
        slopes = {name: gate.grad.clone() for name, gate in gates.items() if gate.grad is not None}
        assert set(slopes) == set(gates)
        for gate in gates.values():
            gate.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for side in ("en", "de"):
            for p, text in zip(teacher, texts[side], strict=True):
                total = total + (p * (p.log() - probabilities(text).log())).sum() / 4
        total.backward()
        assert float(total.detach()) > 1e-4
        for name, gate in gates.items():
            torch.testing.assert_close(slopes[name], gate.grad, rtol=1e-3, atol=1e-6)


def settings(encoder: Path, folder: Path, out: Path, **more: Any) -> MergeSettings:
    common: dict[str, Any] = {
        "adapters": [str(folder / "task"), str(folder / "align")],
        "weights": [1.0, 0.2],
        "method": "fuse",
        "options": {"steps": 30, "rate": 0.1},
        "base": str(encoder),
        "task": "classify",
        "device": "cpu",
        "out": str(out),
    }
    return MergeSettings(**common | more)


def accuracy(encoder: Path, adapter: Path, data: Path) -> float:
    asked = EvaluateSettings(base=str(encoder), adapter=str(adapter), task="classify", data=[str(data)], device="cpu")
    return evaluate(asked).overall.value


def test_pairs_alone_teach_the_other_language_and_keep_the_source(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused"
    words = ["merge", str(folder / "task"), str(folder / "align"), "--method", "fuse", "--weights", "1,0.6"]
    words += ["--base", str(encoder), "--task", "classify", "--device", "cpu", "--set", "steps=40", "rate=0.05"]
    words += ["--objective", "agreement", "--pairs", str(folder / "de-en.tsv"), "--rows", ":20"]
    run([*words, "--dev-pairs", str(folder / "de-en.tsv"), "--json", "--out", str(out)])
    assert json.loads(capsys.readouterr().out)["method"] == "fuse"
    document = json.loads((out / "adaptermix.json").read_text())
    fuse = document["fuse"]
    assert fuse["objective"] == "agreement"
    assert fuse["losses"]["dev"] < fuse["losses"]["dev_start"] / 10
    assert [entry["name"] for entry in fuse["learned_on"]] == ["de-en.tsv"]
    assert fuse["learned_on"][0]["rows"] == 20
    assert document["languages"] == {"supervised": ["en"], "aligned": ["de", "en"]}
    assert {"de-en.tsv"} == {entry["name"] for entry in document["dev"]}
    before = accuracy(encoder, folder / "task", folder / "rows.de.csv")
    assert accuracy(encoder, out, folder / "rows.de.csv") > before + 0.2
    assert accuracy(encoder, out, folder / "rows.en.csv") == 1


def test_entropy_falls_and_labels_are_not_looked_at(encoder: Path, folder: Path, tmp_path: Path) -> None:
    rows = (folder / "rows.de.csv").read_text()
    turned = tmp_path / "turned.de.csv"
    turned.write_text(rows.replace("positive", "?").replace("negative", "positive").replace("?", "negative"))
    texts = tmp_path / "texts.de.txt"
    texts.write_text("".join(f"{line.split(',')[0]}\n" for line in rows.splitlines()[1:]))
    found = []
    for number, more in enumerate(
        ({"train": [str(folder / "rows.de.csv")]}, {"train": [str(turned)]}, {"texts": [str(texts)]})
    ):
        merge_learned(settings(encoder, folder, tmp_path / str(number), objective="entropy", **more))
        document = json.loads((tmp_path / str(number) / "adaptermix.json").read_text())
        found.append(document["fuse"]["gates"])
        assert document["fuse"]["losses"]["last"] < document["fuse"]["losses"]["first"]
        assert Path(next(iter(more.values()))[0]).name in {entry["name"] for entry in document["data"]}
    assert found[0] == found[1] == found[2]


def test_a_few_texts_are_enough_and_no_text_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.de.txt"
    texts.write_text("gut 1\nschlecht 2\n")
    merge_learned(settings(encoder, folder, tmp_path / "out", objective="entropy", texts=[str(texts)]))
    assert json.loads((tmp_path / "out" / "adaptermix.json").read_text())["fuse"]["objective"] == "entropy"
    texts.write_text("\n \n")
    with refuses("gates.no-text"):
        merge_learned(settings(encoder, folder, tmp_path / "no", objective="entropy", texts=[str(texts)]))


def test_generated_answers_are_taught_to_both_sides(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task adapter that answers everything alike is learned at once, so the loss of a gate at 1 is small."""
    common: dict[str, Any] = {"base": str(causal), "device": "cpu", "dtype": "float32", "rank": 4, "dropout": 0.0}
    more = {"task": "slots", "train": [write_slots(tmp_path, "train.en.jsonl")], "batch_size": 8, "learning_rate": 2e-2}
    train_task(TaskSettings(**common, **more, steps=30, out=str(tmp_path / "task")))
    train_task(TaskSettings(**common, **more, steps=2, out=str(tmp_path / "align")))
    (tmp_path / "de-en.tsv").write_text("".join(f"wecke mich um {n}\twake me at {n}\n" for n in range(6)))
    asked = settings(causal, tmp_path, tmp_path / "out", task="slots", objective="agreement", options={"steps": 4})
    asked = asked.model_copy(update={"pairs": [str(tmp_path / "de-en.tsv")], "weights": [0.5, 0.5]})
    with refuses("agreement.constant: 6.*en"):
        merge_learned(asked)
    monkeypatch.setattr(Pairs, "_require_differences", lambda *_: None)
    merge_learned(asked)
    fuse = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["fuse"]
    assert fuse["losses"]["last"] < fuse["losses"]["first"]
    texts = [str(tmp_path / "train.en.jsonl")]
    with refuses("gates.entropy"):
        merge_learned(settings(causal, tmp_path, tmp_path / "no", task="slots", objective="entropy", train=texts))


def test_a_head_that_tags_words_is_compared_by_the_bag_of_its_tags(encoder: Path, tmp_path: Path) -> None:
    rows = [f"wake me at {n} am\tO O O B-time I-time\tx" for n in range(12)]
    rows += [f"play song {n} now\tO O O O\tx" for n in range(12)]
    (tmp_path / "train.en.tsv").write_text("\n".join(rows) + "\n")
    lines = [f"um {n} uhr wecken\twake me at {n} am\n" for n in range(12)]
    (tmp_path / "de-en.tsv").write_text("".join([*lines, *(f"spiele {n}\tplay song {n} now\n" for n in range(12))]))
    common: dict[str, Any] = {"base": str(encoder), "device": "cpu", "dtype": "float32", "rank": 4, "dropout": 0.0}
    more = {"task": "slots", "train": [str(tmp_path / "train.en.tsv")], "batch_size": 8, "learning_rate": 1e-2}
    train_task(TaskSettings(**common, **more, steps=40, out=str(tmp_path / "task")))
    train_align(
        AlignSettings(**common, pairs=[str(tmp_path / "de-en.tsv")], steps=5, batch_size=4, out=str(tmp_path / "align"))
    )
    sources, task = [open_adapter(tmp_path / name) for name in ("task", "align")], get_task("slots")
    base = load_base(str(encoder), device="cpu", dtype="float32", head=head_of(task, sources, []))
    words = [task.unlabelled(text, "en") for text in ("wake me at 7 am", "at 3")]  # type: ignore[attr-defined]
    with acting(base, sources[:1]), torch.no_grad():
        encoded = HEADS["tokens"].encode(base, task, words, max_length=64)
        found = encoded.predictions([1, 0])  # type: ignore[attr-defined]
        tags = encoded.answers([1, 0])
    assert [len(each) for each in found] == [2, 5]
    for logs, answer in zip(found, tags, strict=True):
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(len(logs)))
        assert repair([base.labels[place] for place in logs.argmax(-1).tolist()]) == answer.tags  # type: ignore[attr-defined]
    asked = {
        "task": "slots",
        "objective": "agreement",
        "pairs": [str(tmp_path / "de-en.tsv")],
        "options": {"steps": 20},
    }
    merge_learned(settings(encoder, tmp_path, tmp_path / "out", **asked, dev_pairs=asked["pairs"]))
    losses = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["fuse"]["losses"]
    assert losses["dev"] < losses["dev_start"]
    found_by_types = search(
        SearchSettings(
            adapters=[str(tmp_path / name) for name in ("task", "align")],
            base=str(encoder),
            task="slots",
            objective="agreement",
            pairs=asked["pairs"],
            grid=[0.0, 1.0],
            device="cpu",
            out=str(tmp_path / "found"),
        )
    )
    assert found_by_types.metric == "agreement (type_f1)"
    assert found_by_types.baseline_languages["en"].value == 1
    assert found_by_types.kept == [False, True]


def test_what_does_not_do_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    pairs, rows = [str(folder / "de-en.tsv")], [str(folder / "rows.en.csv")]
    for more, says in (
        ({"objective": "agreement"}, "gates.no-rows: --pairs"),
        ({"objective": "entropy"}, "gates.no-rows: --texts or --train"),
        ({"objective": "agreement", "train": rows}, "gates.data: --pairs.*--train.*is"),
        ({"pairs": pairs}, "gates.data: task.*--train.*--pairs.*is"),
        ({"train": rows, "pairs": pairs}, "gates.data: --train.*and --pairs are"),
        ({"objective": "agreement", "pairs": pairs, "dev": rows, "dev_pairs": pairs}, "gates.two-devs"),
        ({"objective": "entropy", "texts": pairs, "rows": ":3"}, "option.rows-unused"),
        ({"objective": "entropy", "texts": pairs, "task": "nli"}, "gates.texts-task: nli"),
        ({"objective": "agreement", "pairs": pairs, "task": "nli"}, "task.not-comparable"),
        ({"method": "exact", "options": {}, "task": None, "objective": "entropy"}, "gates.option: objective"),
        ({"method": "exact", "options": {}, "task": None, "pairs": pairs}, "gates.option: pairs"),
    ):
        with refuses(says):
            merge_learned(settings(encoder, folder, tmp_path / "no", **more))  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()


def test_a_task_adapter_that_answers_all_alike_teaches_no_gates(encoder: Path, folder: Path, tmp_path: Path) -> None:
    lines = [f"gut {n}\tgood {n}\n" for n in range(6)]  # to all of which the answer is "positive"
    (tmp_path / "de-en.tsv").write_text("".join(lines))
    more: dict[str, Any] = {"objective": "agreement", "pairs": [str(tmp_path / "de-en.tsv")]}
    with refuses("agreement.constant: 6.*en.*'positive'"):
        merge_learned(settings(encoder, folder, tmp_path / "no", **more))
    assert not (tmp_path / "no").exists()
