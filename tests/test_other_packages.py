"""Heads, fusions and bake strategies that a program or another package adds are accepted by the options and work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adaptermix import bake, evaluate, merge, train_fusion, train_task
from adaptermix.baking.strategies import STRATEGIES, requantize
from adaptermix.fusion import FUSIONS
from adaptermix.io.registry import Registry
from adaptermix.models.formats import FORMATS
from adaptermix.options import BakeSettings, EvaluateSettings, FusionSettings, TaskSettings
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.heads.classes import Classes
from tests.cli.test_commands import run
from tests.factories import peft_lora

from .refusals import refuses

Add = Callable[[Registry[Any], object], None]


@pytest.fixture
def add() -> Iterator[Add]:
    """Register entries named `mine` for one test."""
    changed: list[Registry[Any]] = []

    def register(registry: Registry[Any], entry: object) -> None:
        registry.add("mine", entry)
        changed.append(registry)

    yield register
    for registry in changed:
        del registry["mine"]


@pytest.mark.parametrize(
    ("settings", "registry", "option", "others"),
    [
        (BakeSettings, STRATEGIES, "strategy", "auto, keep, merge-16, dequant-16"),
        (FusionSettings, FUSIONS, "fusion", "x-mixup, input"),
        (TaskSettings, HEADS, "head", "auto, none"),
        (TaskSettings, FORMATS, "quantize", "none"),
    ],
)
def test_the_registry_decides_which_names_options_take(
    settings: Any, registry: Registry[Any], option: str, others: str, add: Add
) -> None:
    needed: dict[str, Any] = {"base": "b", "out": "o"}
    needed |= {"adapter": ["a"]} if settings is BakeSettings else {"task": "classify", "train": ["t"]}
    needed |= {"quantize": "nf4"} if settings is BakeSettings else {}
    needed |= {"source": ["s"], "dev": []} if settings is FusionSettings else {}
    with pytest.raises(ValidationError) as caught:
        settings(**needed, **{option: "mine"})
    assert f"must be one of {others}, {', '.join(registry.names())}" in str(caught.value)
    add(registry, registry[registry.built_in[0]])
    assert getattr(settings(**needed, **{option: "mine"}), option) == "mine"


def test_a_wrong_name_is_a_wrong_use_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "bake", "--base", "b", "--adapter", "a", "--out", "o", "--strategy", "mine")
    assert code == 2
    assert "--strategy: must be one of auto, keep, merge-16, dequant-16, requantize, " in err
    assert "got 'mine'" in err


def test_a_strategy_that_was_added_bakes(causal: Path, tmp_path: Path, add: Add) -> None:
    pytest.importorskip("bitsandbytes")
    add(STRATEGIES, requantize)
    one = peft_lora(causal, tmp_path / "one", seed=1, r=2, lora_alpha=4, target_modules=["q_proj"])
    common: dict[str, Any] = {"base": str(causal), "adapter": [str(one)], "quantize": "nf4", "device": "cpu"}
    reports = [
        bake(BakeSettings(strategy=name, keep_at_least=0, out=str(tmp_path / name), **common))
        for name in ("mine", "requantize")
    ]
    assert {module.strategy for module in reports[0].modules.values()} == {"mine"}
    mine, ours = ({path: module.fidelity for path, module in report.modules.items()} for report in reports)
    assert mine == ours


def test_a_fusion_and_a_head_that_were_added_train_and_answer(encoder: Path, tmp_path: Path, add: Add) -> None:
    class Mine(Classes):
        form = replace(Classes.form, name="mine", title="a head of another package")

    add(FUSIONS, FUSIONS["add"])
    add(HEADS, Mine())
    data = tmp_path / "de.csv"
    data.write_text("text,label\nrot,a\nblau,b\ngelb,a\n", encoding="utf-8")
    common: dict[str, Any] = {"base": str(encoder), "task": "classify", "device": "cpu", "dtype": "float32"}
    train: dict[str, Any] = {"train": [str(data)], "steps": 1, "head": "mine", **common}
    train_task(TaskSettings(out=str(tmp_path / "plain"), **train))
    train_fusion(FusionSettings(out=str(tmp_path / "fused"), source=[str(data)], fusion="mine", **train))
    for name, source in (("plain", []), ("fused", [str(data)])):
        adapter = str(tmp_path / name)
        found = evaluate(EvaluateSettings(data=[str(data)], adapter=adapter, source=source, **common))
        assert found.document()["scores"]["de"]["n"] == 3
        assert '"head": "mine"' in (tmp_path / name / "adaptermix.json").read_text(encoding="utf-8")


def test_a_head_whose_package_is_absent_is_not_taken_for_ours(encoder: Path, tmp_path: Path) -> None:
    class Gone(Classes):
        form = replace(Classes.form, name="gone", title="a head of another package")

    data = tmp_path / "de.csv"
    data.write_text("text,label\nrot,a\nblau,b\ngelb,a\n", encoding="utf-8")
    common: dict[str, Any] = {"base": str(encoder), "task": "classify", "device": "cpu", "dtype": "float32"}
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    HEADS["gone"] = Gone()
    try:
        for out in (one, two):
            train_task(TaskSettings(out=out, train=[str(data)], steps=1, head="gone", **common))
    finally:
        del HEADS["gone"]
    with refuses("head.not-installed: 'gone' in the group adaptermix.heads"):
        evaluate(EvaluateSettings(data=[str(data)], adapter=one, **common))
    with refuses("head.not-installed"):
        merge([one, two], weights=[1, 1])
