"""The bundle that multilingual-e5-small comes in: a tiny one, written here byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from adaptermix.demo.e5_bundle import convert, dequantised, read_bundle

from ..refusals import refuses

HIDDEN, INNER, PLACES = 32, 64, 16
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁ab", -1.0), ("▁", -2.0), ("c", -3.0)]
LINEAR = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "ao": (32, 32), "fi": (64, 32), "fo": (32, 64)}


def packed(numbers: np.ndarray, scale: float) -> bytes:
    """Blocks of 32 numbers from -8 to 7 with one scale: Q4_0."""
    found = b""
    for block in numbers.reshape(-1, 32):
        low, high = block[:16] + 8, block[16:] + 8
        found += struct.pack("<e", scale) + bytes(int(a) | int(b) << 4 for a, b in zip(low, high, strict=True))
    return found


def write(path: Path) -> dict[str, torch.Tensor]:
    """Write a bundle of one block and return its weights by their names in it."""
    draw = np.random.default_rng(0)
    whole: dict[str, tuple[Sequence[int], bool]] = {
        "emb.word": ((len(PIECES), HIDDEN), True),
        "emb.pos": ((PLACES, HIDDEN), False),
        "emb.type": ((2, HIDDEN), False),
        "emb.ln.w": ((HIDDEN,), False),
        "emb.ln.b": ((HIDDEN,), False),
    }
    for part, shape in LINEAR.items():
        whole |= {f"l0.{part}.w": (shape, True), f"l0.{part}.b": (shape[:1], False)}
    for part in ("aln", "oln"):
        whole |= {f"l0.{part}.w": ((HIDDEN,), False), f"l0.{part}.b": ((HIDDEN,), False)}
    values, entries, data = {}, [], b""
    for name, (shape, four_bits) in whole.items():
        if four_bits:
            numbers = draw.integers(-8, 8, shape)
            raw, values[name] = packed(numbers, 0.25), torch.tensor(numbers * 0.25, dtype=torch.float32)
        else:
            plain = draw.standard_normal(shape).astype("<f2").astype("<f4")
            raw, values[name] = plain.tobytes(), torch.from_numpy(plain.copy())
        entries.append((name, int(four_bits), int(np.prod(shape)), len(data), len(raw)))
        data += raw
    text = "".join(piece for piece, _ in PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece, _ in PIECES)])
    head = b"E5S1" + struct.pack("<i7i", 1, HIDDEN, 1, 4, INNER, len(PIECES), PLACES, 2)
    head += struct.pack("<fi", 1e-12, 32) + struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text))
    head += ends.astype("<u4").tobytes() + np.array([score for _, score in PIECES], "<f4").tobytes() + text
    table = struct.pack("<IBI", ord("\t"), 1, ord(" ")) + struct.pack("<IB", 0x200B, 0)
    head += struct.pack("<iI", 2, len(table)) + table + struct.pack("<i", len(entries))
    offset = len(head) + sum(2 + len(name) + 21 for name, *_ in entries)  # places are counted from the file's start
    for name, kind, count, start, length in entries:
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, count, offset + start, length)
    path.write_bytes(head + data)
    return values


def test_blocks_of_four_bits_by_hand() -> None:
    numbers = np.arange(-8, 24) % 16 - 8
    found = dequantised(packed(numbers, 0.5), (1, 32))
    assert found.tolist() == [[float(number) * 0.5 for number in numbers]]


def test_a_bundle_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    values = write(tmp_path / "e5.bin")
    convert(tmp_path / "e5.bin", tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = model.state_dict()
    named = {
        "emb.word": "embeddings.word_embeddings.weight",
        "l0.k.w": "encoder.layer.0.attention.self.key.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.fi.b": "encoder.layer.0.intermediate.dense.bias",
        "l0.aln.w": "encoder.layer.0.attention.output.LayerNorm.weight",
    }
    for name, theirs in named.items():
        assert torch.equal(state[theirs], values[name].half().float()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # a tab is a blank, and a zero-width blank nothing, as the table says; the fullwidth c is a c by NFKC
    assert tokenizer("ab\tc\u200b \uff43")["input_ids"] == [0, 4, 5, 6, 5, 6, 2]
    assert tokenizer.pad_token_id == 1


def test_what_is_no_bundle_or_cut_off_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "e5.bin")
    whole = (tmp_path / "e5.bin").read_bytes()
    for data in (b"GGUF" + whole[4:], whole[:200], b""):
        (tmp_path / "bad.bin").write_bytes(data)
        with refuses("demo.bundle"):
            read_bundle(tmp_path / "bad.bin")
    assert not (tmp_path / "out").exists()
