"""A merge on a real, tiny model: the merged folder, the attached adapters and PEFT's own sum agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptermix.adapters import AdapterMeta, AdapterState, TargetSpec, open_adapter
from adaptermix.algebra import LowRank
from adaptermix.merging import merge
from adaptermix.merging.attach import Attachment

from ..factories import contents, load_base, load_with_peft, logits, peft_lora, peft_noise, tokens
from ..refusals import refuses


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two plain LoRAs of other rank and alpha on the same modules."""
    folder = tmp_path_factory.mktemp("plain")
    targets = ["q_proj", "v_proj"]
    return [
        peft_lora(base, folder / "task", seed=1, r=4, lora_alpha=8, target_modules=targets),
        peft_lora(base, folder / "align", seed=2, r=2, lora_alpha=6, target_modules=targets),
    ]


@pytest.fixture(scope="module")
def mixed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A task LoRA everywhere and an alignment rsLoRA on the MLP and attention of the middle layers."""
    folder = tmp_path_factory.mktemp("mixed")
    return [
        peft_lora(
            base,
            folder / "task",
            seed=3,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"o_proj": 2},
            alpha_pattern={r"layers\.3\.self_attn\.q_proj": 2},
        ),
        peft_lora(
            base,
            folder / "align",
            seed=4,
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "gate_proj", "down_proj"],
            layers_to_transform=[1, 2],
        ),
    ]


def states(paths: list[Path]) -> list[AdapterState]:
    return [open_adapter(path).read() for path in paths]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["plain", "mixed"])
@pytest.mark.parametrize("weights", [[0.9, 0.1], [1.0, -0.5]])
def test_the_merged_folder_loads_with_peft_alone_and_equals_the_attached_adapters(
    request: pytest.FixtureRequest, base: Path, tmp_path: Path, kind: str, weights: list[float]
) -> None:
    paths = request.getfixturevalue(kind)
    merge(paths, weights=weights, out=tmp_path / "out")
    merged = logits(load_with_peft(base, tmp_path / "out"))  # a warning about missing keys would be an error
    model = load_base(base)
    untouched = logits(model)
    with Attachment(model, states(paths), weights):
        close(logits(model), merged)
        assert (logits(model) - untouched).abs().max() > 0.05


def test_peft_finds_every_module_of_the_merged_folder_and_no_other(
    base: Path, tmp_path: Path, mixed: list[Path]
) -> None:
    merge(mixed, weights=[0.9], out=tmp_path / "out")
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in load_with_peft(base, tmp_path / "out").named_modules()
        if hasattr(module, "get_delta_weight")
    }
    expected = open_adapter(tmp_path / "out").modules
    assert found == {module: (header.rank, 1.0) for module, header in expected.items()}


def test_a_merged_folder_cut_to_a_rank_loads_with_peft(base: Path, tmp_path: Path, mixed: list[Path]) -> None:
    merge(mixed, weights=[0.9], rank=3, max_residual=1.0, out=tmp_path / "out", dtype="bfloat16")
    model = load_base(base)
    with Attachment(model, [open_adapter(tmp_path / "out").read()]):
        attached = logits(model)
    close(logits(load_with_peft(base, tmp_path / "out")), attached)


def test_it_equals_pefts_own_concatenation(base: Path, tmp_path: Path, plain: list[Path]) -> None:
    merge(plain, weights=[0.7, 0.3], out=tmp_path / "out")
    ours = load_with_peft(base, tmp_path / "out")
    theirs = load_with_peft(base, plain[0], adapter_name="task")
    with peft_noise():
        theirs.load_adapter(plain[1], "align")
        theirs.add_weighted_adapter(["task", "align"], [0.7, 0.3], "merged", combination_type="cat")
    theirs.set_adapter("merged")
    close(logits(ours), logits(theirs))
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if hasattr(module, "get_delta_weight"):
            close(module.get_delta_weight("default"), modules[name].get_delta_weight("merged"), 1e-6)


class TestAttachment:
    def test_one_adapter_equals_peft(self, base: Path, mixed: list[Path]) -> None:
        for path in mixed:
            model = load_base(base)
            with Attachment(model, states([path])):
                close(logits(model), logits(load_with_peft(base, path)))

    def test_weights_can_be_set_again_and_again(self, base: Path, mixed: list[Path], tmp_path: Path) -> None:
        model = load_base(base)
        untouched = logits(model)
        with Attachment(model, states(mixed)) as attached:
            for index, weights in enumerate([[0.5, 0.5], [2.0, 0.0], [-1.0, 0.25]]):
                attached.set_weights(weights)
                merge(mixed, weights=weights, out=tmp_path / str(index))
                close(logits(model), logits(load_with_peft(base, tmp_path / str(index))))
            attached.set_weights([0.0, 0.0])
            assert torch.equal(logits(model), untouched)

    def test_weights_are_one_each_by_default(self, base: Path, plain: list[Path]) -> None:
        model = load_base(base)
        with Attachment(model, states(plain)):
            by_default = logits(model)
        with Attachment(model, states(plain), [1.0, 1.0]):
            assert torch.equal(logits(model), by_default)

    def test_detaching_restores_the_model(self, base: Path, mixed: list[Path]) -> None:
        model = load_base(base)
        untouched = logits(model)
        before = {name: (p._version, p.clone()) for name, p in model.named_parameters()}
        attached = Attachment(model, states(mixed))
        assert not torch.equal(logits(model), untouched)
        attached.detach()
        attached.detach()
        assert torch.equal(logits(model), untouched)
        assert not hooks(model)
        for name, parameter in model.named_parameters():
            assert parameter._version == before[name][0]
            assert torch.equal(parameter, before[name][1])
            assert parameter.grad is None

    def test_an_error_in_the_block_detaches(self, base: Path, plain: list[Path]) -> None:
        model = load_base(base)
        with pytest.raises(KeyError), Attachment(model, states(plain)):
            raise KeyError
        assert not hooks(model)

    @pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
    def test_a_count_of_weights_that_does_not_match_is_refused_and_nothing_stays_attached(
        self, base: Path, plain: list[Path], weights: list[float]
    ) -> None:
        model = load_base(base)
        words = f"one weight per adapter is needed, got {len(weights)} for 2"
        with pytest.raises(ValueError, match=words):
            Attachment(model, states(plain), weights)
        assert not hooks(model)
        with Attachment(model, states(plain), [0.5, 0.5]) as attached:
            before = logits(model)
            with pytest.raises(ValueError, match=words):
                attached.set_weights(weights)
            assert torch.equal(logits(model), before)

    @pytest.mark.parametrize(
        ("module", "shape", "words"),
        [
            ("model.layers.9.self_attn.q_proj", (32, 32), r"base.no-module: model\.layers\.9\.self_attn\.q_proj"),
            ("model.layers.0.self_attn", (32, 32), "base.no-module"),
            ("model.layers.0.self_attn.v_proj", (32, 32), r"base.update-shape: \[32, 32\].*16.*32"),
        ],
    )
    def test_an_adapter_of_another_base_is_refused_and_nothing_stays_attached(
        self, base: Path, plain: list[Path], module: str, shape: tuple[int, int], words: str
    ) -> None:
        model = load_base(base)
        wrong = LowRank(b=torch.ones(shape[0], 1), a=torch.ones(1, shape[1]))
        other = AdapterState.of_updates(AdapterMeta(base=None, targets=TargetSpec(modules=("x",))), {module: wrong})
        with refuses(words):
            Attachment(model, [*states(plain), other])
        assert not hooks(model)

    def test_a_base_in_bfloat16_is_served_in_bfloat16(self, base: Path, plain: list[Path]) -> None:
        model, exact = load_base(base).to(torch.bfloat16), load_base(base)
        with Attachment(model, states(plain), [0.9, 0.1]), Attachment(exact, states(plain), [0.9, 0.1]):
            got = logits(model)
            assert got.dtype == torch.bfloat16
            expected = logits(exact)
            assert (got.float() - expected).norm() <= 0.05 * expected.norm()

    def test_gradients_flow_through_to_the_inputs_and_not_to_the_factors(self) -> None:
        layer = nn.Sequential(nn.Linear(3, 2, bias=False))
        update = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 3), scale=2.0)
        state = AdapterState.of_updates(AdapterMeta(base=None, targets=TargetSpec(modules=("0",))), {"0": update})
        inputs = torch.ones(1, 3, requires_grad=True)
        with Attachment(layer, [state], [0.5]):
            layer(inputs).sum().backward()
        expected = (layer[0].weight + update.dense() * 0.5).sum(0, keepdim=True)
        close(inputs.grad, expected.detach(), 1e-6)

    def test_adapters_are_untouched(self, base: Path, plain: list[Path]) -> None:
        loaded = states(plain)
        before = [(u.a._version, u.a.clone()) for state in loaded for u in state.updates.values()]
        model = load_base(base)
        with Attachment(model, loaded) as attached:
            attached.set_weights([0.3, 0.7])
            model(input_ids=tokens())
        after = [u.a for state in loaded for u in state.updates.values()]
        for tensor, (version, copy) in zip(after, before, strict=True):
            assert tensor._version == version
            assert torch.equal(tensor, copy)


def hooks(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def test_the_base_folder_is_as_it_was(base: Path, plain: list[Path], mixed: list[Path], tmp_path: Path) -> None:
    before = contents(base)
    merge(mixed, weights=[0.9], out=tmp_path / "out")
    logits(load_with_peft(base, tmp_path / "out"))
    assert contents(base) == before
