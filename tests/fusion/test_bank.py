"""Source states are the same in memory, on disk, and read anew."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from adaptermix.evaluation import evaluate
from adaptermix.fusion import bank
from adaptermix.fusion import state_cache as kept
from adaptermix.fusion.state_cache import StateCache
from adaptermix.io import memory
from adaptermix.options import EvaluateSettings
from adaptermix.training.fusion import train_fusion
from tests.training.data import Notes

from .test_commands import settings, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Usage(NamedTuple):
    free: int


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets what is free, and has temporary files in a folder of their own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def free(*, on_disk: int, in_memory: int = 0) -> Path:
        monkeypatch.setattr(kept, "free_memory", lambda _device: in_memory)
        monkeypatch.setattr(kept, "free_disk", lambda _folder: on_disk)
        return folder

    return free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_comes_back_to_the_bit(dtype: torch.dtype, room: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, count, 8, generator=generator).to(dtype) for count in (5, 1, 7, 2)]
    tensors[1][0, 0, 0] = torch.nan
    first = tensors[0].nbytes
    folder = room(on_disk=1000, in_memory=4 * first)  # a quarter: room for one
    found = StateCache()
    for number, tensor in enumerate(tensors):
        found.add(number, tensor.transpose(0, 1).contiguous().transpose(0, 1))
    assert found._in_memory.keys() == {0}
    assert found._written.keys() == {1, 2, 3}
    assert all(number in found for number in range(4))
    for number in (3, 1, 0, 2, 2):
        back = found[number]
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), tensors[number].view(torch.uint8))
    file = found._file
    assert file.seek(0, 2) == sum(tensor.nbytes for tensor in tensors[1:])
    del found
    gc.collect()
    assert file.closed
    assert not list(folder.iterdir())


def test_a_part_of_the_disk_stays_free(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(25, dtype=torch.float32)
    room(on_disk=500)
    left = [500]
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage(left[0]))
    found = StateCache()
    for number in range(9):
        found.add(number, tensor)
        left[0] -= 100 * (number in found)
    assert [number in found for number in range(9)] == [True] * 4 + [False] * 5
    # it is not asked again once it was full
    left[0] = 10**6
    found.add(9, tensor)
    assert 9 not in found


def test_a_disk_that_cannot_be_written_to_is_none(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room(on_disk=10**9)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    found = StateCache()
    found.add(0, torch.zeros(3))
    assert 0 not in found


def test_files_that_lie_in_memory_are_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Mount(NamedTuple):
        mountpoint: str
        fstype: str

    (tmp_path / "inner").mkdir()
    mounts = [Mount("/", "ext4"), Mount(str(tmp_path.resolve() / "inner"), "tmpfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
    assert memory.free_disk(tmp_path / "inner") == 0
    assert memory.free_disk(tmp_path) > 0


def test_the_same_adapter_comes_of_states_in_memory_on_disk_and_read_anew(
    encoder: Path, tmp_path: Path, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = bank.read_sources
    monkeypatch.setattr(bank, "read_sources", lambda *given, **more: reads.append(1) or real(*given, **more))
    rows = "".join(f"{'good' if row % 2 else 'bad'} {'so ' * (row % 5)}{row},{row % 2}\n" for row in range(20))
    (tmp_path / "own.en.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "own.jv.csv").write_text("text,label\n" + "".join(f"xq {row % 7} zw,{row % 2}\n" for row in range(20)))
    files = {"source": [str(tmp_path / "own.en.csv")], "train": [str(tmp_path / "own.jv.csv")]}
    found = {}
    for name, free in {
        "memory": {"on_disk": 0, "in_memory": 2**30},
        "disk": {"on_disk": 2**30},
        "both": {"on_disk": 2**30, "in_memory": 2**18},
        "neither": {"on_disk": 0},
    }.items():
        folder = room(**free)
        reads.clear()
        train_fusion(settings(encoder, tmp_path, steps=12, batch_size=5, overwrite=True, **files))
        gc.collect()
        assert not list(folder.iterdir())
        found[name] = (tmp_path / "fused" / "adapter_model.safetensors").read_bytes(), len(reads)
    counts = {name: count for name, (_, count) in found.items()}
    assert counts["memory"] == counts["disk"] == counts["both"] < counts["neither"] / 2  # of three times
    assert len({adapter for adapter, _ in found.values()}) == 1


@pytest.mark.parametrize("fusion", ["add", "mul", "input"])
def test_rows_without_a_source_have_a_plain_lora_and_are_counted(fusion: str, encoder: Path, tmp_path: Path) -> None:
    gaps = Path(write_rows(tmp_path, "gaps.en.csv", says=True))
    lines = gaps.read_text().splitlines()
    gaps.write_text(
        "\n".join(line if number % 3 else f"-,{line.split(',')[1]}" for number, line in enumerate(lines, 2))
    )
    lines = gaps.read_text().splitlines()
    gaps.write_text("\n".join(["text,label", *lines[1:]]) + "\n")
    none = tmp_path / "none.en.csv"
    none.write_text("\n".join(["text,label", *(f"-,{line.split(',')[1]}" for line in lines[1:])]) + "\n")
    notes = Notes()
    train_fusion(settings(encoder, tmp_path, fusion=fusion, source=[str(gaps)], steps=12), watch=notes)
    assert any("8 of 24 rows have no source" in note for note in notes.said)
    document = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())
    assert document["fusion"]["rows_without_source"] == 8

    def answers(source: list[str], size: int = 32) -> tuple[list[str], int | None]:
        asked = EvaluateSettings(
            base=str(encoder),
            adapter=str(tmp_path / "fused"),
            task="classify",
            data=[str(tmp_path / "jv.csv")],
            source=source,
            device="cpu",
            dtype="float32",
            batch_size=size,
        )
        found = evaluate(asked)
        return list(found.answers), found.without_source

    some, count = answers([str(gaps)])
    assert count == 8
    assert answers([str(gaps)], size=1) == (some, 8)  # a batch of which no row has a source too
    alone = answers([])[0]
    assert answers([str(none)])[0] == alone
    whole = answers([str(tmp_path / "en.csv")])[0] if write_rows(tmp_path, "en.csv", says=True) else []
    missing = [line.startswith("-,") for line in gaps.read_text().splitlines()[1:]]
    assert some == [alone[row] if is_missing else whole[row] for row, is_missing in enumerate(missing)]
