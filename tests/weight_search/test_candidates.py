"""What a trial does is what is written: places, options, ranks and heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search
from adaptermix.weight_search import search_dry
from adaptermix.weight_search.prepare import prepare
from adaptermix.weight_search.space import CandidateList
from tests.factories import peft_lora

from ..refusals import refuses

COMMON = {"task": "classify", "max_new_tokens": 6, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def given(causal: Path, tmp_path: Path) -> dict[str, object]:
    adapters = [
        peft_lora(causal, tmp_path / f"a{seed}", seed=seed, r=rank, lora_alpha=24 * rank)
        for seed, rank in enumerate((4, 2, 3))
    ]
    rows = [{"text": f"wake me {n}", "label": "x"} for n in range(12)]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **COMMON,
        "base": str(causal),
        "adapters": list(map(str, adapters)),
        "dev": [str(tmp_path / "en.jsonl")],
        "out": str(tmp_path / "out"),
    }


CASES = {
    "three adapters": {"trials": 3},
    "free": {"trials": 3, "space": "free", "bounds": [0.5, 2.0]},
    "groups of layers": {"trials": 3, "groups": ["2"]},
    "globs": {"trials": 3, "groups": ["*q_proj", "*layers.1.*"]},
    "curve": {"trials": 3, "curve": 3},
    "rank": {"trials": 3, "rank": 2},
    "ties": {"trials": 4, "method": "ties", "vary": {"density": "0.2:0.9"}, "rank": 4},
    "choices": {
        "grid": [0.2, 0.5],
        "method": "ties",
        "vary": {"density": "0.2,0.8", "order": "elect-first,scale-first"},
    },
    "random": {"trials": 3, "method": "dare-linear", "vary": {"density": "0.3:0.6"}, "rank": 4, "seed": 3},
    "gain": {"grid": [0.2, 0.5], "method": "task-arithmetic", "vary": {"gain": "0.01,0.5,3"}},
    "cut": {"trials": 3, "method": "svd"},
    "fixed and searched": {
        "trials": 3,
        "method": "ties",
        "options": {"gain": 2.0},
        "vary": {"density": "0.2:0.9"},
        "rank": 4,
    },
    "core space": {"trials": 3, "method": "ties", "options": {"space": "core"}, "vary": {"density": "0.2:0.9"}},
    "layer swap": {
        "grid": [1.0],
        "space": "free",
        "method": "layer-swap",
        "options": {"transition": 1},
        "vary": {"bottom": "0,1,3", "top": "0,1"},
        "two": True,
    },
    "sampled borders": {
        "trials": 4,
        "space": "free",
        "bounds": [1.0, 1.0],
        "method": "layer-swap",
        "vary": {"bottom": "0:4", "top": "0:4"},
        "two": True,
    },
    "tied weights": {
        "trials": 3,
        "space": "free",
        "bounds": [1.0, 1.0],
        "method": "adamergex",
        "vary": {"t": "0.0:2.0"},
    },
    "wudi": {"grid": [1.0, 0.5], "space": "free", "method": "wudi", "two": True},
    "balance": {"grid": [0.2, 0.8], "method": "do-merging", "vary": {"per": "column,module"}, "two": True},
    "slerp of a pair": {"trials": 3, "method": "slerp", "two": True},
}


@pytest.mark.parametrize("name", CASES)
def test_every_trial_answers_as_the_merge_that_it_stands_for(
    name: str, given: dict[str, object], causal: Path, tmp_path: Path
) -> None:
    case = dict(CASES[name])
    if case.pop("two", False):
        given = given | {"adapters": given["adapters"][:2]}  # type: ignore[index]
    settings = SearchSettings(**(given | case))  # type: ignore[arg-type]
    found = search(settings)
    told = set()
    for number, trial in enumerate(found.trials):
        candidate = trial.candidate
        merge(
            settings.adapters,
            weights=candidate.weights,
            method=settings.method,
            options={**settings.options, **candidate.options},
            places=[place.entry() for place in candidate.overrides],
            rank=settings.rank,
            seed=settings.seed,
            max_residual=1.0,
            out=tmp_path / f"merged{number}",
        )
        asked = EvaluateSettings(
            base=str(causal), adapter=str(tmp_path / f"merged{number}"), data=settings.dev, **COMMON
        )
        assert list(trial.answers) == list(evaluate(asked).answers)
        told.add(trial.answers)
        if trial is found.chosen:
            weights = "adapter_model.safetensors"
            assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / f"merged{number}" / weights).read_bytes()
    assert len(told) > 1
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["plan"]["weights"] == list(found.chosen.candidate.weights)
    assert manifest["plan"]["options"] == (
        {} if found.chosen is found.baseline else {**settings.options, **found.chosen.candidate.options}
    )


def test_the_score_of_a_raced_search_is_that_of_what_it_chose(given: dict[str, object], tmp_path: Path) -> None:
    rows = [{"text": f"wake me {n}", "label": "x"} for n in range(150)]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # right is what one of the candidates answers
    asked = SearchSettings(**(given | {"grid": [0.2, 0.3, 0.4, 0.8], "adapters": given["adapters"][:2]}))  # type: ignore[arg-type, index]
    answers = search(asked).trials[2].answers
    labelled = [row | {"label": answer} for row, answer in zip(rows, answers, strict=True) if answer]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    found = search(asked.model_copy(update={"race": True, "out": str(tmp_path / "raced")}))
    assert any(not trial.is_whole for trial in found.trials[:2])
    assert found.chosen.candidate.weights == (0.4, 0.6)
    assert found.chosen_score.value == 1.0
    assert found.document()["best"]["value"] == 1.0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"trials": 3, "groups": ["99"]}, "search.groups-count: 4, got 99"),
        ({"trials": 3, "groups": ["0"]}, "search.groups-count: got 0"),
        ({"trials": 3, "groups": ["2"], "curve": 3}, "search.curve"),
        ({"trials": 3, "storage": "."}, "storage.is-folder"),
        ({"trials": 3, "groups": ["2", "*q_proj"]}, "search.groups"),
        ({"trials": 3, "groups": ["*nothing"]}, "override.no-module"),
        ({"trials": 3, "vary": {"density": "0.9:0.1"}, "method": "ties"}, "vary.value: 0.9:0.1"),
        ({"trials": 3, "vary": {"density": "a:b"}, "method": "ties"}, "vary.value: a:b"),
        ({"trials": 3, "vary": {"density": "0.5,0.5"}, "method": "ties"}, "vary.value: 0.5,0.5"),
        ({"trials": 3, "vary": {"density": "0.5:1.5"}, "method": "ties"}, "method.share: density"),
        ({"trials": 3, "vary": {"densty": "0.5:0.9"}, "method": "ties"}, "method.unknown-option: 'density'"),
        ({"grid": [0.5], "vary": {"density": "0.5:0.9"}, "method": "ties"}, "vary.range-in-grid"),
        ({"grid": [0.9, 1.0]}, "search.grid"),
        ({"trials": 3, "method": "fisher"}, "search.statistics-method"),
        ({"trials": 3, "method": "layer-swap"}, "method.roles: Got 3"),
        ({"trials": 3, "space": "free", "bounds": [1.0, 1.0]}, "search.bounds: 1.0,1.0"),
        ({"trials": 3, "method": "tis"}, "method.unknown: 'ties'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_loaded(
    more: dict[str, object], words: str, given: dict[str, object], tmp_path: Path
) -> None:
    with refuses(words):
        search_dry(SearchSettings(**(given | more)))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_averages_and_sums_are_tried_by_default(given: dict[str, object]) -> None:
    settings = SearchSettings(**(given | {"adapters": given["adapters"][:2]}))  # type: ignore[arg-type, index]
    found = prepare(settings, writes=False)
    assert isinstance(found.searched, CandidateList)
    weights = [candidate.weights for candidate in found.searched.candidates]
    assert weights == [(0.25, 0.75), (0.5, 0.5), (0.9, 0.1), (1.0, 0.25), (1.0, 0.5), (1.0, 0.9)]


def test_sums_are_the_whole_first_adapter_and_shares_of_the_others(given: dict[str, object]) -> None:
    settings = SearchSettings(**(given | {"grid": [0.0, 0.5], "space": "sum"}))  # type: ignore[arg-type]
    found = prepare(settings, writes=False)
    assert isinstance(found.searched, CandidateList)
    weights = [candidate.weights for candidate in found.searched.candidates]
    assert weights == [(1.0, 0.0, 0.0), (1.0, 0.0, 0.5), (1.0, 0.5, 0.0), (1.0, 0.5, 0.5)]
    assert "left out" not in " ".join(found.notes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"space": "free"}, "search.grid-or-trials"),
        ({"groups": ["2"]}, "search.grid-or-trials"),
        ({"grid": [0.5], "trials": 3}, "search.grid-or-trials"),
        ({"grid": [0.5], "sampler": "tpe"}, "search.sampler: tpe"),
        ({"grid": [0.5], "groups": ["2"]}, "search.grid-groups"),
        ({"trials": 3, "bounds": [1.0, 0.5]}, "search.bounds"),
        ({"trials": 3, "bounds": [1.0]}, "search.bounds"),
        ({"trials": 3, "curve": 2, "groups": ["*q_proj"]}, "search.curve-groups"),
        ({"trials": 3, "adapters": ["one"]}, "search.one-adapter"),
        ({"trials": 3, "bounds": [0.0, 1.0]}, "search.bounds-space"),
        ({"trials": 3, "space": "sum"}, "search.space: sum"),
        ({"trials": 3, "study": "mine"}, "study.no-storage"),
        ({"trials": 3, "storage": ""}, "storage.empty"),
        ({"trials": 3, "options": {"gain": 1.0}, "vary": {"gain": "1:2"}}, "vary.also-set"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    more: dict[str, object], words: str, given: dict[str, object]
) -> None:
    with refuses(words):
        SearchSettings(**(given | more))  # type: ignore[arg-type]


def test_a_dora_is_refused_by_name(given: dict[str, object], causal: Path, tmp_path: Path) -> None:
    dora = peft_lora(causal, tmp_path / "dora", seed=5, r=2, use_dora=True)
    with refuses("search.not-lora: dora.*DoRA"):
        search_dry(SearchSettings(**(given | {"adapters": [str(dora)], "trials": 2, "space": "free"})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "borders",
    [
        {"grid": [1.0], "vary": {"bottom": "0,2,5"}},
        {"trials": 3, "bounds": [1.0, 1.0], "vary": {"bottom": "0:5"}},
        {"grid": [1.0], "options": {"bottom": 5}},
    ],
    ids=str,
)
def test_borders_outside_the_model_are_refused_before_a_candidate_is_judged(
    given: dict[str, object], borders: dict[str, object]
) -> None:
    given = {**given, "adapters": given["adapters"][:2], "space": "free", "method": "layer-swap"}  # type: ignore[index]
    with refuses("method.too-many-layers: bottom.*4.*5"):
        search_dry(SearchSettings(**given, **borders))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("simplex", [(0.5, 0.5), (1.0, 0.0)]),
        ("free", [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)]),
        ("sum", [(1.0, 0.5), (1.0, 1.0)]),
        ("both", [(0.5, 0.5), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]),
    ],
)
def test_the_weights_of_a_grid_in_each_space(
    space: str, expected: list[tuple[float, ...]], given: dict[str, object]
) -> None:
    given["adapters"] = given["adapters"][:2]  # type: ignore[index]
    found = prepare(SearchSettings(**given, grid=[0.5, 1.0], space=space)).searched  # type: ignore[arg-type]
    assert isinstance(found, CandidateList)
    assert [candidate.weights for candidate in found.candidates] == expected


@pytest.mark.parametrize(
    ("more", "parameters"),
    [
        ({}, {"w0": "0.0:1.0", "w1": "0.0:1.0"}),
        ({"space": "free"}, {"w0": "0.0:1.5", "w1": "0.0:1.5", "w2": "0.0:1.5"}),
        (
            {"space": "free", "bounds": [1.0, 1.0], "method": "ties", "vary": {"density": "0.2:0.9"}},
            {"density": "0.2:0.9"},
        ),
        ({"groups": ["*q_proj"]}, {f"place{place}.0.w{i}": "0.0:1.0" for place in (0, 1) for i in (0, 1)}),
    ],
    ids=["simplex", "free", "fixed", "groups"],
)
def test_what_a_sampler_proposes_in_each_space(
    more: dict[str, object], parameters: dict[str, str], given: dict[str, object]
) -> None:
    found = prepare(SearchSettings(**given, trials=3, **more)).searched  # type: ignore[arg-type]
    assert {name: str(parameter) for name, parameter in found.parameters.items()} == parameters
