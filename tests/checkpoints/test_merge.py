"""Merged checkpoints, against mergekit, against sums in float64, and as transformers loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from adaptermix.cli import adaptermix as command
from adaptermix.errors import OutputError
from adaptermix.merging.checkpoints import merge_checkpoints
from adaptermix.progress import Advance, Look

from ..analysis.models import write_model
from ..factories import contents, load_base
from ..refusals import refuses
from .models import logits, rewrite, tensors_of, tune


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models tuned from the tiny Llama; never written to."""
    folder = tmp_path_factory.mktemp("tuned")
    return tune(base, folder / "one", seed=1), tune(base, folder / "two", seed=2)


class TestAgainstMergekit:
    @pytest.mark.parametrize(
        ("ours", "options", "theirs", "parameters"),
        [
            ("task-arithmetic", {}, "task_arithmetic", {}),
            ("task-arithmetic", {"gain": 0.7}, "task_arithmetic", {"lambda": 0.7}),
            ("ties", {"density": 0.25, "order": "scale-first"}, "ties", {"density": 0.25}),
            ("ties", {"density": 1.0, "order": "scale-first", "normalize": False}, "ties", {"normalize": False}),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_tensors_are_equal(
        self,
        ours: str,
        options: dict[str, Any],
        theirs: str,
        parameters: dict[str, Any],
        base: Path,
        pair: tuple[Path, Path],
        tmp_path: Path,
    ) -> None:
        mergekit = pytest.importorskip("mergekit.merge_methods")
        merge_checkpoints(base, pair, [0.9, 0.4], method=ours, options=options, out=tmp_path / "out")
        expected = mergekit.merge_state_dicts(
            {"base": tensors_of(base), "one": tensors_of(pair[0]), "two": tensors_of(pair[1])},
            theirs,
            base="base",
            parameters={"weight": {"one": 0.9, "two": 0.4}, **parameters},
        )
        found = tensors_of(tmp_path / "out")
        assert set(found) == set(expected)
        for key, tensor in found.items():
            assert torch.allclose(tensor, expected[key], rtol=0, atol=5e-7), key


def test_the_model_loads_and_acts_as_a_sum_in_float64(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge_checkpoints(base, pair, [0.6, -0.3], out=tmp_path / "out")
    own, one, two = (tensors_of(path) for path in (base, *pair))
    wanted = {k: w.double() + 0.6 * (one[k].double() - w) - 0.3 * (two[k].double() - w) for k, w in own.items()}
    model = load_base(base).double()
    model.load_state_dict(wanted)
    assert torch.allclose(logits(load_base(tmp_path / "out")), logits(model), atol=1e-5)
    for key, module in report.modules.items():
        assert module.norm == pytest.approx(float((wanted[key] - own[key].double()).norm()), rel=1e-4)
        assert module.rank is None
    document = report.document()
    assert set(document) >= {"out", "method", "weights", "residual", "modules"}
    assert json.loads((tmp_path / "out" / "adaptermix.json").read_text())["artifact"] == "checkpoint"
    assert "PeftModel" not in (tmp_path / "out" / "README.md").read_text()


def test_a_single_weight_is_split_between_two(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert merge_checkpoints(base, pair, [0.9]).weights == (0.9, 0.1)


@pytest.mark.parametrize("method", ["exact", "dare-ties"])
def test_shards_and_folder_names_change_nothing(
    method: str, base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def merged(name: str, *paths: Path, **more: Any) -> Path:
        given = {"method": method, "seed": 3, "out": tmp_path / name, **more}
        merge_checkpoints(paths[0], paths[1:], [0.5, 0.5], **given)
        return tmp_path / name

    sharded = [
        rewrite(base, tmp_path / f"s{n}", tensors_of(path), shards=n + 2) for n, path in enumerate((base, *pair))
    ]
    first, second = merged("a", base, *pair), merged("b", *sharded)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    third = merged("c", *sharded, shard_size="20KB")
    found = tensors_of(third)
    assert all(torch.equal(tensor, found[key]) for key, tensor in tensors_of(first).items())
    index = json.loads((third / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    count = len(set(index["weight_map"].values()))
    assert count > 3
    assert f"model-00001-of-{count:05d}.safetensors" in index["weight_map"].values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert torch.equal(logits(load_base(third)), logits(load_base(first)))


def test_random_methods_follow_their_seed(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge_checkpoints(
            base, pair, [1, 1], method="dare-linear", options={"density": 0.5}, seed=seed, out=tmp_path / name
        )
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_model_of_weight_zero_has_no_say(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In a mean over the updates that are not zero it would count."""
    merge_checkpoints(base, pair, [0.9, 0.0], method="ties", out=tmp_path / "both")
    merge_checkpoints(base, pair[:1], [0.9], method="ties", out=tmp_path / "one")
    one, both = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "both")
    assert all(torch.equal(both[key], tensor) for key, tensor in one.items())


def test_a_whole_model_scope_is_fitted_first(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    own = {f"layers.{n}.weight": torch.randn(20, 10, generator=generator) for n in range(5)}
    one = {f"layers.{n}.weight": torch.randn(20, 10, generator=generator) * n for n in range(5)}
    base = write_model(tmp_path / "base", own)
    tuned = write_model(tmp_path / "one", {key: tensor + one[key] for key, tensor in own.items()})
    options = {"density": 0.2, "scope": "model"}
    merge_checkpoints(base, [tuned], [1.0], method="ties", options=options, out=tmp_path / "out")
    kept = {key: int((tensor != own[key]).sum()) for key, tensor in tensors_of(tmp_path / "out").items()}
    assert sum(kept.values()) == 200
    assert kept["layers.0.weight"] == 0
    assert kept["layers.4.weight"] > kept["layers.2.weight"]


class TestStorage:
    def test_half_precision_is_rounded_once(self, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
        halves = []
        for name, path in zip(("base", "one", "two"), (base, *pair), strict=True):
            tensors = {key: tensor.bfloat16() for key, tensor in tensors_of(path).items()}
            halves.append(rewrite(base, tmp_path / name, tensors))
        merge_checkpoints(halves[0], halves[1:], [0.7, 0.3], out=tmp_path / "half")
        merge_checkpoints(halves[0], halves[1:], [0.7, 0.3], out=tmp_path / "full", dtype="float32")
        half, full = tensors_of(tmp_path / "half"), tensors_of(tmp_path / "full")
        assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in full.values()} == {torch.float32}
        assert all(torch.equal(tensor, full[key].bfloat16()) for key, tensor in half.items())
        assert json.loads((tmp_path / "full" / "config.json").read_text())["dtype"] == "float32"

    def test_tensors_that_no_model_changed_keep_their_bits(self, base: Path, tmp_path: Path) -> None:
        own = tensors_of(base)
        own["model.norm.weight"][0] = -0.0
        changed = dict(own) | {"lm_head.weight": own["lm_head.weight"] + 1}
        start = rewrite(base, tmp_path / "base", own)
        merge_checkpoints(start, [rewrite(base, tmp_path / "one", changed)], [0.5], out=tmp_path / "out")
        found = tensors_of(tmp_path / "out")
        assert str(float(found["model.norm.weight"][0])) == "-0.0"
        assert torch.allclose(found["lm_head.weight"], own["lm_head.weight"] + 0.5)

    def test_buffers_of_whole_numbers_are_copied_if_they_agree(self, base: Path, tmp_path: Path) -> None:
        own = tensors_of(base) | {"model.position_ids": torch.arange(5), "model.scale": torch.tensor(2.0)}
        start = rewrite(base, tmp_path / "base", own)
        one = rewrite(base, tmp_path / "one", own | {"model.scale": torch.tensor(4.0)})
        merge_checkpoints(start, [one], [0.5], out=tmp_path / "out")
        found = tensors_of(tmp_path / "out")
        assert torch.equal(found["model.position_ids"], torch.arange(5))
        assert found["model.scale"] == 3
        two = rewrite(base, tmp_path / "two", own | {"model.position_ids": torch.arange(5) + 1})
        with refuses(r"checkpoint.whole-numbers: model\.position_ids"):
            merge_checkpoints(start, [two], [0.5], out=tmp_path / "no")
        assert not (tmp_path / "no").exists()

    def test_an_overflow_of_the_storage_dtype_is_refused(self, base: Path, tmp_path: Path) -> None:
        own = tensors_of(base)
        one = rewrite(base, tmp_path / "one", own | {"model.norm.weight": own["model.norm.weight"] * 1e5})
        with refuses("write.overflow: float16"):
            merge_checkpoints(base, [one], [1.0], out=tmp_path / "out", dtype="float16")
        assert not (tmp_path / "out").exists()

    def test_other_files_of_the_base_go_along(self, causal: Path, tmp_path: Path) -> None:
        start = rewrite(causal, tmp_path / "base", tensors_of(causal))
        (start / "LICENSE").write_text("terms")
        (start / "README.md").write_text("the base's card")
        (start / "training_args.bin").write_bytes(b"no")
        merge_checkpoints(start, [tune(start, tmp_path / "one")], [1.0], out=tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names >= {"config.json", "tokenizer.json", "generation_config.json", "LICENSE", "model.safetensors"}
        assert "training_args.bin" not in names
        assert "the base's card" not in (tmp_path / "out" / "README.md").read_text()


class TestTiedHeads:
    def test_a_head_may_be_missing_where_it_is_tied(self, base: Path, tmp_path: Path) -> None:
        own = tensors_of(base)
        own["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
        with_head = rewrite(base, tmp_path / "base", own)
        bare = {key: tensor for key, tensor in own.items() if key != "lm_head.weight"}
        moved = bare | {"model.embed_tokens.weight": own["model.embed_tokens.weight"] + 1}
        one = rewrite(base, tmp_path / "one", moved)
        merge_checkpoints(with_head, [one], [0.5], out=tmp_path / "out")
        found = tensors_of(tmp_path / "out")
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
        assert torch.allclose(found["lm_head.weight"], own["lm_head.weight"] + 0.5)
        without = rewrite(base, tmp_path / "bare", bare)
        merge_checkpoints(without, [with_head, one], [0.5, 0.5], out=tmp_path / "other")
        assert "lm_head.weight" not in tensors_of(tmp_path / "other")

    def test_a_head_of_its_own_is_not_dropped(self, base: Path, tmp_path: Path) -> None:
        own = tensors_of(base)
        bare = rewrite(base, tmp_path / "bare", {k: t for k, t in own.items() if k != "lm_head.weight"})
        with refuses(r"checkpoint.other-tensors: with lm_head\.weight.*1"):
            merge_checkpoints(bare, [base], [1.0], out=tmp_path / "out")


class TestRefusals:
    def test_other_tensors(self, base: Path, tmp_path: Path) -> None:
        tensors = {key: tensor for key, tensor in tensors_of(base).items() if "layers.3" not in key}
        other = rewrite(base, tmp_path / "one", tensors | {"extra": torch.ones(2)})
        with refuses(r"checkpoint.other-tensors: without model\.layers\.3\..*,.*,.*10"):
            merge_checkpoints(base, [other], [1.0])

    def test_other_shapes(self, base: Path, tmp_path: Path) -> None:
        other = rewrite(base, tmp_path / "one", tensors_of(base) | {"model.norm.weight": torch.ones(3)})
        with refuses(r"checkpoint.shapes: model\.norm\.weight"):
            merge_checkpoints(base, [other], [1.0])

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ({"weights": [1.0, 1.0, 1.0]}, "merge.weights-count: got 3 for 2"),
            ({"method": "nothing"}, "method.unknown"),
            ({"method": "fisher"}, "checkpoint.statistics"),
            ({"dtype": "int8"}, "option.dtype"),
            ({"shard_size": "much"}, "checkpoint.shard-size"),
        ],
    )
    def test_impossible_requests(
        self, given: dict[str, Any], match: str, base: Path, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        with refuses(match):
            merge_checkpoints(base, pair, **{"weights": [1.0, 1.0], "out": tmp_path / "out", **given})
        assert not list(tmp_path.iterdir())

    def test_an_input_is_not_replaced(self, base: Path, pair: tuple[Path, Path]) -> None:
        before = contents(pair[0])
        with pytest.raises(OutputError):
            merge_checkpoints(base, pair, [1.0, 1.0], out=pair[0], overwrite=True)
        assert contents(pair[0]) == before


class _Interrupt:
    """A watcher that stops the work in its middle."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(count: int, text: str) -> None:
            nonlocal done
            done += count
            if label == "write" and done > total // 2:
                raise KeyboardInterrupt

        yield advance

    def note(self, message: str) -> None:
        pass

    def look(self, look: Look) -> None:
        pass


class TestWholeOrNotAtAll:
    def test_an_interrupted_merge_leaves_nothing(self, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(base, pair, [1, 1], out=tmp_path / "out", shard_size="20KB", watch=_Interrupt())
        assert not list(tmp_path.iterdir())

    def test_an_earlier_output_survives_it(self, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
        merge_checkpoints(base, pair, [1, 1], out=tmp_path / "out")
        before = contents(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(base, pair, [1, 0], out=tmp_path / "out", overwrite=True, watch=_Interrupt())
        assert contents(tmp_path) == before
        merge_checkpoints(base, pair, [1, 0], out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path) != before

    def test_nothing_is_written_without_an_out(self, base: Path, pair: tuple[Path, Path]) -> None:
        before = contents(base.parent)
        report = merge_checkpoints(base, pair, [1, 1])
        assert report.out is None
        assert report.norm > 0
        assert contents(base.parent) == before


def test_the_command_merges_checkpoints(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["merge", *map(str, pair), "--base", str(base), "--weights", "0.9", "--method", "ties", "--json"]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["method"], document["weights"]) == ("ties", [0.9, 0.1])
    merge_checkpoints(base, pair, [0.9], method="ties", out=tmp_path / "other")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


# getrusage would not do: what it reports outlives exec, so it begins with the memory of the tests.
_PROGRAM = r"""
import re, sys
from pathlib import Path
from adaptermix.merging.checkpoints import merge_checkpoints
base, one, two, small, out = sys.argv[1:]
merge_checkpoints(small, [small], [1.0], out=out + "-small")
def kib(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kib("VmRSS")
merge_checkpoints(base, [one, two], [0.5, 0.5], method="ties", out=out, shard_size="100MB")
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' account of memory")
def test_memory_is_that_of_a_few_tensors(base: Path, tmp_path: Path) -> None:
    side, count = 2048, 12  # 16 MiB each, 200 MB in all
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    for shift, name in enumerate(("base", "one", "two")):
        tensors = {f"layers.{n}.weight": noise.roll(100 * n + shift) for n in range(count)}
        rewrite(base, tmp_path / name, tensors)
        del tensors
    paths = [tmp_path / "base", tmp_path / "one", tmp_path / "two", base, tmp_path / "out"]
    # Freed blocks go back to the system at once, or the peak would be the allocator's.
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"},
    )
    largest = side * side * 4 // 1024
    peak = int(done.stdout)
    print(f"peak {peak / largest:.2f} times the largest tensor")  # noqa: T201
    # Two deltas, their merge and a mapped file, and blocks of a fixed size; the three models are 36 tensors.
    assert peak < 6 * largest + 80_000, f"{peak} KiB, largest tensor {largest} KiB"
