"""Searching with adapters made by PEFT: what is scored, what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search
from adaptermix.errors import AdapterMixError, DataError, ModelError, OutputError
from adaptermix.weight_search import search_dry
from tests.factories import adapter_deltas, contents, peft_lora

from ..refusals import refuses

COMMON = {"task": "slots", "max_new_tokens": 4, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def adapters(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random adapters of other ranks, scales and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    one = peft_lora(causal, folder / "one", seed=1, r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    two = peft_lora(causal, folder / "two", seed=2, r=2, lora_alpha=2, use_rslora=True, target_modules=["q_proj"])
    return one, two


@pytest.fixture
def dev(tmp_path: Path) -> list[str]:
    folder = tmp_path / "dev"
    folder.mkdir()
    for language, texts in {"de": ["weck mich", "ja"], "en": ["wake me", "play it", "no"]}.items():
        rows = [{"text": text, "slots": [{"type": "t", "value": text}]} for text in texts]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "*.jsonl")]


def settings_for(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], out: Path, **more: object
) -> SearchSettings:
    names = {"base": str(causal), "adapters": [str(path) for path in adapters], "dev": dev, "out": str(out)}
    return SearchSettings(**(names | COMMON | {"grid": [0.25, 0.9, 1.0]} | more))  # type: ignore[arg-type]


def test_trials_of_foreign_adapters_answer_as_their_merge_does(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    before = [contents(folder) for folder in (*adapters, causal)]
    found = search(settings_for(causal, adapters, dev, tmp_path / "out"))
    assert [trial.candidate.weights for trial in found.trials] == [(0.25, 0.75), (0.9, 0.1), (1.0, 0.0)]
    for trial, score, languages in zip(found.trials, found.scores, found.languages, strict=True):
        weights = trial.candidate.weights
        merged = tmp_path / f"merged-{weights[0]}"
        merge(adapters, weights=weights, out=merged)
        alone = evaluate(EvaluateSettings(base=str(causal), adapter=str(merged), data=dev, **COMMON))
        assert list(trial.answers) == alone.answers
        assert languages == alone.scores
        assert score == alone.overall
    assert len({trial.answers for trial in found.trials}) > 1
    assert found.chosen_score.value == max(score.value for score in found.scores)
    assert [contents(folder) for folder in (*adapters, causal)] == before


def test_the_output_is_the_exact_merge_at_the_best_weight(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    found = search(settings_for(causal, adapters, dev, tmp_path / "out"))
    one, two = map(adapter_deltas, adapters)
    deltas = adapter_deltas(tmp_path / "out")
    first, second = found.chosen.candidate.weights
    assert set(deltas) == set(one)
    for module, delta in deltas.items():
        expected = first * one[module] + (second * two[module] if module in two else 0)
        assert float((delta - expected).norm()) <= 1e-6 * float(expected.norm())


def test_the_manifest_holds_the_dev_files_by_hash_and_the_document_the_trials(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    found = search(settings_for(causal, adapters, dev, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["kind"] == "search"
    listed = ("name", "languages", "sha256")
    assert [{key: entry[key] for key in listed} for entry in manifest["dev"]] == [
        {"name": path.name, "languages": [path.stem], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(Path(dev[0]).parent.iterdir())
    ]
    assert [entry["rows"] for entry in manifest["dev"]] == [2, 3]
    assert manifest["plan"]["weights"] == list(found.chosen.candidate.weights)
    assert [entry["weight"] for entry in manifest["inputs"]] == list(found.chosen.candidate.weights)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document == json.loads(json.dumps(found.document()))
    assert set(document["best"]) == {"weights", "value", "low", "high"}
    assert document["out"] == str(tmp_path / "out")
    assert [trial["rows"] for trial in document["trials"]] == [5, 5, 5]
    assert all({"weights", "value", "rows"} <= set(trial) for trial in document["trials"])


def test_equal_searches_write_equal_bytes(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    made = []
    for _ in range(2):
        search(settings_for(causal, adapters, dev, tmp_path / "out", grid=[0.5, 0.9], overwrite=bool(made)))
        made.append(contents(tmp_path / "out"))
    different = {name for name in made[0] if made[0][name] != made[1][name]}
    assert different == set()


def test_a_dry_search_checks_and_writes_nothing(
    causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    plan = search_dry(settings_for(causal, adapters, dev, tmp_path / "out", rows=":1"))
    assert (plan["dry_run"], plan["rows"], plan["plan"]["grid"]) == (True, 2, [0.25, 0.9, 1.0])
    with refuses("base.unreachable"):
        search_dry(settings_for(causal, adapters, dev, tmp_path / "out", rows=":1", base="no-such-model"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rows": "9:"}, DataError, "data.none-in-rows: 2"),
        ({"template": "fancy"}, AdapterMixError, "task.template: plain, mid-align"),
        ({"task": "slot"}, AdapterMixError, "task.unknown: choice, classify, ner-json,"),
        ({"base": "no-such-model-folder/"}, ModelError, "base.unreachable"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_is_left(
    change: dict[str, object],
    kind: type,
    message: str,
    causal: Path,
    adapters: tuple[Path, Path],
    dev: list[str],
    tmp_path: Path,
) -> None:
    with refuses(message):
        search(settings_for(causal, adapters, dev, tmp_path / "out", **change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev"]


def test_an_encoder_and_an_output_that_exists_are_refused(
    causal: Path, encoder: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    with refuses("model.not-causal"):
        search(settings_for(encoder, adapters, dev, tmp_path / "out", allow_base_mismatch=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError):
        search(settings_for(causal, adapters, dev, tmp_path / "out"))


@pytest.mark.parametrize("grid", [[0.5, 0.5], [float("nan")], [float("inf"), 0.5]])
def test_grids_that_are_repeated_or_not_finite_are_refused(
    grid: list[float], causal: Path, adapters: tuple[Path, Path], dev: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="grid"):
        settings_for(causal, adapters, dev, tmp_path / "out", grid=grid)
