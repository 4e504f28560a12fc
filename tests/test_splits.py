"""Test data stay test data: what was evaluated as such is refused for choosing and training, by content."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    JointSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    merge,
    search,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.cli import main
from adaptermix.errors import AdapterMixError, PlanError
from adaptermix.tasks.data.files import DataFile, find_files
from adaptermix.tasks.splits import add_to_record, read_record, refuse_tested, state_folder

from .factories import peft_lora
from .refusals import refuses
from .training.data import Notes, write_pairs, write_slots

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(causal: Path) -> dict[str, Any]:
    return {"base": str(causal), "dtype": "float32", "device": "cpu"}


@pytest.fixture
def answering(place: dict[str, Any]) -> dict[str, Any]:
    return place | {"task": "slots", "max_new_tokens": 2}


@pytest.fixture
def adapters(causal: Path, tmp_path: Path) -> list[str]:
    return [str(peft_lora(causal, tmp_path / name, r=2, target_modules=["q_proj"])) for name in ("task", "align")]


def slots(folder: Path, name: str, *values: str) -> str:
    rows = [{"text": f"go {value}", "slots": [{"type": "c", "value": value}]} for value in values]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def as_test(*files: str) -> None:
    add_to_record(find_files(files), task="slots", adapter="merged", watch=Notes())


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adaptermix.json").read_text())
    return found


def test_what_another_process_evaluated_as_test_is_refused_under_any_name(
    answering: dict[str, Any],
    adapters: list[str],
    tmp_path: Path,
    state: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = slots(tmp_path, "de.test.jsonl", "rot", "blau")
    line = f"evaluate --base {answering['base']} --adapter {adapters[0]} --task slots --data {data} --split test --json"
    line += " --max-new-tokens 2 --device cpu --dtype float32 --rows :1"
    ran = subprocess.run(
        [sys.executable, "-m", "adaptermix", *line.split()], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["split"] == "test"
    assert f"1 of the files are now recorded as test data in {state / 'tested.jsonl'}" in ran.stderr
    entry = json.loads((state / "tested.jsonl").read_text())
    assert {key: entry[key] for key in ("name", "task", "adapter")} == {
        "name": "de.test.jsonl",
        "task": "slots",
        "adapter": "task",
    }
    copied = shutil.copy(data, tmp_path / "de.valid.jsonl")
    found = f"search {' '.join(adapters)} --base {answering['base']} --task slots --dev {copied} --grid 0.5"
    with pytest.raises(SystemExit) as ended:
        main([*found.split(), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"error: dev data must not be test data, and 1 of 2 rows of {copied} were evaluated as test on {entry['date']} "
        "(task 'slots', adapter 'task', then named de.test.jsonl). Give other data or other --rows, or pass "
        "--allow-tested to take it all the same.\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_search_on_test_data_that_is_allowed_says_so_and_so_do_merges_of_it(
    answering: dict[str, Any], adapters: list[str], tmp_path: Path
) -> None:
    new, old = slots(tmp_path, "en.jsonl", "red"), slots(tmp_path, "de.jsonl", "rot")
    asked: dict[str, Any] = answering | {"adapters": adapters, "dev": [new, old], "grid": [0.5, 1.0]}
    search(SearchSettings(out=str(tmp_path / "before"), **asked))
    assert "tested" not in manifest(tmp_path / "before")
    as_test(old)
    with refuses(r"split.tested: 1 of 1 rows of.*de\.jsonl were evaluated as test.*pass --allow-tested"):
        search(SearchSettings(out=str(tmp_path / "refused"), **asked))
    search(SearchSettings(out=str(tmp_path / "after"), allow_tested=True, **asked))
    document = manifest(tmp_path / "after")
    assert [entry["name"] for entry in document["tested"]] == ["de.jsonl"]
    assert document["plan"] == manifest(tmp_path / "before")["plan"]
    told = "Trained or chosen on data that were evaluated as test before: `de.jsonl`."
    assert told in (tmp_path / "after" / "README.md").read_text()
    merge([tmp_path / "after", adapters[1]], weights=[0.5], out=tmp_path / "merged")
    assert manifest(tmp_path / "merged")["tested"] == document["tested"]


@pytest.mark.parametrize("name", ["train", "dev", "pairs", "dev_pairs"])
def test_training_on_test_data_is_refused_unless_allowed(name: str, place: dict[str, Any], tmp_path: Path) -> None:
    de, fr = write_pairs(tmp_path)
    files = {"train": slots(tmp_path, "en.jsonl", "red", "blue"), "dev": slots(tmp_path, "de.jsonl", "rot")}
    files |= {"pairs": de, "dev_pairs": fr}
    as_test(files[name])
    given: dict[str, Any] = place | {key: [file] for key, file in files.items()} | {"steps": 1, "batch_size": 2}
    of_task: dict[str, Any] = {key: value for key, value in given.items() if "pairs" not in key} | {"task": "slots"}
    of_pairs: dict[str, Any] = {key: value for key, value in given.items() if key not in ("train", "dev")}
    out = str(tmp_path / "out")
    runs = {
        "joint": lambda **more: train_joint(JointSettings(task="slots", out=out, **given, **more)),
        "task": lambda **more: train_task(TaskSettings(out=out, **of_task, **more)),
        "align": lambda **more: train_align(AlignSettings(out=out, **of_pairs, **more)),
    }
    use = "dev data" if "dev" in name else "training data"
    for kind in ("joint", "align" if "pairs" in name else "task"):
        for more in ({}, {"dry_run": True}):
            with pytest.raises(
                PlanError, match=f"{use} must not be test data, and .* rows of .*{Path(files[name]).name} were"
            ):
                runs[kind](**more)
        assert not Path(out).exists()
        runs[kind](allow_tested=True)
        document = manifest(Path(out))
        assert [entry["name"] for entry in document["tested"]] == [Path(files[name]).name]
        expected = {"joint": ["de.jsonl", "fr-en.tsv"], "task": ["de.jsonl"], "align": ["fr-en.tsv"]}[kind]
        assert [entry["name"] for entry in document["dev"]] == expected
        assert "allow_tested" not in document["plan"]  # so that an interrupted run goes on with it or without
        shutil.rmtree(out)


def test_as_test_is_refused_what_an_adapter_was_trained_or_chosen_on_through_merges_too(
    answering: dict[str, Any], adapters: list[str], tmp_path: Path, state: Path
) -> None:
    train, dev = slots(tmp_path, "en.jsonl", "red", "blue"), slots(tmp_path, "dev.jsonl", "grey")
    new = slots(tmp_path, "new.en.jsonl", "white")
    place: dict[str, Any] = {key: value for key, value in answering.items() if key not in ("task", "max_new_tokens")}
    trained = TaskSettings(task="slots", train=[train], dev=[f"en={dev}"], out=str(tmp_path / "own"), steps=1, **place)
    train_task(trained.model_copy(update={"batch_size": 2}))
    merge([str(tmp_path / "own"), adapters[1]], weights=[0.9], out=tmp_path / "merged")
    assert [entry["name"] for entry in manifest(tmp_path / "merged")["dev"]] == ["dev.jsonl"]
    for adapter in ({"adapter": str(tmp_path / "merged")}, {"adapter": adapters[1], "against": str(tmp_path / "own")}):
        for data in (train, f"en={dev}"):
            asked = EvaluateSettings(data=[new, data], **adapter, **answering)
            notes = Notes()
            evaluate(asked, watch=notes)
            assert sum("was trained or chosen on" in note for note in notes.said) == 1
            with refuses("split.known"):
                evaluate(asked.model_copy(update={"split": "test"}))
    assert not state.exists()
    notes = Notes()
    asked_search: dict[str, Any] = {"adapters": [str(tmp_path / "own"), adapters[1]], "grid": [0.5], **answering}
    search(SearchSettings(dev=[train, f"en={dev}"], out=str(tmp_path / "found"), **asked_search), watch=notes)
    assert [note for note in notes.said if "was trained on" in note] == [
        f"warning: 2 of 2 rows of {train} were seen before: an adapter was trained on en.jsonl; the choice favours "
        "what it has learned."
    ]
    assert {entry["name"] for entry in manifest(tmp_path / "found")["dev"]} == {"en.jsonl", "dev.jsonl"}
    assert manifest(tmp_path / "found")["scores"]["split"] == "dev"


@pytest.mark.parametrize("split", [None, "dev", "test"])
def test_the_split_is_told_where_it_was_given(
    split: Any, answering: dict[str, Any], tmp_path: Path, state: Path
) -> None:
    data = slots(tmp_path, "en.jsonl", "red", "blue")
    asked = EvaluateSettings(data=[data], split=split, predictions=str(tmp_path / "answers"), **answering)
    notes = Notes()
    found = evaluate(asked, watch=notes)
    lines = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    told = {"split": split} if split else {}
    assert {key: value for key, value in found.document().items() if key == "split"} == told
    assert [{key: value for key, value in line.items() if key == "split"} for line in lines] == [told, told]
    assert state.exists() == (split == "test") == bool(notes.said)
    again = Notes()
    evaluate(asked.model_copy(update={"predictions": None}), watch=again)
    assert again.said == []
    if split == "test":
        assert [entry.adapter for entry in read_record().entries] == ["base"]
        assert len((state / "tested.jsonl").read_text().splitlines()) == 1
        with refuses("split.tested: dev data must not be test data,.*drop --split dev"):
            evaluate(EvaluateSettings(data=[data], split="dev", **answering))


def test_an_evaluation_that_fails_records_nothing(answering: dict[str, Any], tmp_path: Path, state: Path) -> None:
    data = slots(tmp_path, "en.jsonl", "red")
    with pytest.raises(AdapterMixError):
        evaluate(EvaluateSettings(data=[data], split="test", **answering | {"base": str(tmp_path / "none")}))
    assert not state.exists()


def test_a_record_that_cannot_be_kept_is_a_note(
    answering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = slots(tmp_path, "en.jsonl", "red")
    monkeypatch.setenv("ADAPTERMIX_STATE", str(Path(data) / "below a file"))
    notes = Notes()
    assert evaluate(EvaluateSettings(data=[data], split="test", **answering), watch=notes).split == "test"
    assert [note.split(" (")[0] for note in notes.said] == [
        "warning: the record of test data must be writable, and is not"
    ]
    assert read_record().entries == ()


def test_broken_lines_are_passed_over_and_do_no_harm_to_the_next(tmp_path: Path, state: Path) -> None:
    one, two = slots(tmp_path, "en.jsonl", "red"), slots(tmp_path, "de.jsonl", "rot")
    as_test(one)
    record = state / "tested.jsonl"
    whole = record.read_text()
    record.write_bytes(b'\xff\n\n[1]\n{"sha256": "x"}\nnull\n' + whole.encode() + b'{"sha256": "cut')
    as_test(two)
    found = read_record()
    assert [entry.name for entry in found.entries] == ["en.jsonl", "de.jsonl"]
    assert found.faults == (f"{record} is damaged in line 1, 3, 4, 5, 7, which is skipped: delete it, or restore it.",)
    assert record.read_text(errors="replace").count("\n") == 8


def test_lines_of_several_processes_do_not_mix(tmp_path: Path, state: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.en.txt").write_text(str(number))
    work = (
        "import sys\nfrom adaptermix.tasks.data.files import DataFile, find_files\n"
        "from adaptermix.progress import SILENT\n"
        "from adaptermix.tasks.splits import add_to_record\n"
        "for file in find_files([sys.argv[1]]):\n"
        "    add_to_record([file] * 20, task='t' * 200, adapter=sys.argv[2], watch=SILENT)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", work, str(tmp_path / "*.txt"), name], cwd=ROOT) for name in "abc"
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0, 0]
    lines = [json.loads(line) for line in (state / "tested.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 40 * 20
    assert len({(line["adapter"], line["name"]) for line in lines}) == 120
    assert len({entry.text for entry in read_record().entries}) == 40


@pytest.mark.skipif(os.name == "nt", reason="folders of another system")
def test_the_state_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ADAPTERMIX_STATE")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state_folder() == tmp_path / ".local" / "state" / "adaptermix"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    assert state_folder() == tmp_path / "states" / "adaptermix"
    monkeypatch.setenv("ADAPTERMIX_STATE", str(tmp_path / "mine"))
    assert state_folder() == tmp_path / "mine"


def test_a_search_that_was_interrupted_goes_on_where_its_data_were_evaluated_meanwhile(
    answering: dict[str, Any], adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = write_slots(tmp_path, "dev.en.jsonl")
    asked = SearchSettings(adapters=adapters, dev=[dev], grid=[0.5, 1.0], out=str(tmp_path / "out"), **answering)
    from adaptermix.weight_search import run

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search(asked)
    as_test(dev)
    notes = Notes()
    search(asked.model_copy(update={"allow_tested": True}), watch=notes)
    assert [note for note in notes.said if note.startswith("trial")] == []


def test_a_file_is_known_packed_and_with_other_line_ends_but_not_with_other_rows(tmp_path: Path) -> None:
    data = Path(slots(tmp_path, "de.jsonl", "rot"))
    as_test(str(data))
    text = data.read_bytes().rstrip(b"\n")
    packed = tmp_path / "packed.de.jsonl.gz"
    packed.write_bytes(gzip.compress(text))
    (tmp_path / "ends.de.jsonl").write_bytes(text.replace(b"\n", b"\r\n") + b"\r\n\n")
    (tmp_path / "more.de.jsonl").write_bytes(text + b"\n" + text.splitlines()[0].replace(b"rot", b"tot"))

    def refused(path: Path) -> list[object]:
        return refuse_tested({"dev data": [DataFile(path=path, languages=("de",))]}, allowed=True)

    assert refused(packed)
    assert refused(tmp_path / "ends.de.jsonl")
    assert not refused(tmp_path / "more.de.jsonl")


@pytest.mark.parametrize(
    ("written", "hashed"),
    [
        (b"a\nb\n", b"a\nb\n"),
        (b"a\r\nb", b"a\nb\n"),
        (b"a  \nb\t\n", b"a\nb\n"),  # blanks at the end of a line
        (b"a\nb\n\n\n", b"a\nb\n"),  # blank lines at the end of the file
        (b"a\n\nb\n", b"a\n\nb\n"),  # those within end sentences (CoNLL), so they count
        (b"\na\n \n\nb\n", b"\na\n\n\nb\n"),
        (b" a\nb\n", b" a\nb\n"),
    ],
)
def test_the_hash_of_a_files_text_by_hand(written: bytes, hashed: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.en.txt").write_bytes(written)
    file = DataFile(path=tmp_path / "data.en.txt", languages=("en",))
    assert file.hashes() == {"sha256": sha256(written).hexdigest(), "text": sha256(hashed).hexdigest()}
