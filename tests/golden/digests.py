"""What is kept of an output, and how it is compared with another run's.

* Weights that are exact: dtype, shape and SHA-256 of each tensor.
* Weights that are not, since sums in another order round otherwise (another CPU, another BLAS): dtype and shape, and of
  the values three figures in float64, compared to 1e-5 of the tensor's norm. Of low-rank factors that come of an SVD
  the product is measured, since the signs of singular vectors are free.
* JSON: the document, less what `RULES` takes out. Its fractions are compared to 1e-5.
* Other text: its lines, likewise. Files of the base model that were copied are only named so.
* `bytes`, the SHA-256 of each whole file without times in it. It is compared on request only, since it holds for one
  machine and one set of versions.
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
    # of a text with versions in it, which is compared by itself
    "<hash of the card>": frozenset({"card_sha256"}),
}
"""Entries of JSON documents that differ from run to run, by what is kept in their place.

In all text, versions and the working folder are replaced too.
"""


def _text(text: str, folder: Path) -> str:
    """Return a text without versions and the working folder."""
    return _VERSION.sub("<version>", text.replace(str(folder), "<folder>"))


def document(value: Any, folder: Path, key: str = "") -> Any:
    """Return a JSON document less what the rules take out, its fractions to nine digits."""
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
    """Return norm, sum, and the sum with weights that tell places apart: of a permuted tensor only it differs."""
    flat = tensor.double().flatten()
    places = torch.arange(len(flat), dtype=torch.float64)
    figures = {"norm": flat.norm(), "sum": flat.sum(), "places": flat @ torch.cos(places)}
    return {"form": _form(tensor)} | {name: float(f"{float(value):.{_DIGITS}g}") for name, value in figures.items()}


def exact(path: Path) -> dict[str, Any]:
    """Return the digest of weights that are the same on every machine."""
    return {
        # bitsandbytes makes its tables with `torch.linspace`, whose last bits differ between CPUs
        name: measure(tensor) if name.endswith("quant_map") else f"{_form(tensor)} {_hash(tensor)}"
        for name, tensor in sorted(load_file(path).items())
    }


def measured(path: Path) -> dict[str, Any]:
    """Return the digest of weights whose last bits may differ."""
    return {name: measure(tensor) for name, tensor in sorted(load_file(path).items())}


def products(path: Path) -> dict[str, Any]:
    """Return the digest of low-rank factors that come of an SVD: their forms, and their products."""
    tensors = dict(sorted(load_file(path).items()))
    found: dict[str, Any] = {name: _form(tensor) for name, tensor in tensors.items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            found[name.replace(".lora_A.weight", " B A")] = measure(b.double() @ a.double())
    return found


Weights = Callable[[Path], dict[str, Any]]


def digest(path: Path, *, weights: Weights, folder: Path, base: Path) -> Any:
    """Return what is kept of a file.

    Args:
        path: The file.
        weights: How weights are kept: `exact`, `measured` or `products`.
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
    """Return the SHA-256 of files by name; those with times in them are left out."""
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


def differences(kept: Any, found: Any, *, where: str = "", within: float = 0.0) -> Iterator[str]:
    """Yield where two digests differ, in one line each.

    Args:
        kept: The snapshot's.
        found: That of this run.
        where: Place in the digest.
        within: Absolute difference of fractions that is let pass.
    """
    if isinstance(kept, Mapping) and isinstance(found, Mapping):
        if "form" in kept and "norm" in kept:  # a sum of many numbers near 0 is judged by what it is a sum of
            within = RELATIVE * abs(kept["norm"]) * math.sqrt(math.prod(json.loads(kept["form"].split(" ", 1)[1])))
        for key in [*kept, *(key for key in found if key not in kept)]:
            place = f"{where}/{key}"
            if key not in found or key not in kept:
                yield f"{place}: {'is gone' if key in kept else 'is new'}"
            else:
                yield from differences(kept[key], found[key], where=place, within=within)
    elif isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        for number, (one, two) in enumerate(zip(kept, found, strict=True)):
            yield from differences(one, two, where=f"{where}/{number}", within=within)
    elif isinstance(kept, float) and isinstance(found, float):
        if not _near(kept, found, within):
            yield f"{where}: was {kept}, is {found}"
    elif isinstance(kept, str) and isinstance(found, str):
        if not _same_text(kept, found):
            yield f"{where}: was {kept!r}, is {found!r}"
    elif type(kept) is not type(found) or kept != found:
        yield f"{where}: was {kept!r}, is {found!r}"


def dumps(value: Any, indent: int = 0) -> str:
    """Return JSON in which what fits into a line stands in one."""
    line = json.dumps(value, ensure_ascii=False)
    if indent and len(line) + indent <= 160 or not isinstance(value, dict | list) or not value:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, list):
        rows = [pad + dumps(each, indent + 1) for each in value]
        return "[\n" + ",\n".join(rows) + "\n" + " " * indent + "]"
    rows = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {dumps(each, indent + 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
