"""Singular-value scaling between models, against torch's SVD of whole matrices and the identities that must hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptermix.analysis import spectrum
from adaptermix.errors import OutputError

from ..factories import CONFIG, contents, load_with_peft, peft_lora, write_lora
from ..refusals import refuses
from .models import SHAPES, decoder, orthogonal, write_model

Q0 = "model.layers.0.self_attn.q_proj"


def two(tmp_path: Path, change: dict[str, Tensor]) -> tuple[Path, Path]:
    """A base and a copy with some tensors changed."""
    base = decoder()
    return write_model(tmp_path / "base", base), write_model(tmp_path / "other", base | change)


def by_hand(a: Tensor, b: Tensor) -> dict[str, float]:
    """The numbers of one module from their definitions."""
    one, other = torch.linalg.svdvals(a.double()), torch.linalg.svdvals(b.double())
    difference = b.double() - a.double()
    return {
        "norm_a": float(one.norm()),
        "norm_b": float(other.norm()),
        "ratio": float(other.norm() / one.norm()),
        "distance": float((other - one).norm()),
        "relative_distance": float((other - one).norm() / one.norm()),
        "difference_norm": float(difference.norm()),
        "stable_rank": float(difference.norm() / torch.linalg.matrix_norm(difference, 2)) ** 2,
    }


class TestCheckpoints:
    def test_every_number_is_that_of_its_definition(self, tmp_path: Path) -> None:
        base, other = decoder(), decoder(seed=1)
        report = spectrum(write_model(tmp_path / "a", base), write_model(tmp_path / "b", other))
        document = report.document()
        assert (document["a"], document["b"]) == (str(tmp_path / "a"), str(tmp_path / "b"))
        assert set(document["modules"]) == {f"model.layers.{n}.{m}" for n in range(2) for m in SHAPES}
        for path, found in document["modules"].items():
            expected = by_hand(base[f"{path}.weight"], other[f"{path}.weight"])
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
            assert found["norm_a"] == pytest.approx(float(base[f"{path}.weight"].double().norm()), rel=1e-12)
            assert abs(found["norm_b"] - found["norm_a"]) <= found["distance"] <= found["difference_norm"]
        assert (document["modules"][Q0]["layer"], document["modules"][Q0]["kind"]) == ("0", "q_proj")
        json.dumps(document, allow_nan=False)

    def test_layers_and_kinds_are_made_from_their_modules(self, tmp_path: Path) -> None:
        document = spectrum(
            write_model(tmp_path / "a", decoder()), write_model(tmp_path / "b", decoder(seed=1))
        ).document()
        modules = document["modules"]
        assert list(document["layers"]) == ["0", "1"]
        assert set(document["kinds"]) == {"q_proj", "k_proj", "down_proj"}
        for name, kind in document["kinds"].items():
            own = [module for path, module in modules.items() if path.endswith(name)]
            assert kind["modules"] == len(own) == 2
            for key in ("norm_a", "norm_b", "distance", "difference_norm"):
                assert kind[key] == pytest.approx(sum(module[key] ** 2 for module in own) ** 0.5)
            assert kind["ratio"] == pytest.approx(kind["norm_b"] / kind["norm_a"])
            for key in ("ratio", "distance", "relative_distance"):
                assert kind[f"mean_{key}"] == pytest.approx(sum(module[key] for module in own) / 2)

    def test_a_model_beside_itself_has_not_moved(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "a", decoder())
        for found in spectrum(model, model).document()["modules"].values():
            assert (found["ratio"], found["distance"], found["difference_norm"], found["stable_rank"]) == (1, 0, 0, 0)

    def test_rotations_are_not_seen_by_the_distance_but_by_the_difference(self, tmp_path: Path) -> None:
        weight = decoder()[f"{Q0}.weight"].double()
        turned = orthogonal(12, 0) @ weight @ orthogonal(8, 1)
        found = spectrum(*two(tmp_path, {f"{Q0}.weight": turned})).document()["modules"][Q0]
        assert found["distance"] == pytest.approx(0.0, abs=1e-10 * found["norm_a"])
        assert found["ratio"] == pytest.approx(1.0)
        assert found["difference_norm"] > 0.5 * found["norm_a"]

    @pytest.mark.parametrize("c", [2.0, 0.5, -1.0, 0.0])
    def test_a_scaled_copy(self, tmp_path: Path, c: float) -> None:
        key = f"{Q0}.weight"
        found = spectrum(*two(tmp_path, {key: c * decoder()[key]})).document()["modules"][Q0]
        assert found["ratio"] == pytest.approx(abs(c))
        assert found["distance"] == pytest.approx(abs(abs(c) - 1) * found["norm_a"], abs=1e-10)
        assert found["difference_norm"] == pytest.approx(abs(c - 1) * found["norm_a"])

    def test_a_zero_base_has_no_ratio(self, tmp_path: Path) -> None:
        key = f"{Q0}.weight"
        base, other = decoder() | {key: torch.zeros(12, 8)}, decoder()
        found = spectrum(write_model(tmp_path / "a", base), write_model(tmp_path / "b", other)).document()
        assert found["modules"][Q0]["ratio"] is None
        assert found["modules"][Q0]["relative_distance"] is None
        assert found["kinds"]["q_proj"]["mean_ratio"] == found["modules"][Q0.replace(".0.", ".1.")]["ratio"]

    @pytest.mark.parametrize("shards", [(1, 3), (3, 1), (2, 4)])
    def test_the_layout_of_the_files_does_not_matter(self, tmp_path: Path, shards: tuple[int, int]) -> None:
        single = spectrum(write_model(tmp_path / "a", decoder()), write_model(tmp_path / "b", decoder(seed=1)))
        one = write_model(tmp_path / "c", decoder(), shards=shards[0])
        other = write_model(tmp_path / "d", decoder(seed=1), shards=shards[1])
        assert spectrum(one, other).document()["modules"] == single.document()["modules"]

    def test_the_orientation_of_the_weights_does_not_matter(self, tmp_path: Path) -> None:
        def turned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: weight.T if weight.ndim == 2 else weight for key, weight in weights.items()}

        straight = spectrum(write_model(tmp_path / "a", decoder()), write_model(tmp_path / "b", decoder(seed=1)))
        both = spectrum(
            write_model(tmp_path / "c", turned(decoder())), write_model(tmp_path / "d", turned(decoder(seed=1)))
        )
        one = spectrum(tmp_path / "a", tmp_path / "d")
        for path, numbers in straight.document()["modules"].items():
            for report in (both, one):
                found = report.document()["modules"][path]
                for key in by_hand(torch.ones(1, 1), torch.zeros(1, 1)):
                    assert found[key] == pytest.approx(numbers[key])

    def test_a_prefix_of_the_names_does_not_matter(self, tmp_path: Path) -> None:
        headed, bare = write_model(tmp_path / "a", decoder()), write_model(tmp_path / "b", decoder(prefix=""))
        found = spectrum(headed, bare).document()["modules"]
        assert list(found) == [f"model.layers.{n}.{m}" for n in range(2) for m in sorted(SHAPES)]
        assert {numbers["distance"] for numbers in found.values()} == {0.0}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes_may_differ(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base, other = decoder(), decoder(seed=1, dtype=dtype)
        found = spectrum(write_model(tmp_path / "a", base), write_model(tmp_path / "b", other)).document()
        expected = by_hand(base[f"{Q0}.weight"], other[f"{Q0}.weight"])
        assert {key: found["modules"][Q0][key] for key in expected} == pytest.approx(expected, rel=1e-6)

    def test_embeddings_and_heads_are_taken_when_asked_for(self, tmp_path: Path) -> None:
        folders = two(tmp_path, {"lm_head.weight": torch.zeros(50, 8)})
        document = spectrum(*folders, layers=["1"], modules=["k_proj"], include=["*embed_tokens", "lm_head"]).document()
        assert list(document["modules"]) == ["model.layers.1.self_attn.k_proj", "lm_head", "model.embed_tokens"]
        assert document["layers"]["outside"]["modules"] == 2
        assert document["modules"]["lm_head"]["ratio"] == 0.0

    def test_other_tensors_are_left_out_and_other_shapes_are_named(self, tmp_path: Path) -> None:
        key = "model.layers.1.mlp.down_proj.weight"
        more = {
            "model.layers.0.codes.weight": torch.zeros(4, 4, dtype=torch.uint8),
            "model.layers.0.conv": torch.zeros(2, 2, 2),
        }
        base, other = two(tmp_path, more | {key: torch.zeros(8, 21), "model.layers.0.new.weight": torch.zeros(2, 2)})
        report = spectrum(base, other)
        assert len(report.modules) == 5
        assert report.notes == (
            "1 matrices differ in shape and are left out, such as 'model.layers.1.mlp.down_proj'",
            "1 matrices are in one of the two only and are left out",
        )

    def test_a_table_is_written_whole_and_read_back(self, tmp_path: Path) -> None:
        folders = two(tmp_path, {f"{Q0}.weight": torch.zeros(12, 8)})
        report = spectrum(*folders, csv=tmp_path / "table.csv")
        rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
        assert [row["module"] for row in rows] == list(report.modules)
        assert rows[0].keys() == {"module", "layer", "kind", *by_hand(torch.ones(1, 1), torch.zeros(1, 1)), "model"}
        for row in rows:
            numbers = report.document()["modules"][row["module"]]
            assert {key: float(row[key]) for key in ("norm_a", "distance")} == {
                key: numbers[key] for key in ("norm_a", "distance")
            }


class TestAdapters:
    MODULES = {f"model.layers.{n}.self_attn.q_proj": (12, 8, 2) for n in range(2)}

    def test_a_base_with_an_adapter_is_the_checkpoint_that_has_it_baked_in(self, tmp_path: Path) -> None:
        deltas = write_lora(tmp_path / "task", self.MODULES, alpha=3)
        base = decoder()
        folder = write_model(tmp_path / "base", base)
        baked = {f"{path}.weight": base[f"{path}.weight"].double() + delta for path, delta in deltas.items()}
        other = write_model(tmp_path / "baked", base | baked)
        found = spectrum(folder, tmp_path / "task").document()
        expected = spectrum(folder, other, modules=["q_proj"]).document()
        assert found["compared"] == "base and base with adapter"
        assert set(found["modules"]) == set(self.MODULES)
        for path in self.MODULES:
            numbers = by_hand(base[f"{path}.weight"], baked[f"{path}.weight"])
            for document in (found, expected):
                assert {key: document["modules"][path][key] for key in numbers} == pytest.approx(numbers, rel=1e-6)

    @pytest.mark.parametrize("shape", [(12, 8), (10, 10)])
    def test_weights_kept_as_in_times_out_get_the_delta_turned(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        deltas = write_lora(tmp_path / "task", {"h.0.attn.c_attn": (*shape, 2)}, alpha=3, fan_in_fan_out=True)
        weight = torch.randn(*shape[::-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        folder = write_model(tmp_path / "base", {"transformer.h.0.attn.c_attn.weight": weight})
        [found] = spectrum(folder, tmp_path / "task").document()["modules"].values()
        expected = by_hand(weight, weight + deltas["h.0.attn.c_attn"].T)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)

    def test_two_adapters_are_compared_by_their_deltas(self, tmp_path: Path) -> None:
        one = write_lora(tmp_path / "a", self.MODULES, alpha=3, seed=1)
        two = write_lora(tmp_path / "b", {Q0: (12, 8, 4)}, alpha=-7, seed=2)
        report = spectrum(tmp_path / "a", tmp_path / "b")
        document = report.document()
        assert document["compared"] == "adapters"
        assert set(document["modules"]) == {Q0}
        expected = by_hand(one[Q0], two[Q0])
        assert {key: document["modules"][Q0][key] for key in expected} == pytest.approx(expected, rel=1e-9)
        assert document["notes"] == ["1 matrices are in one of the two only and are left out"]
        for numbers in spectrum(tmp_path / "a", tmp_path / "a").modules.values():
            assert (numbers.distance, numbers.difference_norm, numbers.stable_rank) == (0.0, 0.0, 0.0)

    def test_a_zero_adapter_changes_nothing(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "zero", self.MODULES, alpha=0)
        folder = write_model(tmp_path / "base", decoder())
        for numbers in spectrum(folder, tmp_path / "zero").modules.values():
            assert (numbers.distance, numbers.norm_b) == (0.0, numbers.norm_a)

    def test_modules_that_the_base_keeps_otherwise_are_left_out_with_a_note(self, tmp_path: Path) -> None:
        """A tied head, which the file lacks; a convolution; and embeddings, whose update lies transposed."""
        more = {"lm_head": (50, 8, 2), "model.layers.0.conv": (4, 18, 2), "model.embed_tokens": (8, 50, 2)}
        deltas = write_lora(tmp_path / "task", self.MODULES | more, alpha=3)
        base = {key: weight for key, weight in decoder().items() if key != "lm_head.weight"}
        folder = write_model(tmp_path / "base", base | {"model.layers.0.conv.weight": torch.ones(4, 2, 3, 3)})
        report = spectrum(folder, tmp_path / "task", include=["*embed_tokens"])
        assert set(report.modules) == {*self.MODULES, "model.embed_tokens"}
        assert report.notes == (
            "2 modules of the adapter are not matrices in the base's files (convolutions, tied heads) and are left "
            "out, such as 'lm_head'",
        )
        weight = base["model.embed_tokens.weight"]
        expected = by_hand(weight, weight + deltas["model.embed_tokens"].T)
        assert report.modules["model.embed_tokens"].distance == pytest.approx(expected["distance"], rel=1e-6)

    def test_what_peft_merges_is_what_is_measured(self, base: Path, tmp_path: Path) -> None:
        folder = peft_lora(base, tmp_path / "made", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        merged = load_with_peft(base, folder).merge_and_unload().state_dict()
        found = spectrum(base, folder).modules
        assert len(found) == 8
        for path, numbers in found.items():
            assert numbers.norm_b == pytest.approx(float(merged[f"{path}.weight"].norm()), rel=1e-5)


class TestRefusals:
    def test_models_that_share_nothing(self, tmp_path: Path) -> None:
        one = write_model(tmp_path / "a", decoder())
        other = write_model(tmp_path / "b", {"encoder.layer.0.x.weight": torch.ones(3, 2)})
        with refuses("spectrum.no-shared-matrix"):
            spectrum(one, other)
        outside = write_model(tmp_path / "c", {"lm_head.weight": torch.ones(50, 8)})
        with refuses("spectrum.no-shared-selection: --include"):
            spectrum(one, outside)
        assert len(spectrum(one, outside, include=["lm_head"]).modules) == 1

    def test_an_adapter_as_the_base(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "task", {Q0: (12, 8, 2)})
        with refuses("spectrum.order"):
            spectrum(tmp_path / "task", write_model(tmp_path / "base", decoder()))

    @pytest.mark.parametrize(
        ("module", "shape", "message"),
        [
            (Q0, (13, 8, 2), r"base.update-shape: \[13, 8\].*\[12, 8\]"),
            (Q0, (8, 12, 2), r"base.update-shape: \[8, 12\]"),
            ("model.layers.7.q_proj", (12, 8, 2), "base.no-module: 'model.layers.7.q_proj'"),
        ],
    )
    def test_an_adapter_of_another_base(
        self, tmp_path: Path, module: str, shape: tuple[int, int, int], message: str
    ) -> None:
        write_lora(tmp_path / "task", {module: shape})
        with refuses(message):
            spectrum(write_model(tmp_path / "base", decoder()), tmp_path / "task")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, tmp_path: Path, value: float) -> None:
        before = torch.full((12, 8), value)
        with refuses(f"base.not-finite: {Q0}.weight"):
            spectrum(*two(tmp_path, {f"{Q0}.weight": before}))

    def test_models_that_are_not_there_or_damaged(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "a", decoder())
        (tmp_path / "empty").mkdir()
        with refuses("checkpoint.no-weights"):
            spectrum(model, tmp_path / "empty")
        (tmp_path / "cut").mkdir()
        (tmp_path / "cut/model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
        with refuses("checkpoint.damaged"):
            spectrum(model, tmp_path / "cut")
        with refuses("checkpoint.not-folder"):
            spectrum(model, tmp_path / "none")
        with refuses("device.unknown"):
            spectrum(model, model, device="tpu")
        (tmp_path / "stack").mkdir()
        (tmp_path / "stack" / "stack.json").write_text("{}")
        with refuses("checkpoint.no-weights: It is a stack"):
            spectrum(model, tmp_path / "stack")
        (tmp_path / "empty" / CONFIG).write_text("{}")
        with refuses("config.peft-type: adapter_"):
            spectrum(model, tmp_path / "empty")

    def test_a_table_that_cannot_be_written_is_refused_before_any_work(self, tmp_path: Path) -> None:
        for name in ("none/table.csv", "."):
            with pytest.raises(OutputError, match="--csv must"):
                spectrum("no model", "no model", csv=tmp_path / name)
        assert contents(tmp_path) == {}
