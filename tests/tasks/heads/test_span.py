"""Question answering by a head: windows, the loss, and the best span of all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.tasks import get_task
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.heads.span import LONGEST_ANSWER, OVERLAP, best_span, cut_windows
from adaptermix.tasks.qa import UNANSWERABLE, QaRow

from ...refusals import refuses

QA = get_task("qa")


def qa_row(context: str, answer: str | None, question: str = "Who?") -> QaRow:
    start = context.find(answer) if answer else -1
    return QaRow(
        question=question,
        context=context,
        answers=(answer,) if answer else (),
        language="en",
        spans=((start, start + len(answer)) if start >= 0 else None,) if answer else (),
    )


@pytest.fixture(scope="module")
def base(encoder: Path) -> BaseModel:
    return load_base(str(encoder), device="cpu", dtype="float32", head=Head(form=HEAD_FORMS["span"], labels=("span",)))


@given(st.data())
def test_the_best_span_is_that_of_a_search_through_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    numbers = st.lists(st.integers(-9, 9).map(float), min_size=count, max_size=count)
    starts, ends = (torch.tensor(data.draw(numbers)) for _ in range(2))
    allowed = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    spans = [
        (float(starts[first] + ends[last]), first, last)
        for first in range(count)
        for last in range(first, min(count, first + LONGEST_ANSWER))
        if allowed[first] and allowed[last]
    ]
    score, first, last = best_span(starts, ends, allowed)
    assert (score, first, last) in spans
    assert score == max(spans)[0]


def words(count: int) -> str:
    return " ".join(f"w{number}ü" for number in range(count))


@pytest.mark.parametrize("length", [40, 64, 400])
@pytest.mark.parametrize("question", ["Who?", "Who, of all that were there, was it in the end that did so? " * 3])
def test_windows_hold_the_whole_text_and_overlap(base: BaseModel, length: int, question: str) -> None:
    tokenizer = base.tokenizer
    context = words(150)
    windows = cut_windows(base, question, context, length)
    assert len(windows) > 1
    parts = []
    for window in windows:
        ids = window.features["input_ids"]
        assert len(ids) == len(window.spans) <= length
        assert ids[window.null] == tokenizer.cls_token_id
        parts.append([place for place in window.spans if place])
        asked = sum(place is None for place in window.spans) - 3
        assert asked == min(len(tokenizer(question, add_special_tokens=False)["input_ids"]), length // 2)
    assert {place for part in parts for place in part} == set(
        tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )
    room = length - 3 - asked
    for one, two in pairwise(parts):
        shared = [place for place in one if place >= two[0]]
        assert len(shared) == pytest.approx(min(OVERLAP, room // 2), abs=1)  # a letter may be two tokens


def test_an_answer_is_found_again_in_every_window_that_holds_it_whole(base: BaseModel) -> None:
    context = words(60)
    windows = cut_windows(base, "Who?", context, 64)
    for answer in ("w0ü", "w59ü", "w30ü w31ü", "ü w7", "w12ü w13ü w14ü"):
        span = context.index(answer), context.index(answer) + len(answer)
        found = 0
        for window in windows:
            first, last = window.tokens_of(span)
            here = [place for place in window.spans if place]
            if here[0][0] <= span[0] and span[1] <= here[-1][1]:
                begin, end = window.spans[first], window.spans[last]
                assert begin is not None
                assert end is not None
                assert context[begin[0] : end[1]].strip() == answer
                found += 1
            else:
                assert (first, last) == (window.null, window.null)
        assert found
    assert {window.tokens_of(None) for window in windows} == {(0, 0)}


def loss_alone(base: BaseModel, features: dict[str, list[int]], first: int, last: int) -> torch.Tensor:
    """Transformers' loss of a window without padding, which it would count as places where an answer may stand."""
    batch = {name: torch.tensor([ids]) for name, ids in features.items()}
    loss: torch.Tensor = base.model(
        **batch, start_positions=torch.tensor([first]), end_positions=torch.tensor([last])
    ).loss
    return loss


def test_the_loss_is_that_of_transformers_where_a_window_is_enough(base: BaseModel) -> None:
    rows = [qa_row("Ada wrote programs.", "Ada"), qa_row("It was grün, said Eve.", "grün"), qa_row("No.", None)]
    encoded = HEADS["span"].encode(base, QA, rows, max_length=128, teach=True)
    batch = base.tokenizer(
        [row.question for row in rows], [row.context for row in rows], padding=True, return_tensors="pt"
    )
    starts, ends = [], []
    for number, row in enumerate(rows):
        if not row.answers:
            starts.append(0)
            ends.append(0)
            continue
        begin = row.context.index(row.answers[0])
        starts.append(batch.char_to_token(number, begin, 1))
        last = len(row.answers[0].encode()) - 1  # one token per byte
        ends.append(starts[-1] + last)
    with torch.no_grad():
        theirs = [
            loss_alone(base, one.features, start, end)
            for (one,), start, end in zip(encoded._windows, starts, ends, strict=True)
        ]
        torch.testing.assert_close(encoded.loss([0, 1, 2]), torch.stack(theirs).mean())
    assert encoded.lengths == batch["attention_mask"].sum(1).tolist()


def test_windows_are_taught_the_answer_where_they_hold_it_and_null_elsewhere(base: BaseModel) -> None:
    row = qa_row(words(30), "w25ü")
    encoded = HEADS["span"].encode(base, QA, [row], max_length=64, teach=True)
    windows = cut_windows(base, row.question, row.context, 64)
    gold = [window.tokens_of(row.spans[0]) for window in windows]
    assert (0, 0) in gold
    assert len(set(gold)) > 1
    with torch.no_grad():
        theirs = [loss_alone(base, window.features, *place) for window, place in zip(windows, gold, strict=True)]
        torch.testing.assert_close(encoded.loss([0]), torch.stack(theirs).mean())


def test_what_a_window_is_taught_does_not_depend_on_its_batch(base: BaseModel) -> None:
    """With padding among the places where an answer may stand, a short window beside a long one has a larger loss."""
    rows = [qa_row("Ada is.", "Ada"), qa_row(words(12), "w11ü")]
    encoded = HEADS["span"].encode(base, QA, rows, max_length=128, teach=True)
    with torch.no_grad():
        torch.testing.assert_close(encoded.loss([0, 1]), (encoded.loss([0]) + encoded.loss([1])) / 2)


def test_an_answer_that_no_window_holds_whole_is_not_taught_as_no_answer(base: BaseModel) -> None:
    rows = [qa_row(words(30), words(25)), qa_row(words(30), "w25ü")]
    encoded = HEADS["span"].encode(base, QA, rows, max_length=64, teach=True)
    assert encoded.notes == (
        "1 of 2 rows have answers too long for a window of 64 tokens (--max-length); the loss passes over them.",
    )
    assert encoded.terms([0]) == 0
    assert encoded.terms([0, 1]) == len(encoded.texts[1])
    with torch.no_grad():
        torch.testing.assert_close(encoded.loss([0, 1]), encoded.loss([1]))
    with refuses("head.no-window: 64"):
        HEADS["span"].encode(base, QA, rows[:1], max_length=64, teach=True)


def by_hand(base: BaseModel, row: QaRow, length: int) -> tuple[float, str, float]:
    """Best score and text over all windows, and the least score of "no answer", by a plain search."""
    best, text, nothing = -torch.inf, "", torch.inf
    for window in cut_windows(base, row.question, row.context, length):
        with torch.no_grad():
            found = base.model(**{name: torch.tensor([ids]) for name, ids in window.features.items()})
        starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        nothing = min(nothing, starts[window.null] + ends[window.null])
        for first, begin in enumerate(window.spans):
            for last, end in enumerate(window.spans[first : first + LONGEST_ANSWER], first):
                if begin and end and starts[first] + ends[last] > best:
                    best, text = starts[first] + ends[last], row.context[begin[0] : end[1]]
    return best, text, nothing


def test_answers_are_the_best_over_all_windows(base: BaseModel) -> None:
    rows = [qa_row(words(count), None, f"What {count}?") for count in (40, 3, 9, 25)]
    encoded = HEADS["span"].encode(base, QA, rows, max_length=64)
    expected = [by_hand(base, row, 64) for row in rows]
    plain = [" ".join(text.split()) for _, text, _ in expected]
    assert encoded.answers([0, 1, 2, 3]) == plain
    assert encoded.answers([2, 0]) == [plain[2], plain[0]]


def test_a_head_that_was_taught_so_may_find_no_answer(encoder: Path) -> None:
    labels = ("span", "unanswerable")
    base = load_base(str(encoder), device="cpu", dtype="float32", head=Head(form=HEAD_FORMS["span"], labels=labels))
    rows = [qa_row(words(count), None, f"What {count}?") for count in range(2, 30)]
    expected = [by_hand(base, row, 64) for row in rows]
    found = HEADS["span"].encode(base, QA, rows, max_length=64).answers(range(len(rows)))
    assert found == [UNANSWERABLE if nothing > best else " ".join(text.split()) for best, text, nothing in expected]
    with torch.no_grad():  # now the bias decides
        base.model.qa_outputs.weight.zero_()
    assert UNANSWERABLE not in HEADS["span"].encode(base, QA, rows[:2], max_length=64).answers([0, 1])


def test_what_was_taught_decides_the_labels() -> None:
    answered, without = qa_row("Ada is.", "Ada"), qa_row("Ada is.", None)
    astray = qa_row("Ada is.", "Eve")
    assert HEADS["span"].labels(QA, [answered, astray]) == ("span",)
    assert HEADS["span"].labels(QA, [answered, without]) == ("span", "unanswerable")


def test_answers_that_are_not_in_their_texts_are_passed_over_and_counted(base: BaseModel) -> None:
    rows = [qa_row("Ada is.", "Ada"), qa_row("Ada is.", "Eve")]
    encoded = HEADS["span"].encode(base, QA, rows, max_length=64, teach=True)
    assert encoded.notes == ("1 rows have answers that do not occur in their texts; the loss ignores them.",)
    torch.testing.assert_close(encoded.loss([0, 1]), encoded.loss([0]))
    with refuses("head.no-answer"):
        HEADS["span"].encode(base, QA, rows[1:], max_length=64, teach=True)
    assert HEADS["span"].encode(base, QA, rows[1:], max_length=64).notes == ()


def test_what_leaves_no_room_is_refused_and_no_weight_is_random(base: BaseModel, causal: Path) -> None:
    with refuses("head.max-length"):
        cut_windows(base, "Who is it?", "Ada.", 6)
    head = Head(form=HEAD_FORMS["span"], labels=("span",))
    # transformers' class would not load the weights, so the head is one of this package
    made = load_base(str(causal), device="cpu", head=head).head
    assert made is not None
    assert made.reader is not None
