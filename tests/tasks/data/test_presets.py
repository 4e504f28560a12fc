"""Presets, from local folders that have the columns and configurations of the data sets of the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs
from adaptermix.tasks.data.files import find_files
from adaptermix.tasks.data.hub import _load
from adaptermix.tasks.data.presets import PRESETS

from ...refusals import refuses

datasets = pytest.importorskip("datasets")

CHOICE = {
    "flores_passage": "p", "question": "q", "correct_answer_num": "2",
    **{f"mc_answer{n}": str(n) for n in range(1, 5)},
}  # fmt: skip
NLI = {"premise": "a", "hypothesis": "b", "label": 1}
NER = {"tokens": ["Anna", "geht"], "ner_tags": ["B-PER", "O"]}
QA = {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
LAYOUTS: dict[str, tuple[str, dict[str, object], str]] = {
    "afrisenti": ("hau", {"tweet": "x", "label": "positive"}, "classify"),
    "americasnli": ("aym", NLI, "nli"),
    "belebele": ("deu_Latn", CHOICE | {"dialect": "deu_Latn"}, "choice"),
    "massive": (
        "de-DE", {"locale": "de-DE", "utt": "um sechs", "annot_utt": "um [time : sechs]", "intent": "alarm"}, "slots",
    ),
    "nusax": ("ace", {"text": "x", "label": "positive"}, "classify"),
    "sib200": ("deu_Latn", {"index_id": 1, "category": "sports", "text": "x"}, "classify"),
    "uner": ("de_pud", NER, "ner-json"),
    "wikiann": ("de", NER, "ner-json"),
    "xcopa": ("et", {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}, "choice"),
    "xnli": ("de", NLI, "nli"),
    "xquad": ("xquad.de", QA, "qa"),
}  # fmt: skip
"""A configuration with a row of it, and the task, of each preset with a configuration for each language."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    _load.cache_clear()  # its key is the name, which is another folder in each test


def lay_out(preset: str, configs: dict[str, Sequence[dict[str, object]]], split: str | None = None) -> None:
    """Write a data set of the Hub as a local folder of its name, each configuration a file."""
    split = split or PRESETS[preset].split
    folder = Path(PRESETS[preset].hub.partition("@")[0])
    folder.mkdir(parents=True)
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}.jsonl\n" for name in configs
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n", encoding="utf-8")
    for name, rows in configs.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_reads_its_layout(name: str) -> None:
    config, row, task = LAYOUTS[name]
    lay_out(name, {config: [row, row], "default": [{"x": 1}]})
    code = re.fullmatch(PRESETS[name].configs or "", config)
    assert code is not None
    rows, files = get_task(task).read([f"preset:{name}:{code['code']}"])
    assert len(rows) == 2
    assert files[0].language == {"hau": "ha", "aym": "ay", "ace": "ace", "et": "et"}.get(config, "de")
    everything, _ = get_task(task).read([f"preset:{name}"])
    assert everything == rows
    again, _ = get_task(task).read([files[0].title])
    assert again == rows


def test_every_preset_is_tested() -> None:
    assert {*LAYOUTS, "flores", "multinerd", "ntrex", "tydiqa-goldp"} == set(PRESETS)


def test_massive_has_intents_too() -> None:
    config, row, _ = LAYOUTS["massive"]
    lay_out("massive", {config: [row, row]})
    rows, _ = get_task("classify").read(["preset:massive:de"])
    assert [(row.text, row.label) for row in rows] == [("um sechs", "alarm")] * 2


def test_flores_joins_two_languages_by_id() -> None:
    german = [{"id": 1, "text": "eins"}, {"id": 2, "text": "zwei"}]
    english = [{"id": 2, "text": "two"}, {"id": 1, "text": "one"}, {"id": 3, "text": "three"}]
    lay_out("flores", {"deu_Latn": german, "eng_Latn": english})
    pairs, _ = read_pairs(["preset:flores:de-en"])
    assert [(pair.languages, pair.source, pair.target) for pair in pairs] == [
        (("de", "en"), "eins", "one"),
        (("de", "en"), "zwei", "two"),
    ]
    with refuses("preset.pair"):
        read_pairs(["preset:flores:de"])


def test_ntrex_has_a_column_for_each_language() -> None:
    lay_out("ntrex", {"default": [{"deu_Latn": "eins", "eng_Latn": "one", "tur_Latn": "bir"}]})
    pairs, _ = read_pairs(["preset:ntrex:de-en,tr-en"])
    assert [(pair.languages, pair.source) for pair in pairs] == [(("de", "en"), "eins"), (("tr", "en"), "bir")]


def test_tydiqa_has_the_language_in_its_ids() -> None:
    rows = [QA | {"id": "swahili-1-0"}, QA | {"id": "korean-2-0"}]
    lay_out("tydiqa-goldp", {"secondary_task": rows})
    assert [row.language for row in get_task("qa").read(["preset:tydiqa-goldp"])[0]] == ["sw", "ko"]
    assert [row.id for row in get_task("qa").read(["preset:tydiqa-goldp:ko"])[0]] == ["korean-2-0"]


def test_scripts_of_one_language_stay_apart() -> None:
    lay_out("belebele", {"hin_Deva": [CHOICE], "hin_Latn": [CHOICE], "deu_Latn": [CHOICE]})
    rows, _ = get_task("choice").read(["preset:belebele"])
    assert [row.language for row in rows] == ["hi-Deva", "hi-Latn", "de"]
    with refuses("preset.language: hin_Deva"):
        find_files(["preset:belebele:hi"])


def test_another_task_is_refused_by_name() -> None:
    config, row, _ = LAYOUTS["xnli"]
    lay_out("xnli", {config: [row]})
    with refuses("data.task: nli"):
        get_task("qa").read(["preset:xnli:de"])
    with refuses("data.task"):
        read_pairs(["preset:xnli:de"])


@pytest.mark.parametrize("argument", ["preset:", "preset:bellebele", "preset:xnli:de:test:x"])
def test_other_presets_are_refused(argument: str) -> None:
    with refuses("preset.name: belebele"):
        find_files([argument])


def test_multinerd_has_tags_as_numbers_and_a_language_column() -> None:
    german = {"tokens": ["Anna", "sieht", "Löwen"], "ner_tags": [1, 0, 7], "lang": "de"}
    english = {"tokens": ["Paris"], "ner_tags": [5], "lang": "en"}
    lay_out("multinerd", {"default": [german, english]})
    rows, _ = get_task("ner-json").read(["preset:multinerd"])
    assert [row.language for row in rows] == ["de", "en"]
    ((german_row), *others), _ = get_task("ner-json").read(["preset:multinerd:de"])
    assert not others
    assert dict(get_task("ner-json").fields(german_row)) == dict(get_task("ner-json").fields(rows[0]))
    assert all(word in get_task("ner-json").answer(german_row) for word in ("PER", "Anna", "ANIM", "Löwen"))


def test_tags_that_multinerd_does_not_have_are_refused() -> None:
    lay_out("multinerd", {"default": [{"tokens": ["Anna"], "ner_tags": [31], "lang": "de"}]})
    with refuses("preset.tags: from 0 to 30"):
        get_task("ner-json").read(["preset:multinerd:de"])


def test_every_preset_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "data_sets.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        assert f"| `{name}` | `{preset.hub}` |" in page, "run scripts/docs --reference"
