"""Adapters exported for inference engines: the deltas that each engine makes of them, and what is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix import ExportSettings, export, merge, push
from adaptermix.adapters.lora_config import LoraSettings
from adaptermix.methods.base import METHODS
from adaptermix.publish.engines import ENGINES, Vllm
from adaptermix.publish.engines.llama_cpp import row_order

from ..cli.test_commands import run
from ..factories import (
    CONFIG,
    contents,
    load_base,
    load_with_peft,
    peft_kind,
    tiny_gpt2,
    wrap_with_peft,
    write_lora,
    write_raw,
)
from ..loaders import check_exports, deltas_by, distance, exported_deltas
from ..refusals import refuses
from ..tiny import tiny_causal

NAMES = list(ENGINES.built_in)
Q, K, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
DOWN, UP = "model.layers.3.mlp.down_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (32, 32, 4), K: (16, 32, 2), V: (16, 32, 1), UP: (48, 32, 3), DOWN: (32, 48, 5)}
"""Modules of the tiny Llama: heads of 8 rows, 4 of q and 2 of k."""


def write_adapter(folder: Path, **more: Any) -> Mapping[str, Tensor]:
    """Write an adapter of unequal ranks and return its deltas."""
    return write_lora(folder, SHAPES, **more)


def exported(folder: Path, engine: str, base: Path, **more: Any) -> Path:
    out = folder.parent / f"{folder.name}-{engine}"
    export(folder=folder, engine=engine, base=str(base), out=out, **more)
    return out


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize(
    "scales",
    [{"alpha": 16}, {"alpha": 3, "rslora": True}, {"alpha": {path: 2.0 - at for at, path in enumerate(SHAPES)}}],
    ids=["alpha", "rslora", "patterns"],
)
def test_each_engine_computes_the_deltas_of_the_adapter(
    base: Path, tmp_path: Path, engine: str, scales: dict[str, Any]
) -> None:
    expected = write_adapter(tmp_path / "one", **scales)
    out = exported(tmp_path / "one", engine, base)
    assert distance(exported_deltas(engine, out, base), expected) < 1e-7


@pytest.mark.parametrize("name", sorted(name for name, cls in METHODS.items() if not (cls.statistics or cls.learner)))
def test_a_merge_by_each_method_and_in_both_forms(base: Path, tmp_path: Path, name: str) -> None:
    weights = [0.6, 0.4, 0.3][: len(METHODS[name].roles) or 2]
    folders = [tmp_path / str(seed) for seed in range(len(weights))]
    for seed, folder in enumerate(folders):
        write_adapter(folder, alpha=5, seed=seed, base=str(base))
    merge(folders, weights=weights, method=name, max_residual=1.0, compact=True, out=tmp_path / "out")
    check_exports(tmp_path / "out", base, tmp_path / "exports", deltas_by("peft", tmp_path / "out"))


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_factors_that_start_from_the_base_become_a_plain_lora(base: Path, tmp_path: Path, initial: str) -> None:
    """PEFT takes the start out of the base, so the delta is the merged weight less the untouched one."""
    folder = peft_kind(
        load_base(base), tmp_path / "one", r=3, init_lora_weights=initial, target_modules=["q_proj", "k_proj"]
    )
    before = {name: value.double() for name, value in load_base(base).state_dict().items()}
    after = wrap_with_peft(load_base(base), folder).merge_and_unload().state_dict()
    paths = [f"model.layers.{block}.self_attn.{name}" for block in range(4) for name in ("q_proj", "k_proj")]
    expected = {path: after[f"{path}.weight"].double() - before[f"{path}.weight"] for path in paths}
    for engine in ("vllm", "llama.cpp"):
        out = exported(folder, engine, base)
        assert distance(exported_deltas(engine, out, base), expected) < 1e-5
    with refuses("merge.needs-base"):
        export(folder=folder, engine="vllm", out=tmp_path / "more")


def test_peft_loads_the_folders_for_engines_that_read_its_format(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "target_modules": ["q_proj", "v_proj"],
    }
    folder = peft_kind(load_base(base), tmp_path / "one", r=4, **settings)
    tokens = torch.arange(3, 27).reshape(2, 12)
    expected = load_with_peft(base, folder)(input_ids=tokens).logits
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        got = load_with_peft(base, exported(folder, engine, base))(input_ids=tokens).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_pairs_of_rows_lie_next_to_each_other_in_gguf() -> None:
    """Two heads of four rows: transformers rotates rows 0 and 2 together, llama.cpp rows 0 and 1."""
    config: Any = type("Config", (), {"num_attention_heads": 2, "num_key_value_heads": 1})
    assert row_order(config, "layers.0.q_proj", 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(config, "layers.0.k_proj", 4).tolist() == [0, 2, 1, 3]
    assert row_order(config, "layers.0.v_proj", 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "has_pairs"), [("llama", True), ("qwen2", False), ("qwen3", False), ("gemma3", False)]
)
def test_rows_are_ordered_for_the_architectures_that_need_it(tmp_path: Path, kind: str, has_pairs: bool) -> None:
    from gguf import GGUFReader

    model = tiny_causal(tmp_path / kind, kind, layers=2)
    write_lora(tmp_path / "one", {"model.layers.1.self_attn.q_proj": (32, 32, 2)}, alpha=2)
    out = exported(tmp_path / "one", "llama.cpp", model)
    file = GGUFReader(out / "adapter.gguf")
    tensors = {each.name: torch.tensor(each.data) for each in file.tensors}
    stored = tensors["blk.1.attn_q.weight.lora_b"] @ tensors["blk.1.attn_q.weight.lora_a"]
    expected = deltas_by("peft", tmp_path / "one")["model.layers.1.self_attn.q_proj"].float()
    if kind == "llama":
        expected = expected.reshape(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    torch.testing.assert_close(stored, expected)


@pytest.mark.parametrize("engine", NAMES)
def test_sixteen_bits_cost_what_their_rounding_costs(base: Path, tmp_path: Path, engine: str) -> None:
    expected = write_adapter(tmp_path / "one")
    for dtype, bits in (("bfloat16", 8), ("float16", 11)):
        out = tmp_path / dtype
        report = export(folder=tmp_path / "one", engine=engine, base=str(base), out=out, dtype=dtype)
        deltas = exported_deltas(engine, out, base)
        measured = {path: float((deltas[path] - expected[path]).norm() / expected[path].norm()) for path in SHAPES}
        assert report.error == pytest.approx(max(measured.values()), rel=1e-5)
        assert 0.1 * 2**-bits < max(measured.values()) < 2**-bits


class TestSettings:
    """What an engine has to be started with."""

    @pytest.mark.parametrize(
        ("engine", "expected"),
        [
            ("vllm", "--max-lora-rank 8 --lora-modules adapter="),
            ("sglang", "--max-lora-rank 5 --lora-target-modules down_proj k_proj q_proj up_proj v_proj"),
            ("tensorrt-llm", 'max_lora_rank=5, lora_target_modules=["mlp_4h_to_h", "attn_k", "attn_q", "mlp_gate", '),
            ("llama.cpp", "--lora OUT/adapter.gguf"),
            ("mlx", "--adapter-path OUT"),
        ],
    )
    def test_commands_and_what_is_written(self, base: Path, tmp_path: Path, engine: str, expected: str) -> None:
        write_adapter(tmp_path / "one")
        report = export(folder=tmp_path / "one", engine=engine, base=str(base), out=tmp_path / "out")
        text = "\n".join(report.commands)
        assert expected.replace("OUT", str(tmp_path / "out")) in text
        assert str(base) in text
        card = (tmp_path / "out" / "README.md").read_text()
        assert expected.replace("OUT", "out") in card
        document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert document["kind"] == "export"
        assert document["serve"]["engine"] == engine
        assert document["fidelity"]["error"] == report.error

    def test_the_target_modules_for_sglang_are_a_list_of_last_parts(self, base: Path, tmp_path: Path) -> None:
        write_adapter(tmp_path / "one", target_modules=r".*\.(q|k|v|up|down)_proj")
        for engine, expected in (("vllm", str), ("sglang", list)):
            config = json.loads((exported(tmp_path / "one", engine, base) / CONFIG).read_text())
            assert isinstance(config["target_modules"], expected)
        assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]

    def test_a_dry_run_writes_nothing(self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_adapter(tmp_path / "one", base=str(base))
        before = contents(tmp_path)
        call = ["export", tmp_path / "one", "--for", "mlx", "--out", tmp_path / "out", "--json"]
        code, out, _ = run(capsys, *call, "--dry-run")
        plan = json.loads(out)
        assert code == 0
        assert contents(tmp_path) == before
        code, out, _ = run(capsys, *call)
        document = json.loads(out)
        assert code == 0
        assert (plan["rank"], plan["commands"], plan["error"]) == (5, document["commands"], None)
        assert document["error"] == max(module["error"] for module in document["modules"].values())
        files = [tmp_path / "out" / name for name in (CONFIG, "adapters.safetensors")]
        assert document["bytes"] == sum(file.stat().st_size for file in files)

    @pytest.mark.parametrize("engine", NAMES)
    def test_an_export_can_be_pushed(self, base: Path, tmp_path: Path, engine: str) -> None:
        write_adapter(tmp_path / "one")
        out = exported(tmp_path / "one", engine, base)
        report = push(folder=str(out), repo="me/mine", base_id="org/base", dry_run=True)
        written = {path.name for path in out.iterdir()}
        assert {name for name, _ in report.files} == written
        assert "me/mine" in report.card
        assert str(tmp_path) not in report.card


def plain(folder: Path, base: Path, **more: Any) -> Path:
    """Save a LoRA of q and v that PEFT made on the base."""
    return peft_kind(load_base(base), folder, r=2, **{"target_modules": ["q_proj", "v_proj"]} | more)


class TestRefusals:
    @pytest.mark.parametrize("engine", NAMES)
    @pytest.mark.parametrize(
        ("code", "settings"),
        [
            ("export.dora: DoRA.*adaptermix bake", {"use_dora": True}),
            ("export.bias: transformers and peft", {"lora_bias": True}),
            ("export.whole-tensors: 'lm_head.*transformers and peft", {"modules_to_save": ["lm_head"]}),
            ("export.whole-tensors", {"trainable_token_indices": [1, 2]}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_parts_that_no_engine_serves(
        self, base: Path, tmp_path: Path, engine: str, code: str, settings: dict[str, Any]
    ) -> None:
        folder = plain(tmp_path / "one", base, **settings)
        with refuses(code):
            export(folder=folder, engine=engine, base=str(base), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_embeddings_and_heads_that_one_engine_serves(self, base: Path, tmp_path: Path) -> None:
        folder = plain(tmp_path / "one", base, target_modules=["embed_tokens", "lm_head", "q_proj"])
        out = exported(folder, "sglang", base)  # PEFT's copies of the two tables are those of the base
        assert distance(exported_deltas("sglang", out, base), deltas_by("peft", folder)) < 1e-6
        for engine in set(NAMES) - {"sglang"}:
            with refuses("export.embedding: 'lm_head'|'model.embed_tokens'"):
                export(folder=folder, engine=engine, base=str(base), out=tmp_path / "out")

    def test_experts_convolutions_and_unknown_modules(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "experts", {"model.layers.0.mlp.experts.1.up_proj": (8, 6, 2)})
        export(folder=tmp_path / "experts", engine="vllm", out=tmp_path / "served")
        with refuses("export.experts"):
            export(folder=tmp_path / "experts", engine="sglang", out=tmp_path / "out")
        write_lora(tmp_path / "fused", {"model.layers.0.attn.c_attn": (8, 6, 2)})
        with refuses("export.module: 'model.layers.0.attn.c_attn', only .*up_proj"):
            export(folder=tmp_path / "fused", engine="tensorrt-llm", out=tmp_path / "out")
        factors = {"A": torch.ones(2, 3, 2, 2), "B": torch.ones(4, 2, 1, 1)}
        tensors = {f"base_model.model.conv.lora_{factor}.weight": value for factor, value in factors.items()}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
        write_raw(tmp_path / "image", config, tensors)
        with refuses("export.convolution"):
            export(folder=tmp_path / "image", engine="vllm", out=tmp_path / "out")

    def test_a_rank_that_vllm_does_not_take(self, tmp_path: Path) -> None:
        path = "model.layers.0.self_attn.q_proj"
        write_lora(tmp_path / "large", {path: (4, 3, 513)})
        with refuses("export.rank: at most rank 512.*513.*--rank 512"):
            export(folder=tmp_path / "large", engine="vllm", out=tmp_path / "out")
        export(folder=tmp_path / "large", engine="sglang", out=tmp_path / "out")

    def test_base_models_that_do_not_fit(self, encoder: Path, base: Path, tmp_path: Path) -> None:
        write_lora(tmp_path / "one", {"encoder.layer.0.attention.self.query": (32, 32, 2)}, base=None)
        for engine in ("llama.cpp", "mlx"):
            with refuses("export.no-base: --base"):
                export(folder=tmp_path / "one", engine=engine, out=tmp_path / "out")
        with refuses("export.encoder: adaptermix bake"):
            export(folder=tmp_path / "one", engine="vllm", base=str(encoder), out=tmp_path / "out")
        gpt2 = tiny_gpt2(tmp_path / "gpt2")
        write_lora(tmp_path / "two", {"transformer.h.0.attn.c_attn": (48, 16, 2)}, base=str(gpt2))
        for engine, name in (("llama.cpp", "GPT2LMHeadModel"), ("mlx", "gpt2")):
            with refuses(f"export.architecture: {name}"):
                export(folder=tmp_path / "two", engine=engine, out=tmp_path / "out")
        write_lora(tmp_path / "three", {"model.layers.0.self_attn.other": (4, 4, 2)}, base=str(base))
        with refuses("export.gguf-name: 'model.layers.0.self_attn.other'"):
            export(folder=tmp_path / "three", engine="llama.cpp", out=tmp_path / "out")
        write_lora(tmp_path / "four", {K: (32, 32, 2)}, base=str(base))
        with refuses("export.other-base: 16 output rows.*found 32"):
            export(folder=tmp_path / "four", engine="llama.cpp", out=tmp_path / "out")
        (tmp_path / "stack").mkdir()
        (tmp_path / "stack" / "stack.json").write_text("{}")
        with refuses("export.stack"):
            export(folder=tmp_path / "three", engine="vllm", base=str(tmp_path / "stack"), out=tmp_path / "out")

    def test_a_fusion(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "one", {Q: (32, 32, 2)}, fusion="add")
        with refuses("export.fusion"):
            export(folder=tmp_path / "one", engine="vllm", out=tmp_path / "out")

    def test_gguf_is_not_installed(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_adapter(tmp_path / "one")
        monkeypatch.setitem(sys.modules, "gguf", None)
        with refuses("export.no-gguf: pip install"):
            export(folder=tmp_path / "one", engine="llama.cpp", base=str(base), out=tmp_path / "out")

    def test_an_engine_that_does_not_exist_and_an_output_that_exists(self, base: Path, tmp_path: Path) -> None:
        write_adapter(tmp_path / "one")
        with refuses("option.unknown: vllm, sglang, tensorrt-llm, llama.cpp, mlx"):
            ExportSettings(folder="one", engine="ollama", out="out")
        exported(tmp_path / "one", "vllm", base)
        with refuses("output.exists"):
            exported(tmp_path / "one", "vllm", base)
        exported(tmp_path / "one", "vllm", base, overwrite=True)


class Doubled(Vllm):
    """An engine that applies twice the scale."""

    name = "doubled"

    def scale(self, settings: LoraSettings, rank: int) -> float:
        return 2 * super().scale(settings, rank)


def test_another_delta_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another package, whose rule does not give the deltas of the folder that it gets."""
    monkeypatch.setitem(ENGINES, "doubled", Doubled())
    write_adapter(tmp_path / "one")
    with refuses("export.delta: differs by 100.00%"):
        export(folder=tmp_path / "one", engine="doubled", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
