"""Digests tell apart what must be told apart, and let pass what other machines may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptermix import load_adapter

from .digests import differences, digest, exact, measured, products
from .inputs import numbers, write_adapter

A, B = "x.lora_A.weight", "x.lora_B.weight"


def tensors() -> dict[str, Tensor]:
    return {A: numbers("a", (2, 6)), B: numbers("b", (6, 2))}


def of(folder: Path, weights: Any, **changed: Tensor) -> Any:
    save_file(tensors() | {name: tensor.contiguous() for name, tensor in changed.items()}, folder / "w.safetensors")
    return digest(folder / "w.safetensors", weights=weights, folder=folder, base=folder / "none")


@pytest.mark.parametrize("weights", [exact, measured, products])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b * 1.0001, id="a factor"),
        pytest.param(lambda b: b.roll(1, 0), id="rows in another order"),
        pytest.param(lambda b: b.double(), id="another dtype"),
        pytest.param(lambda b: torch.cat([b, b[:1]]), id="another shape"),
    ],
)
def test_another_tensor_is_told(weights: Any, change: Any, tmp_path: Path) -> None:
    before = of(tmp_path, weights)
    assert list(differences(before, of(tmp_path, weights))) == []
    assert list(differences(before, of(tmp_path, weights, **{B: change(tensors()[B])})))


def test_other_last_bits_are_told_of_exact_weights_only(tmp_path: Path) -> None:
    nudged = torch.nextafter(tensors()[B], torch.tensor(9.0))
    found = {
        weights: list(differences(of(tmp_path, weights), of(tmp_path, weights, **{B: nudged})))
        for weights in (exact, measured, products)
    }
    assert [len(lines) for lines in found.values()] == [1, 0, 0]


def test_the_signs_of_singular_vectors_are_free(tmp_path: Path) -> None:
    turned = {A: -tensors()[A], B: -tensors()[B]}
    assert list(differences(of(tmp_path, products), of(tmp_path, products, **turned))) == []
    assert list(differences(of(tmp_path, measured), of(tmp_path, measured, **turned)))


@pytest.mark.parametrize(
    ("kept", "found", "count"),
    [
        ({"a": 1.0, "b": [1, "x"]}, {"a": 1.000001, "b": [1, "x"]}, 0),
        ({"a": 1.0}, {"a": 1.0001}, 1),
        ({"a": 1}, {"a": 1.0}, 1),
        ({"a": 1}, {"a": True}, 1),
        ({"a": None}, {}, 1),
        ({}, {"a": None}, 1),
        ([1, 2], [1, 2, 3], 1),
        ("loss 0.50001 of 3", "loss 0.500011 of 3", 0),
        ("loss 0.5 of 3", "loss 0.6 of 3", 1),
        ("loss 0.5 of 3", "loss 0.5 of 4", 1),
    ],
)
def test_documents_differ_but_for_the_last_digits_of_fractions(kept: Any, found: Any, count: int) -> None:
    assert len(list(differences(kept, found))) == count


def test_a_document_loses_times_versions_and_the_working_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        f'{{"seconds": 1.5, "loss": 0.1234567891, "versions": {{"torch": "2.13.0+cpu"}}, "at": "{tmp_path}/x", "n": 2}}'
    )
    assert digest(tmp_path / "d.json", weights=exact, folder=tmp_path, base=tmp_path / "none") == {
        "seconds": "<time>",
        "loss": 0.123456789,
        "versions": {"torch": "<version>"},
        "at": "<folder>/x",
        "n": 2,
    }


def test_the_fixed_numbers_are_those_that_were_written_down(tmp_path: Path) -> None:
    assert (numbers("a", (4,)) * 1024).tolist() == [-467, -887, 205, 295]
    path = "model.layers.0.self_attn.q_proj"
    write_adapter(tmp_path / "one", "base", "CAUSAL_LM", [path], 8)
    seed = f"one {path}"
    delta = 0.5 * numbers(f"{seed} B", (8, 4), bits=5, shift=1) @ numbers(f"{seed} A", (4, 8), bits=5)
    assert torch.equal(load_adapter(tmp_path / "one").updates[path].dense(), delta)
