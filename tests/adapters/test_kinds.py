"""Every kind of adapter that PEFT makes: read, written back, and merged, with PEFT itself for the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptermix.adapters import LINEAR, AdapterModule, AdapterSource, AdapterState, Layout, open_adapter, write_adapter
from adaptermix.algebra import LowRank

from ..factories import CONFIG, load_base, logits, peft_kind, tiny_gpt2, tokens, wrap_with_peft
from ..refusals import refuses


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


class Convolutions(nn.Module):
    """One convolution of each dimension, kernel 1 among them, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3)
        self.point = nn.Conv1d(4, 5, 1)
        self.plane = nn.Conv2d(2, 4, (3, 2))
        self.block = nn.Conv3d(2, 3, 2)
        self.head = nn.Linear(6, 2)

    def forward(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        pieces = [
            self.point(self.line(noise(2, 3, 9))),
            self.plane(noise(2, 2, 5, 5)),
            self.block(noise(2, 2, 3, 3, 3)),
        ]
        return torch.cat([piece.flatten() for piece in [*pieces, self.head(noise(2, 6))]])


def convolutions() -> Convolutions:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutions().eval()


def combine(sources: Sequence[AdapterSource], weights: Sequence[float]) -> AdapterState:
    """The weighted sum by concatenation, written here once more: nothing of compose is used."""
    updates: dict[str, LowRank] = {}
    biases: dict[str, Tensor] = {}
    for source, weight in zip(sources, weights, strict=True):
        for module in source.modules:
            own = source.load(module)
            old = updates.get(module)
            a, b = weight * own.scale * own.a, own.b
            updates[module] = LowRank(
                a=a if old is None else torch.cat([old.a, a]), b=b if old is None else torch.cat([old.b, b], dim=1)
            )
            bias = source.bias(module)
            if bias is not None:
                biases[module] = biases.get(module, 0) + weight * bias
    modules = {
        path: AdapterModule(update=update, bias=biases.get(path), layout=sources[0].modules[path].layout)
        for path, update in updates.items()
    }
    return AdapterState(meta=sources[0].meta, modules=modules)


LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6},
    "bias-inside": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "lora_alpha": 6},
    "rslora-bias": {"target_modules": ["v_proj"], "lora_bias": True, "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "lora_alpha": 6},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "lora_alpha": 3},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 8]},
    "tokens-by-name": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [4]},
    },
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
}
PLAIN_GPT2: dict[str, dict[str, Any]] = {
    "transposed": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 6},
    "transposed-dora": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    "biases-of-the-base": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "biases-of-its-modules": {"target_modules": ["c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    "table": {"target_modules": ["wte", "wpe"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", [*LLAMA, *PLAIN_GPT2])
def test_what_peft_saved_is_read_and_written_back_as_the_same_model(
    tmp_path: Path, base: Path, gpt2: Path, kind: str
) -> None:
    model, settings = (base, LLAMA[kind]) if kind in LLAMA else (gpt2, PLAIN_GPT2[kind])
    peft_kind(load_base(model), tmp_path / "a", r=4, **settings)
    (tmp_path / "b").mkdir()
    source = open_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b", source.read())
    expected = logits(wrap_with_peft(load_base(model), tmp_path / "a"))
    assert (expected - logits(load_base(model))).abs().max() > 0.01
    torch.testing.assert_close(logits(wrap_with_peft(load_base(model), tmp_path / "b")), expected, rtol=1e-4, atol=1e-4)
    again = open_adapter(tmp_path / "b")
    assert again.meta == replace(source.meta, targets=again.meta.targets)
    assert set(again.meta.targets.modules) == set(source.meta.targets.modules)
    assert list(again.saved_headers) == list(source.saved_headers)


def test_what_an_adapter_holds_is_known_from_its_headers(tmp_path: Path, base: Path) -> None:
    peft_kind(load_base(base), tmp_path / "a", r=4, **LLAMA["dora"])
    peft_kind(load_base(base), tmp_path / "b", r=4, **LLAMA["bias-inside"])
    peft_kind(load_base(base), tmp_path / "c", r=4, **LLAMA["embedding"])
    dora, biased, table = (open_adapter(tmp_path / name) for name in "abc")
    assert dora.meta.dora
    assert all(header.magnitude and not header.bias for header in dora.modules.values())
    assert all(header.bias and not header.magnitude for header in biased.modules.values())
    assert [path for path, header in table.modules.items() if header.layout != LINEAR] == ["model.embed_tokens"]
    assert table.modules["model.embed_tokens"].layout == Layout(kind="embedding")
    header = table.modules["model.embed_tokens"]
    assert (header.out, header.into, header.rank) == (32, 101, 4)
    assert list(table.saved_headers) == ["base_model.model.model.embed_tokens.base_layer.weight"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", ()),
        ("bias-inside", ("biases",)),
        ("dora", ("DoRA magnitudes",)),
        ("embedding", ("fully trained tensors", "embeddings")),
        ("tokens", ("fully trained tensors",)),
    ],
)
def test_what_lies_beyond_linear_updates_is_named(
    tmp_path: Path, base: Path, kind: str, words: tuple[str, ...]
) -> None:
    source = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=4, **LLAMA[kind]))
    assert source.beyond_linear == source.read().beyond_linear
    assert tuple(name.split(" (")[0] for name in source.beyond_linear) == words


def test_a_bias_inside_the_lora_is_scaled(tmp_path: Path, base: Path) -> None:
    """PEFT gives scale * lora_B(lora_A(x)), bias and all: at x = 0 only scale * bias is left."""
    peft_kind(load_base(base), tmp_path / "a", r=4, **LLAMA["bias-inside"])
    source = open_adapter(tmp_path / "a")
    model = wrap_with_peft(load_base(base), tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    with torch.no_grad():
        output = layer(torch.zeros(1, 32))[0]
    torch.testing.assert_close(source.bias(name), output)
    assert source.modules[name].scale == 1.5
    assert source.bias("model.layers.1.mlp.down_proj") is not None


def test_embedding_factors_are_the_transpose_of_peft_s_delta(tmp_path: Path, base: Path) -> None:
    peft_kind(load_base(base), tmp_path / "a", r=4, **LLAMA["embedding"])
    layer = wrap_with_peft(load_base(base), tmp_path / "a").base_model.model.model.embed_tokens
    update = open_adapter(tmp_path / "a").load("model.embed_tokens")
    torch.testing.assert_close(update.dense().T, layer.get_delta_weight("default").detach())


def test_convolution_factors_are_peft_s_delta_with_the_kernel_flattened(tmp_path: Path) -> None:
    targets = ["line", "point", "plane", "block", "head"]
    peft_kind(convolutions(), tmp_path / "a", r=2, lora_alpha=6, target_modules=targets, lora_bias=True, task_type=None)
    source = open_adapter(tmp_path / "a")
    model = wrap_with_peft(convolutions(), tmp_path / "a")
    for name in targets:
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        torch.testing.assert_close(source.load(name).dense(), delta.flatten(1), rtol=1e-5, atol=1e-5)
    assert {path: header.layout for path, header in source.modules.items()} == {
        "head": LINEAR,
        "line": Layout(kind="convolution", kernel=(3,)),
        "point": Layout(kind="convolution", kernel=(1,)),
        "plane": Layout(kind="convolution", kernel=(3, 2)),
        "block": Layout(kind="convolution", kernel=(2, 2, 2)),
    }


def test_merged_convolutions_give_the_sum_of_the_deltas(tmp_path: Path) -> None:
    targets, weights = ["line", "point", "plane", "block", "head"], (0.7, -0.4)
    folders = [
        peft_kind(
            convolutions(),
            tmp_path / f"a{seed}",
            r=2 + seed,
            seed=seed,
            target_modules=targets,
            lora_bias=True,
            task_type=None,
        )
        for seed in (0, 1)
    ]
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", combine([open_adapter(folder) for folder in folders], weights))
    with torch.no_grad():
        oracle = convolutions()
        for folder, weight in zip(folders, weights, strict=True):
            layers = wrap_with_peft(convolutions(), folder).base_model.model
            for name in targets:
                layer, own = layers.get_submodule(name), oracle.get_submodule(name)
                own.weight += weight * layer.get_delta_weight("default")
                own.bias += weight * layer.scaling["default"] * layer.lora_B["default"].bias
        torch.testing.assert_close(wrap_with_peft(convolutions(), tmp_path / "out")(), oracle(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte", "c_fc"]])
def test_merged_gpt2_adapters_give_the_sum_of_the_deltas(tmp_path: Path, gpt2: Path, targets: list[str]) -> None:
    weights = (0.6, 0.5)
    folders = [
        peft_kind(load_base(gpt2), tmp_path / f"a{n}", r=3, seed=n, target_modules=targets, fan_in_fan_out=True)
        for n in (0, 1)
    ]
    sources = [open_adapter(folder) for folder in folders]
    assert all(source.meta.fan_in_fan_out for source in sources)
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", combine(sources, weights))
    oracle = load_base(gpt2)
    # GPT-2's head is its table, which an adapter on the table does not touch.
    oracle.lm_head.weight = nn.Parameter(oracle.lm_head.weight.detach().clone())
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            for name, layer in wrap_with_peft(load_base(gpt2), folder).base_model.model.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    oracle.get_submodule(name).weight += weight * layer.get_delta_weight("default")
    merged = logits(wrap_with_peft(load_base(gpt2), tmp_path / "out"))
    torch.testing.assert_close(merged, logits(oracle), rtol=1e-4, atol=1e-4)


def test_trained_tokens_are_rows_that_replace_those_of_the_base(tmp_path: Path, base: Path) -> None:
    peft_kind(load_base(base), tmp_path / "a", r=2, **LLAMA["tokens"])
    source = open_adapter(tmp_path / "a")
    assert source.meta.trainable_tokens == {"": (5, 3, 8)}
    (key,) = source.saved_headers
    rows = source.load_saved(key)
    model = wrap_with_peft(load_base(base), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(model.base_model.model.model.embed_tokens(torch.tensor([5, 3, 8])), rows)
        table = load_base(base).model.embed_tokens.weight
    assert (rows - table[[5, 3, 8]]).norm() < (rows + table[[5, 3, 8]]).norm()  # rows, no differences


def test_a_head_that_peft_adds_for_its_task_is_kept(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def bert() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        return BertForSequenceClassification(BertConfig(vocab_size=101, **sizes)).eval()

    for bias in ("none", "all", "lora_only"):
        folder = peft_kind(bert(), tmp_path / bias, r=2, task_type="SEQ_CLS", target_modules=["query"], bias=bias)
        config = json.loads((folder / CONFIG).read_text())
        assert open_adapter(folder).meta.saved_modules == ("classifier", "score")
        (folder / CONFIG).write_text(json.dumps(config | {"modules_to_save": None}))  # as older releases wrote it
        state = open_adapter(folder).read()
        assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(state.saved)
        (tmp_path / f"{bias}-again").mkdir()
        write_adapter(tmp_path / f"{bias}-again", state)
        with torch.no_grad():
            one, two = (
                wrap_with_peft(bert(), path)(input_ids=tokens()).logits for path in (folder, tmp_path / f"{bias}-again")
            )
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary_is_kept(tmp_path: Path, base: Path) -> None:
    def resized() -> Any:
        model = load_base(base)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.resize_token_embeddings(107, mean_resizing=False)
        return model

    peft_kind(resized(), tmp_path / "a", r=2, target_modules=["q_proj"])
    state = open_adapter(tmp_path / "a").read()
    assert {key.split(".")[-2]: tuple(tensor.shape) for key, tensor in state.saved.items()} == {
        "embed_tokens": (107, 32),
        "lm_head": (107, 32),
    }


class TestRefusals:
    """Kinds that cannot be had right."""

    def test_grouped_convolutions(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
        peft_kind(model, tmp_path / "a", r=2, target_modules=["0"], task_type=None)
        with refuses("adapter-file.grouped-convolution"):
            open_adapter(tmp_path / "a")

    @pytest.mark.parametrize(
        ("target", "what"),
        [("wte", "adapter-file.dora-kind: embedding"), ("plane", "adapter-file.dora-kind: convolution")],
    )
    def test_dora_beyond_linear_modules(self, tmp_path: Path, gpt2: Path, target: str, what: str) -> None:
        model = load_base(gpt2) if target == "wte" else convolutions()
        peft_kind(model, tmp_path / "a", r=2, target_modules=[target], use_dora=True, task_type=None)
        with refuses(what):
            open_adapter(tmp_path / "a")

    def test_a_dora_without_all_its_magnitudes_is_not_written(self, tmp_path: Path, base: Path) -> None:
        state = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=2, **LLAMA["dora"])).read()
        some = list(state.modules)[1:]
        with refuses("write.no-magnitude"):
            write_adapter(tmp_path, _with(state, some))

    def test_a_dora_without_magnitudes_is_not_written(self, tmp_path: Path, base: Path) -> None:
        state = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=2, **LLAMA["dora"])).read()
        with refuses("write.magnitudes: 0"):
            write_adapter(tmp_path, _with(state, []))

    def test_factors_that_are_not_the_delta_are_not_written(self, tmp_path: Path, base: Path) -> None:
        settings = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
        state = open_adapter(peft_kind(load_base(base), tmp_path / "a", r=2, **settings)).read()
        assert state.meta.initial == "pissa"
        with refuses("write.unconverted-factors"):
            write_adapter(tmp_path, state)


def _with(state: AdapterState, magnitudes: list[str]) -> AdapterState:
    return replace(
        state,
        modules={p: m if p in magnitudes else replace(m, magnitude=None) for p, m in state.modules.items()},
    )


def test_biases_of_some_modules_are_filled_with_zeros(tmp_path: Path, base: Path) -> None:
    peft_kind(load_base(base), tmp_path / "a", r=2, **LLAMA["bias-inside"])
    state = open_adapter(tmp_path / "a").read()
    first = min(state.modules)
    bias = state.modules[first].bias
    assert bias is not None
    (tmp_path / "b").mkdir()
    bare = {path: replace(module, bias=bias if path == first else None) for path, module in state.modules.items()}
    write_adapter(tmp_path / "b", replace(state, modules=bare))
    back = open_adapter(tmp_path / "b")
    assert all(header.bias for header in back.modules.values())
    torch.testing.assert_close(back.bias(first), bias)
    assert not torch.cat([back.bias(module) for module in back.modules if module != first]).any()
    wrap_with_peft(load_base(base), tmp_path / "b")
