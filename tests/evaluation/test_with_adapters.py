"""Whole evaluations on a tiny model, against PEFT and transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    RetrieveSettings,
    TaskSettings,
    evaluate,
    merge,
    retrieve,
    train_align,
    train_task,
)
from adaptermix.adapters import open_adapter
from adaptermix.evaluation.retrieval import embed
from adaptermix.merging.on_model import acting
from adaptermix.models.base import load_base
from adaptermix.tasks import get_task, get_template
from tests.evaluation.test_retrieval import brute_force
from tests.factories import load_with_peft, peft_lora

from ..refusals import refuses
from ..scoring import count, micro_f1
from ..training.data import Notes, write_pairs, write_slots

read_slots = get_task("slots").read

TEXTS = {"en": ["wake me", "play some rather long song", "x"], "de": ["weck mich auf", "ja"]}


@pytest.fixture(scope="module")
def adapter(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "random"
    return peft_lora(causal, folder, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def write_rows(folder: Path) -> str:
    for language, texts in TEXTS.items():
        rows = [{"text": text, "slots": [{"type": "t", "value": text[:1]}]} for text in texts]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*.jsonl")


def evaluated(causal: Path, data: str, **more: object) -> EvaluateSettings:
    common = {"task": "slots", "max_new_tokens": 6, "dtype": "float32", "device": "cpu"}
    return EvaluateSettings(base=str(causal), data=[data], **(common | more))  # type: ignore[arg-type]


def test_answers_are_those_of_peft_one_prompt_at_a_time(causal: Path, adapter: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    found = evaluate(evaluated(causal, data, adapter=str(adapter), batch_size=2))
    model, tokenizer = load_with_peft(causal, adapter), AutoTokenizer.from_pretrained(causal)
    newline = tokenizer("\n")["input_ids"][0]
    task, rows = get_task("slots"), read_slots([data])[0]
    expected = []
    for row in rows:
        prompt = torch.tensor([get_template(get_task("slots"), "plain").encode({"text": row.text}, tokenizer)])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, newline],
            pad_token_id=0,
        )
        expected.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    assert found.answers == expected
    assert len(set(expected)) > 1
    assert found.answers != evaluate(evaluated(causal, data)).answers
    for language in TEXTS:
        counts = [
            count(task, row, answer)["pair_f1"]
            for row, answer in zip(rows, expected, strict=True)
            if row.language == language
        ]
        assert found.scores[language] == micro_f1(counts)
    assert [row.language for row in rows] == ["de", "de", "en", "en", "en"]


def test_the_document_has_what_the_contract_promises(causal: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adaptermix.json").write_text(json.dumps({"languages": {"supervised": ["en"], "aligned": ["en", "tr"]}}))
    found = evaluate(evaluated(causal, write_rows(tmp_path), adapter=str(adapter)))
    (adapter / "adaptermix.json").unlink()
    document = json.loads(json.dumps(found.document()))
    assert {"task", "metric", "scores", "groups"} <= set(document)
    assert (document["task"], document["metric"]) == ("slots", "pair_f1")
    assert set(document["scores"]) == set(TEXTS)
    assert all(set(score) == {"value", "low", "high", "n"} for score in document["scores"].values())
    assert {language: score["n"] for language, score in document["scores"].items()} == {"en": 3, "de": 2}
    assert set(document["groups"]) == {"supervised", "transfer", "all"}
    assert document["groups"]["transfer"] == document["scores"]["de"]["value"]
    assert set(document["metrics"]) == {"pair_f1", "type_f1"}


@pytest.mark.parametrize(
    "manifest",
    [
        {"languages": None, "task": None},
        {"languages": ["de"], "task": "slots"},
        {"languages": {"supervised": None}, "task": {"template": ["plain"]}},
        {"languages": {"supervised": [1]}, "task": {}},
        ["not a mapping"],
    ],
    ids=range(5),
)
def test_a_manifest_of_another_form_is_passed_over(
    causal: Path, adapter: Path, tmp_path: Path, manifest: object
) -> None:
    (adapter / "adaptermix.json").write_text(json.dumps(manifest))
    found = evaluate(evaluated(causal, write_rows(tmp_path), adapter=str(adapter), max_new_tokens=1))
    (adapter / "adaptermix.json").unlink()
    assert set(found.groups) == {"all"}


def test_files_that_an_adapter_was_trained_on_are_told_through_merges_too(causal: Path, tmp_path: Path) -> None:
    pairs, trained = write_pairs(tmp_path), write_slots(tmp_path)
    held_out = str(Path(write_rows(tmp_path)).parent / "de.jsonl")
    place: dict[str, Any] = {"base": str(causal), "dtype": "float32", "device": "cpu", "steps": 1, "batch_size": 3}
    train_task(TaskSettings(task="slots", train=[trained], out=str(tmp_path / "task"), **place))
    train_align(AlignSettings(pairs=pairs, out=str(tmp_path / "align"), **place))
    merge([str(tmp_path / "task"), str(tmp_path / "align")], weights=[0.9], out=tmp_path / "merged")
    copied = tmp_path / "other-name.en.jsonl"
    copied.write_bytes(Path(trained).read_bytes())
    for name in ("task", "merged"):
        for data, told in ((str(copied), 1), (held_out, 0)):
            notes = Notes()
            evaluate(evaluated(causal, data, adapter=str(tmp_path / name), rows=":1"), watch=notes)
            assert sum("was trained or chosen on" in note for note in notes.said) == told
    for damaged in ({"data": "x"}, {"data": [1, {}]}):
        (tmp_path / "task" / "adaptermix.json").write_text(json.dumps(damaged))
        evaluate(evaluated(causal, held_out, adapter=str(tmp_path / "task"), rows=":1"))


def test_answers_on_disk_are_not_replaced_unasked(causal: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    kept = tmp_path / "answers"
    kept.write_text("dear")
    for path, words in (
        (kept, "output.file-exists"),
        (tmp_path, "output.is-folder"),
        (tmp_path / "a" / "b", "output.no-parent"),
    ):
        with refuses(words):
            evaluate(evaluated(causal, data, predictions=str(path)))
    # nor is what is no file of answers, asked or not
    with refuses("replace.other-content: answers"):
        evaluate(evaluated(causal, data, predictions=str(kept), overwrite=True))
    assert kept.read_text() == "dear"
    kept.write_text('{"answer": "x"}\n')
    evaluate(evaluated(causal, data, predictions=str(kept), overwrite=True))
    assert len(kept.read_text().splitlines()) == 5


def test_the_template_is_that_of_the_adapter_unless_given(causal: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adaptermix.json").write_text(json.dumps({"task": {"name": "slots", "template": "mid-align"}}))
    data = write_rows(tmp_path)
    own = evaluate(evaluated(causal, data, adapter=str(adapter))).answers
    plain = evaluate(evaluated(causal, data, adapter=str(adapter), template="plain")).answers
    (adapter / "adaptermix.json").unlink()
    assert own == evaluate(evaluated(causal, data, adapter=str(adapter), template="mid-align")).answers
    assert own != plain == evaluate(evaluated(causal, data, adapter=str(adapter))).answers


def test_retrieval_equals_hidden_states_of_peft_and_a_double_loop(causal: Path, adapter: Path, tmp_path: Path) -> None:
    words = {
        "de": ["eins zwei", "drei", "vier und fünf", "sechs", "ab"],
        "en": ["one", "three", "four x", "six", "c d"],
    }
    for language, lines in words.items():
        (tmp_path / f"{language}.txt").write_text("\n".join(lines) + "\n")
    settings = {"data": [str(tmp_path / "*.txt")], "adapter": str(adapter), "neighbours": 3, "batch_size": 2}
    found = retrieve(RetrieveSettings(base=str(causal), dtype="float32", device="cpu", **settings))
    model, tokenizer = load_with_peft(causal, adapter), AutoTokenizer.from_pretrained(causal)

    @torch.no_grad()
    def vectors(text: str) -> torch.Tensor:
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        return torch.stack([state[0].double().mean(0) for state in states])

    tables = {language: torch.stack([vectors(text) for text in texts], 1) for language, texts in words.items()}
    document = found.document()
    assert list(document["layers"]) == [str(number) for number in range(5)]
    for number, entry in document["layers"].items():
        expected = {}
        for one, two in (("de", "en"), ("en", "de")):
            hits = brute_force(tables[one][int(number)], tables[two][int(number)], 3)
            expected[f"{one}-{two}"] = sum(i == hit for i, hit in enumerate(hits)) / 5
        assert entry["directions"] == pytest.approx(expected)
        assert entry["mean"] == pytest.approx(sum(expected.values()) / 2)
    assert document["headline"] == pytest.approx(
        (document["layers"]["2"]["mean"] + document["layers"]["4"]["mean"]) / 2
    )
    assert document["n"] == {"de-en": 5, "en-de": 5}


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_embeddings_do_not_depend_on_the_batch_size(kind: str, request: pytest.FixtureRequest) -> None:
    base = load_base(str(request.getfixturevalue(kind)), dtype="float32", device="cpu")
    texts = ["a longer sentence than the others", "ja", "Grüße", "日本", "x" * 30]
    one, *others = (embed(base, texts, batch_size=size, max_length=20) for size in (1, 2, 5, 64))
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert one.dtype == torch.float32


def test_long_sentences_are_cut(causal: Path) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    cut, short = embed(base, ["x" * 30, "x" * 20], batch_size=2, max_length=20).unbind(1)
    torch.testing.assert_close(cut, short)


def test_an_encoder_retrieves_but_does_not_answer(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "de-en.tsv").write_text("eins\teins\nzwei\tzwei\n")
    found = retrieve(RetrieveSettings(base=str(encoder), data=[str(tmp_path / "de-en.tsv")], device="cpu"))
    assert found.headline() == 1.0
    with refuses("model.not-causal: 'slots'"):
        evaluate(evaluated(encoder, write_rows(tmp_path)))


def test_a_comparison_is_that_of_two_evaluations(causal: Path, adapter: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    alone, with_adapter = evaluate(evaluated(causal, data)), evaluate(evaluated(causal, data, adapter=str(adapter)))
    found = evaluate(evaluated(causal, data, adapter=str(adapter), against="base"))
    assert found.answers == with_adapter.answers
    assert found.against is not None
    for language, difference in found.against.languages.items():
        expected = with_adapter.scores[language].value - alone.scores[language].value
        assert difference.value == pytest.approx(expected)
    assert found.document()["against"]["scores"] == alone.document()["scores"]
    itself = evaluate(evaluated(causal, data, adapter=str(adapter), against=str(adapter))).against
    assert itself is not None
    assert itself.overall.value == 0.0
    assert itself.overall.low < 0 < itself.overall.high


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_dora_acts_through_peft_and_leaves_the_model_as_it_was(causal: Path, tmp_path: Path) -> None:
    folder = peft_lora(causal, tmp_path / "dora", r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    tokens = torch.arange(3, 20)[None]
    base = load_base(str(causal), dtype="float32", device="cpu")
    before = base.model(tokens).logits
    with torch.no_grad(), acting(base, [open_adapter(folder)]):
        found = base.model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(found, load_with_peft(causal, folder)(tokens).logits)
        assert not torch.allclose(found, before)
        torch.testing.assert_close(base.model(tokens).logits, before)


def test_a_dora_of_another_base_is_refused(causal: Path, tmp_path: Path) -> None:
    from ..tiny import tiny_causal

    other = tiny_causal(tmp_path / "other", layers=6)
    folder = peft_lora(other, tmp_path / "dora", r=4, target_modules=["model.layers.5.mlp.down_proj"], use_dora=True)
    base = load_base(str(causal), dtype="float32", device="cpu")
    with refuses("adapter.not-for-base"), acting(base, [open_adapter(folder)]):
        pass
