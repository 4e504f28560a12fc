"""Layer swapping and AdaMergeX: sums in which every adapter has a role."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import merge, merge_checkpoints
from adaptermix.algebra import LowRank, Stack
from adaptermix.cli import main
from adaptermix.methods.base import build, check_depths
from adaptermix.testing.stacks import generic

from ..checkpoints.models import tensors_of, tune
from ..factories import CONFIG, adapter_deltas, load_base, peft_kind, tiny_llama, wrap_with_peft, write_lora
from ..refusals import refuses

DEPTH = 8
SHAPE = (10, 8, 2)


def shares(depth: int = DEPTH, **options: Any) -> list[float]:
    """Return the language adapter's share of each block, from the coefficients of two weights of 1."""
    stack = generic((4, 3), [1, 1], [1.0, 1.0], seed=0)
    found = [build("layer-swap", options).coefficients(replace(stack, block=b, depth=depth)) for b in range(depth)]  # type: ignore[attr-defined]
    assert all(task == pytest.approx(1 - language) for task, language in found)
    return [language for _, language in found]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bottom": 2, "top": 1}, [1, 1, 0.5, 0, 0, 0, 0.5, 1]),
        ({"bottom": 2, "top": 1, "transition": 0}, [1, 1, 0, 0, 0, 0, 0, 1]),
        ({"bottom": 1, "top": 0, "transition": 2, "share": 0.25}, [1, 0.25, 0.25, 0, 0, 0, 0, 0]),
        ({"bottom": 0, "top": 2}, [0, 0, 0, 0, 0, 0.5, 1, 1]),
        ({"bottom": 0, "top": 0, "transition": 3}, [0] * 8),
        ({"bottom": 8, "top": 0}, [1] * 8),
        ({"bottom": 6, "top": 6}, [1] * 8),
        ({"bottom": 3, "top": 4}, [1, 1, 1, 0.5, 1, 1, 1, 1]),
        ({"bottom": 2, "top": 1, "blocks": 10}, [1, 1, 0.5, 0, 0, 0, 0, 0]),
        ({"transition": 0}, [1, 0, 0, 0, 0, 0, 0, 0]),  # 5/32 and 2/32 of 8 are 1.25 and 0.5
    ],
    ids=str,
)
def test_the_blocks_that_each_adapter_supplies(options: dict[str, Any], expected: list[float]) -> None:
    assert shares(**options) == expected


def test_the_published_borders_of_32_blocks() -> None:
    assert shares(32) == [*[1.0] * 5, 0.5, *[0.0] * 23, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottom": 9, "top": 0}, "method.too-many-layers: bottom.*8.*9"),
        ({"bottom": 0, "top": 9}, "method.too-many-layers: top.*8.*9"),
        ({"blocks": 7}, "method.blocks: 8.*7"),
    ],
)
def test_borders_outside_the_model_are_refused(options: dict[str, Any], words: str) -> None:
    with refuses(words):
        check_depths(build("layer-swap", options), {"layers": DEPTH, "vision.layers": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottom": -1}, "method.negative: bottom"),
        ({"transition": -1}, "method.negative: transition"),
        ({"share": 1.5}, "method.share"),
        ({"blocks": 0}, "method.blocks"),
        ({"bottom": 1.5}, "method.option-type: int"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with refuses(words):
        build("layer-swap", options)


def write(folder: Path, blocks: Sequence[int], *, seed: int, more: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    modules = {f"model.layers.{block}.mlp.up": SHAPE for block in blocks} | dict.fromkeys(more, SHAPE)
    return write_lora(folder, modules, seed=seed)


def test_the_merge_takes_each_block_from_its_adapter(tmp_path: Path) -> None:
    """The alignment adapter has the lower half alone, as `train-align` leaves it."""
    task = write(tmp_path / "task", range(6), seed=1, more=["score"])
    align = write(tmp_path / "align", range(4), seed=2)
    report = merge(
        [tmp_path / "task", tmp_path / "align"],
        weights=[1.0, 0.8],
        method="layer-swap",
        options={"bottom": 2, "top": 1, "transition": 1},
        out=tmp_path / "out",
    )
    found = adapter_deltas(tmp_path / "out")
    expected = {0: (0, 0.8), 1: (0, 0.8), 2: (0.5, 0.4), 3: (1, 0), 4: (0.5, 0), 5: (0, 0)}
    for block, (of_task, of_align) in expected.items():
        module = f"model.layers.{block}.mlp.up"
        wanted = of_task * task[module] + of_align * align.get(module, torch.zeros(10, 8))
        torch.testing.assert_close(found[module], wanted, rtol=1e-5, atol=1e-6)
        assert report.modules[module].weights == pytest.approx((of_task, of_align))
        assert report.modules[module].residual == 0
    torch.testing.assert_close(found["score"], task["score"], rtol=1e-5, atol=1e-6)
    ranks = [report.modules[f"model.layers.{block}.mlp.up"].rank for block in range(4)]
    assert ranks == [2, 2, 4, 2]  # nothing of the adapter that a block is not taken from
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 4


def test_stacks_are_swapped_each_by_its_own_depth(tmp_path: Path) -> None:
    """A vision tower of 6 blocks beside 4 of the language model: the top block of both is swapped."""
    modules = {f"vision.layers.{block}.q": SHAPE for block in range(6)}
    modules |= {f"text.layers.{block}.q": SHAPE for block in range(4)}
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, modules, seed=seed)
    report = merge(
        [tmp_path / "task", tmp_path / "align"],
        weights=[1.0, 1.0],
        method="layer-swap",
        options={"bottom": 1, "top": 1, "transition": 0},
    )
    found = {module: report.modules[module].weights[1] for module in modules}
    assert [found[f"vision.layers.{block}.q"] for block in range(6)] == [1, 0, 0, 0, 0, 1]
    assert [found[f"text.layers.{block}.q"] for block in range(4)] == [1, 0, 0, 1]


def test_an_adapter_that_supplies_no_block_has_no_part_in_the_result(tmp_path: Path) -> None:
    for seed, name in enumerate(("task", "align")):
        write(tmp_path / name, range(3), seed=seed)
        manifest = {"kind": "train-align", "languages": {"aligned": [name]}}
        (tmp_path / name / "adaptermix.json").write_text(json.dumps(manifest))
    merge(
        [tmp_path / "task", tmp_path / "align"],
        weights=[1.0, 1.0],
        method="layer-swap",
        options={"bottom": 0, "top": 0},
        out=tmp_path / "out",
    )
    languages = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["languages"]
    assert languages["aligned"] == ["task"]


@pytest.mark.parametrize(("method", "count"), [("layer-swap", 3), ("layer-swap", 1), ("adamergex", 2)])
def test_another_number_of_adapters_is_refused_before_anything_is_read(method: str, count: int, tmp_path: Path) -> None:
    for seed in range(count):
        write(tmp_path / str(seed), range(2), seed=seed)
    needed = {"layer-swap": "2 adapters in this order: the task adapter", "adamergex": "3 adapters in this order"}
    with refuses(f"method.roles: {needed[method]}.*{count}"):
        merge([tmp_path / str(seed) for seed in range(count)], weights=[1.0] * count, method=method)


def test_borders_outside_the_model_are_one_sentence_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("task", "align")):
        write(tmp_path / name, range(3), seed=seed)
    words = ["merge", str(tmp_path / "task"), str(tmp_path / "align"), "--weights", "1,1", "--method", "layer-swap"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--set", "bottom=4", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert (
        "method 'layer-swap': bottom must be at most the number of blocks, 3, got 4; if the model has more than the "
        "adapters adapt, set blocks to its number." in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_whole_checkpoints_are_swapped_tensor_by_tensor(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    task, language = (
        tensors_of(tune(base, tmp_path / name, seed=seed)) for seed, name in enumerate(("task", "language"))
    )
    report = merge_checkpoints(
        base,
        [tmp_path / "task", tmp_path / "language"],
        [1.0, 1.0],
        method="layer-swap",
        options={"bottom": 1, "top": 0, "transition": 0},
        out=tmp_path / "out",
    )
    found = tensors_of(tmp_path / "out")
    for key, value in found.items():
        wanted, weights = (language, (0.0, 1.0)) if ".layers.0." in key else (task, (1.0, 0.0))
        assert report.modules[key].weights == weights
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)
    assert any(".layers.0." in key for key in found)
    assert any(".layers.1." in key for key in found)


def test_adamergex_of_the_reference_task_itself_is_its_adapter_in_the_target_language(tmp_path: Path) -> None:
    """Where the task is the reference task, task + (target - source) is the target, exactly, also in 16 bits."""
    source, target = (write(tmp_path / name, range(2), seed=seed) for seed, name in enumerate(("source", "target")))
    folders = [tmp_path / "source", tmp_path / "target", tmp_path / "source"]
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        report = merge(folders, weights=[1, 1, 1], method="adamergex", dtype=dtype, out=out, max_residual=0.05)
        found = adapter_deltas(out)
        for module, delta in target.items():
            lost = float((found[module] - delta).norm() / delta.norm())
            assert lost == pytest.approx(report.modules[module].residual, rel=0.05, abs=1e-6)
            assert lost < (1e-5 if dtype == "float32" else 1e-2)
    assert source.keys() == target.keys()


def test_adamergex_moves_by_t_and_reports_what_it_multiplied_by(tmp_path: Path) -> None:
    deltas = [
        write_lora(tmp_path / name, {"model.layers.0.q": (9, 7, rank)}, seed=rank)["model.layers.0.q"]
        for rank, name in enumerate(("task", "target", "source"), start=1)
    ]
    folders = [tmp_path / name for name in ("task", "target", "source")]
    for t in (0.0, 0.5, 2.0):
        out = tmp_path / str(t)
        report = merge(folders, weights=[1.0, 0.8, 0.6], method="adamergex", options={"t": t}, out=out)
        wanted = deltas[0] + t * (0.8 * deltas[1] - 0.6 * deltas[2])
        torch.testing.assert_close(adapter_deltas(out)["model.layers.0.q"], wanted, rtol=1e-5, atol=1e-5)
        found = report.modules["model.layers.0.q"]
        assert found.weights == pytest.approx((1.0, 0.8 * t, -0.6 * t))
        assert found.rank == (6 if t else 1)


def test_a_role_stays_with_its_adapter_where_another_is_absent(tmp_path: Path) -> None:
    """The source adapter lacks a block: the target's is still the target's."""
    write(tmp_path / "task", range(2), seed=1)
    target = write(tmp_path / "target", range(2), seed=2)
    write(tmp_path / "source", range(1), seed=3)
    folders = [tmp_path / name for name in ("task", "target", "source")]
    merge(folders, weights=[0.0, 1.0, 1.0], method="adamergex", options={"t": 0.5}, out=tmp_path / "out")
    module = "model.layers.1.mlp.up"
    torch.testing.assert_close(adapter_deltas(tmp_path / "out")[module], 0.5 * target[module], rtol=1e-5, atol=1e-6)


def test_a_stack_without_places_has_its_adapters_in_order() -> None:
    updates = [LowRank(b=torch.ones(1, 1), a=torch.full((1, 1), value)) for value in (1.0, 10.0, 100.0)]
    assert float(build("adamergex", {})(Stack.of(updates)).dense()) == pytest.approx(1 + 10 - 100)


def test_a_dora_is_swapped_with_its_row_lengths(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    targets = ["q_proj", "down_proj"]
    task = peft_kind(load_base(base), tmp_path / "task", seed=1, r=3, use_dora=True, target_modules=targets)
    align = peft_kind(load_base(base), tmp_path / "align", seed=2, r=2, target_modules=targets)
    options = {"bottom": 1, "top": 0, "transition": 0}
    merge([task, align], weights=[1, 1], method="layer-swap", options=options, base=str(base), out=tmp_path / "out")
    parts = {}
    for name, folder in (("out", tmp_path / "out"), ("task", task), ("align", align)):
        parts[name] = wrap_with_peft(load_base(base), folder).merge_and_unload().state_dict()
    for key, value in parts["out"].items():
        wanted = parts["align"] if ".layers.0." in key else parts["task"]
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)
