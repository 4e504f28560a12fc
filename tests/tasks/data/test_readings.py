"""Readings of data sets of the field, each with the columns that the Hub has, from Parquet without scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.errors import DataError
from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs

datasets = pytest.importorskip("datasets")

QA = {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
NLI = {"premise": "a", "hypothesis": "b", "label": 1}
TAGS = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
NER = {"tokens": ["Anna", "geht"], "ner_tags": [1, 0]}
MASSIVE = {"locale": "de-DE", "utt": "um sechs", "annot_utt": "um [time : sechs]", "intent": "alarm"}
BELEBELE = {"flores_passage": "p", "question": "q", "correct_answer_num": "2", "dialect": "deu_Latn"} | {
    f"mc_answer{n}": str(n) for n in range(1, 5)
}
XCOPA = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
ALL_LANGUAGES = {
    "premise": {"de": "a", "en": "b"},
    "hypothesis": {"language": ["de", "en"], "translation": ["c", "d"]},
    "label": 1,
}
MMLU = {"question": "q", "option_a": "a", "option_b": "b", "option_c": "c", "option_d": "d", "answer": "B"}
PAIR = {"sentence1": "a", "sentence2": "b", "label": 1}

READINGS: dict[str, tuple[str, str, dict[str, object], str | None]] = {
    "sib200": ("classify", "de", {"index_id": 1, "category": "sports", "text": "x"}, None),
    "massive slots": ("slots", "", MASSIVE, None),
    "massive intent": ("classify", "de", MASSIVE, None),
    "massive intent, mteb": ("classify", "de", {"id": "1", "label": "alarm", "text": "x"}, None),
    "xnli": ("nli", "de", NLI, None),
    "xnli all_languages": ("nli", "", ALL_LANGUAGES, None),
    "xquad": ("qa", "de", QA | {"id": "1"}, None),
    "mlqa": ("qa", "de", QA | {"id": "2"}, None),
    "tydiqa goldp": ("qa", "", QA | {"id": "swahili-1-0"}, None),
    "wikiann": ("ner-json", "de", NER | {"langs": ["de", "de"]}, None),
    "uner": ("ner-json", "de", NER | {"text": "Anna geht"}, None),
    "masakhaner 2": ("ner-json", "sw", NER | {"id": "1"}, None),
    "multinerd": ("ner-json", "", {"tokens": ["Anna"], "ner_tags": [1], "lang": "de"}, "row.tag"),
    "nusax": ("classify", "ace", {"text": "x", "label": "positive"}, None),
    "afrisenti": ("classify", "ha", {"tweet": "x", "label": "positive"}, None),
    "americasnli": ("nli", "ay", NLI | {"language": "aym"}, None),
    "opus-100": ("pairs", "de-en", {"translation": {"de": "a", "en": "b"}}, None),
    "wmt24++": ("pairs", "en-de", {"source": "a", "target": "b", "is_bad_source": False}, None),
    "tatoeba_mt": ("pairs", "de-en", {"sourceLang": "deu", "sourceString": "a", "targetString": "b"}, None),
    "flores+, one language": ("pairs", "de-en", {"id": 1, "text": "a"}, "pairs.fields"),
    "ntrex": ("pairs", "de-en", {"deu_Latn": "a", "eng_Latn": "b", "tur_Latn": "c"}, None),
    "belebele": ("choice", "", BELEBELE, None),
    "xcopa": ("choice", "et", XCOPA, None),
    "global-mmlu": ("choice", "de", MMLU, None),
    "include": ("choice", "de", {"question": "q", "choices": ["a", "b"], "answer": 1}, None),
    "xstorycloze": (
        "choice", "es",
        {"input_sentence_1": "a", "sentence_quiz1": "b", "sentence_quiz2": "c", "answer_right_ending": 1},
        None,
    ),
    "paws-x": ("pairs task", "de", PAIR, None),
    "paws-x as classify": ("classify", "de", PAIR, "row.missing-field"),
    "aya": ("sft", "de", {"inputs": "a", "targets": "b"}, None),
    "sharegpt": ("sft", "de", {"conversations": SHAREGPT}, None),
    "xsid columns": ("slots", "de", {"tokens": ["um", "sechs"], "slots": ["O", "B-time"]}, None),
    "chat": ("sft", "de", {"messages": CHAT}, None),
    "alpaca": ("sft", "de", {"instruction": "a", "input": "", "output": "b"}, None),
}  # fmt: skip
"""Task, languages of the argument, a row, and the code of the refusal if the data are refused."""


def read(task: str, argument: str) -> int:
    if task == "pairs":
        return len(read_pairs([argument])[0])
    return len(get_task(task.removesuffix(" task")).read([argument])[0])


@pytest.mark.parametrize("name", READINGS)
def test_data_sets_of_the_field(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task, languages, row, refusal = READINGS[name]
    made = datasets.Dataset.from_list([row, row])
    if "ner_tags" in row and name != "multinerd":
        made = made.cast_column("ner_tags", TAGS)
    made.to_parquet(tmp_path / "rows.parquet")
    argument = f"{languages}={tmp_path / 'rows.parquet'}" if languages else str(tmp_path / "rows.parquet")
    if refusal is None:
        assert read(task, argument) == (4 if name == "xnli all_languages" else 2)
        return
    with pytest.raises(DataError) as caught:
        read(task, argument)
    assert caught.value.code == refusal


def test_at_least_thirty_readings_work() -> None:
    assert len(READINGS) == 33
    assert sum(refusal is None for *_, refusal in READINGS.values()) >= 30
