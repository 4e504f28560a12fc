"""Deltas that need the base weight: PiSSA, OLoRA and DoRA, against the models that PEFT makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptermix.adapters import AdapterModule, AdapterSource, AdapterState, open_adapter, write_adapter
from adaptermix.adapters.base_weights import base_weight, find_weight, load_module
from adaptermix.adapters.kinds.dora import dora_delta, dora_row_norms, merge_dora
from adaptermix.adapters.kinds.olora import olora_delta
from adaptermix.adapters.kinds.pissa import pissa_delta
from adaptermix.algebra import LowRank
from adaptermix.io.checkpoint_files import Checkpoint, TensorHeader, open_checkpoint

from ..factories import load_base, logits, peft_kind, tiny_gpt2, wrap_with_peft
from ..refusals import refuses
from ..strategies import updates


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


def with_deltas(model: Any, deltas: Mapping[str, Tensor], *, transposed: bool = False) -> Any:
    """Add dense deltas to a model's weights."""
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += (delta.T if transposed else delta).float()
    return model


def load_delta(source: AdapterSource, module: str, checkpoint: Checkpoint | None) -> LowRank:
    return load_module(source, module, checkpoint).update


def checkpoint_of(*keys: str) -> Checkpoint:
    header = TensorHeader(file="model.safetensors", shape=(2, 2), dtype="F32")
    return Checkpoint(path=Path("base"), tensors=dict.fromkeys(keys, header))


class TestInitials:
    """Factors that began from a part of the base weight."""

    @pytest.mark.parametrize("settings", [{}, {"lora_alpha": 7}, {"use_rslora": True, "lora_alpha": 5}])
    @pytest.mark.parametrize("initial", ["pissa", "olora"])
    def test_base_plus_delta_is_peft_s_model(
        self, tmp_path: Path, base: Path, initial: str, settings: dict[str, Any]
    ) -> None:
        targets = ["q_proj", "up_proj", "down_proj"]  # square, tall and wide
        folder = peft_kind(
            load_base(base), tmp_path / "a", r=4, target_modules=targets, init_lora_weights=initial, **settings
        )
        source, checkpoint = open_adapter(folder), open_checkpoint(base)
        assert source.meta.initial == initial
        deltas = {module: load_delta(source, module, checkpoint) for module in source.modules}
        assert all(delta.rank == 8 for delta in deltas.values())
        expected = logits(wrap_with_peft(load_base(base), folder))
        assert (expected - logits(load_base(base))).abs().max() > 0.01
        ours = with_deltas(load_base(base), {module: delta.dense() for module, delta in deltas.items()})
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)

    def test_what_is_written_is_a_plain_lora_with_the_same_model(self, tmp_path: Path, base: Path) -> None:
        settings = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
        source = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=4, **settings))
        deltas = {module: load_delta(source, module, open_checkpoint(base)) for module in source.modules}
        (tmp_path / "b").mkdir()
        write_adapter(tmp_path / "b", AdapterState.of_updates(replace(source.meta, initial=None), deltas))
        torch.testing.assert_close(
            logits(wrap_with_peft(load_base(base), tmp_path / "b")),
            logits(wrap_with_peft(load_base(base), tmp_path / "a")),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_pissa_on_transposed_weights_and_plain_embeddings(self, tmp_path: Path, gpt2: Path) -> None:
        folder = peft_kind(
            load_base(gpt2),
            tmp_path / "a",
            r=4,
            target_modules=["c_attn", "wpe"],
            fan_in_fan_out=True,
            init_lora_weights="pissa",
        )
        source, checkpoint = open_adapter(folder), open_checkpoint(gpt2)
        deltas = {module: load_delta(source, module, checkpoint).dense() for module in source.modules}
        assert load_delta(source, "transformer.wpe", None).rank == 4  # PEFT takes nothing out of embeddings
        torch.testing.assert_close(
            logits(with_deltas(load_base(gpt2), deltas, transposed=True)),
            logits(wrap_with_peft(load_base(gpt2), folder)),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_the_base_is_asked_for(self, tmp_path: Path, base: Path) -> None:
        settings = {"target_modules": ["q_proj"], "init_lora_weights": "olora"}
        source = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=4, **settings))
        with refuses("merge.needs-base"):
            load_delta(source, next(iter(source.modules)), None)

    @pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
    def test_an_untrained_adapter_changes_nothing(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        start = LowRank(b=u[:, :3] * s[:3] / 2.0, a=v[:3], scale=2.0)
        assert pissa_delta(start, weight).dense().norm() < 1e-12 * weight.norm()
        q, r = torch.linalg.qr(weight)
        assert olora_delta(LowRank(b=q[:, :3], a=r[:3], scale=0.5), weight).dense().norm() < 1e-12 * weight.norm()


class TestDora:
    """Rows of a trained length."""

    @given(update=updates(max_side=9), seed=st.integers(0, 99))
    def test_the_row_norms_are_those_of_the_sum(self, update: LowRank, seed: int) -> None:
        weight = torch.randn(update.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = (weight + update.dense()).norm(dim=1)
        size = weight.norm() + update.dense().norm()
        assert (dora_row_norms(weight, update) - expected).abs().max() <= 1e-7 * size

    def test_rows_beyond_one_block_are_counted(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(2050, 3, generator=generator)
        update = LowRank(
            b=torch.randn(2050, 2, generator=generator), a=torch.randn(2, 3, generator=generator), scale=3.0
        )
        total = weight.double() + update.to(torch.float64).dense()
        torch.testing.assert_close(dora_row_norms(weight, update), total.norm(dim=1))
        magnitude = torch.rand(2050, generator=generator)
        expected = magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True) - weight
        torch.testing.assert_close(dora_delta(weight, update, magnitude), expected.float(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_dense_delta_is_peft_s_model(self, tmp_path: Path, base: Path, gpt2: Path, transposed: bool) -> None:
        model = gpt2 if transposed else base
        targets = ["c_attn", "c_fc"] if transposed else ["q_proj", "down_proj"]
        settings = {"target_modules": targets, "use_dora": True, "fan_in_fan_out": transposed, "lora_alpha": 6}
        folder = peft_kind(load_base(model), tmp_path / "a", r=4, **settings)
        source, checkpoint = open_adapter(folder), open_checkpoint(model)
        deltas = {}
        for module, header in source.modules.items():
            magnitude = source.magnitude(module)
            assert magnitude is not None
            weight = base_weight(checkpoint, module, (header.out, header.into), fan_in_fan_out=transposed)
            deltas[module] = dora_delta(weight, source.load(module), magnitude)
        expected = logits(wrap_with_peft(load_base(model), folder))
        ours = logits(with_deltas(load_base(model), deltas, transposed=transposed))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("plain", [False, True], ids=["two-doras", "dora-and-lora"])
    def test_a_weighted_sum_of_doras_is_a_dora(self, tmp_path: Path, base: Path, plain: bool) -> None:
        """The oracle merges each adapter into the base with PEFT, and adds the weighted differences in float64."""
        weights = (0.7, 0.3)
        folders = [
            peft_kind(
                load_base(base),
                tmp_path / f"a{n}",
                seed=n,
                r=4 + n,
                lora_alpha=6,
                target_modules=["q_proj", "up_proj"],
                use_dora=not (plain and n),
            )
            for n in (0, 1)
        ]
        sources, checkpoint = [open_adapter(folder) for folder in folders], open_checkpoint(base)
        merged, lengths, deltas = {}, {}, {}
        models = [wrap_with_peft(load_base(base), folder).merge_and_unload() for folder in folders]
        for module, header in sources[0].modules.items():
            weight = base_weight(checkpoint, module, (header.out, header.into))
            merged[module], lengths[module] = merge_dora(
                weight, [s.load(module) for s in sources], [s.magnitude(module) for s in sources], weights
            )
            deltas[module] = sum(
                w * (model.get_submodule(module).weight.detach().double() - weight.double())
                for w, model in zip(weights, models, strict=True)
            )
            dense = dora_delta(weight, merged[module], lengths[module])
            torch.testing.assert_close(dense, deltas[module].float(), rtol=1e-4, atol=1e-6)
        (tmp_path / "out").mkdir()
        modules = {path: AdapterModule(update=merged[path], magnitude=lengths[path]) for path in merged}
        write_adapter(tmp_path / "out", AdapterState(meta=sources[0].meta, modules=modules))
        expected = logits(with_deltas(load_base(base), deltas))
        torch.testing.assert_close(
            logits(wrap_with_peft(load_base(base), tmp_path / "out")), expected, rtol=1e-4, atol=1e-4
        )

    def test_rows_that_lose_their_direction_are_refused(self) -> None:
        weight, update = torch.eye(2), LowRank(b=torch.zeros(2, 1), a=torch.zeros(1, 2))
        with refuses("dora.cancelled: -1"):
            merge_dora(weight, [update], [torch.tensor([3.0, 1.0])], [-1.0])
        with refuses("dora.zero-row"):
            dora_delta(torch.zeros(2, 2), update, torch.ones(2))


class TestFinding:
    """The weight of a module by its path."""

    def test_the_path_itself_comes_first(self) -> None:
        assert find_weight(checkpoint_of("x.q.weight", "m.x.q.weight"), "x.q") == "x.q.weight"

    def test_a_prefix_may_be_missing_or_be_there(self) -> None:
        assert (
            find_weight(checkpoint_of("encoder.layer.0.q.weight"), "bert.encoder.layer.0.q")
            == "encoder.layer.0.q.weight"
        )
        assert find_weight(checkpoint_of("bert.layer.0.q.weight"), "layer.0.q") == "bert.layer.0.q.weight"
        with refuses("base.no-weight: no weight ends like it"):
            find_weight(checkpoint_of("decoder.layer.0.q.weight"), "encoder.layer.0.q")

    def test_two_that_fit_are_refused(self) -> None:
        with refuses("base.no-weight: 2 weights end like it"):
            find_weight(checkpoint_of("text.layer.0.q.weight", "image.layer.0.q.weight"), "layer.0.q")

    def test_no_block_is_mistaken_for_another(self) -> None:
        with refuses("base.no-weight: no weight ends like it"):
            find_weight(checkpoint_of("layer.1.q.weight"), "layer.0.q")

    def test_shapes_dtypes_and_values_are_checked(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        made = {
            "q.weight": torch.ones(2, 3),
            "i.weight": torch.ones(2, 3).int(),
            "n.weight": torch.full((2, 3), torch.nan),
        }
        save_file(made, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert base_weight(checkpoint, "q", (2, 3)).shape == (2, 3)
        assert base_weight(checkpoint, "q", (3, 2), fan_in_fan_out=True).shape == (3, 2)
        for module, shape, words in [
            ("q", (3, 2), r"base.weight-shape: \[2, 3\]"),
            ("i", (2, 3), "base.weight-shape: int32"),
            ("n", (2, 3), "base.not-finite"),
        ]:
            with refuses(words):
                base_weight(checkpoint, module, shape)
