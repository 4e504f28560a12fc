"""Token classification: which token a word's label stands at, the loss, and scores that equal seqeval's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.tasks import TokenTask, get_task
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.heads.tokens import first_places, repair, spelling_of
from adaptermix.tasks.ner_json import NerRow
from adaptermix.tasks.slots import SlotRow, iob2_tags
from adaptermix.tasks.tagged import iob2_spans

from ...refusals import refuses
from ...scoring import count, micro_f1
from ...tiny import tiny_causal

TAGS = ["O", "B-x", "I-x", "B-y", "I-y"]
some_tags = st.lists(st.sampled_from(TAGS), min_size=1, max_size=8)


def ner_row(tags: Sequence[str], words: Sequence[str] = ()) -> NerRow:
    tokens = tuple(words) or tuple(f"w{number}" for number in range(len(tags)))
    return NerRow(text=" ".join(tokens), entities=(), language="en", tokens=tokens, tags=tuple(tags))


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    head = Head(form=HEAD_FORMS["tokens"], labels=tuple(TAGS))
    return load_base(str(request.getfixturevalue(request.param)), device="cpu", dtype="float32", head=head)


@given(some_tags)
def test_tags_are_repaired_as_conlleval_reads_them(tags: list[str]) -> None:
    found = repair(tags)
    assert [(kind, start, stop - 1) for kind, start, stop in iob2_spans(found)] == get_entities(tags)
    assert repair(found) == found


@given(st.lists(st.tuples(some_tags, st.randoms()), min_size=1, max_size=4))
def test_scores_of_tags_equal_seqeval_even_where_words_repeat(rows: list[tuple[list[str], object]]) -> None:
    task = get_task("ner-json")
    assert isinstance(task, TokenTask)
    gold, guess, statistics = [], [], []
    for tags, random in rows:
        row = ner_row(repair(tags), ["w"] * len(tags))
        found = repair([random.choice(TAGS) for _ in tags])  # type: ignore[attr-defined]
        statistics.append(count(task, row, task.answer_from_tags(row, found))["entity_f1"])
        gold.append(list(row.tags))
        guess.append(list(found))
    if any(set(tags) != {"O"} for tags in gold + guess):
        expected = f1_score(gold, guess, mode="strict", scheme=IOB2, zero_division=0)
        assert micro_f1(statistics).value == pytest.approx(expected)


@given(some_tags)
def test_the_right_tags_score_one_whatever_the_words(tags: list[str]) -> None:
    task = get_task("slots")
    assert isinstance(task, TokenTask)
    tags = list(repair(tags))
    kinds = tuple(tag if tag == "O" else tag[2:] for tag in tags)
    begins = tuple(place for place, tag in enumerate(tags) if tag[0] == "B")
    words = tuple(["a: b", "; c", "a: b", "d"][number % 4] for number in range(len(tags)))
    spans = [(kind, " ".join(words[start:stop])) for kind, start, stop in iob2_spans(tags)]
    row = SlotRow(text=" ".join(words), slots=tuple(spans), language="en", tokens=words, tags=kinds, starts=begins)
    assert iob2_tags(row) == tuple(tags)
    found = count(task, row, task.answer_from_tags(row, task.tags(row)))
    assert [statistics[1:] for statistics in found.values()] == [(0, 0)] * 3


def test_characters_are_tagged_where_words_are_annotated(tmp_path: Path) -> None:
    text = "# text = 明天 早上 play\n1\t明天\tx\tB-date\n2\t早上\tx\tI-date\n3\tplay\tx\tB-verb\n"
    (tmp_path / "zh.conll").write_text(text)
    task = get_task("slots")
    assert isinstance(task, TokenTask)
    row = task.read([str(tmp_path / "zh.conll")], rows=None)[0][0]
    assert task.tags(row) == ("B-date", "I-date", "I-date", "I-date", "B-verb")
    found = count(task, row, task.answer_from_tags(row, task.tags(row)))
    assert found == dict.fromkeys(("pair_f1", "type_f1", "span_f1"), (2, 0, 0))
    assert count(task, row, task.answer_from_tags(row, ["B-date", "B-date", "I-date", "I-date", "O"]))["pair_f1"] == (
        0,
        2,
        2,
    )


def test_slots_of_one_type_that_touch_stay_two() -> None:
    row = SlotRow(text="a b", slots=(), language="en", tokens=("a", "b"), tags=("x", "x"), starts=(0, 1))
    assert iob2_tags(row) == ("B-x", "B-x")


def test_an_answer_of_tags_is_the_text_that_a_model_would_generate() -> None:
    slots, ner = get_task("slots"), get_task("ner-json")
    assert isinstance(slots, TokenTask)
    assert isinstance(ner, TokenTask)
    words = SlotRow(text="go to Rome", slots=(), language="en", tokens=("go", "to", "Rome"), tags=("O",) * 3)
    assert slots.answer_from_tags(words, ["O", "O", "B-city"]) == "city: Rome"
    assert slots.answer_from_tags(words, ["O", "O", "O"]) == "None"
    row = ner_row(["O", "O"], ["Ada", "Byron"])
    assert ner.answer_from_tags(row, ["B-PER", "I-PER"]) == '[{"TypeName": "PER", "Text": "Ada Byron"}]'


def test_the_loss_is_that_of_transformers_with_the_first_sub_word_labelled(base: BaseModel) -> None:
    rows = [ner_row(["B-x", "I-x", "O"], ["Ada", "Byron", "sleeps"]), ner_row(["O", "B-y"], ["in", "a"])]
    encoded = HEADS["tokens"].encode(base, get_task("ner-json"), rows, max_length=64, teach=True)
    spelled = [[rows[0].tokens[0], " Byron", " sleeps"], ["in", " a"]]
    batch = base.tokenizer(spelled, is_split_into_words=True, padding=True, padding_side="right", return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        ids = batch.word_ids(number)
        for place, word in enumerate(ids):
            if word is not None and (place == 0 or ids[place - 1] != word):
                labels[number, place] = TAGS.index(row.tags[word])
    with torch.no_grad():
        theirs = base.model(**batch, labels=labels).loss
        torch.testing.assert_close(encoded.loss([0, 1]), theirs)
        torch.testing.assert_close(encoded.loss([1, 0]), theirs)
        logits = base.model(**batch).logits
    first = [[place for place, gold in enumerate(row) if gold >= 0] for row in labels.tolist()]
    for number, (row, answer) in enumerate(zip(rows, encoded.answers([0, 1]), strict=True)):
        tags = repair([TAGS[int(logits[number, place].argmax())] for place in first[number]])
        assert answer == get_task("ner-json").answer_from_tags(row, tags)  # type: ignore[attr-defined]
    assert encoded.lengths == batch["attention_mask"].sum(1).tolist()
    assert encoded.notes == ()


def test_words_become_the_tokens_that_they_are_in_a_sentence(base: BaseModel) -> None:
    words = ["Ada", "sleeps", ",", "grün"]
    given = base.tokenizer(spelling_of(base.tokenizer)(words), is_split_into_words=True)["input_ids"]
    assert given == base.tokenizer(" ".join(words))["input_ids"]


def test_words_beyond_the_cut_are_outside_and_counted(base: BaseModel) -> None:
    rows = [ner_row(["B-x"] * 9, ["abc"] * 9), ner_row(["O"], ["a"])]
    encoded = HEADS["tokens"].encode(base, get_task("ner-json"), rows, max_length=14, teach=True)
    kept = 14 // 4 if base.kind == "causal" else 12 // 4
    assert encoded.notes == (
        f"{9 - kept - 1} words in 1 rows are beyond 14 tokens, or have no token; the head cannot learn or label them.",
    )
    assert max(encoded.lengths) == 14
    assert len(encoded.answers([0])[0].tags) == 9  # type: ignore[attr-defined]
    assert set(encoded.answers([0])[0].tags[kept + 1 :]) == {"O"}  # type: ignore[attr-defined]
    assert torch.isfinite(encoded.loss([0, 1]))


def test_a_word_without_tokens_has_no_place() -> None:
    assert first_places([None, 0, 2, 2, None], 4) == [1, None, 2, None]


def test_labels_are_both_tags_of_every_type_and_strays_are_outside() -> None:
    tokens, task = HEADS["tokens"], get_task("ner-json")
    assert tokens.labels(task, [ner_row(["I-z", "B-b"]), ner_row(["B-a"])]) == ("O", "B-a", "I-a", "B-b", "I-b")
    assert tokens.labels(task, []) == ()
    with refuses("head.no-tokens: 'a b'"):
        tokens.labels(task, [NerRow(text="a b", entities=(), language="en")])


def test_tags_that_the_head_does_not_have_are_passed_over_and_counted(base: BaseModel) -> None:
    encode, task = HEADS["tokens"].encode, get_task("ner-json")
    rows = [ner_row(["B-new", "I-new", "O", "B-x"]), ner_row(["B-new"])]
    encoded = encode(base, task, rows, max_length=64, teach=True)
    assert "3 words have tags that the head does not have, such as B-new" in encoded.notes[0]
    without = encode(base, task, [ner_row(["O", "O", "O", "B-x"])], max_length=64, teach=True)
    assert encoded.loss([0]) != without.loss([0])
    assert encoded.loss([1]) == 0
    assert encode(base, task, rows, max_length=64).notes == ()
    with refuses("head.no-tag"):
        encode(base, task, rows[1:], max_length=64, teach=True)


def test_slow_tokenizers_are_refused_and_models_without_such_a_head_get_one(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, ByT5Tokenizer

    AutoModel.from_pretrained(encoder).save_pretrained(tmp_path / "slow")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    head = Head(form=HEAD_FORMS["tokens"], labels=tuple(TAGS))
    with refuses("head.slow-tokenizer"):
        load_base(str(tmp_path / "slow"), device="cpu", head=head)
    gemma = tiny_causal(tmp_path / "gemma", "gemma3")
    made = load_base(str(gemma), device="cpu", head=head).head
    assert made is not None
    assert made.reader is not None
