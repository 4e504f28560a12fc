"""One rank and one scale in every merged adapter, by the rules of all programs that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import merge
from adaptermix.methods.base import METHODS

from ..factories import CONFIG, WEIGHTS, load_base, logits, peft_kind, tiny_gpt2, wrap_with_peft, write_lora
from ..loaders import RefusedByLoaderError, check_one_meaning, deltas_by, distance

LOW, HIGH, EMBED = "model.layers.0.q", "model.layers.1.q", "model.layers.1.v"
Deltas = dict[str, Tensor]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Path], list[Deltas]]:
    """Three adapters of other ranks, alphas, scales and modules, and their deltas by hand."""
    deltas = [
        write_lora(tmp_path / "task", {LOW: (9, 8, 4), HIGH: (9, 8, 4), EMBED: (7, 8, 2)}, alpha=16, seed=1),
        write_lora(tmp_path / "align", {LOW: (9, 8, 8)}, alpha=3, rslora=True, seed=2),
        write_lora(tmp_path / "style", {LOW: (9, 8, 1), EMBED: (7, 8, 5)}, alpha={LOW: -2.0, EMBED: 5.0}, seed=3),
    ]
    return [tmp_path / name for name in ("task", "align", "style")], deltas


def mixed(weights: tuple[float, ...], deltas: list[Deltas]) -> Deltas:
    total: Deltas = {}
    for weight, own in zip(weights, deltas, strict=True):
        for module, delta in own.items():
            total[module] = total.get(module, 0) + weight * delta
    return total


class TestRules:
    """The rules themselves, against what a folder of unequal ranks does to them."""

    def test_patterns_are_what_other_programs_get_wrong(self, inputs: Any, tmp_path: Path) -> None:
        """A merge of an adapter of all layers with one of the lower half, in the form of patterns."""
        merge(inputs[0][:2], weights=[0.9, 0.1], compact=True, out=tmp_path / "out")
        expected = mixed((0.9, 0.1), inputs[1][:2])
        for rule in ("peft", "vllm"):
            assert distance(deltas_by(rule, tmp_path / "out"), expected) < 1e-6
        for rule in ("llama_cpp", "tensorrt"):
            assert distance(deltas_by(rule, tmp_path / "out"), expected) > 0.1
        for rule in ("sglang", "mlx"):
            with pytest.raises(RefusedByLoaderError):
                deltas_by(rule, tmp_path / "out")
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"]) == (12, 12)

    def test_rslora_and_alpha_patterns_are_seen(self, inputs: Any) -> None:
        for folder, expected in zip(*inputs, strict=True):
            assert distance(deltas_by("peft", folder), expected) < 1e-7
        assert distance(deltas_by("llama_cpp", inputs[0][1]), inputs[1][1]) > 0.1


WEIGHTS_OF_THREE = (0.7, -0.4, 1.5)


class TestMerge:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"form": "concat"},
            {"rank": 3},
            {"rank": 40},
            {"rank": "auto", "keep": 0.8},
            {"dtype": "bfloat16"},
            {"dtype": "float16"},
            {"fill": "one"},
            {"dtype": "float16", "rank": "auto", "keep": 0.9},
        ],
        ids=str,
    )
    def test_every_form_of_a_sum(self, inputs: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
        report = merge(inputs[0], weights=WEIGHTS_OF_THREE, max_residual=1.0, out=tmp_path / "out", **settings)
        got = check_one_meaning(tmp_path / "out")
        if "fill" not in settings:
            lost = distance(got, mixed(WEIGHTS_OF_THREE, inputs[1]))
            assert lost == pytest.approx(report.residual, rel=1e-2, abs=1e-6)
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert config["r"] == config["lora_alpha"] == report.rank == max(m.rank or 0 for m in report.modules.values())
        assert report.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
        again = merge(inputs[0], weights=WEIGHTS_OF_THREE, max_residual=1.0, dry_run=True, **settings)
        assert (again.rank, again.bytes, again.residual) == (report.rank, report.bytes, report.residual)

    @pytest.mark.parametrize(
        "name", sorted(name for name, cls in METHODS.items() if not (cls.statistics or cls.learner))
    )
    def test_every_method(self, tmp_path: Path, name: str) -> None:
        """The two adapters have one rank per module, which some methods need, and unequal ones over the modules."""
        weights = [0.6, 0.4, 0.3][: len(METHODS[name].roles) or 2]
        folders = [tmp_path / str(seed) for seed in range(len(weights))]
        for seed, folder in enumerate(folders):
            write_lora(folder, {LOW: (9, 8, 4), HIGH: (9, 8, 2), EMBED: (7, 8, 3)}, alpha=5, seed=seed)
        merge(folders, weights=weights, method=name, max_residual=1.0, out=tmp_path / "out")
        check_one_meaning(tmp_path / "out")

    @pytest.mark.parametrize("name", ["fisher", "regmean"])
    def test_methods_with_statistics(self, inputs: Any, tmp_path: Path, name: str) -> None:
        files = []
        for place in range(3):
            shapes = {LOW: (9, 8), HIGH: (9, 8), EMBED: (7, 8)}
            found = {m: torch.rand(shape) + 0.1 for m, shape in shapes.items()}
            if name == "regmean":
                found = {m: torch.eye(into) * (place + 1) for m, (_, into) in shapes.items()}
            save_file(found, tmp_path / f"{place}.safetensors")
            files.append(tmp_path / f"{place}.safetensors")
        settings: dict[str, Any] = {"method": name, "statistics": files, "max_residual": 1.0}
        merge(inputs[0], weights=[0.5, 0.3, 0.2], out=tmp_path / "out", **settings)
        check_one_meaning(tmp_path / "out")

    @pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
    def test_weights_of_zero(self, inputs: Any, tmp_path: Path, weights: tuple[float, ...]) -> None:
        merge(inputs[0], weights=weights, out=tmp_path / "out")
        assert distance(check_one_meaning(tmp_path / "out"), mixed(weights, inputs[1])) < 1e-6

    def test_merging_what_was_merged_raises_no_rank(self, inputs: Any, tmp_path: Path) -> None:
        """The zeros that fill up a module count as nothing where the file is read again."""
        merge(inputs[0][:2], weights=[1.0, 1.0], out=tmp_path / "filled")
        merge(inputs[0][:2], weights=[1.0, 1.0], compact=True, out=tmp_path / "compact")
        for name in ("filled", "compact"):
            merge([tmp_path / name, inputs[0][2]], weights=[1.0, 1.0], compact=True, out=tmp_path / f"{name}2")
        one, two = (load_file(tmp_path / f"{name}2" / WEIGHTS) for name in ("filled", "compact"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)

    @pytest.mark.parametrize("method", ["svd", "ties", "knots", "dare-linear", "peft-linear", "factor-average"])
    def test_a_filled_adapter_merges_as_the_compact_one(self, inputs: Any, tmp_path: Path, method: str) -> None:
        merge(inputs[0][:2], weights=[1.0, 1.0], out=tmp_path / "filled")
        merge(inputs[0][:2], weights=[1.0, 1.0], compact=True, out=tmp_path / "compact")
        settings: dict[str, Any] = {"weights": [0.5, 0.5], "method": method, "max_residual": 1.0}
        for name in ("filled", "compact"):
            merge([tmp_path / name] * 2, out=tmp_path / f"{name}2", **settings)
        one, two = (deltas_by("peft", tmp_path / f"{name}2") for name in ("filled", "compact"))
        assert distance(one, two) < 1e-6

    def test_one_module_alone_and_an_adapter_of_zeros(self, tmp_path: Path) -> None:
        exact = write_lora(tmp_path / "one", {LOW: (6, 5, 2)}, alpha=-3.0)
        zero = write_lora(tmp_path / "zero", {LOW: (6, 5, 4), HIGH: (6, 5, 4)}, alpha=0.0)
        merge([tmp_path / "one"], weights=[2.0], out=tmp_path / "out")
        assert distance(check_one_meaning(tmp_path / "out"), mixed((2.0,), [exact])) < 1e-6
        merge([tmp_path / "zero"] * 2, weights=[1.0, 1.0], out=tmp_path / "none")
        assert not any(delta.any() for delta in check_one_meaning(tmp_path / "none").values())
        merge([tmp_path / "one", tmp_path / "zero"], weights=[1.0, 1.0], out=tmp_path / "both")
        assert distance(check_one_meaning(tmp_path / "both"), mixed((1.0, 1.0), [exact, zero])) < 1e-6


class TestOnModels:
    """PEFT itself computes what the rules say."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
            {"use_dora": True, "layers_to_transform": [0, 1]},
            {"target_modules": ["embed_tokens", "q_proj"]},
            {"lora_bias": True},
        ],
        ids=str,
    )
    def test_a_filled_adapter_is_the_compact_one_to_peft(
        self, base: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        targets = settings.pop("target_modules", ["q_proj", "v_proj"])
        one = peft_kind(load_base(base), tmp_path / "one", seed=1, r=4, target_modules=targets, **settings)
        other = peft_kind(load_base(base), tmp_path / "two", seed=2, r=8, target_modules=["q_proj"])
        chosen: dict[str, Any] = {"weights": [0.7, 0.4], "base": str(base)}
        for name, compact in (("filled", False), ("compact", True)):
            merge([one, other], compact=compact, out=tmp_path / name, **chosen)
        filled, compact_ = (logits(wrap_with_peft(load_base(base), tmp_path / n)) for n in ("filled", "compact"))
        torch.testing.assert_close(filled, compact_, rtol=1e-4, atol=1e-5)
        check_one_meaning(tmp_path / "filled")

    def test_layers_that_keep_their_weights_transposed(self, tmp_path: Path) -> None:
        gpt2 = tiny_gpt2(tmp_path / "gpt2")
        common: dict[str, Any] = {"fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"]}
        one = peft_kind(load_base(gpt2), tmp_path / "one", seed=1, r=3, layers_to_transform=[0], **common)
        other = peft_kind(load_base(gpt2), tmp_path / "two", seed=2, r=2, use_rslora=True, **common)
        merge([one, other], weights=[1.0, -0.5], out=tmp_path / "out")
        expected = mixed((1.0, -0.5), [deltas_by("peft", one), deltas_by("peft", other)])
        assert distance(check_one_meaning(tmp_path / "out"), expected) < 1e-6


EXPERT = "model.layers.0.mlp.experts.{}.{}"


# PEFT adds patterns for the joined experts, and then warns of them.
@pytest.mark.filterwarnings(r"ignore:.*_pattern keys did not match any targeted module.*gate_up_proj:RuntimeWarning")
class TestExperts:
    """PEFT joins the experts of a layer into one module of one rank, so they must have that of `r`."""

    def base(self, folder: Path) -> Path:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "head_dim": 8}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = Qwen3MoeConfig(vocab_size=101, num_experts=4, num_experts_per_tok=2, **sizes, **heads)
            Qwen3MoeForCausalLM(config).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("attention", [2, 9])
    def test_unequal_ranks_load_in_peft_and_act_as_the_sum(self, tmp_path: Path, compact: bool, attention: int) -> None:
        moe = self.base(tmp_path / "moe")
        shapes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
        every = {EXPERT.format(e, name): (*shape, 4) for e in range(4) for name, shape in shapes.items()}
        some = {EXPERT.format(e, name): (*shape, 2) for e in (0, 2) for name, shape in shapes.items()}
        some["model.layers.0.self_attn.q_proj"] = (32, 32, attention)
        exact = [
            write_lora(tmp_path / name, modules, seed=seed, base=str(moe), target_modules=sorted(modules))
            for seed, (name, modules) in enumerate({"every": every, "some": some}.items())
        ]
        merge([tmp_path / "every", tmp_path / "some"], weights=[1.0, -0.5], compact=compact, out=tmp_path / "out")
        model, expected = load_base(moe), mixed((1.0, -0.5), exact)
        with torch.no_grad():
            layer = model.model.layers[0]
            layer.self_attn.q_proj.weight += expected["model.layers.0.self_attn.q_proj"]
            for e in range(4):
                gate, up, down = (expected[EXPERT.format(e, name)] for name in shapes)
                layer.mlp.experts.gate_up_proj[e] += torch.cat([gate, up])
                layer.mlp.experts.down_proj[e] += down
        got = logits(wrap_with_peft(load_base(moe), tmp_path / "out"))
        torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4)
        assert (got - logits(load_base(moe))).abs().max() > 0.01
