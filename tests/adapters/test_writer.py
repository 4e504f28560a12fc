"""The streaming writer: safetensors' own bytes, one tensor at a time."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from adaptermix.io.safetensors_writer import file_order, stream_tensors, tensor_file, write_tensors

from ..refusals import refuses

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def mixed() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{place}.{str(dtype).removeprefix('torch.')}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for place, shape in [("b", (3,)), ("a", (2, 5)), ("ä \"'\\ ", (1, 2, 3))]
        for dtype in DTYPES
    }
    return made | {"single": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", mixed(), {"format": "pt"})
    back = load_file(tmp_path / "x")
    assert set(back) == set(mixed())
    for name, tensor in mixed().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    made = {name: torch.randn(3, 5).to(dtype) for name in ("b", "a", "c.d")} | {"w": torch.randn(2).double()}
    write_tensors(tmp_path / "x", made, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == save(made, metadata={"format": "pt"})


def test_the_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", mixed(), {"a": "1", "b": "2"})
    write_tensors(tmp_path / "y", dict(reversed(mixed().items())), {"b": "2", "a": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path / "x", {"a": table, "b": table, "c": table[1:3, ::2], "d": table.T.expand(2, 6, 4)})
    back = load_file(tmp_path / "x")
    assert torch.equal(back["b"], table)
    assert torch.equal(back["c"], table[1:3, ::2])
    assert torch.equal(back["d"], table.T.expand(2, 6, 4))


def test_tensors_that_want_a_gradient_are_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(2, requires_grad=True)})
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.ones(0, 3), "tensor-file.empty-tensor"), (torch.ones(1).to(torch.complex64), "tensor-file.dtype")],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, tensor: Tensor, words: str) -> None:
    with refuses(words):
        write_tensors(tmp_path / "x", {"good": torch.ones(1), "bad": tensor})
    assert not (tmp_path / "x").exists()


HEADERS = {"a": (torch.float32, (2,)), "b": (torch.float64, (1, 2)), "c": (torch.float32, (1,))}


def test_wide_dtypes_come_first_and_then_names() -> None:
    assert file_order(HEADERS) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("a", torch.ones(2))], "tensor-file.order: 'b'.*'a'"),
        ([("b", torch.ones(1, 2).double()), ("a", torch.ones(2))], "tensor-file.missing: 'c'"),
        ([("b", torch.ones(1, 2))], "tensor-file.not-as-announced: 'b'"),
        ([("b", torch.ones(2).double())], "tensor-file.not-as-announced: 'b'"),
        (
            [("b", torch.ones(1, 2).double()), ("a", torch.ones(2)), ("c", torch.ones(1)), ("d", torch.ones(1))],
            "tensor-file.order: None.*'d'",
        ),
    ],
    ids=["order", "missing", "dtype", "shape", "more"],
)
def test_a_stream_that_is_not_as_announced_leaves_no_file(
    tmp_path: Path, given: list[tuple[str, Tensor]], words: str
) -> None:
    with refuses(words):
        stream_tensors(tmp_path / "x", HEADERS, given)
    assert not (tmp_path / "x").exists()


def test_a_stream_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    headers = {f"{n:02}": (torch.float32, (2**18,)) for n in range(32)}

    def made() -> Iterator[tuple[str, Tensor]]:
        for name in file_order(headers):
            yield name, torch.full((2**18,), float(name))

    tracemalloc.start()
    stream_tensors(tmp_path / "x", headers, made())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # Python's own; no bytes object of a tensor is made
    back = load_file(tmp_path / "x")
    assert all(torch.equal(back[name], torch.full((2**18,), float(name))) for name in headers)


def test_a_file_of_safetensors_own_writer_is_no_different(tmp_path: Path) -> None:
    made = {name: tensor.contiguous() for name, tensor in mixed().items()}
    save_file(made, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", made, {"format": "pt"})
    theirs, ours = load_file(tmp_path / "theirs"), load_file(tmp_path / "ours")
    assert all(torch.equal(theirs[name], ours[name]) for name in made)


def test_parts_may_come_in_any_order_and_from_any_thread(tmp_path: Path) -> None:
    made = {name: tensor.contiguous() for name, tensor in mixed().items()}
    write_tensors(tmp_path / "whole", made)
    places = [(name, first) for name, tensor in made.items() for first in range(0, tensor.numel(), 2)]
    random.Random(0).shuffle(places)
    headers = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
    with tensor_file(tmp_path / "parts", headers) as file, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda at: file.write(at[0], made[at[0]].reshape(-1)[at[1] :][:2], at[1]), places))
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_large_tensors_are_written_whole(tmp_path: Path) -> None:
    made = {"x": torch.arange(2**20), "y": torch.arange(2**18 + 3, dtype=torch.int16)}
    write_tensors(tmp_path / "x", made)
    assert (tmp_path / "x").read_bytes() == save(made)
