"""Checkpoints as they are written: names, sizes, and what a delta may be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from adaptermix.checkpoints.writing import parse_size, plan_shards, write_checkpoint
from adaptermix.io.checkpoint_files import open_checkpoint

from ..analysis.models import decoder, write_model
from ..refusals import refuses
from .models import tensors_of

Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_deltas_are_added_and_all_else_is_copied(tmp_path: Path) -> None:
    own = decoder(dtype=torch.float16)
    base = open_checkpoint(write_model(tmp_path / "base", own))
    delta = torch.full((12, 8), 1e-4)
    (tmp_path / "out").mkdir()
    write_checkpoint(base, tmp_path / "out", {Q0: lambda: delta})
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found.pop(Q0), (own[Q0].float() + delta).half())
    assert all(torch.equal(tensor, own[key]) for key, tensor in found.items())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_sum_of_float64_tensors_is_in_float64(tmp_path: Path) -> None:
    own = decoder(dtype=torch.float64)
    base = open_checkpoint(write_model(tmp_path / "base", own))
    delta = torch.full((12, 8), 1e-12, dtype=torch.float64)
    (tmp_path / "out").mkdir()
    write_checkpoint(base, tmp_path / "out", {Q0: lambda: delta})
    assert torch.equal(tensors_of(tmp_path / "out")[Q0], own[Q0] + delta)


def test_shards_keep_to_the_size_and_to_the_order_of_the_blocks(tmp_path: Path) -> None:
    base = open_checkpoint(write_model(tmp_path / "base", decoder(layers=12), shards=4))
    shards = plan_shards(base, dtype=None, shard_size=4000)
    names = [name for shard in shards for name in shard.headers if "q_proj" in name]
    assert names == [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(12)]
    assert sorted(name for shard in shards for name in shard.headers) == sorted(base.tensors)
    sizes = [sum(t.numel() * 4 for t in (torch.empty(s) for _, s in shard.headers.values())) for shard in shards]
    assert all(size <= 4000 for size in sizes)
    assert shards[0].file == f"model-00001-of-{len(shards):05d}.safetensors"
    alone = plan_shards(base, dtype=None, shard_size=1)
    assert all(len(shard.headers) == 1 for shard in alone)
    assert [shard.file for shard in plan_shards(base, dtype=None, shard_size="1GB")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("5gib", 5 * 2**30), ("10 MB", 10**7), (7, 7), ("1KiB", 1024)]
)
def test_sizes_are_read_as_transformers_reads_them(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "1TB", "5 i", 0])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with refuses("checkpoint.shard-size"):
        parse_size(size)


class TestRefusals:
    def test_a_delta_for_no_tensor(self, tmp_path: Path) -> None:
        base = open_checkpoint(write_model(tmp_path / "base", decoder()))
        with refuses("base.no-tensor: nothing"):
            write_checkpoint(base, tmp_path, {"nothing": lambda: torch.ones(1)})

    def test_a_delta_of_another_shape(self, tmp_path: Path) -> None:
        base = open_checkpoint(write_model(tmp_path / "base", decoder()))
        with refuses(r"base.delta-shape: \[12, 8\].*\[8, 12\]"):
            write_checkpoint(base, tmp_path, {Q0: lambda: torch.ones(8, 12)})

    def test_a_base_of_packed_numbers(self, tmp_path: Path) -> None:
        weights = decoder() | {Q0: torch.ones(12, 8, dtype=torch.uint8)}
        base = open_checkpoint(write_model(tmp_path / "base", weights))
        with refuses("base.not-float: U8"):
            write_checkpoint(base, tmp_path, {Q0: lambda: torch.ones(12, 8)})

    def test_empty_tensors(self, tmp_path: Path) -> None:
        base = open_checkpoint(write_model(tmp_path / "base", {"x": torch.ones(2), "y": torch.ones(0, 3)}))
        with refuses("checkpoint.dtype: y"):
            write_checkpoint(base, tmp_path, {})


@pytest.mark.parametrize(
    "name", ["notes.txt", "LICENSE", "additional_chat_templates/one.jinja", "1_Pooling/config.json"]
)
def test_what_a_link_of_the_base_leads_to_is_not_copied(name: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", decoder())
    (tmp_path / "secret").write_text("{}")
    (base / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to("../" * len(Path(name).parts) + "secret")
    (tmp_path / "out").mkdir()
    with refuses(f"base.outside-link: '{name}'"):
        write_checkpoint(open_checkpoint(base), tmp_path / "out", {})
    assert not list((tmp_path / "out").iterdir())
    (base / name).unlink()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    shutil.rmtree(base / "1_Pooling", ignore_errors=True)
    (base / "1_Pooling").symlink_to(tmp_path / "1_Pooling", target_is_directory=True)
    with refuses(r"base.outside-link: 1_Pooling/config\.json"):
        write_checkpoint(open_checkpoint(base), tmp_path / "out", {})


def test_links_of_the_hubs_cache_and_inside_a_folder_are_followed(tmp_path: Path) -> None:
    """A folder of the cache holds links to blobs of the same repository; a folder may itself be reached by a link."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    write_model(snapshot, decoder())
    (blobs / "ab12").write_text("a licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/ab12")
    (snapshot / "vocab.txt").write_text("a b")
    (snapshot / "merges.txt").symlink_to("vocab.txt")
    (tmp_path / "linked").symlink_to(snapshot, target_is_directory=True)
    for number, base in enumerate((snapshot, tmp_path / "linked")):
        out = tmp_path / f"out{number}"
        out.mkdir()
        write_checkpoint(open_checkpoint(base), out, {})
        assert (out / "LICENSE").read_text() == "a licence"
        assert (out / "merges.txt").read_text() == "a b"
        assert not any(path.is_symlink() for path in out.iterdir())
    (tmp_path / "models--a--b" / "secret").write_text("not a blob")
    (snapshot / "README.txt").symlink_to("../../secret")
    with refuses("base.outside-link"):
        write_checkpoint(open_checkpoint(snapshot), out, {})


def test_a_disk_without_room_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    from adaptermix.io.disk import check_space

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000_000))
    check_space(tmp_path, 3_000_000_000)
    with refuses(r"disk.full: 3\.01.*3\.00"):
        check_space(tmp_path, 3_010_000_000)
