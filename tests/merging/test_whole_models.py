"""Merges into the whole model, and merges by statistics of the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptermix.errors import PlanError
from adaptermix.merging import merge

from ..factories import adapter_deltas
from ..factories import write_lora as write_adapter
from ..refusals import refuses
from .conftest import MODULES, NAMES, UP, Adapters, Q, V
from .test_forms import ties, trim


class TestWholeModel:
    """TIES as its authors trim: over all of an adapter's entries at once."""

    def expected(
        self, deltas: list[dict[str, Tensor]], density: float, weights: tuple[float, ...]
    ) -> dict[str, Tensor]:
        trimmed = []
        for own in deltas:
            whole = torch.cat([own[module].flatten() for module in MODULES])
            pieces = trim(whole, int(density * len(whole))).split([own[m].numel() for m in MODULES])
            trimmed.append({m: piece.reshape(own[m].shape) for m, piece in zip(MODULES, pieces, strict=True)})
        return {m: ties([own[m] for own in trimmed], weights) for m in MODULES}

    def test_it_equals_trimming_the_concatenated_vector(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        deltas = [
            write_adapter(tmp_path / name, MODULES, alpha={Q: 2.0, V: 9.0, UP: 1.0}, seed=seed)
            for seed, name in enumerate(NAMES)
        ]
        paths = [tmp_path / name for name in NAMES]
        options = {"density": 0.2, "scope": "model"}
        settings: dict[str, Any] = {"weights": [1.0, 0.5], "method": "ties", "options": options, "form": "dense"}
        report = merge(paths, out=tmp_path / "out", **settings)
        got = load_file(tmp_path / "out" / "delta.safetensors")
        expected = self.expected(deltas, 0.2, (1.0, 0.5))
        for module, delta in expected.items():
            torch.testing.assert_close(got[f"{module}.weight"].double(), delta, rtol=1e-5, atol=1e-6)
        per_module = merge(paths, **settings | {"options": {"density": 0.2}})
        assert per_module.modules[Q].norm != pytest.approx(report.modules[Q].norm, rel=1e-3)

    @pytest.mark.parametrize("form", ["dense", None])
    def test_a_dry_run_reports_what_would_be_written(self, pair: Adapters, tmp_path: Path, form: Any) -> None:
        settings: dict[str, Any] = {"method": "ties", "options": {"density": 0.2, "scope": "model"}, "form": form}
        settings |= {"weights": [0.5], "max_residual": 1.0, "out": tmp_path / "out"}
        dry = merge(pair[0], dry_run=True, **settings)
        assert not (tmp_path / "out").exists()
        assert merge(pair[0], **settings).modules == dry.modules


class TestStatistics:
    """One file per adapter."""

    def files(self, folder: Path, kind: str, *, drop: str = "", wrong: str = "") -> list[Path]:
        found = []
        for seed, name in enumerate(NAMES):
            generator = torch.Generator().manual_seed(seed)
            tensors = {}
            for module, (out, into, _) in MODULES.items():
                x = torch.randn(30, into, generator=generator)
                value = x.T @ x if kind == "regmean" else torch.rand(out, into, generator=generator) + 0.1
                if not (module == drop and seed == 1):
                    tensors[module] = value[:, :-1].contiguous() if module == wrong and seed == 1 else value
            found.append(folder / f"{name}-{kind}.safetensors")
            save_file(tensors, found[-1])
        return found

    def test_fisher_weighs_each_entry(self, pair: Adapters, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        files = self.files(tmp_path, "fisher")
        merge(pair[0], weights=[0.7, 0.3], method="fisher", statistics=files, form="dense", out=tmp_path / "out")
        got = load_file(tmp_path / "out" / "delta.safetensors")
        f1, f2 = (load_file(file) for file in files)
        for module in MODULES:
            one, two = 0.7 * f1[module].double(), 0.3 * f2[module].double()
            expected = (one * pair[1][0][module] + two * pair[1][1][module]) / (one + two)
            torch.testing.assert_close(got[f"{module}.weight"].double(), expected, rtol=1e-5, atol=1e-6)

    def test_regmean_solves_the_least_squares(self, pair: Adapters, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        files = self.files(tmp_path, "regmean")
        options = {"off_diagonal": 1.0}
        merge(pair[0], weights=[0.5], method="regmean", options=options, statistics=files, out=tmp_path / "out")
        got = adapter_deltas(tmp_path / "out")
        g1, g2 = (load_file(file) for file in files)
        for module in MODULES:
            one, two = g1[module].double(), g2[module].double()
            expected = (pair[1][0][module] @ one + pair[1][1][module] @ two) @ torch.linalg.inv(one + two)
            torch.testing.assert_close(got[module], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ["fisher", "regmean"])
    def test_what_does_not_fit_is_refused_by_name(self, pair: Adapters, tmp_path: Path, method: str) -> None:
        settings: dict[str, Any] = {"weights": [0.5], "method": method, "out": tmp_path / "out", "max_residual": 1.0}
        with refuses("statistics.count: 0.*2"):
            merge(pair[0], **settings)
        with refuses("statistics.count: 1.*2"):
            merge(pair[0], statistics=self.files(tmp_path, method)[:1], **settings)
        with pytest.raises(PlanError, match=rf"module '{V}' in .*align-{method}\.safetensors, found nothing"):
            merge(pair[0], statistics=self.files(tmp_path, method, drop=V), **settings)
        shape = r"\[5, 12\] .*found \[5, 11\]" if method == "fisher" else r"\[12, 12\] .*found \[12, 11\]"
        with pytest.raises(PlanError, match=shape):
            merge(pair[0], statistics=self.files(tmp_path, method, wrong=V), **settings)
        assert not (tmp_path / "out").exists()

    def test_statistics_that_nobody_reads_are_refused(self, pair: Adapters, tmp_path: Path) -> None:
        with refuses("statistics.unused: exact"):
            merge(pair[0], weights=[0.5], statistics=self.files(tmp_path, "fisher"))
