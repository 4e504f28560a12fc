"""Rows stay known from command to command: training, merging, searching, baking, extracting, retrieving."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix import (
    AlignSettings,
    BakeSettings,
    EvaluateSettings,
    RetrieveSettings,
    SearchSettings,
    TaskSettings,
    bake,
    evaluate,
    extract,
    merge,
    merge_checkpoints,
    retrieve,
    search,
    train_align,
    train_task,
)
from adaptermix.commands.recipes import load_recipe
from adaptermix.errors import PlanError
from adaptermix.provenance import row_hashes
from adaptermix.provenance.manifest import origin_of, seen_files

from .factories import peft_lora
from .refusals import refuses
from .training.data import Notes

TEXTS = [f"the kettle number {number} sings while the {what} waits" for number in range(10) for what in ("cat", "dog")]
GERMAN = [f"der Kessel {number} singt, und das Tier {what} wartet" for number in range(10) for what in ("cat", "dog")]
OTHERS = [f"nobody has seen the {what} of house {number} today" for number in range(10) for what in ("roof", "door")]


def rows(folder: Path, name: str, texts: list[str]) -> str:
    path, content = folder / name, "".join(f"{text}\t{'yn'[n % 2]}\n" for n, text in enumerate(texts))
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return str(path)


def pairs(folder: Path, name: str, one: list[str], two: list[str]) -> str:
    (folder / name).write_text("".join(f"{a}\t{b}\n" for a, b in zip(one, two, strict=True)))
    return str(folder / name)


@pytest.fixture
def place(causal: Path) -> dict[str, Any]:
    return {"base": str(causal), "device": "cpu", "dtype": "float32"}


@pytest.fixture
def task(place: dict[str, Any], tmp_path: Path) -> Path:
    """An adapter that was trained on the first half of the rows of a file."""
    train(place, tmp_path / "task", rows(tmp_path, "tr1.en.tsv", TEXTS), rows=":10")
    return tmp_path / "task"


def train(place: dict[str, Any], out: Path, *files: str, **more: Any) -> None:
    asked: dict[str, Any] = {"task": "classify", "train": list(files), "steps": 1, "batch_size": 2, "rank": 2}
    train_task(TaskSettings(**place, **asked, **more, out=str(out)))


def scored(place: dict[str, Any], data: str, **more: Any) -> EvaluateSettings:
    asked: dict[str, Any] = {"split": "test", "max_new_tokens": 1, "batch_size": 32} | more
    return EvaluateSettings(**{**place, "task": "classify", "data": [data], **asked})


def is_refused(asked: EvaluateSettings, counts: str) -> None:
    with pytest.raises(PlanError, match=rf"test data must be new to the adapter, and {counts} rows of .* were seen"):
        evaluate(asked)


def test_what_was_trained_on_is_not_test_data_packed_or_mixed_and_other_rows_of_the_file_are(
    place: dict[str, Any], task: Path, tmp_path: Path
) -> None:
    for name, texts in (("packed.en.tsv.gz", TEXTS), ("mixed.en.tsv", [*OTHERS[:10], *reversed(TEXTS)])):
        is_refused(scored(place, rows(tmp_path, name, texts), adapter=str(task)), f"10 of {len(texts)}")
    data = str(tmp_path / "tr1.en.tsv")
    is_refused(scored(place, data, adapter=str(task), rows="9:"), "1 of 11")
    notes = Notes()
    evaluate(scored(place, data, adapter=str(task), rows="10:"), watch=notes)
    assert [note for note in notes.said if "seen" in note] == []
    # and the other way round
    train(place, tmp_path / "again", data, rows=":10")
    with refuses("split.tested: training data must not be test data, and 1 of 11 rows of"):
        train(place, tmp_path / "no", data, rows=":11")
    aligned = pairs(tmp_path, "de-en.tsv", GERMAN[10:], TEXTS[10:])
    with refuses("split.tested: training data must not be test data, and 10 of 10 rows of"):
        train_align(AlignSettings(**place, pairs=[aligned], steps=1, out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_scores_that_were_seen_are_recorded_though_the_command_breaks_off(
    place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are on disk before the other system of --against is scored."""
    data = rows(tmp_path, "en.tsv", TEXTS)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptermix.evaluation.run._write_predictions", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(scored(place, data, predictions=str(tmp_path / "answers.jsonl")))
    with refuses("split.tested: training data must not be test data, and 20 of 20 rows"):
        train(place, tmp_path / "no", data)


def test_manifests_hold_names_of_sets_and_older_ones_count_whole_files(
    place: dict[str, Any], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads((task / "adaptermix.json").read_text())
    (entry,) = document["data"]
    assert (entry["rows"], entry["picked"], len(entry["row_hashes"])) == (10, ":10", 16)
    assert len((task / "adaptermix.rows").read_bytes()) < 200
    data = str(tmp_path / "tr1.en.tsv")
    packed = rows(tmp_path, "p.en.tsv.gz", TEXTS)
    older = {name: value for name, value in entry.items() if name not in ("row_hashes", "rows", "picked")}
    oldest = {name: value for name, value in older.items() if name != "text"}
    for damage, known in ((b"cut", entry), (None, entry), (None, older), (None, oldest)):
        monkeypatch.setattr(row_hashes, "_REMEMBERED", {})  # as in another process
        (task / "adaptermix.rows").unlink(missing_ok=True)
        if damage:
            (task / "adaptermix.rows").write_bytes(damage)
        (task / "adaptermix.json").write_text(json.dumps(document | {"data": [known]}))
        is_refused(scored(place, data, adapter=str(task), rows="10:"), "10 of 10")
        notes = Notes()
        if known is not oldest:
            is_refused(scored(place, packed, adapter=str(task), rows="10:"), "10 of 10")
        evaluate(scored(place, rows(tmp_path, "new.en.tsv", TEXTS[1:]), adapter=str(task), split=None), watch=notes)
        assert sum("missing or damaged: rows of tr1.en.tsv" in note for note in notes.said) == (known is entry)


def test_rows_are_known_through_merges_searches_and_training_on_top(
    place: dict[str, Any], task: Path, causal: Path, tmp_path: Path
) -> None:
    other = str(peft_lora(causal, tmp_path / "other", r=2, target_modules=["q_proj"]))
    merge([str(task), other], weights=[0.9], out=tmp_path / "merged")
    dev = rows(tmp_path, "dev.en.tsv", OTHERS)
    train(place, tmp_path / "upon", dev, rows="10:", on_top_of=str(task))
    train(place, tmp_path / "further", dev, rows="10:", start_from=str(task))
    asked: dict[str, Any] = {"task": "classify", "dev": [dev], "rows": ":10", "grid": [0.5], "max_new_tokens": 1}
    found = SearchSettings(
        **place, **asked, adapters=[str(task), other], candidates=[str(tmp_path / "merged")], out=str(tmp_path / "best")
    )
    notes = Notes()
    search(found, watch=notes)
    assert not [note for note in notes.said if "seen before" in note]
    packed = rows(tmp_path, "x.en.tsv.gz", TEXTS)
    for name in ("merged", "upon", "further", "best"):
        is_refused(scored(place, packed, adapter=str(tmp_path / name)), "10 of 20")
    is_refused(scored(place, rows(tmp_path, "y.en.tsv", OTHERS[::-1]), adapter=str(tmp_path / "best")), "10 of 20")
    is_refused(scored(place, packed, against=str(tmp_path / "merged")), "10 of 20")
    notes = Notes()
    again = found.model_copy(update={"dev": [packed], "candidates": [], "rows": None, "out": str(tmp_path / "again")})
    search(again, watch=notes)
    assert [note for note in notes.said if "seen before" in note] == [
        f"warning: 10 of 20 rows of {packed} were seen before: an adapter was trained on tr1.en.tsv; the choice "
        "favours what it has learned."
    ]


def test_a_baked_base_has_seen_the_rows_of_its_adapters(place: dict[str, Any], task: Path, tmp_path: Path) -> None:
    packed = rows(tmp_path, "x.en.tsv.gz", TEXTS)
    bake(BakeSettings(base=place["base"], adapter=[str(task)], out=str(tmp_path / "baked"), device="cpu"))
    merge([str(task)], weights=[1.0], base=place["base"], form="dense", out=tmp_path / "dense")
    baked = place | {"base": str(tmp_path / "baked")}
    train(baked, tmp_path / "second", rows(tmp_path, "second.en.tsv", OTHERS))
    again = BakeSettings(
        base=baked["base"], adapter=[str(tmp_path / "second")], out=str(tmp_path / "twice"), device="cpu"
    )
    bake(again)
    merge_checkpoints(place["base"], [tmp_path / "baked"], [0.5], out=tmp_path / "half")
    for name in ("baked", "dense", "twice", "half"):
        is_refused(scored(place | {"base": str(tmp_path / name)}, packed), "10 of 20")
    is_refused(scored(baked, packed, adapter=str(tmp_path / "second")), "10 of 20")
    extract(place["base"], tmp_path / "baked", rank=2, out=tmp_path / "taken", device="cpu")
    is_refused(scored(place, packed, adapter=str(tmp_path / "taken")), "10 of 20")
    assert {file.name for file in seen_files([origin_of(tmp_path / "twice")])} == {"tr1.en.tsv", "second.en.tsv"}
    asked = RetrieveSettings(**baked, data=[pairs(tmp_path, "de-en.tsv", GERMAN, TEXTS)], split="test")
    with refuses("split.known: 10 of 20 rows"):
        retrieve(asked)


@pytest.mark.parametrize("split", ["test", "dev", None])
def test_retrieval_has_a_split(split: Any, place: dict[str, Any], tmp_path: Path, state: Path) -> None:
    data = pairs(tmp_path, "de-en.tsv", GERMAN, TEXTS)
    asked = RetrieveSettings(**place, data=[data], rows="10:", split=split)
    found = retrieve(asked)
    assert found.document().get("split") == split
    assert state.exists() == (split == "test")
    align: dict[str, Any] = place | {"steps": 1, "batch_size": 2, "rank": 2, "out": str(tmp_path / "align")}
    swapped = pairs(tmp_path, "en-de.tsv", TEXTS, GERMAN)
    if split == "test":
        with refuses(r"split.tested: 10 of 20 rows of.*en-de\.tsv were evaluated as test.*task 'retrieve'"):
            train_align(AlignSettings(**align, pairs=[swapped]))
        with refuses("split.tested: drop --split dev"):
            retrieve(asked.model_copy(update={"split": "dev"}))
    train_align(AlignSettings(**align, pairs=[swapped], rows=":10"))
    with refuses("split.known"):
        retrieve(asked.model_copy(update={"adapter": str(tmp_path / "align"), "rows": None, "split": "test"}))


def test_a_record_that_cannot_be_read_is_announced(place: dict[str, Any], tmp_path: Path, state: Path) -> None:
    data = rows(tmp_path, "en.tsv", TEXTS)
    (state / "tested.jsonl").mkdir(parents=True)
    notes = Notes()
    asked: dict[str, Any] = {"task": "classify", "train": [data], "steps": 1, "batch_size": 2, "rank": 2}
    train_task(TaskSettings(**place, **asked, out=str(tmp_path / "one")), watch=notes)
    assert [note for note in notes.said if note.startswith("warning: the record of test data cannot be read (")]
    (state / "tested.jsonl").rmdir()
    evaluate(scored(place, data))
    for file in (state / "rows").iterdir():
        file.write_bytes(b"damaged")
    notes = Notes()
    changed = rows(tmp_path, "other.en.tsv", OTHERS)
    train_task(TaskSettings(**place, **asked | {"train": [changed]}, out=str(tmp_path / "two")), watch=notes)
    assert [note for note in notes.said if "hashes of the rows of en.tsv are missing or damaged" in note]
    with refuses("split.tested: 20 of 20 rows"):
        train(place, tmp_path / "three", data)


RECIPE = """
version: 1
variables: {{out: {out}}}
steps:
  - train-task: {{base: b, task: classify, train: [{train}], rows: "{rows}", out: "${{out}}/task"}}
  - evaluate: {{base: b, adapter: "${{out}}/task", task: classify, data: [{data}], rows: "10:", split: test}}
"""


def test_recipes_look_at_rows(tmp_path: Path) -> None:
    data = rows(tmp_path, "en.tsv", TEXTS)
    packed = rows(tmp_path, "x.en.tsv.gz", TEXTS[::-1])

    def load(train: str, chosen: str, data: str = data) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(out=tmp_path / "out", train=train, rows=chosen, data=data))
        load_recipe(path)

    load(data, ":10")
    load(packed, "10:")
    for train, chosen, counts in ((data, ":11", "1 of 11"), (packed, ":12", "10 of 12"), (packed, ":", "10 of 20")):
        with refuses(f"recipe.split: step 1 .*{counts} rows of"):
            load(train, chosen)
    hub = '"en=hf:me/data:x:test"'
    load(hub, ":10", hub)
    with refuses("recipe.split: hf:me/data:x:test is test data of step 2"):
        load(hub, "5:15", hub)
