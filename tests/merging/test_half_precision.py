"""What storage costs is little, is what the files have lost, and is in the report; nothing infinite is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix.adapters import AdapterMeta, AdapterState, TargetSpec, write_adapter
from adaptermix.algebra import LowRank
from adaptermix.checkpoints.adding import rounding_share
from adaptermix.merging import merge
from adaptermix.merging.checkpoints import merge_checkpoints
from adaptermix.merging.extract_adapter import extract

from ..checkpoints.models import linear_only, tune
from ..factories import WEIGHTS, key, load_base, peft_kind, peft_noise, wrap_with_peft, write_lora, write_raw
from ..loaders import PREFIX, check_one_meaning, deltas_by, distance
from ..refusals import refuses

Q, V = "layers.0.q", "layers.0.v"
HALVES = ["bfloat16", "float16"]
DTYPES = ["float32", *HALVES]
OUT, INTO, RANK = 48, 40, 4


def bound(dtype: str) -> float:
    """Half a unit in the last place: rounding two well-conditioned factors loses less of their product.

    In float32 factors that cancel little are left as they are.
    """
    return torch.finfo(getattr(torch, dtype)).eps / 2 if dtype in HALVES else 1e-5


def write(folder: Path, a: Tensor, b: Tensor, *, alpha: float = float(RANK), module: str = Q) -> Tensor:
    """Write an adapter of one module in float32, and return its delta in float64."""
    tensors = {key(module, "A"): a.float().contiguous(), key(module, "B"): b.float().contiguous()}
    config = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha, "target_modules": [module], "bias": "none"}
    write_raw(folder, config | {"base_model_name_or_path": "org/base"}, tensors)
    return alpha / len(a) * (tensors[key(module, "B")].double() @ tensors[key(module, "A")].double())


def factors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, INTO, generator=generator, dtype=torch.float64)
    return a, torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)


def gauge(condition: float) -> Tensor:
    """A change of basis inside the rank, of a given condition number."""
    generator = torch.Generator().manual_seed(9)
    q = [torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)).Q for _ in range(2)]
    return q[0] @ torch.diag(torch.logspace(0, math.log10(condition), RANK, dtype=torch.float64)) @ q[1]


def check(out: Path, expected: Tensor, report: Any, dtype: str, module: str = Q) -> None:
    """Check that what was written lost no more than well-conditioned factors lose, and that the report says what."""
    lost = float((check_one_meaning(out)[module] - expected).norm() / expected.norm())
    assert lost < bound(dtype)
    near = pytest.approx(lost, rel=1e-2, abs=0 if dtype in HALVES else 1e-6)
    assert report.modules[module].residual == near
    assert report.residual == report.rounding == near
    assert json.loads((out / "adaptermix.json").read_text())["fidelity"]["residual"] == report.residual


@pytest.mark.parametrize("dtype", DTYPES)
class TestFactorsThatCancel:
    @pytest.mark.parametrize("form", [{}, {"form": "lowrank", "rank": 64}, {"rank": "auto", "keep": 1.0}], ids=str)
    @pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-4])
    def test_a_difference_of_two_stages_of_one_adapter(
        self, tmp_path: Path, dtype: str, apart: float, form: dict[str, Any]
    ) -> None:
        (a, b), (c, d) = factors(1), factors(2)
        first = write(tmp_path / "late", a + apart * c, b + apart * d, alpha=12.0)
        second = write(tmp_path / "early", a, b, alpha=12.0)
        out, folders = tmp_path / "out", [tmp_path / "late", tmp_path / "early"]
        report = merge(folders, weights=[1.0, -1.0], dtype=dtype, out=out, **form)
        check(out, first - second, report, dtype)

    @pytest.mark.parametrize("condition", [1e3, 1e6])
    @pytest.mark.parametrize("weight", [1.0, 0.7])
    def test_a_basis_that_is_badly_conditioned(
        self, tmp_path: Path, dtype: str, condition: float, weight: float
    ) -> None:
        a, b = factors(3)
        turn = gauge(condition)
        exact = write(tmp_path / "odd", torch.linalg.solve(turn, a), b @ turn)
        report = merge([tmp_path / "odd"], weights=[weight], dtype=dtype, out=tmp_path / "out")
        check(tmp_path / "out", weight * exact, report, dtype)

    def test_a_pissa_less_its_start(self, base: Path, tmp_path: Path, dtype: str) -> None:
        model = load_base(base)
        folder = peft_kind(
            model, tmp_path / "pissa", seed=1, r=8, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]
        )
        # Little was trained: the factors are near the part of the base that they began from.
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
        with peft_noise():
            fresh = get_peft_model(load_base(base), config).state_dict()
        tensors = load_file(folder / WEIGHTS)
        for name in tensors:
            start = fresh[name.replace(".weight", ".default.weight")]
            tensors[name] = start + 0.01 * (tensors[name] - start)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        whole = merge([folder], weights=[1.0], base=str(base), out=tmp_path / "whole")
        report = merge([folder], weights=[1.0], base=str(base), dtype=dtype, out=tmp_path / "half")
        expected = deltas_by("peft", tmp_path / "whole")
        assert whole.residual == 0
        lost = distance(check_one_meaning(tmp_path / "half"), expected)
        assert lost < bound(dtype)
        assert report.residual == pytest.approx(lost, rel=1e-2)

    def test_three_adapters_of_which_two_cancel_over_modules_that_one_lacks(self, tmp_path: Path, dtype: str) -> None:
        shapes = {Q: (OUT, INTO, 4), V: (OUT, INTO, 8)}
        exact = [write_lora(tmp_path / f"a{seed}", shapes, alpha=5, seed=seed) for seed in (1, 2)]
        exact.append(write_lora(tmp_path / "a3", {V: (OUT, INTO, 2)}, alpha=1e-2, rslora=True, seed=3))
        folders = [tmp_path / name for name in ("a1", "a2", "a1", "a3")]
        report = merge(folders, weights=[1.0, 1e-3, -1.0, 1.0], dtype=dtype, out=tmp_path / "out")
        expected = {Q: 1e-3 * exact[1][Q], V: 1e-3 * exact[1][V] + exact[2][V]}
        lost = distance(check_one_meaning(tmp_path / "out"), expected)
        assert lost < bound(dtype)
        assert report.residual == pytest.approx(lost, rel=1e-2)

    def test_what_can_be_stored_as_it_is_loses_nothing(self, tmp_path: Path, dtype: str) -> None:
        """A 16-bit adapter at weights that are powers of two keeps every bit."""
        exact = write_lora(tmp_path / "a", {Q: (OUT, INTO, 4)}, alpha=4, dtype=getattr(torch, dtype))
        for weight in (1.0, -0.5):
            report = merge([tmp_path / "a"], weights=[weight], dtype=dtype, out=tmp_path / str(weight))
            assert torch.equal(check_one_meaning(tmp_path / str(weight))[Q], weight * exact[Q])
            assert report.residual == 0


class TestSizes:
    """Entries near the ends of the ranges."""

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize(("left", "right"), [(1e-20, 1e20), (1e20, 1e-20), (1e-30, 1e30), (1e-3, 1e6)])
    def test_factors_of_very_unequal_lengths(self, tmp_path: Path, dtype: str, left: float, right: float) -> None:
        a, b = factors(4)
        exact = write(tmp_path / "a", a * right, b * left)
        report = merge([tmp_path / "a"], weights=[0.9], dtype=dtype, out=tmp_path / "out")
        check(tmp_path / "out", 0.9 * exact, report, dtype)

    def test_what_float16_cannot_hold_is_refused_by_name_and_nothing_is_written(self, tmp_path: Path) -> None:
        a, b = factors(5)
        write(tmp_path / "huge", a * 1e6, b * 1e6)
        for settings in ({}, {"form": "dense"}, {"rank": 2}):
            for dry in (False, True):
                with refuses(f"write.overflow: '{Q}' .*float16"):
                    merge([tmp_path / "huge"], weights=[1.0], dtype="float16", max_residual=1.0, dry_run=dry,
                          out=tmp_path / "out", **settings)  # fmt: skip
                assert not (tmp_path / "out").exists()
        merge([tmp_path / "huge"], weights=[1.0], dtype="bfloat16", out=tmp_path / "out")

    @pytest.mark.parametrize("form", [None, "dense"])
    @pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-9, 1e-14])
    def test_what_float16_takes_for_zero_counts_as_lost(self, tmp_path: Path, form: Any, size: float) -> None:
        a, b = factors(6)
        exact = write(tmp_path / "tiny", a * size**0.5, b * size**0.5)
        settings: dict[str, Any] = {"weights": [1.0], "dtype": "float16", "form": form}
        report = merge([tmp_path / "tiny"], max_residual=1.0, out=tmp_path / "out", **settings)
        if form == "dense":
            got = load_file(tmp_path / "out" / "delta.safetensors")[f"{Q}.weight"].double()
        else:
            got = check_one_meaning(tmp_path / "out")[Q]
        lost = float((got - exact).norm() / exact.norm())
        assert report.residual == pytest.approx(lost, rel=1e-2)
        dry = merge([tmp_path / "tiny"], max_residual=1.0, dry_run=True, **settings)
        assert dry.residual == report.residual
        if lost > 0.1:
            with refuses("residual.rounding: float16.*10%"):
                merge([tmp_path / "tiny"], out=tmp_path / "no", **settings)
            assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_the_writer_alone_refactors_too(self, tmp_path: Path, dtype: str) -> None:
        (a, b), turn = factors(7), gauge(1e6)
        update = LowRank(a=torch.linalg.solve(turn, a), b=b @ turn, scale=-2.0)
        state = AdapterState.of_updates(AdapterMeta(base=None, targets=TargetSpec(modules=("q",))), {Q: update})
        write_adapter(tmp_path, state, dtype=getattr(torch, dtype))
        exact = -2.0 * (update.b @ update.a)
        assert float((check_one_meaning(tmp_path)[Q] - exact).norm() / exact.norm()) < bound(dtype)


class TestDora:
    """A DoRA's delta is a small difference of long rows, so its magnitudes must not be rounded to 16 bits."""

    def weights(self, base: Path, folder: Path) -> dict[str, Tensor]:
        """What PEFT adds to the weights that were adapted."""
        was, got = load_base(base).state_dict(), wrap_with_peft(load_base(base), folder).merge_and_unload().state_dict()
        found = {name: (got[name] - was[name]).double() for name in was}
        return {name: delta for name, delta in found.items() if delta.any()}

    @pytest.mark.parametrize("dtype", HALVES)
    def test_little_is_lost_and_the_report_says_what(self, base: Path, tmp_path: Path, dtype: str) -> None:
        settings: dict[str, Any] = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}
        was = load_base(base).state_dict()
        folders = []
        for seed, alpha in ((1, 0.2), (2, 0.1)):
            folders.append(peft_kind(load_base(base), tmp_path / str(seed), seed=seed, lora_alpha=alpha, **settings))
            tensors = load_file(folders[-1] / WEIGHTS)
            for name in (name for name in tensors if "magnitude" in name):
                weight = was[name.removeprefix(PREFIX).split(".lora_")[0] + ".weight"]
                tensors[name] = weight.norm(dim=1) * (1 + 1e-3 * torch.linspace(-1, 1, len(weight)))
            save_file(tensors, folders[-1] / WEIGHTS, metadata={"format": "pt"})
        common: dict[str, Any] = {"weights": [0.6, 0.5], "base": str(base)}
        merge(folders, out=tmp_path / "whole", **common)
        report = merge(folders, dtype=dtype, out=tmp_path / "half", **common)
        lost = distance(self.weights(base, tmp_path / "half"), self.weights(base, tmp_path / "whole"))
        assert lost < bound(dtype)
        assert report.residual == pytest.approx(lost, rel=2e-2)
        check_one_meaning(tmp_path / "half")
        stored = load_file(tmp_path / "half" / WEIGHTS)
        assert {str(tensor.dtype) for name, tensor in stored.items() if "magnitude" in name} == {"torch.float32"}


class TestIntoBase:
    """A sum that is rounded to the base's dtype loses a part of the delta, which the report tells."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_the_loss_is_that_of_the_weights_that_were_written(self, base: Path, tmp_path: Path, dtype: str) -> None:
        folder = peft_kind(load_base(base), tmp_path / "a", seed=1, r=2, target_modules=["q_proj", "up_proj"])
        settings: dict[str, Any] = {"weights": [0.02], "form": "dense", "base": str(base), "dtype": dtype}
        report = merge([folder], out=tmp_path / "out", **settings)
        was, got = (load_file(next(path.glob("*.safetensors"))) for path in (base, tmp_path / "out"))
        exact = {path: 0.02 * delta for path, delta in deltas_by("peft", folder).items()}
        found = {path: got[f"{path}.weight"].double() - was[f"{path}.weight"].double() for path in exact}
        lost = distance(found, exact)
        assert report.residual == pytest.approx(lost, rel=1e-2, abs=1e-6)
        assert (lost > 1e-4) == (dtype != "float32")
        assert merge([folder], dry_run=True, **settings).residual == report.residual

    def test_checkpoints(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned", change=linear_only)
        report = merge_checkpoints(base, [tuned], [0.01], dtype="bfloat16", out=tmp_path / "out")
        was, aim, got = (load_file(next(path.glob("*.safetensors"))) for path in (base, tuned, tmp_path / "out"))
        changed = [name for name in was if not torch.equal(was[name], aim[name])]
        exact = {name: 0.01 * (aim[name].double() - was[name].double()) for name in changed}
        found = {name: got[name].double() - was[name].double() for name in changed}
        assert report.residual == pytest.approx(distance(found, exact), rel=1e-2)

    @pytest.mark.parametrize("count", [3, 600])
    def test_a_delta_in_some_rows_only(self, count: int) -> None:
        """As that of an embedding in which a few tokens changed."""
        generator = torch.Generator().manual_seed(0)
        base, delta = torch.randn(5000, 8, generator=generator), torch.zeros(5000, 8)
        delta[torch.randperm(5000, generator=generator)[:count]] = 1e-2
        for old in (base.bfloat16(), base):  # rounding to 16 bits changes the rows without a delta too
            off = (old.float() + delta).bfloat16().double() - old.double() - delta.double()
            share = rounding_share(old, delta, torch.bfloat16, name="table")
            assert share == pytest.approx(float(off.norm() / delta.double().norm()), rel=0.1)


def test_an_extraction_that_float16_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=lambda name, tensor, _: tensor * 1e12)
    with refuses("write.overflow: float16"):
        extract(base, tuned, rank=2, dtype="float16", dry_run=True, out=tmp_path / "out")
