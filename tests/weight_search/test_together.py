"""Candidates that share forward passes answer as each does alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptermix import SearchSettings, search
from adaptermix.adapters import open_adapter
from adaptermix.merging.attach import Attachment, MixedRowsError
from adaptermix.models import batch_size as fitting
from adaptermix.models.base import load_base
from adaptermix.models.batch_size import bytes_of_row, rows_that_fit
from adaptermix.weight_search import candidate_model as judging
from adaptermix.weight_search import run
from tests.factories import peft_lora
from tests.tiny import tiny_causal

TASK = {"task": "classify", "max_new_tokens": 10, "dtype": "float32", "device": "cpu"}


def given(folder: Path, kind: str = "llama", **lora: Any) -> dict[str, Any]:
    base = tiny_causal(folder / "base", kind)
    adapters = [
        str(peft_lora(base, folder / f"a{seed}", seed=seed, r=rank, lora_alpha=24 * rank, **lora))
        for seed, rank in enumerate((4, 2))
    ]
    rows = [{"text": f"wake me {'at ' * (n % 4)}{n}", "label": "x"} for n in range(14)]
    (folder / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **TASK,
        "base": str(base),
        "adapters": adapters,
        "dev": [str(folder / "en.jsonl")],
        "out": str(folder / "out"),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_rows_with_weights_of_their_own_give_what_a_batch_of_those_weights_gives(kind: str, tmp_path: Path) -> None:
    settings = given(tmp_path, kind)
    base = load_base(settings["base"], dtype="float32", device="cpu")
    vectors = [lambda _: [0.9, 0.1], lambda module: [float("layers.1" in module), 0.5], lambda _: [0.0, 0.0]]
    ids = torch.arange(3, 39).reshape(4, 9)
    rows = [2, 0, 1, 0]
    with Attachment(base.model, [open_adapter(path).read() for path in settings["adapters"]]) as attached:
        alone = []
        for vector in vectors:
            attached.set_weights_by_module(vector)
            alone.append(base.model(input_ids=ids).logits)
        attached.set_several(vectors)
        attached.choose(rows)
        together = base.model(input_ids=ids).logits
        expected = torch.stack([alone[vector][row] for row, vector in enumerate(rows)])
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
        assert (alone[0] - alone[1]).abs().max() > 1e-2
        with pytest.raises(MixedRowsError):  # a batch of another size than was told
            base.model(input_ids=ids[:3])


@pytest.mark.parametrize(
    "case", [{"grid": [0.1, 0.3, 0.5, 0.7, 0.9]}, {"trials": 9, "sampler": "tpe", "groups": ["2"]}]
)
@pytest.mark.parametrize("batch_size", [None, 5])
def test_trials_that_run_together_are_those_that_run_in_turn(
    case: dict[str, Any], batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(tmp_path) | case | {"batch_size": batch_size}
    asked: list[int] = []
    real = judging.Answering.together

    def together(self: Any, places: Any, choose: Any, label: str) -> Any:
        asked.append(len(places))
        return real(self, places, choose, label)

    monkeypatch.setattr(judging.Answering, "together", together)
    found = search(SearchSettings(**settings))
    assert max(asked) == (5 if "grid" in case else 6)
    answers = [(trial.candidate, trial.answers) for trial in found.trials]
    assert len({told for _, told in answers}) > 1
    monkeypatch.setattr(run, "TOGETHER", 1)
    asked.clear()
    in_turn = search(SearchSettings(**settings | {"out": str(tmp_path / "turn"), "batch_size": 1}))
    assert max(asked) == 1
    assert [(trial.candidate, trial.answers) for trial in in_turn.trials] == answers
    assert in_turn.chosen.candidate == found.chosen.candidate


def test_where_modules_do_not_see_rows_candidates_answer_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(tmp_path, "qwen2_moe", target_modules=["q_proj", "shared_expert.up_proj"])
    case = {"grid": [0.2, 0.5, 0.8]}
    asked: list[object] = []
    real = judging.CandidateModel._one
    monkeypatch.setattr(judging.CandidateModel, "_one", lambda self, *one: asked.append(one[0]) or real(self, *one))
    found = search(SearchSettings(**settings | case))
    assert len(asked) == 3
    alone = search(SearchSettings(**settings | case | {"out": str(tmp_path / "one"), "batch_size": 1}))
    assert [trial.answers for trial in found.trials] == [trial.answers for trial in alone.trials]
    assert len({trial.answers for trial in found.trials}) > 1


def test_a_pass_has_the_rows_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny_causal(tmp_path / "base")), dtype="float32", device="cpu")
    each = bytes_of_row(base, 100)
    assert each is not None
    # keys and values: 4 layers x 2 heads x 8 wide, twice, in float32, are the least that 100 tokens take
    assert each >= 100 * 4 * 2 * 8 * 2 * 4
    monkeypatch.setattr(fitting, "_free_bytes", lambda _base: 10.5 * each)
    assert rows_that_fit(base, 100) == 8  # a power of two
    assert rows_that_fit(base, 10_000) == 1
    monkeypatch.setattr(fitting, "_free_bytes", lambda _base: 1e15)
    assert rows_that_fit(base, 100) == fitting._MOST_ON_CPU
    silent = SimpleNamespace(
        model=SimpleNamespace(
            config=SimpleNamespace(get_text_config=SimpleNamespace), forward=lambda logits_to_keep: 0
        ),
        device=base.device,
    )
    assert rows_that_fit(silent, 100) == fitting.USUAL  # type: ignore[arg-type]


def test_where_only_the_gain_changes_nothing_is_merged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(tmp_path) | {"grid": [0.2, 0.6], "method": "ties", "vary": {"gain": "0.0,0.5,2.0"}, "rank": 3}
    merged: list[object] = []
    real = judging.execute
    monkeypatch.setattr(judging, "execute", lambda plan, **more: merged.append(plan.weights) or real(plan, **more))
    found = search(SearchSettings(**settings))
    assert merged == [(0.2, 0.8), (0.6, 0.4)]
    assert len({trial.answers for trial in found.trials}) > 3
    same = [trial.answers for trial in found.trials if trial.candidate.options == {"gain": 0.0}]
    assert same[0] == same[1]  # nothing is left of either


def test_configs_of_every_language_model_tell_a_size_or_are_passed_over() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class Model:
        dtype = torch.float32

        def forward(self, logits_to_keep: int = 0) -> None:
            """Takes what language models take."""

    told = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = Model()
        try:
            model.config = CONFIG_MAPPING[kind]()  # type: ignore[attr-defined]
        except Exception:  # noqa: S112  (configs that need more than defaults)
            continue
        base: Any = SimpleNamespace(model=model, device=torch.device("cpu"))
        assert rows_that_fit(base, 100) >= 1
        told += bytes_of_row(base, 100) is not None
    assert told > 100


def test_where_memory_ends_passes_are_half_as_large_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(tmp_path) | {"grid": [0.2, 0.6]}
    expected = search(SearchSettings(**settings, batch_size=1))
    monkeypatch.setattr("adaptermix.evaluation.answering.rows_that_fit", lambda _base, _length: 16)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sizes: list[int] = []
    real = judging.Answering._generated.__globals__["generate_ids"]

    def generate(base: Any, prompts: Any, limits: Any, *, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("as asked")
        return real(base, prompts, limits, batch_size=batch_size, **options)

    monkeypatch.setattr("adaptermix.evaluation.answering.generate_ids", generate)
    found = search(SearchSettings(**settings | {"out": str(tmp_path / "halved")}))
    assert sizes[:3] == [16, 8, 4]
    assert set(sizes[3:]) == {4}
    assert [trial.answers for trial in found.trials] == [trial.answers for trial in expected.trials]
    with pytest.raises(torch.OutOfMemoryError):
        search(SearchSettings(**settings, batch_size=8, overwrite=True))
