"""The files of a stack as they are published: its two models are named by their ids on the Hub."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ..adapters import open_adapter
from ..adapters.paths import check_stored_names
from ..errors import PublishError, as_line
from ..io.checkpoint_files import open_checkpoint, open_tensors
from ..io.json_types import JsonObject
from ..models.stack import ADAPTER, PROJECTION, Part, StackForm
from ..models.stack_paths import is_local
from .private import last_part


def check_stack(folder: Path) -> StackForm:
    """Return the form of a stack's folder, all of whose files can be opened.

    Raises:
        AdapterMixError: a file is missing or damaged.
    """
    form = StackForm.read(folder)
    open_tensors(folder / PROJECTION)
    if form.lora:
        check_stored_names(open_adapter(folder / ADAPTER))
    if (inside := Path(form.base.id)).is_relative_to(folder.resolve()):
        open_checkpoint(inside)
    return form


def published_form(folder: Path, form: StackForm, *, base_id: str | None, encoder_id: str | None) -> JsonObject:
    """Return the contents of `stack.json` without local paths.

    Args:
        folder: The stack's folder.
        form: Its form.
        base_id: Id on the Hub of the model on top, if it is in a local folder outside the stack.
        encoder_id: The same of the encoder.

    Raises:
        PublishError: a model is in a local folder, and its id on the Hub is missing.
    """
    document: JsonObject = form.stored(folder)
    for name, named, option in (("base", base_id, "--base-id"), ("encoder", encoder_id, "--encoder-id")):
        part: Part = getattr(form, name)
        local = part.id
        if is_local(local) and Path(local).is_relative_to(folder.resolve()):
            continue
        if named:
            document[name] = asdict(replace(part, id=named))
        elif is_local(local):
            raise PublishError(
                f"both models of a stack must be named by their ids on the Hub, and its {name} is a local folder "
                f"({as_line(last_part(local))!r}), which nobody else can load. Give {option} OWNER/NAME.",
                code="push.local-part",
            )
    return document
