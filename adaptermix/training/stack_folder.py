"""The folder of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor

from ..adapters import AdapterState, write_adapter
from ..errors import PlanError
from ..io.files import manifest_bytes, write_whole
from ..models.base import BaseModel, fingerprint_of
from ..models.pretrained import split_revision
from ..models.stack import ADAPTER, PROJECTION, STACK, Part, stack_folder


def part_of(reference: str) -> Part:
    """Return the entry of a model in the form of a stack."""
    name, _ = split_revision(reference)
    path = Path(name)
    return Part(id=str(path.resolve()) if path.is_dir() else reference, fingerprint=fingerprint_of(reference))


def write_stack(
    folder: Path, base: BaseModel, projection: Mapping[str, Tensor], adapter: AdapterState | None = None
) -> None:
    """Write the files of a stack without its manifest, card and history.

    Args:
        folder: An empty folder.
        base: The stack, with its form.
        projection: The tensors of U.
        adapter: The LoRA of the stack; none for one that generates.
    """
    assert base.stack  # noqa: S101  (for the type checker)
    if adapter:
        (folder / ADAPTER).mkdir()
        write_adapter(folder / ADAPTER, adapter)
    write_whole(folder / PROJECTION, to_bytes({name: value.contiguous() for name, value in projection.items()}))
    write_whole(folder / STACK, manifest_bytes(base.stack.stored(folder)))
    write_whole(folder / "config.json", base.model.config.to_json_string().encode())
    base.tokenizer.save_pretrained(str(folder))


def refuse_stack_on_top(reference: str) -> None:
    """Refuse a stack as the model on top of a new stack.

    Raises:
        PlanError: it is one.
    """
    if stack_folder(reference):
        raise PlanError(
            f"a stack is made of two models, and {reference!r} is a stack itself: give its model on top.",
            code="stack.of-stacks",
        )
