"""Make the folder of a stack from that of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..io.files import manifest_bytes, write_whole
from ..models.stack import PROJECTION, STACK, StackForm
from .writing import companions


def copy_stack(source: Path, folder: Path, form: StackForm) -> None:
    """Copy the configuration, tokenizer and projection of a stack, and write the form of the new one.

    Args:
        source: The stack.
        folder: Folder of the new stack, which gets no LoRA here.
        form: The new form.

    Raises:
        ModelError: a file in the folder is a link that leads out of it.
    """
    for path in companions(source):
        if path.name != STACK:
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(source / PROJECTION, folder / PROJECTION)
    write_whole(folder / STACK, manifest_bytes(form.stored(folder)))
