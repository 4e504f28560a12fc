"""The bridge to mergekit: which inputs its methods get, what is refused, and mergekit itself as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import merge
from adaptermix.algebra import Dense, LowRank, Stack
from adaptermix.methods.base import build
from adaptermix.methods.mergekit import mergekit_methods
from adaptermix.testing import MergeMethodLaws
from adaptermix.testing.stacks import generic

from ..factories import WEIGHTS, adapter_deltas, key, write_lora
from ..refusals import refuses

mergekit = pytest.importorskip("mergekit.merge_methods")

MEMBERS = sorted(mergekit_methods())
WEIGHTED = ("linear", "multislerp", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear")
UNWEIGHTED = ("karcher", "model_stock", "nearswap", "ram", "ramplus_tl", "sce")
PAIRS = ("slerp", "nuslerp", "nearswap")


def stack_of(k: int, weights: Sequence[float], shape: tuple[int, int] = (10, 8), **more: Any) -> Stack:
    return replace(generic(shape, [3] * k, list(weights), seed=4), seed=0, **more)


def options_of(member: str) -> dict[str, Any]:
    return {"t": 0.3} if member == "nearswap" else {}


def by_mergekit(member: str, tensors: Sequence[Tensor], *, base: bool, **parameters: Any) -> Tensor:
    """Run mergekit alone, on the deltas with zeros as the base model where there is to be one."""
    from mergekit.merge_methods.api import merge_tensors

    tensors = [torch.zeros_like(tensors[0]), *tensors] if base else tensors
    return merge_tensors(list(tensors), member, parameters=parameters, base_index=0 if base else None)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("member", PAIRS)
def test_methods_of_two_adapters_refuse_any_other_number(member: str, count: int) -> None:
    """mergekit accepts a base and two models for nuslerp: three adapters made the first one the base model."""
    stack = stack_of(count, [1 / count * 0.9] * count)
    with pytest.raises(ValueError, match=rf"it merges exactly 2 adapters, got {count}"):
        build(f"mergekit:{member}", options_of(member))(stack)


@pytest.mark.parametrize("member", [name for name in MEMBERS if name not in (*PAIRS, "passthrough")])
def test_no_adapter_becomes_the_base_model(member: str) -> None:
    """Every adapter has a say: a base model's delta from itself would have none."""
    stack = stack_of(3, [1 / 3] * 3)
    method = build(f"mergekit:{member}", options_of(member))
    whole = method(stack).dense()
    for place, update in enumerate(stack.updates):
        others = tuple(u * 1.5 if i == place else u for i, u in enumerate(stack.updates))
        assert float((method(replace(stack, updates=others)).dense() - whole).norm()) > 1e-3 * float(
            update.dense().norm()
        )


def test_arcee_fusion_is_refused_since_deltas_are_not_weights() -> None:
    with refuses("mergekit.unsupported: arcee_fusion.*compares the softmax of whole weights"):
        build("mergekit:arcee_fusion", {})
    assert "arcee_fusion" not in MEMBERS


@pytest.mark.parametrize("member", [name for name in (*WEIGHTED, "nuslerp", "della") if "dare" not in name])
def test_weighted_methods_are_mergekit_on_the_deltas(member: str) -> None:
    weights = [0.6, 0.3] if member == "nuslerp" else [0.6, 0.3, -0.2]
    stack = stack_of(len(weights), weights)
    deltas = [update.dense() for update in stack.updates]
    base = member not in ("linear", "multislerp", "nuslerp")
    expected = by_mergekit(member, deltas, base=base, weight=weights)
    torch.testing.assert_close(build(f"mergekit:{member}", {})(stack).dense(), expected)


@pytest.mark.parametrize("member", ["karcher", "model_stock", "ram", "ramplus_tl", "sce"])
def test_methods_without_weights_are_mergekit_on_the_deltas(member: str) -> None:
    stack = stack_of(3, [1 / 3] * 3)
    expected = by_mergekit(member, [update.dense() for update in stack.updates], base=member != "karcher")
    torch.testing.assert_close(build(f"mergekit:{member}", {})(stack).dense(), expected)


@pytest.mark.parametrize("weights", [[3.0, 3.0], [1.0, 1.0], [0.6, 0.4], [0.25, 0.25], [0.5, -0.5]])
@pytest.mark.parametrize("member", UNWEIGHTED)
def test_weights_that_a_method_would_ignore_are_refused(member: str, weights: list[float]) -> None:
    with refuses(r"mergekit.equal-weights: 0\.5, 0\.5"):
        build(f"mergekit:{member}", options_of(member))(stack_of(2, weights))


def test_weights_as_people_round_them_are_taken() -> None:
    one, other = (build("mergekit:karcher", {})(stack_of(3, [w] * 3)).dense() for w in (0.33, 1 / 3))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("weight", [0.25, -1.0, 1.0])
def test_passthrough_gives_the_adapter_times_its_weight(weight: float) -> None:
    stack = stack_of(1, [weight])
    torch.testing.assert_close(build("mergekit:passthrough", {})(stack).dense(), weight * stack.updates[0].dense())


def test_passthrough_with_a_scale_that_contradicts_the_weight_is_refused() -> None:
    stack = stack_of(1, [1.0])
    method = build("mergekit:passthrough", {"scale": 0.5})
    torch.testing.assert_close(method(stack).dense(), 0.5 * stack.updates[0].dense())
    with refuses(r"mergekit.scale: 0\.25.*0\.5"):
        method(stack.weighted([0.25]))
    with refuses("mergekit.adapter-count: exactly 1.*2"):
        method(stack_of(2, [0.5, 0.5]))


@pytest.mark.parametrize(("member", "option"), [("linear", "normalize"), ("multislerp", "normalize_weights")])
def test_weights_that_cancel_are_named_as_the_cause(member: str, option: str) -> None:
    stack = stack_of(2, [1.0, -1.0])
    with pytest.raises(ValueError, match=f"divides by the sum of the weights, which must not be 0.*{option}=false"):
        build(f"mergekit:{member}", {})(stack)
    assert torch.isfinite(build(f"mergekit:{member}", {option: False})(stack).dense()).all()


@pytest.mark.parametrize("member", ["della", "della_linear"])
def test_vectors_are_vectors_to_mergekit(member: str) -> None:
    """As columns they have rows of one entry, whose ranks mergekit divides 0 by 0 for."""
    deltas = [torch.randn(32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    columns = [Dense(w=delta[:, None]) for delta in deltas]
    stack = replace(Stack.of(columns, [0.5, 0.5], seed=0), tensor_shape=(32,))
    method = build(f"mergekit:{member}", {"density": 0.5, "epsilon": 0.4})
    found = method(stack).dense()
    assert found.shape == (32, 1)
    kept = [0, 0]
    for seed in range(200):
        merged = method(replace(stack, seed=seed, updates=(columns[0],), names=("0",), weights=(1.0,))).dense()[:, 0]
        order = deltas[0].abs().argsort()
        kept[0] += int((merged[order[:16]] != 0).sum())
        kept[1] += int((merged[order[16:]] != 0).sum())
    # Chances from 0.1 to 0.9 by rank: 0.294 and 0.706 on average over the halves.
    assert [count / 3200 for count in kept] == pytest.approx([0.294, 0.706], abs=0.05)
    with refuses(r"mergekit.short-rows: \[32, 1\]"):
        method(replace(stack, tensor_shape=()))


def test_kernels_have_their_own_shape() -> None:
    deltas = [torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    stack = Stack.of([Dense(w=delta.reshape(6, 12)) for delta in deltas], [0.6, 0.4], seed=0)
    options = {"nuslerp_flatten": False}
    expected = by_mergekit("nuslerp", deltas, base=False, weight=[0.6, 0.4], **options).reshape(6, 12)
    found = build("mergekit:nuslerp", options)(replace(stack, tensor_shape=(6, 4, 3))).dense()
    torch.testing.assert_close(found, expected)


def test_loras_of_convolutions_are_kernels_to_mergekit(tmp_path: Path) -> None:
    module, deltas = "layers.0.conv", []
    for seed, name in enumerate(("task", "align")):
        delta = write_lora(tmp_path / name, {module: (6, 12, 2)}, seed=seed)[module]
        deltas.append(delta.float().reshape(6, 4, 3))
        tensors = load_file(tmp_path / name / WEIGHTS)
        tensors[key(module, "A")] = tensors[key(module, "A")].reshape(2, 4, 3)
        tensors[key(module, "B")] = tensors[key(module, "B")].reshape(6, 2, 1)
        save_file(tensors, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
    options = {"nuslerp_flatten": False}
    report = merge(
        [tmp_path / "task", tmp_path / "align"], weights=[0.6, 0.4], method="mergekit:nuslerp", options=options,
        max_residual=1.0,
    )  # fmt: skip
    expected = by_mergekit("nuslerp", deltas, base=False, weight=[0.6, 0.4], **options)
    assert report.modules[module].norm == pytest.approx(float(expected.norm()), rel=1e-5)
    flat = by_mergekit("nuslerp", [d.reshape(6, 12) for d in deltas], base=False, weight=[0.6, 0.4], **options)
    assert report.modules[module].norm != pytest.approx(float(flat.norm()), rel=1e-4)


class TestZeros:
    """A zero delta has no angle: the others are merged, times their share."""

    @pytest.mark.parametrize("member", ["slerp", "nuslerp"])
    @pytest.mark.parametrize("zero", [0, 1])
    def test_of_two(self, member: str, zero: int) -> None:
        stack = stack_of(2, [1.5, 0.5])
        updates = [u * 0.0 if i == zero else u for i, u in enumerate(stack.updates)]
        found = build(f"mergekit:{member}", {})(replace(stack, updates=tuple(updates))).dense()
        torch.testing.assert_close(found, (0.25, 0.75)[zero == 1] * stack.updates[1 - zero].dense())

    def test_of_three_for_model_stock(self) -> None:
        stack = stack_of(3, [1 / 3] * 3)
        first, second, third = stack.updates
        pair = by_mergekit("model_stock", [first.dense(), third.dense()], base=True)
        found = build("mergekit:model_stock", {})(replace(stack, updates=(first, second * 0.0, third))).dense()
        torch.testing.assert_close(found, pair * 2 / 3)

    @pytest.mark.parametrize("member", ["slerp", "nuslerp", "model_stock"])
    def test_one_adapter_of_weight_one_comes_back(self, member: str) -> None:
        """The end of a line of weights: the other adapter weighs 0 and is left out."""
        stack = stack_of(1, [1.0])
        torch.testing.assert_close(build(f"mergekit:{member}", {})(stack).dense(), stack.updates[0].dense())


class TestOptions:
    """Types, ranges, and values of single adapters."""

    @pytest.mark.parametrize(
        ("member", "options", "words"),
        [
            ("ties", {"density": 5}, r"density.* must be in \(0, 1\], got 5"),
            ("ties", {"density": -1}, r"density.* must be in \(0, 1\], got -1"),
            ("ties", {"density": [0.5, 1.5]}, r"density.* must be in \(0, 1\], got 1\.5"),
            ("dare_ties", {"density": {"task": 0.5, "align": 0}}, r"density.* must be in \(0, 1\], got 0"),
            ("ties", {"density": "much"}, "density.* must be float, got 'much'"),
            ("ties", {"density": True}, "density.* must be float, got True"),
            ("ties", {"lambda": float("nan")}, "lambda.* must be finite, got nan"),
            ("ties", {"normalize": "maybe"}, "normalize.* must be bool, got 'maybe'"),
            ("sce", {"select_topk": 2.0}, r"select_topk.* must be in \(0, 1\]"),
            ("breadcrumbs", {"gamma": 1.0}, r"gamma.* must be in \[0, 1\)"),
            ("karcher", {"max_iter": 0}, "max_iter.* must be at least 1"),
            ("slerp", {"t": 1.5}, r"t.* must be in \[0, 1\]"),
            ("nearswap", {"t": -1.0}, "t.* must be at least 0"),
        ],
    )
    def test_values_outside_their_range_are_refused(self, member: str, options: dict[str, Any], words: str) -> None:
        with refuses(f"mergekit.option-value: {words}"):
            build(f"mergekit:{member}", options)

    def test_a_value_per_adapter_by_name_or_in_order(self) -> None:
        stack = replace(stack_of(2, [0.6, 0.4]), adapters=("task", "left", "align"), indices=(0, 2))
        deltas = [update.dense() for update in stack.updates]
        expected = by_mergekit("ties", deltas, base=True, weight=[0.6, 0.4], density=[0.5, 0.25])
        for value in ([0.5, 1.0, 0.25], {"align": 0.25, "task": 0.5, "left": 1.0}):
            torch.testing.assert_close(build("mergekit:ties", {"density": value})(stack).dense(), expected)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ([0.5], "mergekit.per-adapter-count: density.*1.*2"),
            ({"task": 0.5}, "mergekit.per-adapter-missing: density.*align"),
            ({"tsk": 0.5, "align": 0.5}, r"mergekit.per-adapter-names: 'tsk'.*Did you mean 'task'\?.*task, align"),
        ],
    )
    def test_values_that_fit_no_adapter_are_refused_by_name(self, tmp_path: Path, value: Any, words: str) -> None:
        folders = pair(tmp_path)
        with refuses(words) as caught:
            merge(folders, weights=[0.5, 0.5], method="mergekit:ties", options={"density": value}, max_residual=1.0)
        assert len(str(caught.value)) < 300


def pair(folder: Path) -> list[Path]:
    for seed, name in enumerate(("task", "align")):
        write_lora(folder / name, {"layers.0.q": (16, 12, 2), "layers.1.q": (16, 12, 2)}, seed=seed)
    return [folder / "task", folder / "align"]


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties", "della", "mergekit:dare_ties", "mergekit:dare_linear"])
def test_draws_depend_on_neither_order_nor_names_nor_settings(tmp_path: Path, method: str) -> None:
    folders = pair(tmp_path)
    deltas = []
    for number, (order, weights) in enumerate((([0, 1], [0.7, 0.3]), ([1, 0], [0.3, 0.7]), ([0, 1], [0.7, 0.3]))):
        if number == 2:
            for folder in folders:
                config = folder / "adapter_config.json"
                text = config.read_text().rstrip().removesuffix("}")
                config.write_text(text + '  ,\n\n"peft_version": "9.9.9"}\n')
            folders = [folder.rename(tmp_path / f"other{i}") for i, folder in enumerate(folders)]
        merge(
            [folders[i] for i in order], weights=weights, method=method, options={"density": 0.5}, rank=12,
            max_residual=1.0, out=tmp_path / f"out{number}",
        )  # fmt: skip
        deltas.append(adapter_deltas(tmp_path / f"out{number}"))
    for module, delta in deltas[0].items():
        torch.testing.assert_close(deltas[1][module], delta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deltas[2][module], delta, rtol=1e-4, atol=1e-5)


def test_draws_for_copies_of_one_adapter_do_not_depend_on_their_order(tmp_path: Path) -> None:
    write_lora(tmp_path / "one", {"layers.0.q": (16, 12, 2)})
    write_lora(tmp_path / "two", {"layers.0.q": (16, 12, 2)})
    found = []
    for weights, names in (([0.7, 0.3], ("one", "two")), ([0.3, 0.7], ("one", "two")), ([0.3, 0.7], ("two", "one"))):
        out = tmp_path / f"out{len(found)}"
        merge(
            [tmp_path / name for name in names],
            weights=weights,
            method="dare-linear",
            rank=12,
            max_residual=1.0,
            out=out,
        )
        found.append(adapter_deltas(out)["layers.0.q"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


LAWS: dict[str, dict[str, Any]] = {
    **{member: {} for member in ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")},
    "multislerp": {"acute": True},
    "dare_linear": {"method": build("mergekit:dare_linear", {"density": 0.5})},
    "dare_ties": {"method": build("mergekit:dare_ties", {"density": 0.5})},
}
"""Laws of mergekit's weighted methods, as far as its limits such as 1e-8 let them hold."""


class BridgeLaws(MergeMethodLaws):
    """The laws, of weights that do not cancel."""

    signed = False
    tolerance = 1e-5
    homogeneous = False


for _member, _laws in LAWS.items():
    _neutral = build(f"mergekit:{_member}", {})
    _body = {"method": _neutral, "neutral": _neutral, "__doc__": "The laws.", **_laws}
    globals()[f"Test{_member.title().replace('_', '')}Laws"] = type("TestLaws", (BridgeLaws,), _body)


def test_sixteen_bit_factors_are_merged_in_float32() -> None:
    stack = stack_of(2, [0.5, 0.5])
    halves = []
    for update in stack.updates:
        assert isinstance(update, LowRank)
        halves.append(LowRank(b=update.b.bfloat16(), a=update.a.bfloat16(), scale=update.scale))
    found = build("mergekit:ties", {"density": 0.5})(replace(stack, updates=tuple(halves))).dense()
    wide = [half.to(torch.float64).dense() for half in halves]
    expected = by_mergekit("ties", wide, base=True, weight=[0.5, 0.5], density=0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
