"""Rank and size of what is written, as the commands tell them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.publish.engines.vllm import VLLM_RANKS
from adaptermix.publish.output import size_sentence
from tests.checkpoints.models import linear_only, tune
from tests.factories import CONFIG, WEIGHTS, load_base, peft_kind, write_lora
from tests.loaders import check_one_meaning

from .test_merge_options import MODULES, NAMES, merged, pair, run

__all__ = ["pair"]


def test_merge_tells_rank_and_size_in_words_and_in_json(
    capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path
) -> None:
    for name, more in (("filled", []), ("compact", ["--compact"]), ("half", ["--dtype", "bfloat16"])):
        document = merged(capsys, pair, tmp_path / name, *more)
        size = (tmp_path / name / WEIGHTS).stat().st_size
        assert (document["rank"], document["bytes"]) == (4, size)
        stored = json.loads((tmp_path / name / "adaptermix.json").read_text())
        assert (stored["fidelity"]["rank"], stored["fidelity"]["bytes"]) == (4, size)
        assert stored["plan"].get("compact", False) == (name == "compact")
    code, _, err = run(capsys, "merge", *pair, "--weights", "0.9", "--out", tmp_path / "said")
    assert code == 0
    size = (tmp_path / "said" / WEIGHTS).stat().st_size
    assert f"rank 4, {size / 1e6:.3g} MB; vLLM needs --max-lora-rank 8\n" in err
    assert "lost to truncation 0.00%" in err
    _, _, err = run(capsys, "merge", *pair, "--weights", "0.9", "--dtype", "float16", "--dry-run", "--out", "x")
    assert "lost to truncation and rounding 0.0" in err
    assert "rank 4" in err


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (16, 16), (17, 32), (256, 256), (257, 320), (321, 512)])
def test_the_limit_of_vllm_is_the_least_that_it_takes(rank: int, limit: int) -> None:
    assert size_sentence(rank, 1_500_000) == f"rank {rank}, 1.5 MB; vLLM needs --max-lora-rank {limit}"
    assert limit in VLLM_RANKS


def test_a_rank_that_vllm_does_not_take_is_told() -> None:
    assert size_sentence(538, 499_000_000) == "rank 538, 499 MB; vLLM takes ranks up to 512 only"


def test_an_adapter_of_more_than_half_the_base_is_warned_of(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    one = peft_kind(load_base(base), tmp_path / "one", r=4, target_modules=names)
    two = peft_kind(load_base(base), tmp_path / "two", seed=1, r=12, target_modules=names)
    _, _, err = run(capsys, "merge", one, two, "--weights", "0.5", "--out", tmp_path / "large")
    whole = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    size = (tmp_path / "large" / WEIGHTS).stat().st_size
    assert size > 0.5 * whole
    assert f"warning: the adapter takes {size / 1e6:.3g} MB, {size / whole:.0%} of the base model's" in err
    _, _, err = run(capsys, "merge", one, "--weights", "0.5", "--out", tmp_path / "small")
    assert (tmp_path / "small" / WEIGHTS).stat().st_size <= 0.5 * whole
    assert "warning" not in err


def test_extract_tells_them_too(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "tuned", change=linear_only)
    asked = ["extract", "--base", base, "--tuned", tuned, "--rank", "auto", "--keep", "0.6"]
    code, text, err = run(capsys, *asked, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert json.loads(text)["bytes"] == size
    largest = json.loads((tmp_path / "out" / CONFIG).read_text())["r"]
    check_one_meaning(tmp_path / "out")
    _, _, err = run(capsys, *asked, "--out", tmp_path / "again", "--compact")
    assert f"rank {largest}, {(tmp_path / 'again' / WEIGHTS).stat().st_size / 1e6:.3g} MB; vLLM needs" in err
    assert (tmp_path / "again" / WEIGHTS).stat().st_size < size


def test_compact_is_refused_where_there_are_no_ranks(
    capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path
) -> None:
    code, _, err = run(
        capsys, "merge", *pair, "--weights", "0.9", "--form", "dense", "--compact", "--out", tmp_path / "out"
    )
    assert code == 1
    assert "--compact applies to the ranks of an adapter" in err
    assert not (tmp_path / "out").exists()


def test_concat_is_suggested_only_where_it_is_possible(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        write_lora(tmp_path / name, MODULES, seed=seed)
    pair = [tmp_path / name for name in NAMES]
    asked = ["merge", *pair, "--weights", "1,1", "--rank", "1", "--out", tmp_path / "out"]
    for method, forms in (("exact", "--form concat or dense"), ("ties", "--form dense")):
        code, _, err = run(capsys, *asked, "--method", method)
        assert code == 1
        assert f"{forms}, or accept it" in err
        assert not (tmp_path / "out").exists()
