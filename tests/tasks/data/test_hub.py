"""Data sets of the Hub, from local folders of the same form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs
from adaptermix.tasks.data.files import DataFile, find_files
from adaptermix.tasks.data.hub import open_hub

from ...refusals import refuses

read_classify = get_task("classify").read
read_ner = get_task("ner-json").read
read_nli = get_task("nli").read
read_slots = get_task("slots").read

datasets = pytest.importorskip("datasets")


def write(folder: Path, split: str, rows: list[dict[str, object]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_rows_are_those_of_the_split(tmp_path: Path) -> None:
    write(tmp_path / "nli", "test", [{"premise": "x", "hypothesis": "y", "label": "neutral"}])
    name = write(tmp_path / "nli", "train", [{"premise": "ä", "hypothesis": "b", "label": "entailment"}] * 3)
    rows, files = read_nli([f"de={name}::train"])
    assert [(row.premise, row.label, row.language) for row in rows] == [("ä", "entailment", "de")] * 3
    assert len(read_nli([f"de={name}::test"])[0]) == 1
    assert len(read_nli([f"de={name}"], rows=":2")[0]) == 2
    assert files[0].entry()["name"] == f"{name}::train"
    assert len(str(files[0].entry()["sha256"])) == 64


def test_class_numbers_become_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    found, _ = read_classify([f"en=hf:{tmp_path / 'set'}"])
    assert [row.label for row in found] == ["good", "bad"]


def test_other_readers_take_them_too(tmp_path: Path) -> None:
    slots = write(
        tmp_path / "slots", "train", [{"text": "go", "slots": [{"type": "a", "value": "b"}], "language": "fr"}]
    )
    assert read_slots([slots])[0][0].language == "fr"
    pairs = write(tmp_path / "pairs", "train", [{"source": "eins", "target": "one"}])
    assert read_pairs([f"de-en={pairs}"])[0][0].languages == ("de", "en")
    both = write(tmp_path / "both", "train", [{"translation": {"en": "one", "de": "eins"}}])
    assert read_pairs([f"de-en={both}"])[0][0].source == "eins"


def test_the_configuration_tells_the_language() -> None:
    assert open_hub("hf:facebook/xnli:de:test", ()).languages == ("de",)
    found = open_hub("hf:AmazonScience/massive@abc:sw-KE", ())
    assert (found.languages, found.revision, found.split) == (("sw",), "abc", "train")
    assert open_hub("hf:owner/name", ()).languages == ()
    assert open_hub("hf:owner/name:default", ("tr",)).languages == ("tr",)


@pytest.mark.parametrize("argument", ["hf:", "hf:a:b:c:d", "hf:a@b@c"])
def test_other_forms_are_refused(argument: str) -> None:
    with refuses("hub-data.name"):
        find_files([argument])


def test_what_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    name = write(tmp_path / "nli", "train", [{"premise": "x", "hypothesis": "y", "label": "neutral"}])
    for argument in (f"de={name}::dev", f"de=hf:{tmp_path / 'missing'}"):
        with refuses("hub-data.unreachable"):
            read_nli([argument])


def test_a_row_without_a_class_is_unlabelled_whether_it_has_no_number_or_minus_one(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )
    columns = {"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [None, 2, -1]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    found, files = read_nli([f"en=hf:{tmp_path / 'set'}"])
    assert [row.label for row in found] == ["contradiction"]
    assert files[0].left_out == 2


def test_texts_without_a_class_are_left_out_too_and_minus_one_is_a_label_elsewhere(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    (tmp_path / "set").mkdir()
    columns = {"text": ["a", "b", "c"], "label": [-1, 1, None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    found, files = read_classify([f"en=hf:{tmp_path / 'set'}"])
    assert [(row.text, row.label) for row in found] == [("b", "good")]
    assert files[0].left_out == 2
    numbers = write(tmp_path / "numbers", "train", [{"text": "a", "label": -1}, {"text": "b", "label": 1}])
    assert [row.label for row in read_classify([f"en={numbers}"])[0]] == ["-1", "1"]


def test_tags_as_classes_are_read_as_entities(tmp_path: Path) -> None:
    """As conll2003, wikiann and MasakhaNER have them."""
    kinds = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(kinds)}
    )
    (tmp_path / "set").mkdir()
    columns = {"tokens": [["Ada", "Lovelace", "wrote"], ["so"]], "ner_tags": [[1, 2, 0], [0]]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    rows, _ = read_ner([f"en=hf:{tmp_path / 'set'}"])
    assert [(row.text, row.entities) for row in rows] == [
        ("Ada Lovelace wrote", (("PER", "Ada Lovelace"),)),
        ("so", ()),
    ]
    assert rows[0].tags == ("B-PER", "I-PER", "O")


@pytest.mark.parametrize(
    ("config", "languages"),
    [
        ("en_pud", ("en",)),
        ("zh-TW", ("zh-Hant",)),
        ("zho_Hant", ("zh-Hant",)),
        ("en-de", ("en", "de")),
        ("mt", ("mt",)),
        ("20220301.de", ("de",)),
        ("mlqa.de.en", ()),
        ("plain_text", ()),
    ],
)
def test_configurations_are_read_as_file_names_are(config: str, languages: tuple[str, ...]) -> None:
    assert open_hub(f"hf:owner/name:{config}", ()).languages == languages


def test_a_file_whose_name_is_the_prefix_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").write_text("a\n", encoding="utf-8")
    assert [type(file) for file in find_files(["hf"])] == [DataFile]
