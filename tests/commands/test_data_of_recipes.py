"""`run --dry-run` reads every data file of every step, and reports all faults at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipe_checks import check_data
from adaptermix.commands.recipe_file import read_recipe
from tests.refusals import refuses
from tests.training.data import write_pairs, write_slots


def write(folder: Path, *steps: str) -> Path:
    lines = "".join(f"  - {step}\n" for step in steps)
    (folder / "recipe.yaml").write_text(f"version: 1\nvariables: {{d: '{folder}'}}\nsteps:\n{lines}")
    return folder / "recipe.yaml"


def check(path: Path) -> None:
    check_data(path, read_recipe(path).steps)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_slots(tmp_path)
    write_pairs(tmp_path)
    (tmp_path / "de.txt").write_text("eins\nzwei\n")
    (tmp_path / "en.txt").write_text("one\ntwo\n")
    return tmp_path


GOOD = (
    "train-task: {base: b, task: slots, train: ['${d}/train.*.jsonl'], dev: ['de=${d}/train.en.jsonl'], out: '${d}/t'}",
    "train-align: {base: b, pairs: ['${d}/de-en.tsv', '${d}/fr-en.tsv'], out: '${d}/a'}",
    "evaluate: {base: b, task: slots, data: ['${d}/train.en.jsonl'], rows: '2:4'}",
    "retrieve: {base: b, data: ['${d}/de.txt', '${d}/en.txt']}",
    "bake: {base: b, adapter: ['${d}/t'], quantize: nf4, calibration: ['${d}/de.txt'], out: '${d}/baked'}",
    "demo-inputs: {out: '${d}/made'}",
    "evaluate: {base: b, task: classify, data: ['${d}/made/test.*.jsonl', 'de=${d}/made/x.jsonl', 'hf:me/x:de:test']}",
    "retrieve: {base: b, data: ['${d}/made/de.txt', '${d}/en.txt']}",
)


def test_good_files_and_those_of_earlier_steps_pass(data: Path) -> None:
    check(write(data, *GOOD))


def test_files_of_a_later_step_are_missing(data: Path) -> None:
    with refuses(r"data.not-found: step 1 \(evaluate\), data: .*/made/test"):
        check(write(data, GOOD[6], GOOD[5]))


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("evaluate: {base: b, task: slots, data: ['${d}/nowhere.jsonl']}", "data.not-found"),
        ("evaluate: {base: b, task: slots, data: ['${d}/train.en.jsonl'], rows: '6:'}", "data.none-in-rows"),
        ("evaluate: {base: b, task: slots, data: ['${d}/unnamed.jsonl']}", "data.no-language"),
        ("evaluate: {base: b, task: slots, data: ['${d}/broken.en.jsonl']}", "row.not-json"),
        ("train-align: {base: b, pairs: ['${d}/de-en.tsv', '${d}/unnamed.tsv'], out: o}", "pairs.no-languages"),
        ("retrieve: {base: b, data: ['${d}/de.txt', '${d}/fr.txt']}", "parallel.line-count"),
        ("evaluate: {base: b, task: translate, data: ['${d}/de.txt', '${d}/fr.txt']}", "translate.line-count"),
        ("train-stack: {encoder: e, base: b, texts: ['${d}/blank.en.txt'], out: o}", "data.none-in-rows"),
        ("compare: {systems: [a=x], task: slots, data: ['${d}/de.txt']}", "slots.format"),
        (
            "train-task: {base: b, task: slots, train: ['${d}/train.en.jsonl'], dev: ['${d}/dev.jsonl'], out: o}",
            "data.not-found",
        ),
    ],
)
def test_each_kind_of_fault_is_found(step: str, code: str, data: Path) -> None:
    (data / "unnamed.jsonl").write_text((data / "train.en.jsonl").read_text())
    (data / "broken.en.jsonl").write_text("{\n")
    (data / "unnamed.tsv").write_text("a\tb\n")
    (data / "blank.en.txt").write_text("\n\n")
    (data / "fr.txt").write_text("un\n")
    path = write(data, step)
    with refuses("recipe.data") as caught:
        check(path)
    assert caught.value.codes == ["recipe.data", code]  # type: ignore[attr-defined]


def test_all_faults_are_reported_together_and_shared_ones_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "recipe.yaml"
    path.write_text(
        f"""
version: 1
steps:
  - train-task: {{base: b, task: slots, train: [{data}/train.en.jsonl, {data}/no.jsonl], out: {data}/t}}
  - each: {{seed: [0, 1, 2]}}
    steps:
      - evaluate: {{base: b, task: slots, data: [{data}/empty.en.jsonl, {data}/bad.en.jsonl], seed: "${{seed}}"}}
"""
    )
    (data / "empty.en.jsonl").write_text("")
    (data / "bad.en.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "--dry-run", "--json"])
    assert ended.value.code == 1
    error = json.loads(capsys.readouterr().out)["error"]
    message = error["message"]
    for piece in (
        "step 1 (train-task), train: a data file must exist",
        "step 2 (evaluate, seed 0) and 2 more steps, data: a data file must hold rows",
        "bad.en.jsonl:1",
    ):
        assert message.count(piece) == 1, (piece, message)
    assert error["codes"][:3] == ["recipe.data", "data.not-found", "data.empty"]
