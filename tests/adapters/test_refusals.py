"""What an adapter may not be: each case is refused by name, in one line, and nothing is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix.adapters import open_adapter
from adaptermix.errors import AdapterFormatError

from ..factories import CONFIG, WEIGHTS, contents, key, write_lora
from ..refusals import refuses

Q, V = "model.layers.0.attn.q_proj", "model.layers.0.attn.v_proj"
Spoil = Callable[[Path], None]


def setting(**values: Any) -> Spoil:
    """Change settings of the config."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return spoil


def without(name: str) -> Spoil:
    """Remove a setting of the config."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        del config[name]
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def config_text(text: str | bytes) -> Spoil:
    """Put other content in place of the config."""

    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


def raw_setting(name: str, literal: str) -> Spoil:
    """Set a value that `json.dumps` would not write."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | {name: "@"}
        (folder / CONFIG).write_text(json.dumps(config).replace('"@"', literal))

    return spoil


def manifest(text: str) -> Spoil:
    """Put a manifest beside the adapter."""

    def spoil(folder: Path) -> None:
        (folder / "adaptermix.json").write_text(text)

    return spoil


def tensors(**changes: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors; the keyword is only a name for the reader."""

    def spoil(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        for change in changes.values():
            change(content)
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def add(name: str, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> Spoil:
    """Add a tensor."""
    return tensors(more=lambda content: content.update({name: torch.ones(shape, dtype=dtype)}))


def poke(value: float) -> Spoil:
    """Put a value into one entry of one factor."""
    return tensors(poke=lambda content: content[key(V, "B")].view(-1)[-1:].fill_(value))


def weights_bytes(make: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of the weights file."""
    return lambda folder: (folder / WEIGHTS).write_bytes(make((folder / WEIGHTS).read_bytes())) and None


def header(entries: dict[str, Any], data: bytes = b"") -> Spoil:
    """Put a safetensors file with this header in place of the weights."""
    text = json.dumps(entries).encode()
    return weights_bytes(lambda _: struct.pack("<Q", len(text)) + text + data)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def folder_as_file(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
    folder.rmdir()
    folder.write_text("a file")


def no_folder(folder: Path) -> None:
    folder_as_file(folder)
    folder.unlink()


def config_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


DEEP = "[" * 100_000 + "]" * 100_000

CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    # what would be lost
    "dora": (setting(use_dora=True), (repr(Q), "lora_magnitude_vector is missing")),
    "lora-bias": (setting(lora_bias=True), (repr(Q), "lora_B.bias is missing")),
    "modules-to-save": (setting(modules_to_save=["score"]), ("modules_to_save (score)", "lacks them")),
    "trainable-tokens": (setting(trainable_token_indices=[1]), ("rows of trainable_token_indices", "does not")),
    "trainable-tokens-map": (setting(trainable_token_indices={"embed": [1]}), ("trainable_token_indices",)),
    "target-parameters": (setting(target_parameters=["experts.gate"]), ("target_parameters", "not handled")),
    "layer-replication": (setting(layer_replication=[[0, 2]]), ("layer_replication",)),
    "activated-lora": (setting(alora_invocation_tokens=[5]), ("alora_invocation_tokens", "cannot be merged")),
    "qalora": (setting(use_qalora=True), ("use_qalora",)),
    "dora-with-bias": (setting(use_dora=True, lora_bias=True), ("use_dora with lora_bias", "norm")),
    "olora-transposed": (setting(init_lora_weights="olora", fan_in_fan_out=True), ("'olora'", "transposed weight")),
    "corda": (setting(init_lora_weights="corda"), ("init_lora_weights='corda'", "depends on data")),
    "kasa": (setting(kasa_config={"beta": 1}), ("KaSA", "not handled")),
    "tied-heads": (
        setting(modules_to_save=["lm_head"], ensure_weight_tying=True),
        ("modules_to_save with ensure_weight_tying",),
    ),
    "pissa-iterations": (setting(init_lora_weights="pissa_niter_16"), ("pissa_niter_16",)),
    "loftq": (setting(init_lora_weights="loftq"), ("init_lora_weights='loftq'",)),
    "bias-unknown": (setting(bias="some"), ("bias must be one of none, all, lora_only", "'some'")),
    "unknown-setting": (setting(use_mora=True), ("unknown setting 'use_mora'", "might change the delta")),
    "unknown-object": (setting(some_new_config={"rank": 4}), ("unknown setting 'some_new_config'",)),
    # what is no LoRA
    "ia3": (setting(peft_type="IA3"), ("peft_type 'LORA'", "'IA3'")),
    "no-peft-type": (without("peft_type"), ("peft_type 'LORA'", "None")),
    # files
    "pickle": (only_pickle, (WEIGHTS, "adapter_model.bin is a pickle", "save it as safetensors")),
    "no-config": (remove(CONFIG), (f"must hold {CONFIG}",)),
    "config-is-a-folder": (config_folder, (f"must hold {CONFIG}",)),
    "no-weights": (remove(WEIGHTS), (f"must contain {WEIGHTS}",)),
    "a-file": (folder_as_file, ("is not a folder", CONFIG, WEIGHTS)),
    "nothing": (no_folder, ("is not a folder",)),
    # the settings file
    "config-not-json": (config_text("{'r': 8}"), (CONFIG, "must be JSON")),
    "config-empty": (config_text(""), ("must be JSON",)),
    "config-not-utf8": (config_text(b'{"r": "\xff"}'), ("must be JSON",)),
    "config-with-bom": (config_text(b"\xef\xbb\xbf{}"), ("must be JSON",)),
    "config-too-deep": (config_text(DEEP), ("must be JSON",)),
    "config-list": (config_text("[1]"), ("must hold a JSON object", "list")),
    "config-null": (config_text("null"), ("must hold a JSON object", "NoneType")),
    "config-huge": (config_text(b" " * (16 * 2**20 + 1)), ("must be at most", "bytes")),
    "config-number-of-5000-digits": (raw_setting("lora_alpha", "1" * 5000), ("must be JSON",)),
    "manifest-not-json": (manifest("{"), ("adaptermix.json", "must be JSON", "Remove it")),
    "manifest-too-deep": (manifest(DEEP), ("adaptermix.json", "must be JSON")),
    # numbers
    "r-zero": (setting(r=0), ("r must be a whole number from 1", "found 0")),
    "r-negative": (setting(r=-4), ("r must be a whole number", "-4")),
    "r-huge": (setting(r=10**12), ("r must be a whole number", "1000000000000")),
    "r-bool": (setting(r=True), ("r must be a whole number", "True")),
    "r-string": (setting(r="2"), ("r must be a whole number", "'2'")),
    "r-float": (setting(r=2.0), ("r must be a whole number", "2.0")),
    "r-missing": (without("r"), ("r must be a whole number", "None")),
    "alpha-nan": (raw_setting("lora_alpha", "NaN"), ("lora_alpha must be a finite number", "nan")),
    "alpha-inf": (raw_setting("lora_alpha", "Infinity"), ("lora_alpha must be a finite number", "inf")),
    "alpha-overflows": (raw_setting("lora_alpha", "1" + "0" * 400), ("lora_alpha must be a finite number",)),
    "alpha-bool": (setting(lora_alpha=True), ("lora_alpha must be a finite number", "True")),
    "alpha-string": (setting(lora_alpha="8"), ("lora_alpha must be a finite number", "'8'")),
    "alpha-null": (setting(lora_alpha=None), ("lora_alpha must be a finite number", "None")),
    "rslora-string": (setting(use_rslora="false"), ("use_rslora must be true or false", "'false'")),
    "fan-string": (setting(fan_in_fan_out="false"), ("fan_in_fan_out must be true or false", "'false'")),
    # patterns
    "rank-pattern-regex": (setting(rank_pattern={"q_(": 1}), ("rank_pattern", "'q_('", "regular expression")),
    "alpha-pattern-regex": (setting(alpha_pattern={"*": 1}), ("alpha_pattern", "'*'", "regular expression")),
    "pattern-flags": (
        setting(rank_pattern={"(?i)Q_PROJ": 1}),
        ("rank_pattern", "'(?i)Q_PROJ'", "regular expression"),
    ),
    "pattern-repetition": (setting(rank_pattern={"a{99999999999}": 1}), ("rank_pattern", "regular expression")),
    "rank-pattern-list": (setting(rank_pattern=["q"]), ("rank_pattern must map modules to numbers",)),
    "rank-pattern-value": (setting(rank_pattern={"q_proj": 0}), ("rank_pattern.q_proj", "found 0")),
    "alpha-pattern-value": (setting(alpha_pattern={"q_proj": "4"}), ("q_proj must be a finite number", "'4'")),
    # targets
    "no-targets": (setting(target_modules=None), ("target_modules must name",)),
    "empty-targets": (setting(target_modules=[]), ("target_modules must name",)),
    "target-numbers": (setting(target_modules=[1]), ("target_modules must be a list of names",)),
    "layers-strings": (setting(layers_to_transform=["0"]), ("layers_to_transform must be whole numbers",)),
    "layers-bool": (setting(layers_to_transform=True), ("layers_to_transform must be whole numbers",)),
    "layers-bools": (setting(layers_to_transform=[True]), ("layers_to_transform must be whole numbers",)),
    # tensors
    "other-key": (add("model.layers.0.q_proj.weight"), ("must be named base_model.model.MODULE.lora_A",)),
    "default-in-key": (add(f"base_model.model.{Q}.lora_A.default.weight"), ("must be stored once",)),
    "other-name-in-key": (add(f"base_model.model.{Q}.lora_A.en.weight"), ("without the adapter's own name, 'en'",)),
    "path-escape": (
        add("base_model.model.../../x.lora_A.weight"),
        ("'base_model.model.../../x", "its module is unknown"),
    ),
    "newline-in-key": (add("base_model.model.x\n.lora_A.weight"), (r"x\n.lora_A", "its module is unknown")),
    "long-key": (add("x" * 5000), ("xxx", "must be named")),
    "embedding": (
        add("base_model.model.model.embed_tokens.lora_embedding_A"),
        ("both factors", "lora_embedding_B is missing"),
    ),
    "magnitude": (
        add(f"base_model.model.{Q}.lora_magnitude_vector", (3,)),
        (repr(Q), "use_dora is not set", "peft would drop it"),
    ),
    "bias-in-lora": (add(f"base_model.model.{Q}.lora_B.bias", (3,)), (repr(Q), "lora_bias is not set")),
    "bias-tensor": (add(f"base_model.model.{Q}.base_layer.bias", (3,)), ("a trained bias",)),
    "head": (add("base_model.model.score.modules_to_save.weight"), ("a fully trained module",)),
    "three-dimensions": (
        tensors(a=lambda c: c.update({key(Q, "A"): torch.ones(2, 3, 1)})),
        ("must have matrices", "[2, 3, 1]"),
    ),
    "no-columns": (tensors(a=lambda c: c.update({key(Q, "A"): torch.ones(2, 0)})), ("must not be empty", "[2, 0]")),
    "integers": (
        tensors(a=lambda c: c.update({key(Q, "A"): torch.ones(2, 3, dtype=torch.int8)})),
        ("must be of a float dtype", "I8"),
    ),
    "float8": (
        tensors(a=lambda c: c.update({key(Q, "A"): torch.ones(2, 3).to(torch.float8_e4m3fn)})),
        ("must be of a float dtype", "F8_E4M3"),
    ),
    "only-a": (tensors(b=lambda c: c.pop(key(Q, "B"))), (repr(Q), "both factors", "lora_B is missing")),
    "only-b": (tensors(a=lambda c: c.pop(key(Q, "A"))), (repr(Q), "both factors", "lora_A is missing")),
    "ranks-of-the-factors": (
        tensors(b=lambda c: c.update({key(Q, "B"): torch.ones(4, 3)})),
        (repr(Q), "rank 2", "lora_A [2, 3]", "lora_B [4, 3]"),
    ),
    "rank-of-the-config": (setting(r=3), (repr(Q), "rank 3", "lora_A [2, 3]")),
    "rank-of-the-pattern": (setting(rank_pattern={"v_proj": 1}), (repr(V), "rank 1")),
    "no-tensors": (tensors(clear=dict.clear), ("at least one LoRA module", "empty")),
    "empty-file": (weights_bytes(lambda _: b""), ("must be a whole safetensors file",)),
    "truncated": (weights_bytes(lambda data: data[:-3]), ("must be a whole safetensors file", "Fetch or save")),
    "truncated-header": (weights_bytes(lambda data: data[:30]), ("must be a whole safetensors file",)),
    "trailing-bytes": (weights_bytes(lambda data: data + b"12345678"), ("must be a whole safetensors file",)),
    "header-of-1-gb": (
        weights_bytes(lambda data: struct.pack("<Q", 2**30) + data[8:]),
        ("must be a whole safetensors file",),
    ),
    "header-of-16-eb": (weights_bytes(lambda _: b"\xff" * 64), ("must be a whole safetensors file",)),
    "header-not-json": (weights_bytes(lambda _: struct.pack("<Q", 4) + b"nope"), ("whole safetensors file",)),
    "offsets-that-overlap": (
        header({key(Q, f): {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} for f in "AB"}, b"\0" * 16),
        ("must be a whole safetensors file",),
    ),
    "offsets-beyond-the-file": (
        header({key(Q, "A"): {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 8),
        ("must be a whole safetensors file",),
    ),
    "shape-that-overflows": (
        header({key(Q, "A"): {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, b"\0" * 16),
        ("must be a whole safetensors file",),
    ),
    "nan": (poke(float("nan")), ("must be finite", key(V, "B"), "NaN or infinity", "earlier checkpoint")),
    "inf": (poke(float("inf")), ("must be finite", key(V, "B"))),
    "minus-inf": (poke(float("-inf")), ("must be finite", key(V, "B"))),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = CASES[name]
    folder = tmp_path / "adapter"
    write_lora(folder, {Q: (4, 3, 2), V: (5, 3, 2)}, alpha=4)
    spoil(folder)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFormatError) as caught:
        open_adapter(folder).read()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    for word in words:
        assert word in message
    assert str(folder) in message
    assert contents(tmp_path) == before


def test_the_folder_that_the_cases_spoil_is_sound(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q: (4, 3, 2), V: (5, 3, 2)}, alpha=4)
    assert set(open_adapter(tmp_path).read().updates) == {Q, V}


def test_nan_is_found_when_the_tensor_is_read_and_not_before(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q: (4, 3, 2), V: (5, 3, 2)}, alpha=4)
    poke(float("nan"))(tmp_path)
    source = open_adapter(tmp_path)
    source.load(Q)
    with refuses("adapter-file.not-finite"):
        source.load(V)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": False, "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None},
        {"a_setting_of_next_year": None, "another": False, "third": {}, "fourth": []},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.3, "inference_mode": False, "peft_version": "0.21.2", "auto_mapping": {"x": "y"}},
    ],
)
def test_settings_that_leave_the_delta_alone_are_accepted(tmp_path: Path, values: dict[str, Any]) -> None:
    write_lora(tmp_path, {Q: (4, 3, 2)}, alpha=4)
    setting(**values)(tmp_path)
    assert open_adapter(tmp_path).modules[Q].scale == 2.0
