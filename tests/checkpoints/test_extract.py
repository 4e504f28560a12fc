"""Extraction: what comes out is the difference, as PEFT alone sees it, and what is lost is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import adaptermix
from adaptermix.cli import adaptermix as command
from adaptermix.errors import OutputError
from adaptermix.merging.extract_adapter import extract

from ..analysis.models import decoder, write_model
from ..factories import adapter_deltas, load_base, load_with_peft, tiny_gpt2
from ..refusals import refuses
from .models import everywhere, linear_only, logits, rewrite, tensors_of, tune

Q0 = "model.layers.0.self_attn.q_proj"


def low_rank(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A change of rank 3 on the matrices inside the blocks."""
    if "layers" not in name or tensor.ndim != 2:
        return tensor
    b = torch.randn(tensor.shape[0], 3, generator=generator)
    return tensor + 0.05 * b @ torch.randn(3, tensor.shape[1], generator=generator)


def test_base_and_extracted_adapter_together_are_the_tuned_model(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=linear_only)
    report = extract(base, tuned, out=tmp_path / "out", rank=48)
    assert report.residual < 1e-6
    assert not report.left_out
    assert report.left_out_share == 0
    expected = logits(load_base(tuned))
    assert torch.allclose(logits(load_with_peft(base, tmp_path / "out")), expected, atol=1e-5)
    assert not torch.allclose(logits(load_base(base)), expected, atol=1e-2)


def test_the_residual_is_that_of_eckart_and_young(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=linear_only)
    report = extract(base, tuned, out=tmp_path / "out", rank=5, exact=True)
    deltas = adapter_deltas(tmp_path / "out")
    first, second = tensors_of(base), tensors_of(tuned)
    for path, found in report.modules.items():
        delta = second[f"{path}.weight"].double() - first[f"{path}.weight"].double()
        sigma = torch.linalg.svdvals(delta)
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert found.residual == pytest.approx(float(sigma[5:].norm() / sigma.norm()), rel=1e-4)
        assert found.residual == pytest.approx(float((delta - deltas[path]).norm() / delta.norm()), rel=1e-4)
        assert (found.rank, found.excess) == (5, 0.0)


def test_the_randomised_residual_is_within_its_stated_bound(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(400, 40, generator=generator) @ torch.randn(40, 500, generator=generator)
    delta += torch.randn(400, 500, generator=generator)
    weight = torch.randn(400, 500, generator=generator)
    key = "model.layers.0.mlp.up_proj.weight"
    base = write_model(tmp_path / "a", {key: weight})
    tuned = write_model(tmp_path / "b", {key: weight + delta})
    found = extract(base, tuned, out=tmp_path / "out", rank=8).modules[key.removesuffix(".weight")]
    sigma = torch.linalg.svdvals(delta.double())
    least = float(sigma[8:].norm() / sigma.norm())
    assert least * (1 - 1e-5) <= found.residual <= least * (1 + found.excess + 1e-5)
    assert found.excess <= 0.0101


def test_an_automatic_rank_is_the_least_that_keeps_the_share(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=low_rank)
    report = extract(base, tuned, out=tmp_path / "out", rank="auto", keep=0.9999)
    assert {found.rank for found in report.modules.values()} == {3}
    assert report.residual < 0.01


def test_ranks_per_module_load_in_peft(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=linear_only)
    report = extract(base, tuned, out=tmp_path / "out", rank="auto", keep=0.8)
    assert len({found.rank for found in report.modules.values()}) > 1
    model = load_with_peft(base, tmp_path / "out").merge_and_unload()
    weights = dict(model.named_parameters())
    for path, delta in adapter_deltas(tmp_path / "out").items():
        expected = tensors_of(base)[f"{path}.weight"].double() + delta
        assert torch.allclose(weights[f"{path}.weight"].double(), expected, atol=1e-5)


def test_factors_are_balanced(base: Path, tmp_path: Path) -> None:
    extract(base, tune(base, tmp_path / "tuned"), out=tmp_path / "out", rank=4)
    state = adaptermix.load_adapter(tmp_path / "out")
    for update in state.updates.values():
        assert torch.allclose(update.b.norm(dim=0), update.a.norm(dim=1), rtol=1e-3)


class TestWhatIsTaken:
    def test_what_is_left_out_is_named_with_its_share(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned")
        document = extract(base, tuned, out=tmp_path / "out", rank=4).document()
        first, second = tensors_of(base), tensors_of(tuned)
        norms = {key: float((second[key].double() - first[key].double()).norm()) for key in first}
        left = {key for key in norms if "layers" not in key or first[key].ndim == 1}
        assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= left
        assert document["left_out"] == pytest.approx({key: norms[key] for key in left}, rel=1e-4)
        share = math.hypot(*(norms[key] for key in left)) / math.hypot(*norms.values())
        assert document["left_out_share"] == pytest.approx(share, rel=1e-4)
        json.dumps(document, allow_nan=False)

    def test_modules_that_did_not_change_are_left_out(self, base: Path, tmp_path: Path) -> None:
        tensors = tensors_of(base)
        tensors[f"{Q0}.weight"] += 0.1
        report = extract(base, rewrite(base, tmp_path / "tuned", tensors), out=tmp_path / "out", rank=1)
        assert list(report.modules) == [Q0]
        assert report.residual < 1e-5
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["target_modules"] == [Q0]
        load_with_peft(base, tmp_path / "out")

    def test_globs_take_some_modules_only(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned")
        report = extract(base, tuned, out=tmp_path / "out", rank=2, modules=["q_proj", "*.3.mlp.*"])
        assert {path.rsplit(".", 1)[-1] for path in report.modules} == {"q_proj", "up_proj", "gate_proj", "down_proj"}
        assert len(report.modules) == 4 + 3
        assert f"{Q0.replace('q_proj', 'k_proj')}.weight" in report.left_out

    def test_heads_and_embeddings_are_taken_where_a_glob_names_them(self, base: Path, tmp_path: Path) -> None:
        def change(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
            return everywhere(name, tensor, generator) if "lm_head" in name or "embed" in name else tensor

        tuned = tune(base, tmp_path / "tuned", change=change)
        report = extract(base, tuned, out=tmp_path / "out", rank=40, modules=["lm_head", "embed_tokens"])
        assert set(report.modules) == {"lm_head", "model.embed_tokens"}
        found = logits(load_with_peft(base, tmp_path / "out"))
        assert torch.allclose(found, logits(load_base(tuned)), atol=1e-5)

    def test_gpt2_keeps_its_weights_the_other_way_round(self, tmp_path: Path) -> None:
        tiny_gpt2(tmp_path / "base")

        def change(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
            return everywhere(name, tensor, generator) if ".h." in name and tensor.ndim == 2 else tensor

        tuned = tune(tmp_path / "base", tmp_path / "tuned", change=change)
        report = extract(tmp_path / "base", tuned, out=tmp_path / "out", rank=16)
        assert report.residual < 1e-5
        found = logits(load_with_peft(tmp_path / "base", tmp_path / "out"))
        assert torch.allclose(found, logits(load_base(tuned)), atol=1e-5)

    def test_heads_of_gpt2_lie_as_everywhere(self, tmp_path: Path) -> None:
        tiny_gpt2(tmp_path / "gpt2")
        head = {"score.weight": torch.zeros(3, 32)}
        base = rewrite(tmp_path / "gpt2", tmp_path / "base", {**tensors_of(tmp_path / "gpt2"), **head})
        delta = torch.outer(torch.arange(1.0, 4.0), torch.linspace(-1, 1, 32))
        tuned = rewrite(base, tmp_path / "tuned", {**tensors_of(base), "score.weight": delta})
        extract(base, tuned, out=tmp_path / "out", rank=1, modules=["score"])
        found = adapter_deltas(tmp_path / "out")["score"]
        assert torch.allclose(found.float(), delta, atol=1e-6)


class TestHowItIsStored:
    def test_half_precision_counts_as_a_loss(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned", change=linear_only)
        report = extract(base, tuned, out=tmp_path / "out", rank=48, dtype="bfloat16")
        assert 1e-3 < report.residual < 1e-2
        assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}

    def test_shards_and_prefixes_change_nothing(self, tmp_path: Path) -> None:
        one, two = decoder(), decoder(seed=1)
        bare = {key.removeprefix("model."): tensor for key, tensor in two.items()}
        base = write_model(tmp_path / "base", one)
        extract(base, write_model(tmp_path / "x", two), out=tmp_path / "a", rank=3)
        extract(
            write_model(tmp_path / "y", one, shards=3),
            write_model(tmp_path / "z", bare, shards=2),
            out=tmp_path / "b",
            rank=3,
        )
        name = "adapter_model.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_differences_of_double_precision_are_kept(self, tmp_path: Path) -> None:
        weights = {key: tensor.double() for key, tensor in decoder().items()}
        tuned = dict(weights)
        tuned[f"{Q0}.weight"] = weights[f"{Q0}.weight"] + 1e-12
        report = extract(
            write_model(tmp_path / "a", weights), write_model(tmp_path / "b", tuned), out=tmp_path / "o", rank=1
        )
        assert report.residual < 1e-3

    def test_the_manifest_names_both_models(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned")
        extract(base, tuned, out=tmp_path / "out", rank=2)
        document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert document["kind"] == "extract"
        assert document["base"]["id"] == str(base)
        assert len(document["base"]["fingerprint"]) == 64
        assert len(document["inputs"][0]["files"]["model.safetensors"]) == 64
        assert "left out" in (tmp_path / "out" / "README.md").read_text()


class TestRefusals:
    def test_the_same_model_twice(self, base: Path, tmp_path: Path) -> None:
        with refuses("extract.no-difference"):
            extract(base, rewrite(base, tmp_path / "same", tensors_of(base)), out=tmp_path / "out", rank=2)
        assert not (tmp_path / "out").exists()

    def test_other_shapes(self, base: Path, tmp_path: Path) -> None:
        tensors = tensors_of(base)
        tensors["lm_head.weight"] = torch.zeros(105, 32)
        with refuses(r"checkpoint.shapes: \[101, 32\].*\[105, 32\]"):
            extract(base, rewrite(base, tmp_path / "tuned", tensors), out=tmp_path / "out", rank=2)

    def test_another_architecture(self, base: Path, encoder: Path, tmp_path: Path) -> None:
        with refuses("extract.other-tensors"):
            extract(base, encoder, out=tmp_path / "out", rank=2)

    def test_too_much_is_lost(self, base: Path, tmp_path: Path) -> None:
        tuned = tune(base, tmp_path / "tuned")
        with refuses(r"extract.residual: 10% .* 9\d%"):
            extract(base, tuned, out=tmp_path / "out", rank=1, max_residual=0.1)
        assert not (tmp_path / "out").exists()

    def test_not_finite(self, base: Path, tmp_path: Path) -> None:
        tensors = tensors_of(base)
        tensors[f"{Q0}.weight"][0, 0] = torch.nan
        with refuses(f"base.not-finite: '{Q0}.weight'"):
            extract(base, rewrite(base, tmp_path / "tuned", tensors), out=tmp_path / "out", rank=2)

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ({"rank": 0}, "rank.too-small"),
            ({"rank": "auto", "keep": 0.0}, "rank.keep"),
            ({"rank": 2, "modules": ["nothing"]}, "selection.no-module: modules.*'nothing'"),
            ({"rank": 2, "dtype": "int8"}, "option.dtype"),
            ({"rank": 2, "max_residual": 2.0}, "option.max-residual"),
        ],
    )
    def test_impossible_requests(self, given: dict[str, object], match: str, base: Path, tmp_path: Path) -> None:
        with refuses(match):
            extract(base, base, out=tmp_path / "out", **given)  # type: ignore[arg-type]

    def test_writing_over_an_input(self, base: Path) -> None:
        with pytest.raises(OutputError):
            extract(base, base, out=base, rank=2, overwrite=True)


def test_the_command_writes_what_the_library_does(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned")
    arguments = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "auto", "--keep", "0.5"]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) >= {"out", "rank", "residual", "excess", "modules", "left_out"}
    assert set(document["modules"][Q0]) == {"rank", "norm", "residual", "excess"}
    assert "left out" in result.stderr
    dry = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "dry"), "--json", "--dry-run"])
    assert json.loads(dry.stdout)["modules"] == document["modules"]
    assert not (tmp_path / "dry").exists()
