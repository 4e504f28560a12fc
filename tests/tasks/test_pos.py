"""Parts of speech in every published layout, and their scores against scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task
from adaptermix.tasks.tagged import TaggedRow

from ..refusals import refuses
from .data.test_readers import PACKINGS, pack

TASK = get_task("pos")
CONLLU = """# newdoc id = 1
# sent_id = 1
# text = Zum 1 000. # !
1-2\tZum\t_\t_\t_\t_\t_\t_\t_\t_
1\tzu\tzu\tADP\tAPPR\t_\t3\tcase\t_\t_
2\tdem\tder\tDET\tART\t_\t3\tdet\t_\t_
3\t1 000\t1000\tNUM\tCARD\t_\t0\troot\t_\t_
3.1\tMal\t_\tNOUN\t_\t_\t_\t_\t_\t_
4\t#\t#\tSYM\t$\t_\t3\tpunct\t_\t_

# sent_id = 2
1\tJa\tja\tINTJ\t_\t_\t0\troot\t_\t_
"""
TOKENS, TAGS = ("zu", "dem", "1000", "#"), ("ADP", "DET", "NUM", "SYM")
ROWS = [
    TaggedRow(text="zu dem 1000 #", tokens=TOKENS, tags=TAGS, language="de"),
    TaggedRow(text="Ja", tokens=("Ja",), tags=("INTJ",), language="de"),
]
FILES = {
    "de_gsd-ud-test.conllu": CONLLU,
    # XTREME, then XGLUE.
    "test-de.tsv": "zu\tADP\ndem\tDET\n1000\tNUM\n#\tSYM\n\nJa\tINTJ\n",
    "de.test": "zu ADP\ndem DET\n1000 NUM\n# SYM\n\n\nJa INTJ\n\n",
    "de.iob2": "# text = zu dem 1000 #\nzu x ADP\ndem x DET\n1000 x NUM\n# x SYM\n\nJa x INTJ\n",
    "de.jsonl": "".join(
        json.dumps({names[0]: tokens, names[1]: tags}) + "\n"
        for names, tokens, tags in ((("words", "pos"), TOKENS, TAGS), (("tokens", "upos"), ["Ja"], ["INTJ"]))
    ),
}


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    assert TASK.read([pack(tmp_path / name, FILES[name], packing)])[0] == ROWS


def test_pairs_of_sentences_are_refused(tmp_path: Path) -> None:
    pairs = "Where is the old station?\tWhere was the station?\t0\nI do not know.\tNo idea.\t1\n"
    with refuses(r"pos.sentence: de.tsv:1: .*'Where is the old station\?'"):
        TASK.read([pack(tmp_path / "de.tsv", pairs, "plain")])
    words = "Ủy ban nhân dân\tNOUN\n1 000 000 000\tNUM\n"
    assert len(TASK.read([pack(tmp_path / "vi.tsv", words, "plain")])[0][0].tokens) == 2


def test_sentences_with_a_token_without_a_tag_are_left_out(tmp_path: Path) -> None:
    rows, files = TASK.read([pack(tmp_path / "de.tsv", "a\tX\nb\t_\n\nc\tX\n", "plain")])
    assert ([row.tokens for row in rows], files[0].left_out) == ([("c",)], 1)


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("de.tsv", "a\tX\nb\n", r"pos.columns: de\.tsv:2"),
        ("de.tsv", "a\n", "pos.columns"),
        ("de.tsv", "a\tX Y\n", r"pos.tag: de\.tsv:1"),
        ("de.jsonl", '{"tokens": ["a"], "pos": [1]}\n', "pos.json"),
        ("de.jsonl", '{"tokens": ["a"], "pos": ["X", "Y"]}\n', "pos.json"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, code: str) -> None:
    path = pack(tmp_path / name, text, "plain")
    with refuses(code):
        TASK.read([path])


@given(
    st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=5), min_size=1)
)
def test_scores_equal_those_of_scikit_learn(sentences: list[list[tuple[str, str]]]) -> None:
    rows = [
        TaggedRow(text="x", tokens=("x",) * len(pairs), tags=tuple(gold for gold, _ in pairs), language="en")
        for pairs in sentences
    ]
    answers = [" ".join(guess for _, guess in pairs) for pairs in sentences]
    gold, guesses = zip(*(pair for pairs in sentences for pair in pairs), strict=True)
    found = score_answers(TASK, rows, answers, {}, seed=0, metric="macro_f1")
    expected = f1_score(gold, guesses, average="macro", labels=sorted(set(gold)), zero_division=0)
    assert found.overall.value == pytest.approx(expected)
    assert found.others["accuracy"]["en"].value == pytest.approx(accuracy_score(gold, guesses))


@pytest.mark.parametrize(
    ("answer", "right"), [("ADP DET NUM SYM", 4), ("ADP DET", 2), ("DET ADP NUM SYM X", 2), ("", 0)]
)
def test_tags_belong_to_tokens_by_their_order(answer: str, right: int) -> None:
    assert TASK.metrics(ROWS)[0].count(ROWS[0], answer) == (right, 4)
