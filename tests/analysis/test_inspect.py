"""Inspection of adapters against their dense deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptermix
from adaptermix import AlignSettings, JointSettings, TaskSettings, train_align, train_joint, train_task
from adaptermix.adapters import AdapterMeta, TargetSpec
from adaptermix.analysis import inspect
from adaptermix.analysis.spectrum_inputs import beyond_factors

from ..factories import CONFIG, WEIGHTS, key, load_with_peft, peft_lora, write_lora, write_raw
from ..refusals import refuses
from ..training.data import write_pairs, write_slots

Q0, Q1, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q0: (12, 10, 3), Q1: (12, 10, 2), UP0: (20, 12, 4)}


def flat(deltas: dict[str, Tensor], paths: list[str]) -> Tensor:
    """Deltas of some modules as one vector; zeros where there is none."""
    return torch.cat([deltas.get(path, torch.zeros(SHAPES[path][:2], dtype=torch.float64)).ravel() for path in paths])


def projectors(delta: Tensor) -> tuple[Tensor, Tensor, int]:
    u, sigma, vh = torch.linalg.svd(delta)
    rank = int((sigma > 1e-10 * sigma[0]).sum())
    return u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank], rank


def test_one_adapter_has_the_norms_and_ranks_of_its_deltas(tmp_path: Path) -> None:
    deltas = write_lora(tmp_path / "task", SHAPES, alpha=5)
    document = inspect([tmp_path / "task"]).document()
    assert document["pairs"] == {}
    found = document["adapters"]["task"]
    whole = float(flat(deltas, list(SHAPES)).norm())
    assert found["norm"] == pytest.approx(whole, rel=1e-10)
    assert (found["rank"], found["numerical_rank"]) == (4, 4)
    assert found["base"] == "org/base"
    for groups, members in (
        (found["layers"], {"0": [Q0, UP0], "1": [Q1]}),
        (found["kinds"], {"q_proj": [Q0, Q1], "up_proj": [UP0]}),
        (found["modules"], {path: [path] for path in SHAPES}),
    ):
        assert set(groups) == set(members)
        for name, paths in members.items():
            norm = float(flat(deltas, paths).norm())
            assert groups[name]["norm"] == pytest.approx(norm, rel=1e-10)
            assert groups[name]["share"] == pytest.approx((norm / whole) ** 2, rel=1e-10)
            assert groups[name]["rank"] == max(SHAPES[path][2] for path in paths)
        assert sum(group["share"] for group in groups.values()) == pytest.approx(1.0)
    stable = float(deltas[Q0].norm() / torch.linalg.matrix_norm(deltas[Q0], 2)) ** 2
    assert found["modules"][Q0]["stable_rank"] == pytest.approx(stable)


def test_a_pair_has_the_angles_of_its_dense_deltas(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "a", SHAPES, alpha=5, seed=1)
    two = write_lora(tmp_path / "b", {path: SHAPES[path] for path in (UP0, Q0)}, alpha=2, seed=2, rslora=True)
    found = inspect([tmp_path / "a", tmp_path / "b"]).document()["pairs"]["a|b"]
    assert found["modules_in_common"] == 2
    overlaps = []
    for path in (Q0, UP0):
        (p1, q1, k), (p2, q2, m) = projectors(one[path]), projectors(two[path])
        module = found["modules"][path]
        left, right = float(torch.trace(p1 @ p2)) / min(k, m), float(torch.trace(q1 @ q2)) / min(k, m)
        cosine = float((one[path] * two[path]).sum() / one[path].norm() / two[path].norm())
        assert module["cosine"] == pytest.approx(cosine, abs=1e-10)
        assert module["overlap_left"] == pytest.approx(left, abs=1e-10)
        assert module["overlap_right"] == pytest.approx(right, abs=1e-10)
        assert module["overlap"] == pytest.approx((left + right) / 2, abs=1e-10)
        assert module["sign_conflict"] == pytest.approx(float((one[path] * two[path] < 0).double().mean()), abs=1e-9)
        inside = float((p2 @ one[path] @ q2).norm() / one[path].norm()) ** 2
        assert module["share_a_in_b"] == pytest.approx(inside, abs=1e-10)
        overlaps.append((left + right) / 2)
    assert found["overlap"] == pytest.approx(sum(overlaps) / 2)
    paths = list(SHAPES)
    for cosine, members in (
        (found["cosine"], paths),
        (found["layers"]["0"]["cosine"], [Q0, UP0]),
        (found["kinds"]["q_proj"]["cosine"], [Q0, Q1]),
    ):
        x, y = flat(one, members), flat(two, members)
        assert cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-10)
    assert set(found["layers"]) == {"0"}
    projected = sum(
        float((projectors(two[path])[0] @ one[path] @ projectors(two[path])[1]).norm()) ** 2 for path in (Q0, UP0)
    )
    assert found["share_a_in_b"] == pytest.approx(projected / float(flat(one, paths).norm()) ** 2, abs=1e-10)


def test_an_adapter_beside_itself_is_the_same_and_gets_a_name_of_its_own(tmp_path: Path) -> None:
    write_lora(tmp_path / "x" / "task", SHAPES, alpha=5)
    document = inspect([tmp_path / "x" / "task", str(tmp_path / "x" / "task")]).document()
    assert list(document["adapters"]) == ["task", "task#2"]
    [(name, pair)] = document["pairs"].items()
    assert name == "task|task#2"
    for measure in ("cosine", "overlap", "overlap_left", "overlap_right", "share_a_in_b", "share_b_in_a"):
        assert pair[measure] == pytest.approx(1.0)
    assert pair["sign_conflict"] == 0.0
    assert pair["notes"] == []


def test_every_pair_of_three_is_there_in_the_order_given(tmp_path: Path) -> None:
    for seed, name in enumerate(("c", "a", "b")):
        write_lora(tmp_path / name, SHAPES, alpha=5, seed=seed)
    document = inspect([tmp_path / name for name in ("c", "a", "b")]).document()
    assert list(document["pairs"]) == ["c|a", "c|b", "a|b"]
    other_way = inspect([tmp_path / "a", tmp_path / "c"]).document()["pairs"]["a|c"]
    for measure in ("cosine", "overlap", "sign_conflict"):
        assert document["pairs"]["c|a"][measure] == pytest.approx(other_way[measure])
    assert document["pairs"]["c|a"]["share_a_in_b"] == pytest.approx(other_way["share_b_in_a"])


def test_subspaces_do_not_depend_on_the_scale(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", SHAPES, alpha=5, seed=1)
    write_lora(tmp_path / "b", SHAPES, alpha=-500, seed=1)
    pair = inspect([tmp_path / "a", tmp_path / "b"]).document()["pairs"]["a|b"]
    assert pair["overlap"] == pytest.approx(1.0)
    assert pair["cosine"] == pytest.approx(-1.0)
    assert pair["sign_conflict"] == pytest.approx(1.0)


def test_adapters_without_a_module_in_common_get_nulls_and_a_note(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", {Q0: SHAPES[Q0]}, alpha=5)
    write_lora(tmp_path / "b", {Q1: SHAPES[Q1]}, alpha=5)
    pair = inspect([tmp_path / "a", tmp_path / "b"]).document()["pairs"]["a|b"]
    assert pair["modules_in_common"] == 0
    assert {pair[measure] for measure in ("cosine", "sign_conflict", "overlap", "overlap_left", "share_a_in_b")} == {
        None
    }
    assert pair["layers"] == pair["kinds"] == pair["modules"] == {}
    assert pair["notes"] == ["'a' and 'b' have no module in common"]


@pytest.mark.parametrize("how", ["scale", "factor"])
def test_a_zero_delta_has_rank_zero_and_no_angle(tmp_path: Path, how: str) -> None:
    write_lora(tmp_path / "a", SHAPES, alpha=5)
    write_lora(tmp_path / "zero", SHAPES, alpha=0 if how == "scale" else 5)
    if how == "factor":
        tensors = {
            key(path, factor): torch.zeros(out, rank) if factor == "B" else torch.ones(rank, into)
            for path, (out, into, rank) in SHAPES.items()
            for factor in "AB"
        }
        write_raw(tmp_path / "zero", json.loads((tmp_path / "a/adapter_config.json").read_text()), tensors)
    document = inspect([tmp_path / "a", tmp_path / "zero"]).document()
    zero = document["adapters"]["zero"]
    assert (zero["rank"], zero["numerical_rank"], zero["norm"]) == (4, 0, 0.0)
    assert {layer["share"] for layer in zero["layers"].values()} == {0.0}
    pair = document["pairs"]["a|zero"]
    assert (pair["cosine"], pair["overlap"], pair["share_b_in_a"]) == (None, None, None)
    assert (pair["sign_conflict"], pair["share_a_in_b"]) == (0.0, 0.0)
    assert pair["notes"] == ["the delta of 'zero' is zero, so there is no angle"]
    json.dumps(document, allow_nan=False)


def test_adapters_of_other_bases_are_compared_where_they_can_be_with_notes(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", SHAPES, alpha=5)
    write_lora(tmp_path / "b", SHAPES | {UP0: (16, 12, 4)}, alpha=5, base="org/other")
    pair = inspect([tmp_path / "a", tmp_path / "b"]).document()["pairs"]["a|b"]
    assert set(pair["modules"]) == {Q0, Q1}
    assert pair["notes"] == [
        "'a' and 'b' differ in shape at 1 of 3 shared modules, left out",
        "'a' and 'b' name different base models, 'org/base' and 'org/other'",
    ]


def test_no_dense_matrix_is_ever_formed(tmp_path: Path) -> None:
    """A delta of 10^12 entries: 4 TB if it were."""
    write_lora(tmp_path / "small", {Q0: (4, 4, 1)}, alpha=2)
    config = json.loads((tmp_path / "small" / CONFIG).read_text())
    side = 1_000_000
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        factors = {"A": torch.randn(1, side, generator=generator), "B": torch.randn(side, 1, generator=generator)}
        write_raw(tmp_path / str(seed), config, {key(Q0, name): factor for name, factor in factors.items()})
    document = inspect([tmp_path / "0", tmp_path / "1"]).document()
    assert document["adapters"]["0"]["numerical_rank"] == 1
    assert document["adapters"]["0"]["norm"] == pytest.approx(2 * side, rel=0.01)
    assert abs(document["pairs"]["0|1"]["cosine"]) < 0.01


def test_what_peft_saves_has_the_deltas_that_peft_applies(base: Path, tmp_path: Path) -> None:
    folder = peft_lora(base, tmp_path / "made", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = load_with_peft(base, folder)
    found = inspect([folder]).document()["adapters"]["made"]["modules"]
    assert len(found) == 8
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            assert found[name]["norm"] == pytest.approx(float(module.get_delta_weight("default").norm()), rel=1e-5)


def test_what_the_factors_do_not_show_is_said() -> None:
    targets = TargetSpec(modules=("q_proj",))
    assert beyond_factors(AdapterMeta(base=None, targets=targets)) == ()
    meta = AdapterMeta(base=None, targets=targets, dora=True, bias="all", initial="pissa")
    magnitudes, biases, initial = beyond_factors(meta)
    assert magnitudes == "its DoRA magnitudes are not part of these numbers"
    assert biases == "its trained biases are not part of these numbers"
    assert "(pissa)" in initial


def test_faults_are_refused(tmp_path: Path) -> None:
    with refuses("inspect.no-adapter"):
        inspect([])
    with refuses("adapter.not-folder"):
        inspect([tmp_path / "none"])
    write_lora(tmp_path / "huge", {Q0: SHAPES[Q0]}, alpha=1.7e308)
    with refuses("inspect.overflow: huge.*overflows with scale"):
        inspect([tmp_path / "huge"])
    write_lora(tmp_path / "nan", {Q0: SHAPES[Q0]}, alpha=1)
    tensors = load_file(tmp_path / "nan" / WEIGHTS)
    tensors[key(Q0, "A")][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan" / WEIGHTS)
    with refuses("adapter-file.not-finite"):
        inspect([tmp_path / "nan"])


def test_it_is_public() -> None:
    assert adaptermix.inspect.__wrapped__ is inspect  # type: ignore[attr-defined]
    assert callable(adaptermix.spectrum)


def test_an_adapter_with_a_head_and_one_of_the_encoder_are_compared(tmp_path: Path) -> None:
    """The head's model has the encoder under a name of its own, and so have its modules."""
    inner = "encoder.layer.0.attention.self.query"
    write_lora(
        tmp_path / "task", {f"bert.{inner}": (12, 10, 3), "bert.encoder.layer.1.output.dense": (6, 5, 2)}, seed=0
    )
    write_lora(tmp_path / "align", {inner: (12, 10, 2)}, seed=1)
    found = inspect([tmp_path / "task", tmp_path / "align"]).document()
    (pair,) = found["pairs"].values()
    assert pair["modules_in_common"] == 1
    assert pair["cosine"] is not None


def test_trainings_begin_apart_and_a_shared_beginning_is_told(causal: Path, tmp_path: Path, monkeypatch: Any) -> None:
    common: dict[str, Any] = {"base": str(causal), "device": "cpu", "dtype": "float32", "steps": 6, "batch_size": 4}

    def trained(name: str) -> list[Path]:
        folders = [tmp_path / f"{name}-{kind}" for kind in ("task", "align", "joint")]
        slots, pairs = [write_slots(tmp_path)], write_pairs(tmp_path)
        train_task(TaskSettings(**common, task="slots", train=slots, out=str(folders[0])))
        train_align(AlignSettings(**common, pairs=pairs, out=str(folders[1])))
        train_joint(JointSettings(**common, task="slots", train=slots, pairs=pairs, out=str(folders[2])))
        return folders

    for pair in inspect(trained("own")).pairs:
        assert not any("alike" in note for note in pair.notes)
        numbers = pair.group(pair.modules)
        assert numbers is not None
        assert numbers["overlap_right"] < 3 * numbers["overlap_by_chance"]
    monkeypatch.setattr("adaptermix.training.runner.first_draw", lambda seed, _kind: seed)
    shared = trained("shared")
    for pair in inspect(shared).pairs:
        assert any("similar A factors row by row" in note for note in pair.notes)
        assert pair.group(pair.modules)["overlap_right"] > 0.9  # type: ignore[index]
        assert all((numbers.first_factors or 0) > 0.9 for numbers in pair.modules.values())
