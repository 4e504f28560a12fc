"""The part of `inspect` that is about a stack beyond its LoRA."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import AdapterFormatError
from ..io.checkpoint_files import open_tensors
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..models.languages import language_tags
from ..models.pretrained import load_tokenizer
from ..models.stack import PROJECTION, Part, StackForm


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StackInspection(ResultView):
    """A stack.

    Args:
        encoder: The multilingual encoder.
        base: The model on top.
        width: Width of the encoder's states.
        own_width: Width of the word embeddings of the model on top.
        norm: Frobenius norm of the projection's weight.
        bias_norm: Norm of its bias.
        attention: "causal" or "both".
        pooling: Pooling of the states that the stack was trained on.
        lora: Whether the stack has its own LoRA.
        languages: Languages for which the encoder reads a tag; empty if it reads none.
        unexplained: Fraction of the variance of the teacher's states on dev texts that the stack left unexplained, at
            the step whose factors were kept; None without dev texts.
    """

    encoder: Part
    base: Part
    width: int
    own_width: int
    norm: float
    bias_norm: float
    attention: str
    pooling: str
    lora: bool
    languages: tuple[str, ...]
    unexplained: float | None

    def document(self) -> JsonObject:
        """Return plain data."""
        return asdict(self) | {"languages": list(self.languages)}


def inspect_stack(folder: Path) -> StackInspection:
    """Read the numbers of a stack's folder; its two models are not loaded.

    Raises:
        AdapterFormatError: the projection lacks a tensor.
        ModelError: a file is damaged.
    """
    form, file = StackForm.read(folder), open_tensors(folder / PROJECTION)
    if {"weight", "bias"} - file.tensors.keys():
        raise AdapterFormatError(
            f"{folder / PROJECTION} must hold the tensors weight and bias, and does not. Make the stack again.",
            code="stack.projection",
        )
    weight, bias = (file.load(name).double() for name in ("weight", "bias"))
    return StackInspection(
        encoder=form.encoder,
        base=form.base,
        width=weight.shape[1],
        own_width=weight.shape[0],
        norm=float(torch.linalg.vector_norm(weight)),
        bias_norm=float(torch.linalg.vector_norm(bias)),
        attention=form.attention,
        pooling=form.pooling,
        lora=form.lora,
        languages=tuple(sorted(language_tags(load_tokenizer(str(folder), what="stack")))),
        unexplained=_unexplained(folder),
    )


def _unexplained(folder: Path) -> float | None:
    """Return the last value of the history, or that of the step that the manifest names as kept."""
    values: dict[int, float] = {}
    kept = -1
    with suppress(OSError, ValueError, TypeError, KeyError):
        lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        values = {entry["step"]: float(entry["dev_unexplained"]) for entry in entries if "dev_unexplained" in entry}
        kept = int(json.loads((folder / "adaptermix.json").read_text(encoding="utf-8"))["selection"]["kept_step"])
    return values.get(kept, values[max(values)]) if values else None
