"""Every kind of adapter through `merge`, with PEFT and dense float64 weights for judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptermix.adapters import open_adapter
from adaptermix.merging import merge

from ..factories import CONFIG, WEIGHTS, load_base, logits, peft_kind, tiny_gpt2, tokens, wrap_with_peft
from ..refusals import refuses

SPREAD: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3},
    },
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]},
    "dora": {"r": 3, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "other dora": {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "bias inside": {"r": 3, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]},
    "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    "olora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]},
}


def made(base: Path, folder: Path, *kinds: str) -> list[Path]:
    return [
        peft_kind(load_base(base), folder / f"{seed}-{kind}".replace(" ", "-"), seed=seed, **SPREAD[kind])
        for seed, kind in enumerate(kinds)
    ]


def merged_by_peft(base: Path, folder: Path) -> dict[str, Tensor]:
    """Return the weights of the base after PEFT has merged one adapter into them."""
    config = json.loads((folder / CONFIG).read_text())
    # PEFT takes PiSSA's start out of no float64 weights.
    bare = load_base(base) if config["init_lora_weights"] in ("pissa", "olora") else load_base(base).double()
    if config["lora_bias"]:
        for layer in bare.modules():  # which PEFT merges a bias into only where there is one
            if isinstance(layer, nn.Linear):
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
    model = wrap_with_peft(bare, folder).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def summed(base: Path, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """Return the base in float64 plus the weighted sum of what PEFT adds to each of its tensors."""
    model = load_base(base).double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in start.items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, tensor in merged_by_peft(base, folder).items():
            if name in start:
                total[name] += weight * (tensor.double() - start[name])
            elif name.endswith(".bias"):  # a bias that only the LoRA has
                total[name] = total.get(name, torch.zeros_like(tensor)) + weight * tensor
    for name in set(total) - set(start):
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.bias = nn.Parameter(torch.zeros_like(total[name]))
    model.load_state_dict(total)
    return model.eval()


def check(model: Path, folders: Sequence[Path], weights: Sequence[float], out: Path, **settings: Any) -> Any:
    """Merge, and compare PEFT's model of the merged folder with the dense oracle."""
    report = merge(folders, weights=list(weights), out=out, **settings)
    expected = logits(summed(model, folders, weights))
    assert (expected - logits(load_base(model).double())).abs().max() > 0.01
    got = logits(wrap_with_peft(load_base(model), out)).double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    return report


@pytest.mark.parametrize(
    "kinds",
    [("patterns", "plain"), ("plain", "patterns", "patterns"), ("bias inside", "plain"), ("bias inside",) * 2],
    ids=" + ".join,
)
def test_plain_kinds_give_the_sum_of_what_peft_gives(base: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    weights = [0.7, -0.4, 0.5][: len(kinds)]
    check(base, made(base, tmp_path, *kinds), weights, tmp_path / "out")


@pytest.mark.parametrize(
    "kinds",
    [("dora", "other dora"), ("dora", "plain"), ("patterns", "dora"), ("pissa", "plain"), ("pissa", "olora")],
    ids=" + ".join,
)
def test_kinds_that_need_the_base_give_the_sum_of_what_peft_gives(
    base: Path, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    folders = made(base, tmp_path, *kinds)
    check(base, folders, [0.6, 0.3], tmp_path / "out", base=str(base))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config.get("use_dora", False) == any("dora" in kind for kind in kinds)
    assert config.get("init_lora_weights", True) is True


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora"])
@pytest.mark.parametrize("method", ["exact", "ties", "slerp"])
def test_without_the_base_they_are_refused(base: Path, tmp_path: Path, kind: str, method: str) -> None:
    folders = made(base, tmp_path, kind, "plain")
    with refuses("merge.needs-base: --base"):
        merge(folders, weights=[0.5], method=method, out=tmp_path / "out", max_residual=1.0)
    assert not (tmp_path / "out").exists()


def dense_deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    start = load_base(base).double().state_dict()
    found = {name: tensor - start[name] for name, tensor in merged_by_peft(base, folder).items() if name in start}
    return {name: delta for name, delta in found.items() if delta.abs().max() > 1e-9}


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_a_dora_in_another_method_is_the_dense_delta_that_it_is(base: Path, tmp_path: Path, method: str) -> None:
    folders = made(base, tmp_path, "dora", "other dora")
    settings: dict[str, Any] = {"weights": [0.5, 0.5], "method": method, "base": str(base)}
    settings |= {"options": {"density": 1.0, "order": "scale-first"}} if method == "ties" else {}
    merge(folders, form="dense", out=tmp_path / "full", dtype="float32", **settings)
    full, start = load_file(tmp_path / "full" / "model.safetensors"), load_base(base).state_dict()
    one, two = (dense_deltas(base, folder) for folder in folders)
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = (full[name] - start[name]).double()
    if method == "ties":
        stack = torch.stack([0.5 * one[name], 0.5 * two[name]])
        keep = torch.sign(stack) == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        expected = (stack * keep).sum(0) / (0.5 * keep.sum(0))
    else:
        lengths = [one[name].norm(), two[name].norm()]
        angle = torch.acos((one[name] * two[name]).sum() / (lengths[0] * lengths[1]))
        half = torch.sin(angle / 2) / torch.sin(angle)
        expected = half * (one[name] + two[name])
    torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-5)
    report = merge(folders, max_residual=1.0, out=tmp_path / "cut", **settings)
    cut = open_adapter(tmp_path / "cut").load(name.removesuffix(".weight")).dense().double()
    module = report.modules[name.removesuffix(".weight")]
    assert module.rank == 5
    sigma = torch.linalg.svdvals(expected)
    assert module.residual == pytest.approx(float(sigma[5:].norm() / sigma.norm()), abs=1e-4)
    assert float((cut - expected).norm() / expected.norm()) == pytest.approx(module.residual, abs=1e-4)
    assert not open_adapter(tmp_path / "cut").meta.dora


@pytest.mark.parametrize("other", ["embedding", "bias inside"])
def test_a_dora_with_what_no_dora_can_hold_becomes_a_plain_lora(base: Path, tmp_path: Path, other: str) -> None:
    """PEFT refuses lora_bias with DoRA, and would make embeddings DoRAs too; so the deltas are cut instead."""
    folders = made(base, tmp_path, "dora", other)
    settings: dict[str, Any] = {"weights": [0.8, 0.5], "base": str(base), "out": tmp_path / "out"}
    report = merge(folders, rank=32, **settings)
    assert report.residual < 1e-5
    expected = logits(summed(base, folders, (0.8, 0.5)))
    got = logits(wrap_with_peft(load_base(base), tmp_path / "out")).double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_biases_inside_in_a_method_that_is_no_sum(base: Path, tmp_path: Path) -> None:
    """TIES of whole density elects signs among the biases as among the weights."""
    folders = made(base, tmp_path, "bias inside", "bias inside")
    options = {"density": 1.0, "order": "scale-first", "normalize": False}
    merge(folders, weights=[0.6, 0.5], method="ties", options=options, max_residual=1.0, out=tmp_path / "out")
    one, two, got = (open_adapter(folder) for folder in (*folders, tmp_path / "out"))
    module = "model.layers.2.self_attn.o_proj"
    stack = torch.stack([0.6 * one.bias(module), 0.5 * two.bias(module)])  # type: ignore[operator]
    keep = torch.sign(stack) == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    torch.testing.assert_close(got.bias(module), (stack * keep).sum(0), rtol=1e-5, atol=1e-6)
    with refuses("statistics.unused"):
        merge(folders, weights=[0.6], method="slerp", statistics=[tmp_path / "x"])


def test_embeddings(base: Path, tmp_path: Path) -> None:
    check(base, made(base, tmp_path, "embedding", "embedding"), [0.7, 0.4], tmp_path / "out", saved="average")


def test_trained_tokens_of_one_adapter_are_taken(base: Path, tmp_path: Path) -> None:
    rows = peft_kind(
        load_base(base), tmp_path / "rows", seed=1, r=2, target_modules=["q_proj"], trainable_token_indices=[5, 3]
    )
    (plain,) = made(base, tmp_path, "plain")
    merge([rows, plain], weights=[1.0, 0.5], out=tmp_path / "out")
    model = load_base(base)
    with torch.no_grad():
        for folder, weight in ((rows, 1.0), (plain, 0.5)):
            for name, layer in wrap_with_peft(load_base(base), folder).base_model.model.named_modules():
                if hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A"):
                    model.get_submodule(name).weight += weight * layer.get_delta_weight("default")
        table = wrap_with_peft(load_base(base), rows).base_model.model.model.embed_tokens
        model.model.embed_tokens.weight[[5, 3]] = table(torch.tensor([5, 3]))
    got = logits(wrap_with_peft(load_base(base), tmp_path / "out"))
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


class TestTransposed:
    """GPT-2's Conv1D."""

    @pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
    def test_wide_tall_and_square_weights(self, gpt2: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
        targets = ["c_attn", "attn.c_proj", "mlp.c_proj"]
        folders = [
            peft_kind(
                load_base(gpt2), tmp_path / name, seed=seed, r=3, target_modules=targets, fan_in_fan_out=True, **own
            )
            for seed, (name, own) in enumerate([("a", kind), ("b", {})])
        ]
        check(gpt2, folders, [0.7, 0.3], tmp_path / "out", base=str(gpt2))
        assert open_adapter(tmp_path / "out").meta.fan_in_fan_out


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(2, 4, (3, 2))
        self.head = nn.Linear(4, 3)

    def forward(self) -> Tensor:
        noise = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
        return self.head(self.plane(noise).mean(dim=(2, 3)))


def picture() -> Picture:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Picture().eval()


@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"method": "ties", "options": {"density": 1.0}, "rank": 4}])
def test_convolutions(tmp_path: Path, settings: dict[str, Any]) -> None:
    folders = [
        peft_kind(
            picture(), tmp_path / n, seed=s, r=2 + s, lora_alpha=5, target_modules=["plane", "head"], task_type=None
        )
        for s, n in enumerate("ab")
    ]
    report = merge(folders, weights=[0.6, 0.5], out=tmp_path / "out", **settings)
    oracle = picture()
    with torch.no_grad():
        for name in ("plane", "head"):
            parts = [
                wrap_with_peft(picture(), folder).base_model.model.get_submodule(name).get_delta_weight("default")
                for folder in folders
            ]
            stack = torch.stack([0.6 * parts[0], 0.5 * parts[1]])
            delta = stack.sum(0)
            if settings.get("method") == "ties":
                keep = torch.sign(torch.stack(parts)) == torch.where(sum(parts) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
                delta = (stack * keep).sum(0) / keep.sum(0)
            oracle.get_submodule(name).weight += delta
        assert report.residual < 1e-5
        got = wrap_with_peft(picture(), tmp_path / "out")()
        torch.testing.assert_close(got, oracle(), rtol=1e-4, atol=1e-4)
        assert (got - picture()()).abs().max() > 0.01


class TestHeads:
    """A sequence classifier with a trained head."""

    @staticmethod
    def bert() -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BertForSequenceClassification(BertConfig(vocab_size=101, **sizes)).eval()

    def adapters(self, folder: Path, *heads: bool) -> list[Path]:
        kind: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"]}
        return [
            peft_kind(self.bert(), folder / f"h{n}", seed=n, task_type="SEQ_CLS" if head else None, **kind)
            for n, head in enumerate(heads)
        ]

    def expected(self, folders: list[Path], weights: list[float], head: Callable[[list[Tensor]], Tensor]) -> Tensor:
        model = self.bert()
        with torch.no_grad():
            for folder, weight in zip(folders, weights, strict=True):
                for name, layer in wrap_with_peft(self.bert(), folder).base_model.model.named_modules():
                    if hasattr(layer, "get_delta_weight"):
                        model.get_submodule(name).weight += weight * layer.get_delta_weight("default")
            files = [load_file(folder / WEIGHTS) for folder in folders]
            for part in ("weight", "bias"):
                own = [file[f"base_model.model.classifier.{part}"] for file in files
                       if f"base_model.model.classifier.{part}" in file]  # fmt: skip
                getattr(model.classifier, part).copy_(head(own))
            found: Tensor = model(input_ids=tokens()).logits
            return found

    def got(self, out: Path) -> Tensor:
        with torch.no_grad():
            found: Tensor = wrap_with_peft(self.bert(), out)(input_ids=tokens()).logits
            return found

    @pytest.mark.parametrize("heads", [(True, False), (False, True)])
    def test_the_head_of_the_one_that_has_it_is_taken(self, tmp_path: Path, heads: tuple[bool, bool]) -> None:
        folders = self.adapters(tmp_path, *heads)
        merge(folders, weights=[0.25, 0.75], out=tmp_path / "out")
        expected = self.expected(folders, [0.25, 0.75], lambda own: own[0])
        torch.testing.assert_close(self.got(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("saved", "shares"), [("average", (0.25, 0.75)), ("h0", (1, 0)), ("2", (0, 1)), ("refuse", None)]
    )
    def test_two_that_differ_need_a_choice(
        self, tmp_path: Path, saved: str, shares: tuple[float, float] | None
    ) -> None:
        folders = self.adapters(tmp_path, True, True)
        settings: dict[str, Any] = {"weights": [0.25, 0.75], "saved": saved, "out": tmp_path / "out"}
        if shares is None:
            with refuses("saved.differ: classifier"):
                merge(folders, **settings)
            assert not (tmp_path / "out").exists()
            return
        merge(folders, **settings)

        def head(own: list[Tensor]) -> Tensor:
            found: Tensor = shares[0] * own[0] + shares[1] * own[1]
            return found

        expected = self.expected(folders, [0.25, 0.75], head)
        torch.testing.assert_close(self.got(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


def test_pickles_are_read_where_allowed(base: Path, tmp_path: Path) -> None:
    folders = made(base, tmp_path, "plain", "patterns")
    merge(folders, weights=[0.7, 0.3], out=tmp_path / "safe")
    tensors: Mapping[str, Tensor] = load_file(folders[1] / WEIGHTS)
    torch.save(dict(tensors), folders[1] / "adapter_model.bin")
    (folders[1] / WEIGHTS).unlink()
    merge(folders, weights=[0.7, 0.3], allow_pickle=True, out=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "safe" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "out" / "adaptermix.json").read_text())["plan"]["allow_pickle"] is True
