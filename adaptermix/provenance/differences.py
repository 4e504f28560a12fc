"""Two outputs compared file by file: the same bytes, or the same numbers up to a tolerance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapters import open_adapter
from ..adapters.lora_config import CONFIG
from ..algebra import concatenate, singular_values
from ..errors import as_line
from ..io.files import MANIFEST, has_edited_card, listed_files
from ..io.json_types import JsonObject, JsonValue

CARD = "README.md"
_NOT_RESULTS = {"seconds", "seconds_per_step", "tokens_per_second", "device", "out"}
"""Entries of JSON documents: how long the work took, where it was done, and where its output was written."""
_NOT_COMPARED = {"versions", "card_sha256"}
"""Entries of a manifest: versions are compared on their first, and the card as a file."""
_PICTURES = (".png", ".html")
_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference between an output and its rebuilt copy.

    Args:
        file: Path of the file in the output.
        entry: Module, tensor, or entry of a JSON document; empty for the file as a whole.
        text: What differs.
        largest: The largest difference of two numbers, absolute without a tolerance; with one, the norm of the
            difference divided by the norm of the output's tensor. None where numbers are not compared.
    """

    file: str
    entry: str = ""
    text: str
    largest: float | None = None

    def document(self) -> JsonObject:
        """Return the JSON document."""
        return {"file": self.file, "entry": self.entry, "text": self.text, "largest": self.largest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How two outputs are compared.

    Args:
        tolerance: 0 compares bytes. A larger value compares numbers, and the deltas of adapters: it is the largest
            relative difference that counts as the same. Pictures are not compared then.
        moved: New paths by old ones: folders and files that the copy was made from and that moved in the meantime.
    """

    tolerance: float = 0.0
    moved: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, text: str) -> str:
        """Return a text with its path replaced, if the path is a moved one, is inside one, or follows `NAME=`."""
        for start in (0, text.find("=") + 1):
            for old, new in self.moved.items():
                if text[start:] == old or text[start:].startswith(f"{old.rstrip('/')}/"):
                    return f"{text[:start]}{new}{text[start + len(old) :]}"
        return text


def differences(output: Path, rebuilt: Path, how: Comparison) -> list[Difference]:
    """Return the differences between an output and a copy that was rebuilt; the largest of each weights file first.

    Times are not compared, nor the versions and the device in the manifest. A card follows from the manifest, so it is
    only checked that nobody edited it.

    Args:
        output: The output, a folder or a file.
        rebuilt: The copy.
        how: How numbers and paths are compared.
    """
    if output.is_file():
        return list(_of_file(output, rebuilt, output.name, how))
    before, after = _files(output), _files(rebuilt)
    missing = sorted(name for name in listed_files(output) or () if not (output / name).is_file())
    result = [Difference(file=name, text="the manifest lists this file, and it is missing") for name in missing]
    result += [Difference(file=name, text="only the output has this file") for name in sorted(before - after)]
    result += [
        Difference(file=name, text="only the rebuilt copy has this file")
        for name in sorted(after - before - {*missing})
    ]
    for name in sorted(before & after):
        if Path(name).name == CARD:
            is_edited = has_edited_card((output / name).parent)
            result += [Difference(file=name, text="the card was edited")] if is_edited else []
        else:
            result += _of_file(output / name, rebuilt / name, name, how)
    return result


def _files(folder: Path) -> set[str]:
    """Return the files of an output that exist; files that its manifest does not list are not part of it."""
    return {name for name in listed_files(folder) or () if (folder / name).is_file()}


def _of_file(before: Path, after: Path, name: str, how: Comparison) -> Iterator[Difference]:
    if before.read_bytes() == after.read_bytes() if before.stat().st_size < 2**20 else _same_bytes(before, after):
        return
    if before.suffix == ".safetensors":
        yield from _of_weights(before, after, name, how)
    elif before.suffix in (".json", ".jsonl"):
        yield from _of_documents(before, after, name, how)
    elif not (how.tolerance and before.suffix in _PICTURES):
        yield Difference(file=name, text="the bytes differ")


def _same_bytes(before: Path, after: Path) -> bool:
    """Return whether two files have the same bytes, read in parts."""
    if before.stat().st_size != after.stat().st_size:
        return False
    with before.open("rb") as one, after.open("rb") as two:
        while part := one.read(2**22):
            if part != two.read(2**22):
                return False
    return True


def _of_weights(before: Path, after: Path, name: str, how: Comparison) -> Iterator[Difference]:
    try:
        with safe_open(before, "pt") as one, safe_open(after, "pt") as two:
            result = _of_tensors(one, two, name, how)
            factors = _is_adapter(before) and how.tolerance and not any(each.largest is None for each in result)
        if factors:
            result = [each for each in result if not any(part in each.entry for part in _FACTORS)]
            result += _of_deltas(before.parent, after.parent, name, how)
    except Exception as error:  # safetensors has no public class of errors
        if type(error).__name__ != "SafetensorError":
            raise
        yield Difference(file=name, text=f"one of the two is not a whole safetensors file: {as_line(error)}")
        return
    if not result and not how.tolerance:
        result = [Difference(file=name, text="the tensors are the same, and the header of the file differs")]
    yield from sorted(result, key=lambda each: -(math.inf if each.largest is None else each.largest))


def _of_tensors(one: safe_open, two: safe_open, name: str, how: Comparison) -> list[Difference]:
    first, second = {*one.keys()}, {*two.keys()}  # type: ignore[no-untyped-call]
    result = [
        Difference(file=name, entry=key, text="only the output has this tensor") for key in sorted(first - second)
    ]
    result += [
        Difference(file=name, entry=key, text="only the rebuilt copy has this tensor") for key in sorted(second - first)
    ]
    for key in sorted(first & second):
        tensors = one.get_tensor(key), two.get_tensor(key)  # type: ignore[no-untyped-call]
        if difference := _of_tensor(*tensors, key, name, how):
            result.append(difference)
    return result


def _is_adapter(weights: Path) -> bool:
    """Return whether a file has the weights of a plain LoRA, whose deltas are compared instead of the factors."""
    return weights.name == "adapter_model.safetensors" and (weights.parent / CONFIG).is_file()


def _of_deltas(before: Path, after: Path, name: str, how: Comparison) -> Iterator[Difference]:
    """Yield the modules whose deltas differ by more than the tolerance."""
    one, two = open_adapter(before), open_adapter(after)
    for module in sorted(one.modules.keys() & two.modules.keys()):
        first, second = one.load(module).to(torch.float64), two.load(module).to(torch.float64)
        # Through singular values: inner products would lose half of the digits of a small difference.
        apart, size = (
            float(singular_values(each).norm()) for each in (concatenate([first, second], [1.0, -1.0]), first)
        )
        share = apart / size if size else apart
        if not share <= how.tolerance:
            yield Difference(file=name, entry=module, text="the deltas differ", largest=share)


def _of_tensor(first: Tensor, second: Tensor, key: str, name: str, how: Comparison) -> Difference | None:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        forms = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (first, second)]
        return Difference(file=name, entry=key, text=f"the output has {forms[0]}, the rebuilt copy {forms[1]}")
    if _bits(first).equal(_bits(second)):
        return None
    apart, size = first.double() - second.double(), float(first.double().norm())
    largest = float(apart.norm()) / size if how.tolerance and size else float(apart.abs().max())
    if how.tolerance and largest <= how.tolerance:
        return None
    return Difference(file=name, entry=key, text="the numbers differ", largest=largest)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that NaN equals NaN, and 0 differs from -0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _of_documents(before: Path, after: Path, name: str, how: Comparison) -> Iterator[Difference]:
    try:
        first, second = _parsed(before), _parsed(after)
    except (ValueError, RecursionError) as error:
        yield Difference(file=name, text=f"one of the two is not JSON: {error}")
        return
    if before.name == MANIFEST and isinstance(first, dict) and isinstance(second, dict):
        for each in (first, second):
            for key in _NOT_COMPARED & each.keys():
                del each[key]
    folders = before.parent, after.parent
    for entry, text, largest in _of_values(first, second, "", how, folders):
        yield Difference(file=name, entry=entry, text=text, largest=largest)


def _parsed(path: Path) -> JsonValue:
    """Return a JSON document, or the list of those in the lines of a JSONL file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _of_values(
    first: object, second: object, entry: str, how: Comparison, folders: tuple[Path, Path]
) -> Iterator[tuple[str, str, float | None]]:
    """Yield (entry, text, largest difference) of each difference between two JSON values."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in sorted({*first, *second} - _NOT_RESULTS):
            where = f"{entry}.{key}" if entry else str(key)
            if key in first and key in second:
                yield from _of_values(first[key], second[key], where, how, folders)
            else:
                yield where, f"only the {'output' if key in first else 'rebuilt copy'} has this entry", None
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (one, two) in enumerate(zip(first, second, strict=True)):
            yield from _of_values(one, two, f"{entry}[{number}]", how, folders)
    elif isinstance(first, float) and isinstance(second, float):
        if first != second and not math.isclose(first, second, rel_tol=how.tolerance, abs_tol=how.tolerance):
            yield entry, f"the output has {first!r}, the rebuilt copy {second!r}", abs(first - second)
    elif (type(first), first) != (type(second), second) and not _same_path(first, second, how, folders):
        yield entry, f"the output has {_short(first)}, the rebuilt copy {_short(second)}", None


def _same_path(first: object, second: object, how: Comparison, folders: tuple[Path, Path]) -> bool:
    """Return whether two texts are the same path, after moves; a relative one starts at the folder of its file."""
    if not (isinstance(first, str) and isinstance(second, str)):
        return False
    with suppress(ValueError, OSError):
        first = how.renamed(first)
        return first == second or os.path.realpath(folders[0] / first) == os.path.realpath(folders[1] / second)
    return False


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
