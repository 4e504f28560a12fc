"""The form of the result, the limit on truncation, dense and random methods, whole-model TIES, statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix.adapters import open_adapter
from adaptermix.algebra import Dense, LowRank, concatenate
from adaptermix.errors import PlanError
from adaptermix.merging import merge
from adaptermix.merging.output_form import Shape

from ..factories import CONFIG, WEIGHTS, adapter_deltas, contents, load_base, logits, peft_kind, wrap_with_peft
from ..factories import write_lora as write_adapter
from ..refusals import refuses
from .conftest import MODULES, NAMES, Adapters, Q, V


def mixed(deltas: list[dict[str, Tensor]], weights: tuple[float, ...] = (0.9, 0.1)) -> dict[str, Tensor]:
    return {m: sum(w * d[m] for w, d in zip(weights, deltas, strict=True)) for m in deltas[0]}  # type: ignore[misc]


def tails(delta: Tensor) -> Tensor:
    """Share of the norm that each rank, from 0, loses."""
    sigma = torch.linalg.svdvals(delta)
    rest = sigma.square().flip(0).cumsum(0).flip(0).sqrt() / sigma.norm()
    return torch.cat([rest, torch.zeros(1, dtype=rest.dtype)])


def ties(deltas: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """PEFT's order on trimmed vectors, entry by entry: elect unweighted, mean over the survivors' count."""
    result = torch.zeros_like(deltas[0])
    for place in range(result.numel()):
        values = [float(delta.flatten()[place]) for delta in deltas]
        sign = 1 if sum(values) >= 0 else -1
        kept = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        result.view(-1)[place] = sum(kept) / len(kept) if kept else 0.0
    return result


def trim(vector: Tensor, count: int) -> Tensor:
    least = vector.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(vector.abs() >= least, vector, 0.0)


class TestForms:
    def test_concat_lays_the_ranks_side_by_side_and_loses_nothing(self, pair: Adapters, tmp_path: Path) -> None:
        for form in (None, "concat"):
            report = merge(pair[0], weights=[0.9], form=form, out=tmp_path / str(form))  # type: ignore[arg-type]
            assert {m: found.rank for m, found in report.modules.items()} == {
                m: 2 * r for m, (_, _, r) in MODULES.items()
            }
            assert report.residual == 0
        expected = mixed(pair[1])
        for module, delta in adapter_deltas(tmp_path / "concat").items():
            assert (delta - expected[module]).norm() <= 1e-6 * expected[module].norm()

    def test_lowrank_loses_the_tail_of_the_singular_values(self, pair: Adapters, tmp_path: Path) -> None:
        report = merge(pair[0], weights=[0.5], form="lowrank", rank=2, max_residual=1.0, out=tmp_path / "out")
        lost, norms = [], []
        for module, delta in mixed(pair[1], (0.5, 0.5)).items():
            share = float(tails(delta)[2])
            assert report.modules[module].residual == pytest.approx(share, abs=1e-6)
            got = adapter_deltas(tmp_path / "out")[module]
            assert float((got - delta).norm() / delta.norm()) == pytest.approx(share, abs=1e-6)
            lost.append(share * float(delta.norm()))
            norms.append(float(delta.norm()))
        assert report.residual == pytest.approx(math.hypot(*lost) / math.hypot(*norms), abs=1e-6)

    @pytest.mark.parametrize("keep", [0.6, 0.9, 0.999, 1.0])
    def test_an_automatic_rank_is_the_least_that_keeps_the_share(
        self, pair: Adapters, tmp_path: Path, keep: float
    ) -> None:
        settings: dict[str, Any] = {"weights": [0.5], "rank": "auto", "keep": keep, "max_residual": 1.0}
        report = merge(pair[0], compact=True, out=tmp_path / "out", **settings)
        for module, delta in mixed(pair[1], (0.5, 0.5)).items():
            lost = tails(delta)
            least = next(rank for rank in range(1, len(lost)) if 1 - lost[rank] ** 2 >= keep * (1 - 1e-9))
            assert report.modules[module].rank == least
            assert report.modules[module].residual == pytest.approx(float(lost[least]), abs=1e-6)
        got = {module: header.rank for module, header in open_adapter(tmp_path / "out").modules.items()}
        assert got == {module: found.rank for module, found in report.modules.items()}
        assert report.rank == max(got.values())
        plan = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["plan"]
        assert (plan["rank"], plan["keep"], plan["compact"]) == ("auto", keep, True)

    def test_unequal_ranks_stand_in_the_rank_pattern_and_load_in_peft(self, base: Path, tmp_path: Path) -> None:
        targets = ["q_proj", "v_proj", "down_proj"]
        paths = [
            peft_kind(load_base(base), tmp_path / n, seed=s, r=4, target_modules=targets) for s, n in enumerate(NAMES)
        ]
        settings: dict[str, Any] = {"weights": [0.7, 0.6], "rank": "auto", "keep": 0.9, "max_residual": 0.4}
        report = merge(paths, compact=True, out=tmp_path / "out", **settings)
        ranks = {found.rank for found in report.modules.values()}
        assert len(ranks) > 1
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert set(config["rank_pattern"].values()) | {config["r"]} == ranks
        deltas = adapter_deltas(tmp_path / "out")
        model = load_base(base)
        with torch.no_grad():
            for module, delta in deltas.items():
                model.get_submodule(module).weight += delta.float()
        merged = logits(wrap_with_peft(load_base(base), tmp_path / "out"))
        torch.testing.assert_close(merged, logits(model), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("rank", [4, "auto"])
    def test_a_dense_result_is_cut_as_well_as_the_svd_cuts_it(self, pair: Adapters, rank: Any) -> None:
        settings: dict[str, Any] = {"method": "ties", "options": {"density": 0.6}, "weights": [1.0, 1.0]}
        report = merge(pair[0], rank=rank, max_residual=1.0, **settings)
        for module, (out, into, _) in MODULES.items():
            parts = [trim(delta[module], round(0.6 * out * into)) for delta in pair[1]]
            expected = ties(parts, (1.0, 1.0))
            lost = tails(expected)
            chosen = report.modules[module].rank
            assert report.modules[module].norm == pytest.approx(float(expected.norm()), rel=1e-5)
            assert report.modules[module].residual == pytest.approx(float(lost[chosen]), abs=1e-5)
            if rank == "auto":
                assert 1 - lost[chosen] ** 2 >= 0.999 > 1 - lost[chosen - 1] ** 2
            else:
                assert chosen == min(4, out, into)

    @pytest.mark.parametrize("method", ["ties", "dare-ties"])
    def test_a_dense_result_has_the_sum_of_the_ranks_by_default(self, tmp_path: Path, method: str) -> None:
        write_adapter(tmp_path / "task", {Q: (20, 20, 3)}, seed=1)
        write_adapter(tmp_path / "align", {Q: (20, 20, 4)}, seed=2)
        paths = [tmp_path / name for name in NAMES]
        report = merge(paths, weights=[0.5], method=method, max_residual=1.0, out=tmp_path / "out")
        assert report.modules[Q].rank == 7
        assert open_adapter(tmp_path / "out").modules[Q].rank == 7
        assert 0 < report.residual < 1

    def test_an_automatic_rank_counts_no_rounding_where_factors_cancel(self) -> None:
        """.1 + .2 - .3 is 5.6e-17 in float64, alike in all three directions, and is no update of rank 3."""
        one = LowRank(b=torch.eye(4, 3, dtype=torch.float64), a=torch.eye(3, 5, dtype=torch.float64))
        nothing, something = (concatenate([one] * 3, [0.1, 0.2, last]) for last in (-0.3, -0.2))
        assert float(nothing.dense().abs().max()) == pytest.approx(5.6e-17, rel=0.01)
        assert [
            update.rank
            for found in (nothing, something)
            if isinstance(update := Shape(rank="auto").apply(found, fallback=9, largest=None).update, LowRank)
        ] == [1, 3]

    @pytest.mark.parametrize(
        ("settings", "rank", "squared"),
        [
            # singular values 4, 3 and 1, whose squares sum to 26
            ({}, 3, 0),
            ({"form": "concat"}, 3, 0),
            ({"rank": 2}, 2, 1 / 26),
            ({"form": "lowrank", "rank": 1}, 1, 10 / 26),
            ({"rank": 9}, 3, 0),
            ({"rank": "auto", "keep": 0.6}, 1, 10 / 26),
            ({"rank": "auto", "keep": 0.62}, 2, 1 / 26),
            ({"rank": "auto", "keep": 0.96}, 2, 1 / 26),
            ({"rank": "auto", "keep": 0.97}, 3, 0),
            ({"rank": "auto"}, 3, 0),
            ({"form": "dense"}, None, 0),
        ],
    )
    def test_each_form_of_three_numbers(self, settings: dict[str, Any], rank: int | None, squared: float) -> None:
        values = torch.tensor([4.0, 1.0, 3.0], dtype=torch.float64)
        factors = LowRank(b=torch.eye(5, 3, dtype=torch.float64) * values, a=torch.eye(3, 4, dtype=torch.float64))
        found = Shape(**settings).apply(factors, fallback=9, largest=None)
        assert (found.update.rank if isinstance(found.update, LowRank) else None) == rank
        assert found.residual**2 == pytest.approx(squared, abs=1e-12)
        kept = values.where(values**2 > {None: 0.0, 3: 0.0, 2: 1.0, 1: 9.0}[rank], 0.0)
        torch.testing.assert_close(found.update.dense()[:3, :3], torch.diag(kept))

    @pytest.mark.parametrize(
        ("settings", "rank", "squared"),
        [
            ({}, 2, 1 / 26),  # the fallback
            ({"form": "lowrank", "rank": 1}, 1, 10 / 26),
            ({"rank": 9}, 4, 0),
            ({"rank": "auto", "keep": 0.96}, 2, 1 / 26),
            ({"form": "dense"}, None, 0),
        ],
    )
    def test_each_form_of_a_full_matrix(self, settings: dict[str, Any], rank: int | None, squared: float) -> None:
        full = Dense(w=torch.diag(torch.tensor([4.0, 1.0, 3.0, 0.0], dtype=torch.float64)))
        found = Shape(**settings).apply(full, fallback=2, largest=None)
        assert (found.update.rank if isinstance(found.update, LowRank) else None) == rank
        assert found.residual**2 == pytest.approx(squared, abs=1e-12)
        with pytest.raises(PlanError):
            Shape(form="concat").apply(full, fallback=2, largest=None)

    def test_dense_loses_nothing(self, pair: Adapters) -> None:
        report = merge(pair[0], weights=[0.5], method="ties", form="dense")
        assert report.residual == 0
        assert {found.rank for found in report.modules.values()} == {None}


class TestLimit:
    """What truncation may lose."""

    def test_beyond_a_tenth_it_is_refused_in_one_sentence_and_nothing_is_written(
        self, pair: Adapters, tmp_path: Path
    ) -> None:
        before = contents(tmp_path)
        with pytest.raises(PlanError) as caught:
            merge(pair[0], weights=[0.5], rank=1, out=tmp_path / "out")
        message = str(caught.value)
        assert "at most 10%" in message
        assert "\n" not in message
        for word in ("--rank auto", "--max-residual", "--form concat"):
            assert word in message
        assert contents(tmp_path) == before

    def test_the_limit_that_the_message_names_is_enough(self, pair: Adapters, tmp_path: Path) -> None:
        with pytest.raises(PlanError) as caught:
            merge(pair[0], weights=[0.5], rank=1)
        limit = float(str(caught.value).rsplit("--max-residual ", 1)[1].rstrip("."))
        report = merge(pair[0], weights=[0.5], rank=1, max_residual=limit, out=tmp_path / "out")
        assert 0.1 < report.residual <= limit
        with refuses("residual.truncation"):
            merge(pair[0], weights=[0.5], rank=1, max_residual=report.residual - 1e-6)

    def test_a_dry_run_is_refused_too(self, pair: Adapters, tmp_path: Path) -> None:
        with refuses("residual.truncation"):
            merge(pair[0], weights=[0.5], rank=1, out=tmp_path / "out", dry_run=True)

    def test_the_limit_is_on_the_whole_delta_and_not_on_each_module(self, tmp_path: Path) -> None:
        """A small module may lose everything that a large one keeps."""
        write_adapter(tmp_path / "a", {Q: (9, 9, 2), V: (9, 9, 2)}, alpha={Q: 1e-3, V: 8.0}, seed=1)
        write_adapter(tmp_path / "b", {Q: (9, 9, 2)}, alpha=1e-3, seed=2)
        report = merge([tmp_path / "a", tmp_path / "b"], weights=[1.0, 1.0], rank=2)
        assert report.modules[Q].residual > 0.1
        assert report.residual < 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"form": "concat", "rank": 4}, "--rank goes with --form lowrank"),
        ({"form": "dense", "rank": "auto"}, "--rank goes with --form lowrank"),
        ({"form": "lowrank"}, "--form lowrank needs a rank"),
        ({"rank": 0}, "at least 1"),
        ({"rank": "auto", "keep": 0.0}, "--keep must be in"),
        ({"rank": "auto", "keep": 1.5}, "--keep must be in"),
        ({"keep": 0.5}, "--keep goes with --rank auto"),
        ({"rank": 4, "keep": 0.5}, "--keep goes with --rank auto"),
        ({"form": "concat", "method": "ties"}, "--form concat needs a method whose result is low rank"),
        ({"max_residual": -0.1}, "--max-residual must be in"),
        ({"max_residual": math.nan}, "--max-residual must be in"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    pair: Adapters, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError) as caught:
        merge(pair[0], weights=[0.9], out=tmp_path / "out", **settings)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


class TestRandomMethods:
    @pytest.mark.parametrize("method", ["dare-ties", "dare-linear", "della"])
    def test_bytes_depend_on_the_seed_and_the_content_alone(self, pair: Adapters, tmp_path: Path, method: str) -> None:
        settings: dict[str, Any] = {"method": method, "max_residual": 1.0}
        (task, align), _ = pair
        merge([task, align], weights=[0.7, 0.3], out=tmp_path / "one", **settings)
        merge([task, align], weights=[0.7, 0.3], out=tmp_path / "again", **settings)
        merge([align, task], weights=[0.3, 0.7], out=tmp_path / "turned", **settings)
        merge([task, align], weights=[0.7, 0.3], out=tmp_path / "other", seed=1, **settings)
        renamed = [task.rename(tmp_path / "zeta"), align.rename(tmp_path / "alpha")]
        merge(renamed, weights=[0.7, 0.3], out=tmp_path / "renamed", **settings)
        first = (tmp_path / "one" / WEIGHTS).read_bytes()
        assert [name for name in ("again", "turned", "renamed", "other")
                if (tmp_path / name / WEIGHTS).read_bytes() == first] == ["again", "turned", "renamed"]  # fmt: skip

    def test_copies_of_one_adapter_are_drawn_apart(self, pair: Adapters) -> None:
        """A mean of two equal draws would be one draw, with gaps of the same size."""
        task = pair[0][0]
        settings: dict[str, Any] = {"method": "dare-linear", "options": {"density": 0.5}, "form": "dense"}
        alone = merge([task], weights=[1.0], **settings)
        twice = merge([task, task], weights=[0.5, 0.5], **settings)
        assert twice.norm < 0.95 * alone.norm

    def test_the_seed_stands_in_the_manifest_of_random_methods_only(self, pair: Adapters, tmp_path: Path) -> None:
        for method in ("ties", "dare-ties"):
            merge(pair[0], weights=[0.5], method=method, seed=7, max_residual=1.0, out=tmp_path / method)
        plans = [json.loads((tmp_path / m / "adaptermix.json").read_text())["plan"] for m in ("ties", "dare-ties")]
        assert ["seed" in plan for plan in plans] == [False, True]
        assert plans[1]["seed"] == 7
