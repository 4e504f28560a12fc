"""Multiple choice in every layout, prompts, and answers by likelihood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix import compare_systems, evaluate, train_task
from adaptermix.errors import UsageError
from adaptermix.evaluation.answering import Answering
from adaptermix.models.base import BaseModel, load_base
from adaptermix.options import CompareSettings, EvaluateSettings, GenerationSettings, TaskSettings
from adaptermix.progress import Silent
from adaptermix.tasks import ChoiceTask, clusters_of, get_task, get_template
from adaptermix.tasks.choice import ChoiceRow, format_scores, marked, parse_scores

from ..refusals import refuses
from ..scoring import count
from .data.test_readers import PACKINGS, pack

TASK = get_task("choice")
BELEBELE = {
    "link": "x",
    "question_number": 1,
    "flores_passage": "Ada wohnt in  Bath.",
    "question": "Wo wohnt Ada?",
    "mc_answer1": "in Rom",
    "mc_answer2": "in Bath",
    "mc_answer3": "da",
    "mc_answer4": "dort",
    "correct_answer_num": "2",
    "dialect": "deu_Latn",
    "ds": "2023-05-03",
}
XCOPA = {"premise": "Ada fror.", "choice1": "Es schneite.", "choice2": "Sie sang.", "question": "cause", "label": 1}
ROWS = {
    "Belebele": ChoiceRow(
        context="Ada wohnt in Bath.",
        question="Wo wohnt Ada?",
        choices=("in Rom", "in Bath", "da", "dort"),
        right=1,
        language="de",
    ),
    "XCOPA": ChoiceRow(
        context="Ada fror.",
        question="",
        choices=("Es schneite.", "Sie sang."),
        right=1,
        relation="cause",
        language="de",
    ),
}
FILES = {
    "deu_Latn.jsonl": (BELEBELE, "Belebele"),
    "belebele.jsonl": (BELEBELE, "Belebele"),
    "test.de.jsonl": (XCOPA | {"idx": 0, "changed": False}, "XCOPA"),
    "de.jsonl": (
        {
            "context": "Ada wohnt in Bath.",
            "question": "Wo wohnt Ada?",
            "choices": ["in Rom", "in Bath", "da", "dort"],
            "answer": "in Bath",
        },
        "Belebele",
    ),
}


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    row, kind = FILES[name]
    assert TASK.read([pack(tmp_path / name, json.dumps(row) + "\n", packing)])[0] == [ROWS[kind]]


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    lines = [XCOPA, XCOPA | {"label": -1}, XCOPA | {"label": None}, XCOPA | {"label": 2}, XCOPA | {"choice2": ""}]
    rows, files = TASK.read([pack(tmp_path / "de.jsonl", "".join(json.dumps(each) + "\n" for each in lines), "plain")])
    assert (rows, files[0].left_out) == ([ROWS["XCOPA"]], 4)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (XCOPA | {"label": 2}, r"choice.answer: de\.jsonl:1"),
        (BELEBELE | {"correct_answer_num": "0"}, "choice.answer"),
        (XCOPA | {"choice2": "Es schneite."}, r"choice.row: de\.jsonl:1"),
        ({"question": "Wo?", "choices": ["da"], "answer": 0}, "choice.row"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, row: dict[str, object], code: str) -> None:
    path = pack(tmp_path / "de.jsonl", json.dumps(row) + "\n", "plain")
    with refuses(code):
        TASK.read([path])


@pytest.mark.parametrize(
    ("kind", "template", "prompt", "answers"),
    [
        (
            "Belebele",
            "plain",
            "Ada wohnt in Bath. Wo wohnt Ada?\n1 in Rom\n2 in Bath\n3 da\n4 dort\nAnswer:",
            ["1", "2", "3", "4"],
        ),
        ("Belebele", "continue", "Ada wohnt in Bath.\nWo wohnt Ada?", ["in Rom", "in Bath", "da", "dort"]),
        ("XCOPA", "plain", "Ada fror. What caused this?\n1 Es schneite.\n2 Sie sang.\nAnswer:", ["1", "2"]),
        ("XCOPA", "continue", "Ada fror because", ["es schneite.", "sie sang."]),
    ],
)
def test_prompts_and_the_texts_of_answers(kind: str, template: str, prompt: str, answers: list[str]) -> None:
    assert isinstance(TASK, ChoiceTask)
    chosen, fields = get_template(TASK, template), TASK.fields(ROWS[kind])
    assert chosen.render(fields, None) == prompt
    assert [chosen.text_of(option, fields) for option in TASK.options(ROWS[kind])] == answers


def test_choices_are_found_by_their_characters() -> None:
    found = marked(ROWS["Belebele"])
    assert tuple(found.text[start:end] for start, end in found.spans) == ROWS["Belebele"].choices
    assert found.text[slice(*found.passage)] == ROWS["Belebele"].context


def test_questions_on_one_text_are_resampled_together() -> None:
    assert clusters_of(TASK, [ROWS["Belebele"]] * 2) == ["Ada wohnt in Bath."] * 2


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2", (1, 1)),
        ("In Bath.", (1, 1)),
        ("1", (0, 0)),
        ("", (0, 0)),
        # The second one is the likeliest, and per character the third one; the text before the scores does not count.
        ("2 [-9/2 -4/4 -5/9 -9/3]", (1, 0)),
        ("1 [-9/2 -5/9 -4/4 -9/3]", (0, 1)),
        ("2 [-1/2 -4/4]", (0, 0)),
    ],
)
def test_scores_of_answers(answer: str, right: tuple[int, int]) -> None:
    found = count(TASK, ROWS["Belebele"], answer)
    assert (found["accuracy"], found["accuracy_norm"]) == ((right[0], 1), (right[1], 1))


def test_scores_are_read_back() -> None:
    assert parse_scores(format_scores(("1", "2"), (-1e-9, -12345.678), (3, 1))) == [(-1e-9, 3), (-12345.678, 1)]


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self, notes: list[str]) -> None:
        self.note = notes.append  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def base(causal: Path) -> BaseModel:
    return load_base(str(causal), device="cpu", dtype="float32")


def test_numbers_and_texts_are_chosen_by_likelihood(base: BaseModel) -> None:
    import torch

    answering = Answering(base, TASK, list(ROWS.values()), GenerationSettings(), template="continue")
    found = parse_scores(answering()[1])
    assert found
    prompt = base.tokenizer("Ada fror because")["input_ids"]
    for (score, length), ending in zip(found, ["es schneite.", "sie sang."], strict=True):
        ids = base.tokenizer(f" {ending}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            loss = base.model(torch.tensor([prompt + ids]), labels=torch.tensor([[-100] * len(prompt) + ids])).loss
        assert (score, length) == (pytest.approx(-float(loss) * len(ids), rel=1e-4), len(ending))
    with pytest.raises(UsageError, match="max-new-tokens"):
        Answering(base, TASK, list(ROWS.values()), GenerationSettings(max_new_tokens=3), template="plain")


def test_several_adapters_share_the_passes(base: BaseModel) -> None:
    answering = Answering(base, TASK, list(ROWS.values()), GenerationSettings(), template="continue")
    owners: list[int] = []
    rows: list[int] = []
    answering.before = rows.extend
    found = answering.together([[0, 1], [1]], owners.extend, "answer")
    alone = [answering(), answering(indices=[1])]
    for together, each in zip(found, alone, strict=True):
        for one, other in zip(together, each, strict=True):
            assert one.split()[0] == other.split()[0]
            assert parse_scores(one) == [
                (pytest.approx(score, abs=1e-4), length) for score, length in parse_scores(other)
            ]
    # A pass for each of four and two choices; the owner is known for each, and the row.
    assert sorted(zip(owners, rows, strict=False)) == [(0, 0)] * 4 + [(0, 1)] * 2 + [(1, 1)] * 2


def test_choices_that_exceed_the_positions_are_cut(causal: Path) -> None:
    base = load_base(str(causal), device="cpu", dtype="float32")
    base.model.config.max_position_embeddings = 12
    notes: list[str] = []
    answering = Answering(base, TASK, [ROWS["XCOPA"]], GenerationSettings(), template="continue", watch=Notes(notes))
    lengths: list[int] = []
    base.model.register_forward_pre_hook(
        lambda _module, _args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    assert parse_scores(answering()[0])
    assert max(lengths) <= 12
    assert any("12 positions" in note for note in notes)


@pytest.mark.parametrize("template", ["plain", "continue"])
def test_a_trained_adapter_chooses_what_it_was_taught(causal: Path, tmp_path: Path, template: str) -> None:
    words = ["rot", "blau", "gelb", "weiss"]
    lines = [
        {"question": f"Sag {word}", "choices": [word, "ein anderes Wort"][:: 1 if number % 2 else -1], "answer": word}
        for number, word in enumerate(words)
    ]
    data, out = tmp_path / "de.jsonl", str(tmp_path / "out")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    common = {"base": str(causal), "task": "choice", "device": "cpu", "dtype": "float32"}
    train_task(
        TaskSettings(  # type: ignore[arg-type]
            train=[str(data)], out=out, steps=40, batch_size=4, learning_rate=2e-2, template=template, **common
        )
    )
    predictions = tmp_path / "answers.jsonl"
    found = evaluate(EvaluateSettings(data=[str(data)], adapter=out, predictions=str(predictions), **common))  # type: ignore[arg-type]
    assert found.overall.value == 1
    for metric, expected in (("accuracy", found.scores), ("accuracy_norm", found.others["accuracy_norm"])):
        again = compare_systems(
            CompareSettings(systems=[f"ours={predictions}"], task="choice", data=[str(data)], metric=metric)
        )
        assert again.systems[0].languages["de"].value == expected["de"].value
