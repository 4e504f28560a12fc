"""The entry `request` of a manifest: a command, the options that were set, and hashes of its inputs.

`adaptermix verify` repeats the command from it. The plan in a manifest is not enough for that: it has resolved values,
such as the weights at each module, and no paths of the inputs of a merge or an extraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Coded
from ..io.fingerprints import companion_digest, fingerprint
from ..io.json_types import JsonObject
from ..options import Settings
from ..options.paths import digest, paths_of
from ..options.roles import MODEL, Reads, Role, Writes, marked, marks_of, values_of
from ..provenance.manifest import REQUEST


def left_out(schema: type[Settings]) -> set[str]:
    """Return the options that a request does not record, since a result does not depend on them."""
    return marked(schema, Role.HANDLING, Role.SCHEDULING) | marks_of(schema, Writes).keys()


@contextmanager
def requested(command: str, settings: Callable[[], Settings]) -> Iterator[None]:
    """Let the manifests that the block writes record the command; inputs are hashed when a manifest is made.

    Args:
        command: Name of the command.
        settings: Returns its options. If it raises an error of this package, no request is recorded: Python functions
            have arguments that the command line lacks.
    """

    def entry() -> JsonObject | None:
        try:
            options = settings()
        except Coded:
            return None
        values = options.model_dump(mode="json", exclude=left_out(type(options)), exclude_defaults=True)
        return {"command": command, "settings": values, "inputs": inputs_of(options)}

    token = REQUEST.set(entry)
    try:
        yield
    finally:
        REQUEST.reset(token)


def is_recorded(schema: type[Settings]) -> bool:
    """Return whether a command with these options writes an output that has a manifest."""
    return any(mark.is_main and mark.form is None for mark in marks_of(schema, Writes).values())


def inputs_of(settings: Settings) -> list[JsonObject]:
    """Return the inputs of a command: option, path or model, and hashes; inputs that are not on disk have no hash.

    Of models a fast hash is taken, which samples the weights (see `io.fingerprints`), and one of configuration and
    tokenizer. Other files and folders are hashed as a whole.
    """
    return [
        {"option": name, **entry}
        for name, mark in marks_of(settings, Reads).items()
        for argument in values_of(settings, [name])
        for entry in _entries(argument, is_model=mark.use == MODEL)
    ]


def _entries(argument: str, *, is_model: bool) -> Iterator[JsonObject]:
    paths = paths_of(argument)
    for path in paths:
        yield {"path": str(path), **_hashes(path)}
    if not paths and is_model:
        from ..models.base import model_folder  # imports torch

        folder = model_folder(argument)
        yield {"model": argument, **(_hashes(folder) if folder else {})}
    elif not paths:
        yield {"path": argument}


def _hashes(path: Path) -> JsonObject:
    weights = fingerprint(path) if (path / "config.json").is_file() and not _is_small(path) else None
    return {"sha256": digest(path)} if weights is None else {"weights": weights, "companions": companion_digest(path)}


def _is_small(folder: Path) -> bool:
    """Return whether a folder is an adapter or a stack, which is hashed as a whole."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "stack.json"))
