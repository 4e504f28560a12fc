"""Random adapters in the place of the others: what they are, and what the verdict says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_by
from hypothesis import strategies as st

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search, train_align, train_task
from adaptermix.adapters import open_adapter
from adaptermix.algebra import LowRank
from adaptermix.options import AlignSettings, TaskSettings
from adaptermix.weight_search import control, run
from adaptermix.weight_search.control import random_adapters, random_update
from tests.factories import peft_lora
from tests.fusion.test_commands import write_rows

from .test_significance import scorer, trial

COMMON: dict[str, Any] = {"task": "classify", "max_new_tokens": 12, "dtype": "float32", "device": "cpu"}


@given_by(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.floats(0.01, 100))
def test_rank_and_norm_are_those_of_the_update(out: int, into: int, rank: int, scale: float) -> None:
    rank = min(rank, out, into)
    generator = torch.Generator().manual_seed(out)
    b, a = (torch.randn(shape, generator=generator).double() for shape in ((out, rank), (rank, into)))
    update = LowRank(b=b, a=a, scale=scale)
    found = random_update(update, seed=3, key="k", module="m")
    assert float(torch.linalg.norm(found.dense())) == pytest.approx(float(torch.linalg.norm(update.dense())), rel=1e-9)
    assert torch.linalg.matrix_rank(found.dense()) == rank
    again = random_update(update, seed=3, key="k", module="m")
    assert torch.equal(found.b, again.b)
    others = [random_update(update, seed=4, key="k", module="m"), random_update(update, seed=3, key="k", module="n")]
    assert all(not torch.allclose(found.a, other.a) for other in others)
    nothing = random_update(LowRank(b=0 * b, a=a), seed=3, key="k", module="m")
    assert float(nothing.dense().abs().max()) == 0


def test_entries_are_gaussian() -> None:
    update = LowRank(b=torch.randn(400, 8), a=torch.randn(8, 300))
    entries = random_update(update, seed=0, key="k", module="m").a.flatten()
    assert float(entries.mean()) == pytest.approx(0, abs=0.06)
    assert float(entries.std()) == pytest.approx(1, abs=0.05)
    assert float((entries.abs() < 1).double().mean()) == pytest.approx(0.683, abs=0.03)


def test_only_the_others_are_random_and_they_load_as_any_adapter(causal: Path, tmp_path: Path) -> None:
    folders = [
        peft_lora(causal, tmp_path / "one", seed=1, r=4),
        peft_lora(causal, tmp_path / "two", seed=2, r=2, lora_alpha=6, rank_pattern={"q_proj": 5}, alpha_pattern={}),
    ]
    sources = [open_adapter(folder) for folder in folders]
    with random_adapters(sources, seed=0) as found:
        assert found[0] is sources[0]
        rivals, own = found[1].read().updates, sources[1].read().updates
        assert set(rivals) == set(own)
        assert len({sources[1].rank(module) for module in own}) == 2
        for module in own:
            rival, delta = rivals[module].dense(), own[module].dense()
            assert float(rival.norm()) == pytest.approx(float(delta.norm()), rel=1e-5)
            assert found[1].rank(module) == sources[1].rank(module)
            assert abs(float((rival * delta).sum() / delta.norm() ** 2)) < 0.5


def verdict_of(chosen: list[bool], rival: list[bool], alone: list[bool]) -> Any:
    """Return the verdict on a candidate where random adapters answer so."""
    from dataclasses import replace

    from adaptermix.weight_search.decision import Control

    table = scorer(len(alone), languages=2)
    own, base, other = trial(chosen), trial(alone, weights=(1.0, 0.0)), trial(rival)
    found = table.decide([own, base], base, rule="best")
    return replace(
        found,
        control=Control(
            tried=1,
            score=table.score(other),
            languages=table.languages(other),
            gain=table.difference(base, other),
            difference=table.difference(other, own),
        ),
    )


@pytest.mark.parametrize(("gains_too", "skill"), [(False, 0.5), (True, 0.78)])
def test_a_gain_that_random_adapters_have_too_is_not_found(gains_too: bool, skill: float) -> None:
    """By planted skills: .5 alone, .8 chosen, and random adapters at one or the other."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(300)
    alone, chosen, rival = (
        [bool(hit) for hit in difficulty + rng.normal(0, 0.03, 300) < own] for own in (0.5, 0.8, skill)
    )
    found = verdict_of(chosen, rival, alone)
    assert found.is_better
    assert found.control.gains_too == gains_too
    assert found.is_found != gains_too
    assert found.document()["found"] != gains_too
    right = np.mean(chosen) - np.mean(rival)
    assert found.control.difference.value == pytest.approx(right, abs=1e-9)
    assert found.control.gain.value == pytest.approx(np.mean(rival) - np.mean(alone), abs=1e-9)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(params=[{}])
def given(causal: Path, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Two adapters; right is what their merge at .4 answers, by a method that a test may choose."""
    one = peft_lora(causal, tmp_path / "one", seed=1, r=4, lora_alpha=64)
    two = peft_lora(causal, tmp_path / "two", seed=2, r=2, lora_alpha=32)
    common = {**COMMON, "base": str(causal)}
    asked = write(tmp_path / "asked.en.jsonl", [{"text": f"wake me {n}", "label": "x"} for n in range(40)])
    merge([one, two], weights=[0.4], out=tmp_path / "planted", max_residual=1, **request.param)
    found = evaluate(EvaluateSettings(adapter=str(tmp_path / "planted"), data=[asked], **common))
    rows = [{"text": f"wake me {n}", "label": answer} for n, answer in enumerate(found.answers) if answer]
    dev = write(tmp_path / "en.jsonl", rows)
    return {
        **common,
        "adapters": [str(one), str(two)],
        "dev": [dev],
        "grid": [0.4, 0.9],
        "out": str(tmp_path / "out"),
        **request.param,
    }


@pytest.mark.parametrize(
    "given", [{}, {"method": "ties", "options": {"density": 0.9}}], ids=["sum", "ties"], indirect=True
)
def test_a_planted_gain_stays_and_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = search(SearchSettings(**given, report=True))
    found = result.verdict.control
    assert found is not None
    assert found.difference.low > 0
    assert result.verdict.is_found
    assert result.sentence().endswith("over random adapters of the same ranks and norms instead of the others.")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["verdict"]["control"] == json.loads(json.dumps(found.document()))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["scores"]["verdict"]["control"]["gains_too"] is False
    assert "random adapters instead of the others" in (tmp_path / "out" / "report.html").read_text()
    # the search itself, and what it writes, are those without the control
    other = search(SearchSettings(**given | {"out": str(tmp_path / "none")}, control=0))
    assert other.verdict.control is None
    assert other.verdict.is_found
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "none" / weights).read_bytes()


def test_where_random_adapters_answer_as_well_the_verdict_says_so(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are the adapters themselves they gain as much."""
    monkeypatch.setattr(control, "random_update", lambda update, **_more: update)
    result = search(SearchSettings(**given))
    assert result.verdict.is_better
    assert result.verdict.control is not None
    assert result.verdict.control.difference.value == 0
    assert not result.verdict.is_found
    assert "but not clearly better than random adapters" in result.sentence()


def test_several_draws_and_a_search_that_goes_on(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the draws counts; answers are kept, and given again by the same seed."""
    asked: list[int] = []
    real = control.random_adapters

    def spy(*args: Any, **more: Any) -> Any:
        asked.append(more["number"])
        return real(*args, **more)

    monkeypatch.setattr(control, "random_adapters", spy)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_result", lambda *_given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search(SearchSettings(**given, control=2))
    assert asked == [0, 1]
    first = search(SearchSettings(**given, control=3))
    assert asked == [0, 1, 2]
    second = search(SearchSettings(**given | {"out": given["out"] + "2"}, control=3))
    assert asked == [0, 1, 2, 0, 1, 2]
    assert first.verdict.control == second.verdict.control


def test_nothing_is_asked_where_nothing_was_found(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "random_adapters", None)
    result = search(SearchSettings(**given | {"grid": [0.97, 0.99]}))
    assert result.verdict.control is None


@pytest.mark.parametrize(
    "more",
    [
        {"trials": 3, "groups": ["2"], "space": "free", "race": True},
        {"grid": [0.3], "space": "both", "rank": 2},
        {"grid": [0.3], "space": "both", "objective": "agreement"},
    ],
    ids=["groups, raced", "three, of rank 2", "agreement"],
)
def test_heads_groups_and_choices_without_labels(
    more: dict[str, Any], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three adapters of which the first has a head; the others are random in the control."""
    rows = write_rows(tmp_path, "en.csv", says=True)
    common: dict[str, Any] = {"base": str(encoder), "device": "cpu", "dtype": "float32"}
    taught = {"task": "classify", "train": [rows], "steps": 40, "batch_size": 8, "learning_rate": 1e-2, "rank": 4}
    train_task(TaskSettings(**common, **taught, out=str(tmp_path / "task")))
    texts = [row["text"] for row in csv.DictReader(Path(rows).read_text().splitlines())]
    pairs = tmp_path / "de-en.tsv"
    pairs.write_text("".join(f"das {text}\t{text}\n" for text in texts))
    for seed in (1, 2):
        aligned = AlignSettings(
            **common, pairs=[str(pairs)], steps=3, batch_size=4, seed=seed, out=str(tmp_path / f"align{seed}")
        )
        train_align(aligned)
    asked = {"adapters": [str(tmp_path / name) for name in ("task", "align1", "align2")], "task": "classify"}
    asked |= {"pairs": [str(pairs)]} if "objective" in more else {"dev": [rows]}
    monkeypatch.setattr("adaptermix.weight_search.decision.LEVEL", 1.0)  # whatever is chosen counts as better
    result = search(SearchSettings(**common, **asked, **more, out=str(tmp_path / "out")))
    found = result.verdict.control
    assert found is not None
    assert found.difference.value == pytest.approx(result.chosen_score.value - found.score.value, abs=1e-9)
