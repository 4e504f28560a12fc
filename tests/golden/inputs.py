"""Models, adapters and data files that are fixed to the bit, on every machine and with every version of torch.

Weights are multiples of 2^-10 from Python's own generator, which draws the same numbers in every version. Products and
sums of a few of them fit into float32 without rounding, so that a merge gives the same bytes on every CPU. (Numbers of
`torch.randn` differ in their last bits between CPUs with AVX2 and CPUs with AVX-512.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..factories import key, write_raw
from ..tiny import tiny_causal, tiny_encoder

LAYERS, ENCODER_WIDTH, CAUSAL_WIDTH = 2, 32, 64
WORDS = ["good", "bad", "fine", "poor", "nice", "weak"]
LABELS = ["negative", "positive"]
COLOURS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß", "black": "schwarz", "grey": "grau"}
WEIGHTS = "model.safetensors"


def numbers(name: str, shape: Sequence[int], *, bits: int = 10, shift: int = 0) -> Tensor:
    """Return multiples of 2^-(bits + shift) between -2^-shift and 2^-shift; the name is the seed."""
    random, steps = Random(name), 2**bits
    values = [int(random.random() * (2 * steps + 1)) - steps for _ in range(prod(shape))]
    return torch.tensor(values, dtype=torch.float32).reshape(*shape) / 2 ** (bits + shift)


def _fix(folder: Path) -> None:
    """Replace the random weights of transformers, and switch off dropout, which draws other numbers on Intel CPUs."""
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        tensors[name] = numbers(name, tensor.shape, shift=1 if tensor.ndim > 1 else 3) + float(is_scale)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: 0.0 for name in config if "dropout" in name and config[name]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_adapter(
    folder: Path, base: str, task_type: str, paths: Sequence[str], width: int, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write a LoRA of rank 4 and scale 1/2 on square modules, with fully trained tensors if given."""
    tensors = {}
    for path in paths:
        seed = f"{folder.name} {path}"
        tensors[key(path, "A")] = numbers(f"{seed} A", (4, width), bits=5)
        tensors[key(path, "B")] = numbers(f"{seed} B", (width, 4), bits=5, shift=1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": 4,
        "lora_alpha": 2,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in paths}),
        "bias": "none",
        "inference_mode": True,
    }
    if extra:
        config["modules_to_save"] = sorted({name.split(".")[0] for name in extra})
    saved = {f"base_model.model.{name}": tensor for name, tensor in (extra or {}).items()}
    write_raw(folder, config, tensors | saved)


def _write_tuned(base: Path, folder: Path) -> None:
    """Write a copy of a model that differs in the matrices of its blocks, by a rank of 3 and small noise."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / WEIGHTS)
    for name, tensor in tensors.items():
        if "layers" in name and tensor.ndim == 2:
            b = numbers(f"{name} b", (tensor.shape[0], 3), bits=4)
            a = numbers(f"{name} a", (3, tensor.shape[1]), bits=4, shift=3)
            tensors[name] = tensor + b @ a + numbers(f"{name} rest", tensor.shape, shift=7)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_data(folder: Path) -> None:
    def write(name: str, lines: Sequence[str]) -> None:
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    pairs = [f"{pre} {b}\t{pr} {a}" for pre, pr in (("das", "the"), ("ein", "a")) for a, b in COLOURS.items()]
    write("de-en.tsv", pairs)
    write("held.de-en.tsv", [pair.replace("a", "u").replace("e", "o") for pair in pairs])
    for name, words in {"train.en": WORDS, "train.jv": [f"x{word}z" for word in WORDS]}.items():
        write(f"{name}.csv", ["text,label", *(f"it is {words[n % 6]} {n},{LABELS[(n + 1) % 2]}" for n in range(24))])
    for language in ("de", "en"):
        rows = (f"{language} {WORDS[n % 6]} {n * n},{LABELS[(n + 1) % 2]}" for n in range(30))
        write(f"dev.{language}.csv", ["text,label", *rows])
    write("texts.txt", [f"{WORDS[n % 6]} and {WORDS[n * n % 5]} make {n}" for n in range(40)])


def write_inputs(folder: Path) -> None:
    """Write all inputs of the golden runs."""
    _fix(tiny_encoder(folder / "encoder", layers=LAYERS, hidden=ENCODER_WIDTH))
    _fix(tiny_causal(folder / "causal", layers=LAYERS, hidden=CAUSAL_WIDTH, chat=True))
    _write_tuned(folder / "causal", folder / "tuned")
    blocks = [f"model.layers.{n}.self_attn.{name}_proj" for n in range(LAYERS) for name in "qo"]
    for name in ("one", "two"):
        write_adapter(folder / name, "causal", "CAUSAL_LM", blocks, CAUSAL_WIDTH)
    attention = [f"bert.encoder.layer.{n}.attention.self.{name}" for n in range(LAYERS) for name in ("query", "value")]
    head = {
        "classifier.weight": numbers("classifier.weight", (2, ENCODER_WIDTH)),
        # With this bias about half of the answers are "positive", and no answer is a close call.
        "classifier.bias": numbers("classifier.bias", (2,), shift=3) + torch.tensor([3.1875, -3.1875]),
    }
    write_adapter(folder / "task", "encoder", "SEQ_CLS", attention, ENCODER_WIDTH, head)
    task = {"name": "classify", "template": "plain", "head": "classes", "labels": LABELS}
    manifest = {"kind": "train-task", "task": task, "base": {"id": "encoder", "class": "encoder"}}
    (folder / "task" / "adaptermix.json").write_text(json.dumps(manifest), encoding="utf-8")
    plain = [path.removeprefix("bert.") for path in attention]
    write_adapter(folder / "align", "encoder", "FEATURE_EXTRACTION", plain, ENCODER_WIDTH)
    _write_data(folder)
