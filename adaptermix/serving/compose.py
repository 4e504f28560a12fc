"""Merge the adapters of a model name into a folder for vLLM, once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..adapters import AdapterSource, open_adapters
from ..adapters.kinds import kinds_of
from ..errors import IncompatibleAdapters, OutputError, UsageError, as_line
from ..io.fingerprints import fingerprint
from ..merging import merge
from ..options import ExportSettings
from ..options.paths import digest
from ..publish.export import export
from .cache import FolderCache
from .names import parse
from .settings import ServingSettings

_ENGINE = "vllm"
_FORMAT = 1
"""Raise this number when the same inputs give other files, so that folders of earlier versions are not used."""
# vLLM shows the messages of loggers below its own.
_LOGGER = logging.getLogger("vllm.adaptermix")


class Composer:
    """Merges of registered adapters.

    Args:
        settings: The adapters and the cache.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self.cache = FolderCache(settings.cache, settings.limit)

    async def find(self, base: str, name: str) -> Path | None:
        """Return the folder of a model name, without blocking the event loop; None if it cannot be served.

        The reason is logged: at level INFO for a name that does not list registered adapters, which may belong to
        another resolver, and else as a warning.

        Args:
            base: The base model of the server.
            name: The model name of a request.
        """
        try:
            return await asyncio.to_thread(self._folder_of, base, name)
        except UsageError as error:
            _LOGGER.info("%s is not a merge of registered adapters: %s", repr(as_line(name)), as_line(error, 400))
        except Exception as error:
            _LOGGER.warning("%s cannot be merged: %s", repr(as_line(name)), as_line(error, 800))
        return None

    def _folder_of(self, base: str, name: str) -> Path:
        registered = self.settings.registered()
        parts = parse(name, registered.keys())
        return self.folder(base, [(registered[part.adapter], part.weight) for part in parts])

    def folder(self, base: str, parts: Sequence[tuple[Path, float]]) -> Path:
        """Return the folder of a merge; make it if the cache does not have it.

        Args:
            base: The base model of the server.
            parts: Adapter folders and their weights.

        Raises:
            AdapterMixError: the adapters do not belong to the base or to each other, vLLM cannot serve the merge, or
                there is no room.
        """
        sources = open_adapters([path for path, _ in parts])
        _check_base(sources, base)
        needs_base = any(kinds_of(source.meta) for source in sources)
        identity = _identity(parts, base if needs_base else None)

        def make(staging: Path) -> Path:
            made = _write(parts, base if needs_base else None, staging)
            if _identity(parts, base if needs_base else None) != identity:
                raise OutputError(
                    "the adapters must stay the same while they are merged, and one changed. Send the request again.",
                    code="serving.changed",
                )
            return made

        return self.cache.get(identity, make)


def _identity(parts: Sequence[tuple[Path, float]], base: str | None) -> str:
    """Return a hash of all that a merge depends on."""
    inputs = [_FORMAT, base, [(digest(path), weight.hex()) for path, weight in parts]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _write(parts: Sequence[tuple[Path, float]], base: str | None, staging: Path) -> Path:
    """Merge and export into an empty folder, and return the export."""
    folder, out = staging / "merged", staging / "adapter"
    if len(parts) == 1 and parts[0][1] == 1:
        folder = parts[0][0]
    else:
        paths, weights = [path for path, _ in parts], [weight for _, weight in parts]
        merge(paths, weights=weights, out=folder, base=base, device="cpu")
    export(ExportSettings(folder=str(folder), engine=_ENGINE, out=str(out), base=base))
    return out


def _check_base(sources: Sequence[AdapterSource], base: str) -> None:
    """Refuse adapters of another base model than the server's, by name, and else by the hash of the weights."""
    for source in sources:
        if source.meta.base == base:
            continue
        known = source.meta.base_fingerprint
        if known is None or not Path(base).is_dir() or fingerprint(Path(base)) != known:
            raise IncompatibleAdapters(
                f"adapters must have the base model of the server, {base!r}, and '{source.name}' names "
                f"{source.meta.base!r}. Start the server with that name.",
                code="serving.base",
            )
