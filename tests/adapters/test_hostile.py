"""Folders made to do harm: each is refused in one line, at once, and before anything large is allocated."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaptermix.adapters import AdapterState, open_adapter
from adaptermix.errors import AdapterMixError

from ..factories import CONFIG, WEIGHTS, key, write_lora
from ..refusals import refuses

Q, V = "model.layers.0.attn.q_proj", "model.layers.0.attn.v_proj"
Spoil = Callable[[Path], object]
MOST_SECONDS, MOST_BYTES = 10.0, 50 * 2**20
"""CPU time, which other processes do not lengthen."""


@contextmanager
def bounded() -> Iterator[None]:
    """Check that the block is quick, and that neither Python nor the process grows much in it."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < MOST_SECONDS
    assert peak < MOST_BYTES
    # The high-water mark of the process, in KiB: it grows only if this block went beyond all before it.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def sound(folder: Path) -> Path:
    write_lora(folder, {Q: (4, 3, 2), V: (5, 3, 2)}, alpha=4)
    return folder


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(folder: Path, header: object, body: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def setting(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return spoil


def literal(name: str, text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | {name: "@"}
        (folder / CONFIG).write_text(json.dumps(config).replace('"@"', text))

    return spoil


def raw_config(content: bytes) -> Spoil:
    return lambda folder: (folder / CONFIG).write_bytes(content)


def raw_weights(make: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(make((folder / WEIGHTS).read_bytes()))


def entry(**changes: Any) -> Spoil:
    """Change what the header says of one factor."""

    def spoil(folder: Path) -> None:
        header, body = header_of(folder)
        header[key(Q, "A")] |= changes
        put(folder, header, body)

    return spoil


def rename(new: str) -> Spoil:
    """Give one factor another name."""

    def spoil(folder: Path) -> None:
        header, body = header_of(folder)
        header[new] = header.pop(key(Q, "A"))
        put(folder, header, body)

    return spoil


def whole_header(make: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        header, body = header_of(folder)
        put(folder, make(header), body)

    return spoil


def twice(folder: Path) -> None:
    header, body = header_of(folder)
    text = json.dumps(header)
    put(folder, (text[:-1] + "," + text[1:]).encode(), body)


def store(**tensors: torch.Tensor) -> Spoil:
    """Put other tensors in place of the weights, under the names of the factors."""
    names = {f"{part}{name}": key(module, part) for name, module in (("q", Q), ("v", V)) for part in "AB"}

    def spoil(folder: Path) -> None:
        made = {names[short]: tensor for short, tensor in tensors.items()}
        save_file(made, folder / WEIGHTS)

    return spoil


def poke(value: float, dtype: torch.dtype = torch.float32) -> Spoil:
    a, b = torch.ones(2, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    b[3, 1] = value
    return store(Aq=a, Bq=b)


def loop(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return spoil


def dangling(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "nowhere")

    return spoil


def as_folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def as_pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def sparse(name: str, size: int, head: bytes = b"") -> Spoil:
    """A file that claims a size and holds nothing."""

    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)

    return spoil


def deep(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + closing * depth).encode()


WRONG: list[object] = [7, -1, 2.5, True, "x", [], [1], [None], {}, {"a": 1}, {"a": {"b": []}}, [[[]]], "\n", "\x00"]
LONG = "a." * 5000

CASES: dict[str, Spoil] = {
    # sizes and lengths that promise much
    "header-of-1-gb": raw_weights(lambda data: struct.pack("<Q", 2**30) + data[8:]),
    "header-of-1-gb-in-a-file-of-2-gb": sparse(WEIGHTS, 2**31, struct.pack("<Q", 2**30) + b"{"),
    "header-of-90-mb": sparse(WEIGHTS, 100 * 2**20, struct.pack("<Q", 90 * 2**20)),
    "header-of-2-to-the-63": raw_weights(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "header-one-too-long": raw_weights(lambda data: struct.pack("<Q", len(data) - 7) + data[8:]),
    "header-of-nothing": raw_weights(lambda data: struct.pack("<Q", 0) + data[8:]),
    "a-file-of-zeros": sparse(WEIGHTS, 2**31),
    "config-of-17-mb": raw_config(b'{"a": "' + b"x" * (17 * 2**20) + b'"}'),
    "config-of-10-gb": sparse(CONFIG, 10 * 2**30),
    "manifest-of-10-gb": sparse("adaptermix.json", 10 * 2**30),
    "rank-1e9": setting(r=10**9),
    "rank-2-to-the-19": setting(r=2**19),
    "rank-pattern-1e9": setting(rank_pattern={"q_proj": 10**9}),
    "rank-pattern-negative": setting(rank_pattern={"q_proj": -2}),
    "rank-pattern-true": setting(rank_pattern={"q_proj": True}),
    "rank-negative": setting(r=-2),
    "rank-true": setting(r=True),
    "rank-1e308": literal("r", "1e308"),
    "rank-of-4000-digits": literal("r", "9" * 4000),
    "alpha-of-4000-digits": literal("lora_alpha", "9" * 4000),
    "alpha-nan": literal("lora_alpha", "NaN"),
    "alpha-pattern-inf": literal("alpha_pattern", '{"q_proj": -Infinity}'),
    "alpha-pattern-true": setting(alpha_pattern={"q_proj": True}),
    "shape-of-1e18": entry(shape=[10**18, 3]),
    "shape-that-wraps": entry(shape=[2**63, 2]),
    "shape-negative": entry(shape=[-2, 3]),
    "shape-of-fractions": entry(shape=[2.5, 3]),
    "shape-of-text": entry(shape=["2", "3"]),
    "shape-of-a-thousand-axes": entry(shape=[1] * 1000 + [2, 3]),
    "shape-null": entry(shape=None),
    # offsets
    "offsets-beyond": entry(data_offsets=[10**6, 10**6 + 24]),
    "offsets-backwards": entry(data_offsets=[24, 0]),
    "offsets-negative": entry(data_offsets=[-24, 0]),
    "offsets-of-2-to-the-64": entry(data_offsets=[2**64, 2**64 + 24]),
    "offsets-overlap": entry(data_offsets=[8, 32]),
    "offsets-three": entry(data_offsets=[0, 24, 48]),
    "offsets-too-short": entry(data_offsets=[0, 8]),
    "offsets-text": entry(data_offsets="0-24"),
    # headers that are no headers
    "header-not-json": lambda folder: put(folder, b"{'a': 1}", b""),
    "header-list": lambda folder: put(folder, [], b""),
    "header-null": lambda folder: put(folder, None, b""),
    "header-number": lambda folder: put(folder, 7, b""),
    "header-not-utf8": lambda folder: put(folder, b'{"\xff\xfe": 1}', b""),
    "header-deep": lambda folder: put(folder, deep(100_000), b""),
    "header-deep-objects": lambda folder: put(folder, deep(50_000, '{"a":', "}"), b""),
    "header-deep-within": whole_header(lambda header: header | {"x": [[[[[[1]]]]]]}),
    "header-cut": lambda folder: put(folder, b'{"a": {"dtype": "F32"', b""),
    "header-many-names": lambda folder: put(
        folder, {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n in range(20_000)},
        bytes(80_000),
    ),
    "entry-is-a-list": whole_header(lambda header: header | {key(Q, "A"): []}),
    "entry-is-null": whole_header(lambda header: header | {key(Q, "A"): None}),
    "metadata-is-a-number": whole_header(lambda header: header | {"__metadata__": 3}),
    "metadata-nested": whole_header(lambda header: header | {"__metadata__": {"a": {"b": "c"}}}),
    "dtype-unknown": entry(dtype="F33"),
    "dtype-null": entry(dtype=None),
    "dtype-of-half-the-size": entry(dtype="F16"),
    "dtype-integers": entry(dtype="I32"),
    "dtype-unsigned": entry(dtype="U32"),
    # names
    "name-climbs": rename("base_model.model.../../x.lora_A.weight"),
    "name-absolute": rename("/etc/passwd"),
    "name-nul": rename("base_model.model.x\0.lora_A.weight"),
    "name-newline": rename("base_model.model.x\ny.lora_A.weight"),
    "name-carriage-return": rename("\r\n"),
    "name-escape-codes": rename("base_model.model.\x1b[31mx.lora_A.weight"),
    "name-empty": rename(""),
    "name-of-10000": rename(f"base_model.model.{LONG}q.lora_A.weight"),
    "name-of-10000-odd": rename("\n" * 10_000),
    "name-without-module": rename("base_model.model..lora_A.weight"),
    "name-of-another-script": rename("base_model.model.мод.lora_A.weight"),
    "name-with-a-space": rename("base_model.model.a b.lora_A.weight"),
    "name-of-a-variant": rename(f"base_model.model.{Q}.lora_diag"),
    "name-of-tokens": rename("base_model.model.x.token_adapter.trainable_tokens_delta"),
    "name-of-metadata": rename("__metadata__"),
    # what the factors hold
    "nan": poke(float("nan")),
    "inf": poke(float("inf")),
    "minus-inf": poke(float("-inf")),
    "nan-in-bfloat16": poke(float("nan"), torch.bfloat16),
    "inf-in-float16": poke(float("inf"), torch.float16),
    "nan-in-float64": poke(float("nan"), torch.float64),
    "no-b": store(Aq=torch.ones(2, 3)),
    "no-a": store(Bq=torch.ones(4, 2)),
    "ranks-differ": store(Aq=torch.ones(2, 3), Bq=torch.ones(4, 3)),
    "turned": store(Aq=torch.ones(3, 2), Bq=torch.ones(2, 4)),
    "one-axis": store(Aq=torch.ones(6), Bq=torch.ones(4, 2)),
    "six-axes": store(Aq=torch.ones(2, 3, 1, 1, 1, 1), Bq=torch.ones(4, 2, 1, 1, 1, 1)),
    "kernel-in-b": store(Aq=torch.ones(2, 3, 3, 3), Bq=torch.ones(4, 2, 3, 3)),
    "a-number": store(Aq=torch.tensor(1.0), Bq=torch.ones(4, 2)),
    "no-rows": store(Aq=torch.ones(2, 3), Bq=torch.ones(0, 2)),
    "no-rank": store(Aq=torch.ones(0, 3), Bq=torch.ones(4, 0)),
    "int64": store(Aq=torch.ones(2, 3).long(), Bq=torch.ones(4, 2)),
    "bool": store(Aq=torch.ones(2, 3).bool(), Bq=torch.ones(4, 2)),
    "no-tensors": store(),
    # files that are none
    "config-loop": loop(CONFIG),
    "weights-loop": loop(WEIGHTS),
    "config-dangles": dangling(CONFIG),
    "weights-dangle": dangling(WEIGHTS),
    "weights-folder": as_folder(WEIGHTS),
    "config-folder": as_folder(CONFIG),
    "weights-pipe": as_pipe(WEIGHTS),
    "config-pipe": as_pipe(CONFIG),
    "manifest-folder": lambda folder: (folder / "adaptermix.json").mkdir(),
    "weights-empty": raw_weights(lambda _: b""),
    "weights-are-the-config": lambda folder: (folder / WEIGHTS).write_bytes((folder / CONFIG).read_bytes()),
    "weights-are-html": raw_weights(lambda _: b"<!doctype html>\n<html>404</html>\n" * 9),
    "weights-are-an-lfs-pointer": raw_weights(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    # the settings
    "config-deep": raw_config(deep(200_000)),
    "config-deep-within": raw_config(b'{"peft_type": "LORA", "x": ' + deep(900) + b"}"),
    "config-nul": raw_config(b"\0" * 100),
    "config-utf16": lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-16"),
    "config-two-objects": raw_config(b"{}{}"),
    "key-of-1-mb": setting(**{"k" * 2**20: "v" * 2**20}),
    "key-with-newlines": setting(**{"\n\n": "\n"}),
    "peft-type-newlines": setting(peft_type="LORA\nLORA"),
    "peft-type-list": setting(peft_type=["LORA"] * 10_000),
    "init-newlines": setting(init_lora_weights="x\ny"),
    "init-list": setting(init_lora_weights=["pissa"]),
    "bias-list": setting(bias=["none"]),
    "tokens-negative": setting(trainable_token_indices=[-1]),
    "tokens-fractions": setting(trainable_token_indices=[1.5]),
    "tokens-nested": setting(trainable_token_indices={"a": {"b": [1]}}),
    "tokens-many": setting(trainable_token_indices=list(range(10_000))),
    "patterns-many": setting(rank_pattern={f"a|b{n}": 2 for n in range(20_000)}),
    "pattern-of-1-mb": setting(rank_pattern={"(a+)" * 2**18: 2}),
    "pattern-path-of-1-mb": setting(rank_pattern={"a." * 2**19: 2}),
    "pattern-with-newline-and-zero": setting(rank_pattern={"a\nb": 0}),
}  # fmt: skip
CASES |= {
    f"{name}={json.dumps(value)[:12]}": setting(**{name: value})
    for name, wrong in {
        "r": ["2", 2.0, None, [2], {"a": 2}, 0],
        "lora_alpha": ["4", None, [4], {}],
        "use_rslora": [1, "no", []],
        "use_dora": ["no", 1.5],
        "lora_bias": ["no", {"a": 1}],
        "fan_in_fan_out": ["yes", 3],
        "rank_pattern": [7, "x", ["q_proj"], {"q_proj": None}, {"q_proj": "2"}, {"q_proj": [2]}],
        "alpha_pattern": [7, "x", [1], {"q_proj": None}, {"q_proj": {}}],
        "target_modules": [None, [], 7, [1], {"a": 1}, True],
        "layers_to_transform": ["all", [0.5], {"a": 1}, True],
        "layers_pattern": [7, [7], {"a": 1}],
        "exclude_modules": [7, [7], {"a": 1}],
        "modules_to_save": [7, "head", [7], {"a": 1}, [""]],
        "trainable_token_indices": [7, "x", {"a": 1}, {"a": []}],
        "base_model_name_or_path": [7, [], {"a": 1}],
        "revision": [7, ["main"]],
        "task_type": [7, ["CAUSAL_LM"], {"a": 1}],
        "init_lora_weights": [7, "pissa_niter_4", "corda", "lora_ga", "loftq", "kaiming"],
    }.items()
    for value in wrong
    # An empty list means nothing to PEFT where a flag or a name is due, and is not worth a refusal.
    if value != []
}
CASES |= {
    f"truncated-at-{at}": raw_weights(lambda data, at=at: data[:at]) for at in (1, 7, 8, 9, 20, 100, 300, -48, -1)
}
CASES |= {f"config-truncated-at-{at}": raw_config(b'{"peft_type": "LORA", "r": 2}'[:at]) for at in (1, 8, 20, -1)}


def refused(folder: Path) -> None:
    """Check that the folder is refused in one line of moderate length, in bounds."""
    with bounded(), pytest.raises(AdapterMixError) as caught:
        open_adapter(folder).read()
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    assert len(message) < 1500 + 3 * len(str(folder))
    assert message.isprintable()


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_at_once(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path / "adapter")
    CASES[name](folder)
    refused(folder)


def test_there_are_many_of_them(tmp_path: Path) -> None:
    assert len(CASES) >= 100
    assert isinstance(open_adapter(sound(tmp_path)).read(), AdapterState)


@pytest.mark.parametrize("path", ["\0", "a\0b", "x" * 5000, "/dev/null", "/dev/zero/x", ".." * 3000])
def test_paths_that_are_no_folders(path: str) -> None:
    with bounded(), refuses("adapter.not-folder"):
        open_adapter(path)


def check_line(error: Exception) -> None:
    assert len(str(error).splitlines()) == 1
