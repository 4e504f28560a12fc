"""Digests of outputs, and how two of them are compared.

* Weights that are the same on every machine: dtype, shape and SHA-256 of each tensor.
* Weights that depend on the order of sums, which differs between CPUs and BLAS libraries: dtype and shape, and three
  figures in float64, compared to 1e-5. They also change if entries change places. Low-rank factors from an SVD are
  compared by their product, since the signs of singular vectors are arbitrary.
* JSON: the document without the entries that `RULES` names. Fractions are compared to 1e-5.
* Other text: its lines, compared in the same way. Copies of the base model's files are only marked as copies.
* `bytes`: the SHA-256 of each whole file, except files with times in them. It is compared on request only, since it is
  valid for one machine and one set of versions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-5, 1e-7
_DIGITS = 9
_FRACTION = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
_VERSION = re.compile(r"\b\d+\.\d+\.\d+(?:[.+]\w+)*")

RULES: Mapping[str, frozenset[str]] = {
    "<time>": frozenset({"seconds", "seconds_per_step", "tokens_per_second"}),
    # The card has versions in it, and is compared itself.
    "<hash of the card>": frozenset({"card_sha256"}),
    # The configuration and the tokenizer of a model name the version of transformers that wrote them.
    "<hash of companions>": frozenset({"companions"}),
}
"""Entries of JSON documents that differ between runs, and what the snapshot has instead.

Versions and the path of the working folder are replaced in all text too.
"""


def _text(text: str, folder: Path) -> str:
    """Return a text without versions and the working folder."""
    return _VERSION.sub("<version>", text.replace(str(folder), "<folder>"))


def document(value: Any, folder: Path, key: str = "") -> Any:
    """Return a JSON document without what the rules name, and with fractions of nine digits."""
    for name, keys in RULES.items():
        if key in keys:
            return name
    if isinstance(value, Mapping):
        return {own: document(found, folder, own) for own, found in value.items()}
    if isinstance(value, list):
        return [document(found, folder, key) for found in value]
    if isinstance(value, str):
        return _text(value, folder)
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def _hash(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def measure(tensor: Tensor) -> dict[str, Any]:
    """Return norm, sum, and a weighted sum, which is the only one that changes if entries change places."""
    flat = tensor.double().flatten()
    places = torch.arange(len(flat), dtype=torch.float64)
    figures = {"norm": flat.norm(), "sum": flat.sum(), "places": flat @ torch.cos(places)}
    return {"form": _form(tensor)} | {name: float(f"{float(value):.{_DIGITS}g}") for name, value in figures.items()}


def exact(path: Path) -> dict[str, Any]:
    """Return the digest of weights that are the same on every machine."""
    return {
        # bitsandbytes computes its tables with `torch.linspace`, whose last bits differ between CPUs.
        name: measure(tensor) if name.endswith("quant_map") else f"{_form(tensor)} {_hash(tensor)}"
        for name, tensor in sorted(load_file(path).items())
    }


def measured(path: Path) -> dict[str, Any]:
    """Return the digest of weights whose last bits may differ."""
    return {name: measure(tensor) for name, tensor in sorted(load_file(path).items())}


def products(path: Path) -> dict[str, Any]:
    """Return the digest of low-rank factors from an SVD: their shapes, and their products."""
    tensors = dict(sorted(load_file(path).items()))
    found: dict[str, Any] = {name: _form(tensor) for name, tensor in tensors.items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            found[name.replace(".lora_A.weight", " B A")] = measure(b.double() @ a.double())
    return found


Weights = Callable[[Path], dict[str, Any]]


def digest(path: Path, *, weights: Weights, folder: Path, base: Path) -> Any:
    """Return the digest of a file.

    Args:
        path: The file.
        weights: Digest of weight files: `exact`, `measured` or `products`.
        folder: The folder in which the command ran.
        base: Folder of the base model.
    """
    content = path.read_bytes()
    if (base / path.name).is_file() and content == (base / path.name).read_bytes():
        return "copied from the base model"
    if path.suffix == ".safetensors":
        return weights(path)
    if path.suffix == ".json":
        return document(json.loads(content), folder)
    if path.suffix == ".jsonl":
        return [document(json.loads(line), folder) for line in content.decode().splitlines()]
    if path.suffix == ".md":
        return _text(content.decode(), folder).splitlines()
    return f"sha256 {sha256(content).hexdigest()}"


def whole(paths: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name, without those that have times in them."""
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.suffix != ".jsonl"}


def _near(kept: float, found: float, within: float) -> bool:
    return math.isclose(kept, found, rel_tol=RELATIVE, abs_tol=max(ABSOLUTE, within))


def _same_text(kept: str, found: str) -> bool:
    """Return whether texts are equal but for the last digits of fractions in them."""
    if _FRACTION.split(kept) != _FRACTION.split(found):
        return False
    return all(
        _near(float(one), float(two), 0.0)
        for one, two in zip(_FRACTION.findall(kept), _FRACTION.findall(found), strict=True)
    )


def _same(kept: Any, found: Any, within: float) -> bool:
    if isinstance(kept, float) and isinstance(found, float):
        return _near(kept, found, within)
    if isinstance(kept, str) and isinstance(found, str):
        return _same_text(kept, found)
    return type(kept) is type(found) and bool(kept == found)


def _slack(kept: Mapping[str, Any]) -> float:
    """Return by how much sums over a tensor may differ if each entry differs by 1e-5 of their root mean square."""
    if "norm" not in kept or "form" not in kept:
        return 0.0
    entries = math.prod(json.loads(kept["form"].split(" ", 1)[1]))
    return RELATIVE * float(kept["norm"]) * math.sqrt(entries)


def differences(kept: Any, found: Any, *, where: str = "", within: float = 0.0) -> Iterator[str]:
    """Yield where two digests differ, in one line each.

    Args:
        kept: The digest in the snapshot.
        found: The digest of this run.
        where: Place in the digest.
        within: Absolute difference that fractions may have.
    """
    if isinstance(kept, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys([*kept, *found]):
            if key in kept and key in found:
                within = _slack(kept) if key in ("sum", "places") else 0.0
                yield from differences(kept[key], found[key], where=f"{where}/{key}", within=within)
            else:
                yield f"{where}/{key}: {'is gone' if key in kept else 'is new'}"
    elif isinstance(kept, list) and isinstance(found, list):
        if len(kept) != len(found):
            yield f"{where}: had {len(kept)} entries, has {len(found)}"
        for number, (one, two) in enumerate(zip(kept, found, strict=False)):
            yield from differences(one, two, where=f"{where}/{number}")
    elif not _same(kept, found, within):
        yield f"{where}: was {kept!r}, is {found!r}"


def dumps(value: Any, indent: int = 0) -> str:
    """Return JSON with one line for each value that is short enough."""
    line = json.dumps(value, ensure_ascii=False)
    if (indent and len(line) + indent <= 160) or not isinstance(value, dict | list) or not value:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, list):
        rows = [pad + dumps(each, indent + 1) for each in value]
        return "[\n" + ",\n".join(rows) + "\n" + " " * indent + "]"
    rows = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {dumps(each, indent + 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
