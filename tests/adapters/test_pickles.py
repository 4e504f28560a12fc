"""The old pickle format: only where it is allowed, and never with code in it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix.adapters import open_adapter
from adaptermix.errors import AdapterFormatError, AdapterMixError

from ..factories import WEIGHTS, key
from ..refusals import refuses
from .test_hostile import Q, bounded, check_line, sound


def pickled(folder: Path, content: object = None, **options: Any) -> Path:
    from safetensors.torch import load_file

    sound(folder)
    torch.save(load_file(folder / WEIGHTS) if content is None else content, folder / "adapter_model.bin", **options)
    (folder / WEIGHTS).unlink()
    return folder


def test_it_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    expected = open_adapter(sound(tmp_path / "sound")).read()
    source = open_adapter(pickled(tmp_path / "old"), allow_pickle=True)
    back = source.read()
    for module, update in expected.updates.items():
        assert torch.equal(back.updates[module].dense(), update.dense())
    assert len(source.digest) == 129


def test_otherwise_the_option_is_named(tmp_path: Path) -> None:
    with refuses("adapter-file.pickle-only"):
        open_adapter(pickled(tmp_path))


def test_safetensors_come_first(tmp_path: Path) -> None:
    pickled(tmp_path, {"x": torch.ones(1)})
    sound(tmp_path)
    assert open_adapter(tmp_path, allow_pickle=True).file.path.name == WEIGHTS


@pytest.mark.parametrize(
    "content",
    [
        os.getcwd,
        {"x": os.getcwd},
        {key(Q, "A"): Path("x")},
        [torch.ones(1)],
        {1: torch.ones(1)},
        {key(Q, "A"): 3},
        {key(Q, "A"): torch.ones(1).expand(10**6, 10**6)},
        {key(Q, "A"): torch.ones(2, 3).to_sparse()},
        {key(Q, "A"): torch.ones(2, 3).to(torch.complex64)},
        {key(Q, "A"): torch.ones(2, 3)},
        {key(Q, "A"): torch.full((2, 3), torch.nan), key(Q, "B"): torch.ones(4, 2)},
        {},
    ],
    ids=["code", "code-within", "object", "list", "number-key", "number", "huge-view", "sparse", "complex", "half",
         "nan", "empty"],
)  # fmt: skip
def test_anything_but_a_lora_of_plain_tensors_is_refused(tmp_path: Path, content: object) -> None:
    folder = pickled(tmp_path, content)
    with bounded(), pytest.raises(AdapterFormatError) as caught:
        open_adapter(folder, allow_pickle=True).read()
    assert len(str(caught.value).splitlines()) == 1


def test_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    folder = pickled(tmp_path / "a", {key(Q, "A"): Trap()})
    with refuses("pickle.not-tensors"):
        open_adapter(folder, allow_pickle=True)
    assert not (tmp_path / "trapped").exists()


def test_the_format_without_an_archive_is_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path, _use_new_zipfile_serialization=False)
    with refuses("pickle.archive"):
        open_adapter(folder, allow_pickle=True)


def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    import zipfile

    folder = pickled(tmp_path)
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with bounded(), refuses("pickle.compressed"):
        open_adapter(folder, allow_pickle=True)


@pytest.mark.parametrize("seed", range(20))
def test_changed_bytes_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = pickled(tmp_path)
    data = (folder / "adapter_model.bin").read_bytes()
    for _ in range(5):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4])):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        (folder / "adapter_model.bin").write_bytes(changed)
        try:
            open_adapter(folder, allow_pickle=True).read()
        except AdapterMixError as error:
            check_line(error)
