"""Reading and writing PEFT folders: what comes back is what went in, to the byte."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.adapters import AdapterMeta, AdapterState, TargetSpec, open_adapter, write_adapter
from adaptermix.algebra import LowRank

from ..factories import CONFIG, WEIGHTS, adapter_deltas, contents, write_lora
from ..refusals import refuses
from ..strategies import updates

Q0, Q1, V0 = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.layers.0.attn.v_proj"

GOLDEN = """\
{
  "alpha_pattern": {
    "^model\\\\.layers\\\\.0\\\\.attn\\\\.v_proj": 1
  },
  "base_model_name_or_path": "org/base-ä",
  "bias": "none",
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": [
    "layers"
  ],
  "layers_to_transform": [
    0,
    1
  ],
  "lora_alpha": 2,
  "lora_dropout": 0.0,
  "peft_type": "LORA",
  "r": 2,
  "rank_pattern": {
    "^model\\\\.layers\\\\.0\\\\.attn\\\\.v_proj": 1
  },
  "revision": "abc123",
  "target_modules": [
    "q_proj",
    "v_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_rslora": false
}
"""


def small(*, dtype: torch.dtype = torch.float32, reverse: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    made = {
        module: LowRank(
            b=torch.randn(3, rank, generator=generator).to(dtype),
            a=torch.randn(rank, 4, generator=generator).to(dtype),
            scale=scale,
        )
        for module, rank, scale in [(Q0, 2, 1.0), (Q1, 2, -0.5), (V0, 1, 3.0)]
    }
    return AdapterState.of_updates(
        AdapterMeta(
            base="org/base-ä",
            revision="abc123",
            task_type="CAUSAL_LM",
            targets=TargetSpec(modules=("v_proj", "q_proj"), layers=(0, 1), layers_pattern=("layers",)),
        ),
        dict(reversed(made.items())) if reverse else made,
    )


def test_the_settings_file_is_this_text_to_the_byte(tmp_path: Path) -> None:
    write_adapter(tmp_path, small(), compact=True)
    assert (tmp_path / CONFIG).read_text(encoding="utf-8") == GOLDEN


def test_without_compact_it_has_one_rank_and_no_patterns(tmp_path: Path) -> None:
    write_adapter(tmp_path, small())
    one_rank = json.loads(GOLDEN) | {"rank_pattern": {}, "alpha_pattern": {}}
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8")) == one_rank
    assert {header.rank for header in open_adapter(tmp_path).modules.values()} == {2}


def test_the_largest_rank_becomes_r_where_the_others_are_more_common(tmp_path: Path) -> None:
    ranks = {"layers.0.q": 1, "layers.1.q": 3, "layers.2.q": 1}
    state = AdapterState.of_updates(
        AdapterMeta(base=None, targets=TargetSpec(modules=("q",))),
        {m: LowRank(b=torch.ones(3, r), a=torch.ones(r, 3)) for m, r in ranks.items()},
    )
    write_adapter(tmp_path, state, compact=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert set(config["rank_pattern"].values()) == set(config["alpha_pattern"].values()) == {1}


def test_writing_twice_in_any_order_gives_equal_bytes(tmp_path: Path) -> None:
    written = []
    for name, reverse in [("one", False), ("two", False), ("three", True)]:
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, small(reverse=reverse))
        written.append(contents(tmp_path / name))
    assert written[0] == written[1] == written[2]
    assert set(written[0]) == {CONFIG, WEIGHTS}


def test_ranks_that_are_equally_common_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    two = LowRank(b=torch.ones(2, 2), a=torch.ones(2, 2))
    meta = AdapterMeta(base="b", targets=TargetSpec(modules=("x", "y")))
    written = []
    for name, made in [("one", {"x": one, "y": two}), ("two", {"y": two, "x": one})]:
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, AdapterState.of_updates(meta, made))
        written.append(contents(tmp_path / name))
    assert written[0] == written[1]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    state = small()
    write_adapter(tmp_path, state)
    back = open_adapter(tmp_path).read()
    targets = TargetSpec(modules=("q_proj", "v_proj"), layers=(0, 1), layers_pattern=("layers",))
    assert back.meta == AdapterMeta(base="org/base-ä", revision="abc123", task_type="CAUSAL_LM", targets=targets)
    assert list(back.updates) == sorted(state.updates)
    for module, update in back.updates.items():
        assert update.scale == 1.0
        assert torch.equal(update.b, state.updates[module].b)
        torch.testing.assert_close(update.dense(), state.updates[module].dense(), rtol=1e-6, atol=1e-6)


def test_reading_and_writing_again_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_adapter(tmp_path / "one", small())
    write_adapter(tmp_path / "two", open_adapter(tmp_path / "one").read())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@given(made=st.lists(updates(dtype=torch.float32), min_size=1, max_size=4))
def test_any_update_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, made: list[LowRank]) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    state = AdapterState.of_updates(
        AdapterMeta(base=None, targets=TargetSpec(modules=r".*\.m\d")),
        {f"layers.{index}.m{index}": update for index, update in enumerate(made)},
    )
    write_adapter(folder, state)
    back = open_adapter(folder).read()
    assert back.meta == state.meta
    for module, update in state.updates.items():
        assert back.updates[module].rank <= update.rank  # zeros at the end are taken for padding
        error = (back.updates[module].to(torch.float64).dense() - update.to(torch.float64).dense()).norm()
        assert error <= 1e-6 * abs(update.scale) * float(update.a.norm() * update.b.norm())


@pytest.mark.parametrize(
    "targets",
    [
        TargetSpec(modules=("q_proj",)),
        TargetSpec(modules=r"model\.layers\.\d+\.attn\.(q|v)_proj"),
        TargetSpec(modules=("q_proj",), layers=(0, 3), layers_pattern=("blocks", "layers")),
        TargetSpec(modules=("q_proj",), exclude=("lm_head", "x.q_proj")),
        TargetSpec(modules=("q_proj",), exclude=r".*vision.*"),
    ],
    ids=["suffix", "regex", "layers", "exclude", "exclude-regex"],
)
def test_targets_survive_the_round_trip(tmp_path: Path, targets: TargetSpec) -> None:
    meta = AdapterMeta(base="org/base", targets=targets, fan_in_fan_out=True)
    write_adapter(tmp_path, AdapterState.of_updates(meta, {Q0: small().updates[Q0]}))
    assert open_adapter(tmp_path).meta == meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_storage_dtype_is_the_one_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    write_adapter(tmp_path, small(), dtype=dtype)
    back = open_adapter(tmp_path).read().updates[V0]
    assert back.a.dtype == back.b.dtype == dtype
    torch.testing.assert_close(
        back.to(torch.float64).dense(),
        small().updates[V0].to(torch.float64).dense(),
        rtol=0,
        atol=4 * torch.finfo(dtype).eps * 10 + 1e-6,
    )


def test_a_scale_is_applied_to_half_precision_factors_in_float32(tmp_path: Path) -> None:
    """1.001 is a float32 and no bfloat16: a product taken in bfloat16 would be 1."""
    update = LowRank(b=torch.ones(1, 1).bfloat16(), a=torch.ones(1, 1).bfloat16(), scale=1.001)
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=("m",)))
    write_adapter(tmp_path, AdapterState.of_updates(meta, {"m": update}))
    assert open_adapter(tmp_path).read().updates["m"].a.item() == pytest.approx(1.001, rel=1e-7)


@pytest.mark.parametrize(("scale", "dtype"), [(1e10, torch.float16), (1e39, torch.bfloat16), (1e39, torch.float32)])
def test_a_delta_that_overflows_the_storage_dtype_is_refused(tmp_path: Path, scale: float, dtype: torch.dtype) -> None:
    update = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2), scale=scale)
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=("m",)))
    with refuses("write.overflow: 'm'"):
        write_adapter(tmp_path, AdapterState.of_updates(meta, {"m": update}), dtype=dtype)
    assert contents(tmp_path) == {}


def test_one_update_may_stand_in_two_modules(tmp_path: Path) -> None:
    update = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=("x", "y")))
    write_adapter(tmp_path, AdapterState.of_updates(meta, {"x": update, "y": update}))
    assert set(open_adapter(tmp_path).modules) == {"x", "y"}


def test_factors_that_are_views_are_written_whole(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    update = LowRank(b=table[:, ::3], a=table.T[1:3])
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=("m",)))
    write_adapter(tmp_path, AdapterState.of_updates(meta, {"m": update}))
    assert torch.equal(open_adapter(tmp_path).read().updates["m"].dense(), update.dense())


def test_a_module_whose_path_ends_like_another_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT matches the end of a path, so a pattern for `layers.0.q` must not hit `vision.layers.0.q`."""
    ranks = {"layers.0.q": 2, "layers.1.q": 1, "vision.layers.0.q": 1, "vision.layers.1.q": 1}
    state = AdapterState.of_updates(
        AdapterMeta(base=None, targets=TargetSpec(modules=("q",))),
        {m: LowRank(b=torch.ones(3, r), a=torch.ones(r, 3)) for m, r in ranks.items()},
    )
    write_adapter(tmp_path, state, compact=True)
    assert {m: header.rank for m, header in open_adapter(tmp_path).modules.items()} == ranks
    from peft.utils.other import get_pattern_key

    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config[name]
        assert {m: pattern.get(get_pattern_key(pattern, m), config["r"]) for m in ranks} == ranks


def test_headers_are_read_without_a_tensor(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q0: (3, 4, 2), V0: (5, 4, 1)}, alpha=8)
    source = open_adapter(tmp_path)
    assert list(source.modules) == [Q0, V0]
    header = source.modules[V0]
    assert (header.out, header.into, header.rank, header.scale) == (5, 4, 1, 8.0)
    assert "_file" not in source.__dict__


def test_the_digest_is_of_both_files(tmp_path: Path) -> None:
    import hashlib

    write_lora(tmp_path, {Q0: (3, 4, 2)})
    weights, config = open_adapter(tmp_path).digest.split("+")
    assert weights == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    assert config == hashlib.sha256((tmp_path / CONFIG).read_bytes()).hexdigest()


def test_the_name_is_that_of_the_folder_however_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "align-de", {Q0: (3, 4, 2)})
    monkeypatch.chdir(tmp_path / "align-de")
    assert open_adapter(".").name == "align-de"
    assert open_adapter(tmp_path / "align-de" / ".." / "align-de").name == "align-de"


def test_writing_leaves_the_state_untouched(tmp_path: Path) -> None:
    state = small()
    before = {module: (update.a._version, update.a.clone()) for module, update in state.updates.items()}
    write_adapter(tmp_path, state)
    for module, (version, copy) in before.items():
        assert state.updates[module].a._version == version
        assert torch.equal(state.updates[module].a, copy)


class TestScales:
    """alpha/r, alpha/sqrt(r), and the patterns, against deltas computed beside the code."""

    MODULES: ClassVar = {Q0: (4, 3, 2), Q1: (4, 3, 4), V0: (2, 3, 1)}

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("alpha", [16, 0.5, -2.0, 0, {Q0: 4, Q1: 32.0, V0: 1}])
    def test_a_delta_is_scaled_by_its_own_rank_and_alpha(
        self, tmp_path: Path, alpha: float | dict[str, float], rslora: bool
    ) -> None:
        exact = write_lora(tmp_path, self.MODULES, alpha=alpha, rslora=rslora, dtype=torch.float64)
        read = open_adapter(tmp_path).read().updates
        for module, delta in exact.items():
            torch.testing.assert_close(read[module].dense(), delta, rtol=1e-12, atol=1e-12)

    def test_the_exact_deltas_of_the_factory_agree_with_a_second_reading(self, tmp_path: Path) -> None:
        exact = write_lora(tmp_path, self.MODULES, alpha={Q0: 4, Q1: 32.0, V0: 1}, rslora=True)
        for module, delta in adapter_deltas(tmp_path).items():
            torch.testing.assert_close(delta, exact[module], rtol=1e-12, atol=1e-12)

    def test_a_pattern_matches_the_end_of_a_path(self, tmp_path: Path) -> None:
        write_lora(
            tmp_path,
            {Q0: (4, 3, 2), Q1: (4, 3, 2), V0: (2, 3, 1), "model.layers.0.attn.xq_proj": (2, 3, 2)},
            alpha=2,
            rank_pattern={"v_proj": 1},
            alpha_pattern={"q_proj": 8},
        )
        scales = {module: header.scale for module, header in open_adapter(tmp_path).modules.items()}
        assert scales == {Q0: 4.0, Q1: 4.0, V0: 2.0, "model.layers.0.attn.xq_proj": 1.0}

    def test_the_first_pattern_that_matches_wins(self, tmp_path: Path) -> None:
        write_lora(
            tmp_path,
            {Q0: (4, 3, 2), Q1: (4, 3, 2)},
            alpha=2,
            alpha_pattern={r"^model\.layers\.1\..*": 6, "q_proj": 8, r"layers\.0\.attn\.q_proj": 10},
        )
        scales = {module: header.scale for module, header in open_adapter(tmp_path).modules.items()}
        assert scales == {Q0: 4.0, Q1: 3.0}

    def test_patterns_are_read_as_peft_reads_them(self, tmp_path: Path) -> None:
        from peft.utils.other import get_pattern_key

        patterns = {r"layers\.[01]\.attn\.q": 3, "q_proj|v_proj": 5, r"^model\.layers\.0": 7}
        write_lora(tmp_path, {Q0: (4, 3, 1), Q1: (4, 3, 1), V0: (2, 3, 1)}, alpha=2, alpha_pattern=patterns)
        for module, header in open_adapter(tmp_path).modules.items():
            assert header.scale == patterns.get(get_pattern_key(patterns, module), 2)

    def test_rslora_divides_by_the_root(self, tmp_path: Path) -> None:
        write_lora(tmp_path, {Q0: (4, 3, 3)}, alpha=6, rslora=True)
        assert open_adapter(tmp_path).modules[Q0].scale == pytest.approx(6 / math.sqrt(3), rel=1e-15)


def test_layers_to_transform_may_be_one_number(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q0: (4, 3, 2)}, layers_to_transform=0, layers_pattern="layers")
    targets = open_adapter(tmp_path).meta.targets
    assert targets == TargetSpec(modules=("q_proj",), layers=(0,), layers_pattern=("layers",))


def test_an_adapter_that_peft_made_is_read(tmp_path: Path, base: Path) -> None:
    from peft import LoraConfig

    from ..factories import load_with_peft, peft_lora

    peft_lora(
        base,
        tmp_path / "a",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3},
        layers_to_transform=[1, 2],
    )
    assert LoraConfig.from_pretrained(tmp_path / "a").r == 4
    model = load_with_peft(base, tmp_path / "a")
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    read = open_adapter(tmp_path / "a").read()
    assert set(read.updates) == set(expected)
    for module, update in read.updates.items():
        torch.testing.assert_close(update.dense(), expected[module], rtol=1e-6, atol=1e-7)
    assert read.meta.targets.layers == (1, 2)
    assert read.meta.base == str(base)


def test_what_is_written_peft_reads_with_the_same_deltas(tmp_path: Path, base: Path) -> None:
    from ..factories import load_with_peft, peft_lora

    peft_lora(base, tmp_path / "a", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    state = open_adapter(tmp_path / "a").read()
    (tmp_path / "b").mkdir()
    write_adapter(tmp_path / "b", state)
    for name, module in load_with_peft(base, tmp_path / "b").named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            expected = state.updates[name.removeprefix("base_model.model.")].dense()
            torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-7)


def test_a_manifest_beside_the_adapter_is_read(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q0: (4, 3, 2)})
    (tmp_path / "adaptermix.json").write_text('{"kind": "train-task", "base": {"fingerprint": "f00d"}}')
    meta = open_adapter(tmp_path).meta
    assert meta.manifest["kind"] == "train-task"
    assert meta.base_fingerprint == "f00d"


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"base": null}', '{"base": {"fingerprint": 3}}'])
def test_a_manifest_without_a_fingerprint_gives_none(tmp_path: Path, manifest: str) -> None:
    write_lora(tmp_path, {Q0: (4, 3, 2)})
    (tmp_path / "adaptermix.json").write_text(manifest)
    assert open_adapter(tmp_path).meta.base_fingerprint is None
