"""The head that scores choices: which tokens it reads, texts that are too long, and its loss by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.tasks import get_task
from adaptermix.tasks.choice import ChoiceRow, marked
from adaptermix.tasks.heads.choices import ChoiceRows, shortened, token_span

from ...refusals import refuses

CHOICE = get_task("choice")


def row(context: str, question: str, *choices: str, right: int = 0) -> ChoiceRow:
    return ChoiceRow(context=context, question=question, choices=choices, right=right, language="de")


SHORT = row("It rains.", "Is it dry?", "yes", "no", right=1)
SUBSTRINGS = row("no one said no", "who said no?", "no", "no one", "one", "said no", right=1)


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    folder: Path = request.getfixturevalue(request.param)
    head = Head(form=HEAD_FORMS["choices"], labels=("choice",))
    return load_base(str(folder), device="cpu", dtype="float32", head=head)


def choices_read(base: BaseModel, rows: ChoiceRows, number: int) -> list[str]:
    """Texts of the tokens that the scores of a row are means over."""
    ids = rows.texts[number][0]["input_ids"]
    (weights,) = rows._weights([number], len(ids))
    return [base.tokenizer.decode([ids[token] for token in each.nonzero().flatten()]) for each in weights]


def test_the_tokens_of_each_choice_by_hand(base: BaseModel) -> None:
    # One token per byte, after the token that the encoder puts first: "It rains. Is it dry?\n1 yes\n2 no".
    first = 1 if base.kind == "encoder" else 0
    rows = ChoiceRows(base, CHOICE, [SHORT], max_length=64)
    (weights,) = rows._weights([0], rows.lengths[0])
    expected = torch.zeros(2, rows.lengths[0])
    expected[0, first + 23 : first + 26] = 1 / 3
    expected[1, first + 29 : first + 31] = 1 / 2
    torch.testing.assert_close(weights, expected)


def test_choices_that_repeat_the_passage_or_each_other_are_found(base: BaseModel) -> None:
    rows = ChoiceRows(base, CHOICE, [SUBSTRINGS], max_length=128)
    assert choices_read(base, rows, 0) == list(SUBSTRINGS.choices)


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        # "1 yes.\n2 no": yes. is (2, 6)
        ([(0, 0), (0, 1), (1, 5), (5, 7), (7, 8), (8, 11)], (2, 4)),  # " yes" and ".\n"
        ([(0, 1), (1, 2), (2, 6), (6, 11), (0, 0)], (2, 3)),
        ([(0, 1), (1, 2), (6, 7), (7, 11)], (1, 2)),  # no token has it: the one before
    ],
)
def test_tokens_that_touch_a_choice_belong_to_it(offsets: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert token_span(offsets, (2, 6)) == expected


@pytest.mark.parametrize("passage", ["It rains and rains. " * 20, "Überall Öl. " * 20, "語" * 80])
def test_too_long_a_text_loses_the_end_of_its_passage_and_no_choice(base: BaseModel, passage: str) -> None:
    passage = passage.strip()
    long = row(passage, "Is it dry?", "yes", "It rains", right=1)
    rows = ChoiceRows(base, CHOICE, [SHORT, long], max_length=64)
    assert choices_read(base, rows, 1) == ["yes", "It rains"]
    assert 60 < rows.lengths[1] <= 64
    text = base.tokenizer.decode(rows.texts[1][0]["input_ids"], skip_special_tokens=True)
    kept, _, rest = text.partition(" Is it dry?")
    assert rest == "\n1 yes\n2 It rains"
    assert passage.startswith(kept)
    assert kept
    assert rows.notes == (
        "1 of 2 (de 1) rows are longer than 64 tokens (--max-length) and lose the ends of their passages.",
    )


def test_a_question_without_a_passage_is_cut_and_choices_never(base: BaseModel) -> None:
    rows = ChoiceRows(base, CHOICE, [row("", "Is it dry? " * 20, "yes", "no")], max_length=32)
    assert choices_read(base, rows, 0) == ["yes", "no"]
    with refuses("head.long-choices: 16 tokens.*2 no"):
        ChoiceRows(base, CHOICE, [row("a", "Is it dry, or is it not?", "yes", "no")], max_length=16)


@given(st.text("ab .ü", max_size=30), st.integers(1, 40))
def test_a_shortened_text_keeps_its_choices(passage: str, surplus: int) -> None:
    text = marked(row(passage, "q", "ab", "b"))
    part = shortened(text, [(index, index + 1) for index in range(len(text.text))], surplus)
    if part is None:
        assert not passage
        return
    assert [part.text[slice(*span)] for span in part.spans] == ["ab", "b"]
    assert part.text[: part.passage[1]] == passage[: max(0, len(passage) - surplus)].rstrip()


def test_loss_and_answers_by_hand_for_rows_of_different_lengths(base: BaseModel) -> None:
    rows = [SHORT, SUBSTRINGS]
    encoded = ChoiceRows(base, CHOICE, rows, max_length=128, teach=True)
    losses, best = [], []
    with torch.no_grad():
        for each in rows:
            text = marked(each)
            tokens = base.tokenizer(text.text, return_offsets_mapping=True, return_tensors="pt")
            offsets = tokens.pop("offset_mapping")[0].tolist()
            states = base.model.base_model(**tokens).last_hidden_state[0].double()
            weight = base.model.head.weight[0].double()
            scores = [
                float(
                    torch.stack(
                        [state for state, (a, b) in zip(states, offsets, strict=True) if a < b and start <= a < end]
                    ).mean(0)
                    @ weight
                )
                for start, end in text.spans
            ]
            losses.append(-float(torch.tensor(scores, dtype=torch.float64).log_softmax(0)[each.right]))
            best.append(str(1 + max(range(len(scores)), key=scores.__getitem__)))
        assert float(encoded.loss([0, 1])) == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert [float(encoded.loss([number])) for number in (0, 1)] == pytest.approx(losses, rel=1e-4)
        assert encoded.answers([1, 0]) == best[::-1]
        assert encoded.terms([0, 1]) == 2
    assert base.model.head.weight.shape[0] == 1
    assert base.model.head.bias is None
