"""Systems side by side, from answers on disk."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptermix import CompareSettings, compare_systems
from adaptermix.cli import main
from adaptermix.errors import AdapterMixError
from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task
from adaptermix.tasks.tagged import Tagged, to_entry

from ..refusals import refuses

LABELS = ("good", "bad", "fair")
LANGUAGES = ("de", "en", "tr")


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    files = []
    for number, language in enumerate(LANGUAGES):
        path = tmp_path / f"{language}.test.tsv"
        rows = [(f"text {i}", rng.choice(LABELS)) for i in range(20 + number)]
        path.write_text("".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]))
        files.append(str(path))
    return files


def gold(files: list[str]) -> list[tuple[str, str]]:
    return [
        (Path(file).name[:2], line.split("\t")[1]) for file in files for line in Path(file).read_text().splitlines()[1:]
    ]


def answer(path: Path, files: list[str], right: dict[str, float], seed: int = 0) -> str:
    """Write answers of which a share per language is right."""
    rng = random.Random(f"{path.name}/{seed}")
    with path.open("w") as file:
        for language, label in gold(files):
            given = label if rng.random() < right[language] else "nothing"
            file.write(json.dumps({"language": language, "expected": label, "answer": given}) + "\n")
    return str(path)


def accuracy(path: str) -> dict[str, float]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {
        language: float(np.mean([row["answer"] == row["expected"] for row in rows if row["language"] == language]))
        for language in LANGUAGES
    }


def settings(files: list[str], systems: dict[str, list[str]], **more: Any) -> CompareSettings:
    named = [f"{name}={path}" for name, paths in systems.items() for path in paths]
    return CompareSettings(systems=named, task="classify", data=files, **more)


@pytest.fixture
def systems(data: list[str], tmp_path: Path) -> dict[str, list[str]]:
    shares = {"task": (0.9, 0.9, 0.2), "joint": (0.9, 0.9, 0.8), "merged": (0.9, 0.8, 0.5)}
    return {
        name: [
            answer(tmp_path / f"{name}{seed}.jsonl", data, dict(zip(LANGUAGES, right, strict=True)), seed)
            for seed in range(3)
        ]
        for name, right in shares.items()
    }


def test_values_are_means_over_runs_and_languages(data: list[str], systems: dict[str, list[str]]) -> None:
    found = compare_systems(
        settings(data, systems, baseline="task", ceiling="joint", supervised=["en"], aligned=["tr"])
    )
    for system in found.systems:
        runs = [accuracy(path) for path in systems[system.name]]
        assert list(system.runs) == pytest.approx([np.mean(list(run.values())) for run in runs])
        for language, score in system.languages.items():
            assert score.value == pytest.approx(np.mean([run[language] for run in runs]))
            assert score.low <= score.value <= score.high
        assert system.groups["aligned"].value == pytest.approx(system.languages["tr"].value)
        assert system.groups["transfer"].value == pytest.approx(system.languages["de"].value)
        assert system.groups["all"].value == pytest.approx(np.mean(system.runs))
        assert (system.groups["aligned"].n, system.groups["all"].n) == (22, 63)
    task, joint, merged = found.systems
    assert task.above == task.gap_closed == {}
    gain = merged.groups["all"].value - task.groups["all"].value
    gap = joint.groups["all"].value - task.groups["all"].value
    assert merged.above["all"].value == pytest.approx(gain)
    assert merged.gap_closed["all"].value == pytest.approx(gain / gap)
    assert merged.gap_closed["all"].low < gain / gap < merged.gap_closed["all"].high


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_gains_have_standard_deviations_over_runs_and_over_languages(
    data: list[str], systems: dict[str, list[str]]
) -> None:
    found = compare_systems(settings(data, systems, baseline="task", supervised=["en"]))
    assert found.systems[0].deviations is None
    runs = {name: [accuracy(path) for path in paths] for name, paths in systems.items()}
    gains = [
        {language: ours[language] - base[language] for language in LANGUAGES}
        for ours, base in zip(runs["merged"], runs["task"], strict=True)
    ]
    over = found.systems[2].deviations
    assert over
    means = [statistics.mean(gain.values()) for gain in gains]
    assert over.runs["all"] == pytest.approx(statistics.stdev(means))
    assert over.runs["transfer"] == pytest.approx(statistics.stdev((gain["de"] + gain["tr"]) / 2 for gain in gains))
    by_language = {language: statistics.mean(gain[language] for gain in gains) for language in LANGUAGES}
    assert set(over.languages) == {"all", "transfer"}
    assert over.languages["transfer"] == pytest.approx(statistics.stdev([by_language["de"], by_language["tr"]]))
    assert over.runs_of_languages["tr"] == pytest.approx(statistics.stdev(gain["tr"] for gain in gains))
    assert found.document()["systems"]["merged"]["deviations"] == over.document()  # type: ignore[index]
    table = found.markdown().split("\n\n")[1].splitlines()
    line = dict(zip(cells(table[0]), cells(table[-1]), strict=True))
    assert (len(table), line["gain over task"]) == (4, "merged")
    assert line["tr"] == f"{by_language['tr']:+.3f} ± {over.runs_of_languages['tr']:.3f}"
    assert line["SD of transfer languages"] == f"{over.languages['transfer']:.3f}"


def test_deviations_of_unequal_and_of_single_runs(data: list[str], systems: dict[str, list[str]]) -> None:
    single = {"task": systems["task"][:1], "joint": systems["joint"]}
    over = compare_systems(settings(data, single, baseline="task")).systems[1].deviations
    assert over
    assert (over.runs, over.runs_of_languages, set(over.languages)) == ({}, {}, {"all"})
    unequal = {"task": systems["task"][:2], "joint": systems["joint"]}
    over = compare_systems(settings(data, unequal, baseline="task")).systems[1].deviations
    assert over
    apart = [statistics.variance(accuracy(path)["tr"] for path in paths) for paths in unequal.values()]
    assert over.runs_of_languages["tr"] == pytest.approx(sum(apart) ** 0.5)


def test_the_ceiling_closes_the_whole_gap_and_a_copy_of_the_baseline_none(
    data: list[str], systems: dict[str, list[str]]
) -> None:
    found = compare_systems(
        settings(data, systems | {"copy": systems["task"]}, baseline="task", ceiling="joint")
    ).systems
    ends = [(s.low, s.value, s.high) for s in (found[1].gap_closed["all"], found[3].gap_closed["all"])]
    assert ends == [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)]
    # answers that are the same do not show that other rows would be answered the same
    assert found[3].above["all"].value == 0
    assert -0.1 < found[3].above["all"].low < 0 < found[3].above["all"].high < 0.1


def test_answers_of_a_tagging_head_score_as_evaluate_scores_them(tmp_path: Path) -> None:
    task = get_task("slots")
    path = tmp_path / "test.en.tsv"
    path.write_text("a: b c\tB-x I-x O\n" * 3)
    read, _ = task.read([str(path)], rows=None)
    answers = [Tagged("x: a: b", tags=["B-x", "I-x", "O"], pairs=[("x", "a: b")]), "line\u2028break", "x: a"]
    lines = [
        json.dumps({"language": "en", "expected": task.answer(row), **to_entry(each)}, ensure_ascii=False) + "\n"
        for row, each in zip(read, answers, strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    found = compare_systems(
        CompareSettings(systems=[f"one={tmp_path / 'answers.jsonl'}"], task="slots", data=[str(path)])
    )
    expected = score_answers(task, read, answers, {}, seed=0)
    assert found.systems[0].groups["all"] == expected.overall
    assert expected.overall.value > 0


def test_runs_widen_the_interval_where_they_differ(data: list[str], tmp_path: Path) -> None:
    shares = [dict.fromkeys(LANGUAGES, share) for share in (0.2, 0.9)]
    paths = [answer(tmp_path / f"run{n}.jsonl", data, share) for n, share in enumerate(shares)]
    wide, low = (
        compare_systems(settings(data, {"a": chosen})).systems[0].groups["all"] for chosen in (paths, paths[:1] * 2)
    )
    assert wide.high - wide.low > 1.5 * (low.high - low.low)


def test_what_a_reader_should_know_is_told(data: list[str], systems: dict[str, list[str]], tmp_path: Path) -> None:
    found = compare_systems(settings(data, systems, baseline="joint", ceiling="task"))
    assert "does not clearly exceed" in found.notes[0]
    assert compare_systems(settings(data, systems, baseline="task", ceiling="joint")).notes == []
    none = next(system for system in found.systems if system.name == "merged")
    assert none.document()["gap_closed"]["all"]["value"] is None
    assert " unknown |" in found.markdown()
    for row in systems["merged"]:
        Path(row.replace("merged", "other_")).write_text(Path(row).read_text())
    globs = CompareSettings(
        systems=[f"a={tmp_path}/task?.jsonl", f"b={tmp_path}/other_?.jsonl"], task="classify", data=data
    )
    assert compare_systems(globs).notes == []
    (tmp_path / "other_0.jsonl").rename(tmp_path / "other_7.jsonl")
    assert "check that both have the same seeds" in compare_systems(globs).notes[0]
    uneven = systems | {"task": systems["task"][:1]}
    assert "not paired by run" in compare_systems(settings(data, uneven)).notes[0]


@pytest.mark.parametrize(
    ("given", "more", "says"),
    [
        ("task", {}, "NAME=FILE"),
        ("task=none-*.jsonl", {}, "matches none"),
        ("task={task}", {"baseline": "other"}, "--baseline must be one of the systems (task), got 'other'"),
        ("task={task}", {"aligned": ["fr"]}, "--aligned must be languages of the data (de, en, tr), got 'fr'"),
        ("task={task}", {"rows": ":5"}, "must answer the 15 rows of the data, and has 63 answers"),
        ("task={swapped}", {}, "must answer row 1 of the data, and answers another one"),
        ("task={task}", {"markdown": "/nowhere/at/all/table.md"}, "--markdown must lie in a folder that exists"),
        ("task={odd}", {}, "must be a file of `evaluate --predictions`, and is not"),
    ],
)
def test_what_does_not_fit_is_refused(
    given: str, more: dict[str, Any], says: str, data: list[str], systems: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "odd").write_text('["answer"]\n')
    swapped = Path(systems["task"][0]).read_text().splitlines(keepends=True)
    (tmp_path / "swapped").write_text("".join(reversed(swapped)))
    given = given.format(task=systems["task"][0], odd=tmp_path / "odd", swapped=tmp_path / "swapped")
    with pytest.raises(AdapterMixError) as caught:
        compare_systems(CompareSettings(systems=[given], task="classify", data=data, **more))
    assert says in str(caught.value)


def test_the_command_prints_and_writes_the_table(
    data: list[str], systems: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{name}={tmp_path}/{name}?.jsonl" for name in systems]
    options = ["--task", "classify", "--data", *data, "--baseline", "task", "--ceiling", "joint"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *named, *options, "--markdown", str(tmp_path / "table.md"), "--json"])
    out = capsys.readouterr()
    document = json.loads(out.out)
    assert ended.value.code in (0, None)
    assert document["systems"]["merged"]["gap_closed"]["all"]["value"] < 1
    assert "gap closed" in out.err
    table = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| system", "| ---", "| task", "| joint", "| merged"]
    tr = document["systems"]["merged"]["scores"]["tr"]
    assert table[-1].endswith(f"{tr['value']:.3f} [{tr['low']:.3f}, {tr['high']:.3f}] |")
    with pytest.raises(SystemExit) as ended:
        main(["compare", *named, *options[:-2], "--ceiling", "task"])
    assert ended.value.code == 2
    assert "--ceiling needs another system as --baseline" in capsys.readouterr().err


def test_data_sets_stand_beside_each_other(data: list[str], systems: dict[str, list[str]], tmp_path: Path) -> None:
    first = str(tmp_path / "first.json")
    compare_systems(settings(data, {"task": systems["task"], "joint": systems["joint"]}, document=first))
    both = compare_systems(settings(data, systems, beside=[f"other={first}"]))
    assert both.data_sets is not None
    titles, rows = both.data_sets
    assert titles == ["system", "classify", "other", "mean"]
    assert [row[0] for row in rows] == ["task", "joint", "merged"]
    assert rows[2][2:] == ["", ""]  # the other data set knows no merged system
    score = both.systems[0].groups["all"]
    half = (score.value - score.low) / 2**0.5
    assert rows[0][3].startswith(f"{score.value:.3f} [{score.value - half:.3f}, ")
    assert "| system | classify | other | mean |" in both.markdown()
    for wrong, says in (
        (f"classify={first}", "compare.names"),
        ("x", "compare.document-name"),
        (f"o={data[0]}", "compare.not-document"),
    ):
        with refuses(says):
            compare_systems(settings(data, systems, beside=[wrong]))
