"""Merged deltas as full matrices, alone and added to the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptermix.errors import OutputError
from adaptermix.merging import merge

from ..factories import WEIGHTS as FILE
from ..factories import contents, load_base, logits, peft_kind, tiny_gpt2, wrap_with_peft, write_lora
from ..refusals import refuses

WEIGHTS = [0.7, -0.4]
GPT2 = ["c_attn", "attn.c_proj", "mlp.c_proj"]
LLAMA = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


def made(base: Path, folder: Path, targets: list[str], **settings: Any) -> list[Path]:
    return [
        peft_kind(load_base(base), folder / n, seed=s, r=2 + s, lora_alpha=6, target_modules=targets, **settings)
        for s, n in enumerate(["task", "align"])
    ]


@torch.no_grad()
def by_peft(base: Path, folders: list[Path]) -> dict[str, Tensor]:
    """Weighted sum of PEFT's own dense deltas, as they lie in the base model."""
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, WEIGHTS, strict=True):
        for name, layer in wrap_with_peft(load_base(base), folder).base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                total[name] = total.get(name, 0) + weight * layer.get_delta_weight("default").double()
    return total


def check_delta(base: Path, folders: list[Path], out: Path) -> None:
    got, expected = load_file(out / "delta.safetensors"), by_peft(base, folders)
    assert set(got) == {f"{name}.weight" for name in expected}
    weights = load_base(base).state_dict()
    for name, delta in expected.items():
        assert got[f"{name}.weight"].shape == weights[f"{name}.weight"].shape
        torch.testing.assert_close(got[f"{name}.weight"].double(), delta, rtol=1e-4, atol=1e-6)


class TestDelta:
    """A file of its own."""

    def test_linear_weights(self, base: Path, tmp_path: Path) -> None:
        folders = made(base, tmp_path, LLAMA)
        report = merge(folders, weights=WEIGHTS, form="dense", out=tmp_path / "out")
        check_delta(base, folders, tmp_path / "out")
        assert report.residual == 0
        document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert document["artifact"] == "delta"
        assert document["plan"]["form"] == "dense"
        assert "delta" in (tmp_path / "out" / "README.md").read_text().lower()

    def test_transposed_weights_wide_tall_and_square(self, gpt2: Path, tmp_path: Path) -> None:
        folders = made(gpt2, tmp_path, GPT2, fan_in_fan_out=True)
        merge(folders, weights=WEIGHTS, form="dense", out=tmp_path / "out")
        check_delta(gpt2, folders, tmp_path / "out")

    def test_tables_of_positions_and_tokens(self, gpt2: Path, tmp_path: Path) -> None:
        folders = made(gpt2, tmp_path, ["wpe", "c_attn"], fan_in_fan_out=True)
        merge(folders, weights=WEIGHTS, form="dense", out=tmp_path / "out")
        check_delta(gpt2, folders, tmp_path / "out")

    @pytest.mark.parametrize("sides", [(4, 6), (6, 6)])
    def test_convolutions_and_square_tables(self, tmp_path: Path, sides: tuple[int, int]) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.plane = nn.Conv2d(2, 4, (3, 2))
                self.table = nn.Embedding(*sides)

        torch.manual_seed(0)
        model = Small()
        folder = peft_kind(model, tmp_path / "a", r=2, target_modules=["plane", "table"], task_type=None)
        merge([folder], weights=[0.5], form="dense", out=tmp_path / "out")
        got = load_file(tmp_path / "out" / "delta.safetensors")
        layers = wrap_with_peft(Small(), folder).base_model.model
        for name in ("plane", "table"):
            expected = 0.5 * layers.get_submodule(name).get_delta_weight("default").detach()
            torch.testing.assert_close(got[f"{name}.weight"], expected, rtol=1e-4, atol=1e-6)

    def test_the_storage_dtype_is_chosen(self, base: Path, tmp_path: Path) -> None:
        folders = made(base, tmp_path, LLAMA)
        merge(folders, weights=WEIGHTS, form="dense", dtype="bfloat16", out=tmp_path / "half")
        merge(folders, weights=WEIGHTS, form="dense", out=tmp_path / "full")
        half, full = (load_file(tmp_path / n / "delta.safetensors") for n in ("half", "full"))
        assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)

    @pytest.mark.parametrize("kind", [{"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
    def test_what_is_no_matrix_is_refused(self, base: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
        folders = made(base, tmp_path, LLAMA, **kind)
        with refuses("dense.other-tensors: task"):
            merge(folders, weights=WEIGHTS, form="dense", saved="average", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestIntoBase:
    """A full checkpoint."""

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_transformers_loads_it_and_its_logits_are_the_oracle_s(
        self, request: pytest.FixtureRequest, tmp_path: Path, kind: str
    ) -> None:
        model: Path = request.getfixturevalue("base" if kind == "llama" else "gpt2")
        folders = made(model, tmp_path, LLAMA if kind == "llama" else GPT2, fan_in_fan_out=kind == "gpt2")
        before = contents(model)
        merge(folders, weights=WEIGHTS, form="dense", base=str(model), out=tmp_path / "out")
        oracle = load_base(model).double()
        with torch.no_grad():
            for name, delta in by_peft(model, folders).items():
                oracle.get_submodule(name).weight += delta
        expected = logits(oracle)
        assert (expected - logits(load_base(model).double())).abs().max() > 0.01
        torch.testing.assert_close(logits(load_base(tmp_path / "out")).double(), expected, rtol=1e-4, atol=1e-4)
        assert contents(model) == before
        document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert document["artifact"] == "checkpoint"
        assert not (tmp_path / "out" / "adapter_config.json").exists()

    def test_untouched_tensors_are_copied_bit_for_bit_and_the_base_s_dtype_is_kept(
        self, base: Path, tmp_path: Path
    ) -> None:
        load_base(base).bfloat16().save_pretrained(tmp_path / "half")
        folders = made(base, tmp_path, LLAMA)
        merge(
            folders,
            weights=WEIGHTS,
            form="dense",
            base=str(tmp_path / "half"),
            out=tmp_path / "out",
            allow_base_mismatch=True,
        )
        old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("half", "out"))
        deltas = by_peft(base, folders)
        assert set(old) == set(new)
        for name, tensor in new.items():
            delta = deltas.get(name.removesuffix(".weight"))
            assert tensor.dtype == torch.bfloat16
            if delta is None:
                assert torch.equal(tensor, old[name])
            else:
                expected = (old[name].double() + delta).bfloat16()
                torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=1e-6)
                assert (tensor != expected).float().mean() < 0.01  # rounded once: only ties of the sum may differ

    def test_a_tied_table_would_change_the_head_too_and_is_refused(self, gpt2: Path, tmp_path: Path) -> None:
        """A LoRA on an embedding leaves the head alone; a base that stores one tensor for both cannot."""
        folders = made(gpt2, tmp_path, ["wte", "c_attn"], fan_in_fan_out=True)
        for folder in folders:  # as PEFT saves with save_embedding_layers=False: without copies of the table
            tensors = load_file(folder / FILE)
            save_file({k: v for k, v in tensors.items() if "lora_" in k}, folder / FILE, metadata={"format": "pt"})
        before = contents(tmp_path)
        for dry_run in (True, False):
            with refuses(r"into-base.tied-embedding: transformer\.wte"):
                merge(
                    folders,
                    weights=WEIGHTS,
                    form="dense",
                    saved="average",
                    base=str(gpt2),
                    out=tmp_path / "out",
                    dry_run=dry_run,
                )
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_another_base_is_refused_and_leaves_nothing(
        self, base: Path, gpt2: Path, tmp_path: Path, dry_run: bool
    ) -> None:
        folders = made(base, tmp_path, LLAMA)
        before = contents(tmp_path)
        settings: dict[str, Any] = {"weights": WEIGHTS, "form": "dense", "out": tmp_path / "out", "dry_run": dry_run}
        with refuses("base.mismatch"):
            merge(folders, base=str(gpt2), **settings)
        with refuses("base.no-weight"):
            merge(folders, base=str(gpt2), allow_base_mismatch=True, **settings)
        assert contents(tmp_path) == before

    def test_another_shape_is_refused(self, base: Path, tmp_path: Path) -> None:
        write_lora(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (48, 32, 2)})
        with refuses(r"base.delta-shape: \[32, 32\].*\[48, 32\]"):
            merge([tmp_path / "a"], weights=[1.0], form="dense", base=str(base), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_existing_folder_is_kept_unless_it_may_be_replaced(self, base: Path, tmp_path: Path) -> None:
        folders = made(base, tmp_path, LLAMA)
        settings: dict[str, Any] = {"weights": WEIGHTS, "form": "dense", "base": str(base), "out": tmp_path / "out"}
        merge(folders, **settings)
        before = contents(tmp_path / "out")
        with pytest.raises(OutputError):
            merge(folders, **settings)
        assert contents(tmp_path / "out") == before
        merge(folders, overwrite=True, **settings)
        assert contents(tmp_path / "out") == before
