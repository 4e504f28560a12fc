"""Where an adapter's delta is zero: it adds nothing to a sum, and counts in a mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptermix import merge
from adaptermix.adapters.kinds.dora import dora_row_norms
from adaptermix.algebra import LowRank
from adaptermix.errors import PlanError
from adaptermix.methods.base import build

from ..factories import WEIGHTS, adapter_deltas, key, load_base, load_with_peft, peft_lora, write_lora

MODULE = "model.layers.0.self_attn.q_proj"
SHAPE = {MODULE: (6, 5, 2)}


@pytest.fixture
def half_zero(tmp_path: Path) -> tuple[list[Path], torch.Tensor]:
    """A task adapter and one whose B is zero; the delta of the first."""
    delta = write_lora(tmp_path / "task", SHAPE, alpha=2, seed=1)[MODULE]
    write_lora(tmp_path / "align", SHAPE, alpha=2, seed=2)
    tensors = load_file(tmp_path / "align" / WEIGHTS)
    tensors[key(MODULE, "B")].zero_()
    save_file(tensors, tmp_path / "align" / WEIGHTS)
    return [tmp_path / "task", tmp_path / "align"], delta


def test_a_zero_delta_counts_in_a_mean(half_zero: tuple[list[Path], torch.Tensor], tmp_path: Path) -> None:
    folders, delta = half_zero
    for name in ("one", "two"):
        save_file({MODULE: torch.ones(6, 5)}, tmp_path / f"{name}.safetensors")
    merge(
        folders,
        weights=[0.5, 0.5],
        method="fisher",
        statistics=[tmp_path / "one.safetensors", tmp_path / "two.safetensors"],
        out=tmp_path / "out",
    )
    torch.testing.assert_close(adapter_deltas(tmp_path / "out")[MODULE], 0.5 * delta, rtol=1e-5, atol=1e-6)


def test_peft_linear_keeps_its_cross_terms_with_a_zero_delta(
    half_zero: tuple[list[Path], torch.Tensor], tmp_path: Path
) -> None:
    folders, _ = half_zero
    merge(folders, weights=[0.9, 0.1], method="peft-linear", out=tmp_path / "out")
    one, two = (load_file(folder / WEIGHTS) for folder in folders)
    a = sum(w**0.5 * t[key(MODULE, "A")].double() for w, t in ((0.9, one), (0.1, two)))
    b = sum(w**0.5 * t[key(MODULE, "B")].double() for w, t in ((0.9, one), (0.1, two)))
    torch.testing.assert_close(adapter_deltas(tmp_path / "out")[MODULE], b @ a, rtol=1e-5, atol=1e-6)


def test_nothing_that_acts_gives_zero_without_asking_the_method(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_lora(tmp_path / name, SHAPE, seed=seed)
        save_file({MODULE: torch.eye(5)}, tmp_path / f"{name}.safetensors")
    merge(
        [tmp_path / "one", tmp_path / "two"],
        weights=[0.0, 0.0],
        method="regmean",
        statistics=[tmp_path / f"{name}.safetensors" for name in ("one", "two")],
        out=tmp_path / "out",
    )
    assert not adapter_deltas(tmp_path / "out")[MODULE].any()


def test_an_adapter_of_weight_zero_gives_no_fully_trained_tensor(base: Path, tmp_path: Path) -> None:
    peft_lora(base, tmp_path / "head", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft_lora(base, tmp_path / "plain", r=2, target_modules=["q_proj"], seed=1)
    folders = [tmp_path / "head", tmp_path / "plain"]
    assert merge(folders, weights=[0.5, 0.5], out=tmp_path / "with").notes
    notes = merge(folders, weights=[0.0, 1.0], out=tmp_path / "without").notes
    assert notes == ("the fully trained tensors of 'head' are left out, since its weight is 0.",)
    kept = [any("lm_head" in name for name in load_file(tmp_path / out / WEIGHTS)) for out in ("with", "without")]
    assert kept == [True, False]


def test_a_truncated_dora_reports_the_residual_of_its_delta_on_the_base(base: Path, tmp_path: Path) -> None:
    peft_lora(base, tmp_path / "one", r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj"])
    path = tmp_path / "one" / WEIGHTS
    tensors = load_file(path)
    weights = {name: p.detach() for name, p in load_base(base).named_parameters()}
    for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        update = LowRank(a=tensors[key(module, "A")], b=tensors[key(module, "B")])
        tensors[name] = (dora_row_norms(weights[f"{module}.weight"], update) * 1.1).float()
    save_file(tensors, path, metadata={"format": "pt"})

    def deltas(folder: Path) -> dict[str, torch.Tensor]:
        model = load_with_peft(base, folder).merge_and_unload()
        return {n: p.detach().double() - weights[n].double() for n, p in model.named_parameters() if "q_proj" in n}

    report = merge([tmp_path / "one"], weights=[1.0], base=str(base), rank=2, max_residual=1.0, out=tmp_path / "cut")
    whole, cut = deltas(tmp_path / "one"), deltas(tmp_path / "cut")
    for name, delta in whole.items():
        found = report.modules[name.removesuffix(".weight")]
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert found.residual == pytest.approx(float((delta - cut[name]).norm() / delta.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task-arithmetic", {"gain": "abc"}),
        ("ties", {"normalize": "maybe"}),
        ("ties", {"order": ["elect-first"]}),
        ("karcher", {"iterations": 1.5}),
        ("task-arithmetic", {"gain": float("nan")}),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(method: str, options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(PlanError, match=f"option '{name}' of method '{method}' must be "):
        build(method, options)


def test_methods_of_mergekit_take_options_at_places(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    for seed, name in enumerate(("one", "two")):
        write_lora(tmp_path / name, SHAPE, seed=seed)
    report = merge(
        [tmp_path / "one", tmp_path / "two"],
        weights=[0.5, 0.5],
        method="mergekit:ties",
        options={"density@*.q_proj": 0.5},
        rank=4,
        max_residual=1.0,
    )
    assert report.norm > 0
