"""`adaptermix.json`: the settings, inputs and package versions of an output.

It contains no time and no host name, so that repeating the work gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters import AdapterMeta, AdapterSource
from ..io.files import MANIFEST, ROWS_FILE, manifest_bytes
from ..io.json_types import JsonObject
from .row_hashes import RowHashes, read_sets, remembered, write_sets

Manifest = Mapping[str, Any]
"""A manifest as JSON. Users edit manifests, so entries that decide something are checked where they are read."""
START = "start"
"""Use of the input that training started from."""
_ROLES = ("data", "dev", "calibration", "tested")
"""Entries that list data files."""
SEEN = ("data", "dev", "calibration")
"""Entries whose files influenced a result: used for training, selection or fitting."""
REQUEST: ContextVar[Callable[[], JsonObject | None] | None] = ContextVar("request", default=None)
"""Returns the entry `request` of manifests that are made now: the command that runs, its options and its inputs."""
_PACKAGES = ("adaptermix", "torch", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a result."""
    result = {}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def manifest(kind: str, *, plan: Mapping[str, object], base: Mapping[str, object], **more: object) -> JsonObject:
    """Return an output's manifest document.

    Args:
        kind: Name of the command that made the output.
        plan: Resolved settings of the command.
        base: `id`, `revision` and `fingerprint` of the base model.
        more: Further entries; those that are None are left out.
    """
    request = REQUEST.get()
    entries = {"kind": kind, "plan": plan, "base": base, "versions": versions(), **more}
    entries["request"] = request() if request else None
    return {key: value for key, value in entries.items() if value is not None}


def base_entry(metas: Sequence[AdapterMeta]) -> JsonObject:
    """Return the manifest's base model entry, from the adapters that were trained on it."""
    first = metas[0]
    same = [meta for meta in metas if (meta.base, meta.revision) == (first.base, first.revision)]
    fingerprints = (meta.base_fingerprint for meta in same)
    return {
        "id": first.base,
        "revision": first.revision,
        "fingerprint": next((mark for mark in fingerprints if mark), None),
        "class": _class(metas),
    }


def _class(metas: Sequence[AdapterMeta]) -> str:
    """Return the kind of base model, from the adapters' manifests or else from their task type."""
    entries = [meta.manifest.get("base") for meta in metas]
    named = [entry.get("class") for entry in entries if isinstance(entry, Mapping)]
    if any(name in ("encoder", "causal") for name in named):
        return str(next(name for name in named if name in ("encoder", "causal")))
    return "encoder" if metas[0].task_type == "FEATURE_EXTRACTION" else "causal"


def input_entry(source: AdapterSource, weight: float) -> JsonObject:
    """Return the manifest entry of one input of a merge."""
    weights, config = source.digest.split("+")
    return {
        "name": source.name,
        "path": str(source.path),
        "kind": source.meta.manifest.get("kind"),
        "weight": weight,
        "weights_sha256": weights,
        "config_sha256": config,
    }


def inherit(
    sources: Sequence[AdapterSource],
    *,
    models: Sequence[Path] = (),
    acting: Sequence[bool] | None = None,
    **new: Sequence[Mapping[str, object]],
) -> dict[str, Any]:
    """Return the entries that a merge inherits: languages by role, files, and the task and vectors if all share them.

    Args:
        sources: The adapters.
        models: Folders of models that go into the result. Those that this toolkit wrote list data files as well.
        acting: Whether each adapter has a nonzero weight; languages of the others are left out. Default: all.
        new: Files of the merge itself, in addition to those of its inputs: `data` for learning, `dev` for selection,
            `calibration` for fitting, and `tested` for files that were test data before.
    """
    languages: dict[str, list[str]] = {}
    for source, acts in zip(sources, acting or [True] * len(sources), strict=True):
        for role, names in _languages(source.meta.manifest) if acts else ():
            languages[role] = sorted({*languages.get(role, ()), *names})
    return {
        "languages": languages or None,
        **files_of([*map(origin, sources), *map(origin_of, models)], new),
        "task": _common(sources, "task"),
        "vectors": _common(sources, "vectors"),
        # A fused adapter can be merged only if it is a plain LoRA that reads the source as a part of the text.
        "fusion": _common(sources, "fusion"),
    }


def carry_on(entries: Manifest, start: AdapterSource | None, on: AdapterSource | None = None) -> JsonObject:
    """Return the entries of a training run combined with those of the adapter that it started from.

    Languages and files are combined. The run's task and sentence vectors take precedence.

    Args:
        entries: The run's entries.
        start: The adapter that training started from, if any.
        on: A frozen adapter under the trained one, if any; its files count as seen too.
    """
    together = files_of([origin(source) for source in (start, on) if source], entries)
    if start is None:
        return dict(entries) | together
    before = inherit([start])
    languages = dict(before["languages"] or {})
    for role, names in entries["languages"].items():
        languages[role] = sorted({*languages.get(role, ()), *names})
    return before | dict(entries) | together | {"languages": languages}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A folder that this toolkit may have written, and its manifest.

    Args:
        path: The folder.
        manifest: The manifest, or an empty mapping.
    """

    path: Path
    manifest: Mapping[str, object]


def origin(source: AdapterSource) -> Origin:
    """Return an adapter's folder with its manifest."""
    return Origin(path=source.path, manifest=source.meta.manifest)


def origin_of(folder: Path) -> Origin:
    """Return a folder with its manifest; empty if it is missing or damaged."""
    document = None
    with suppress(OSError, ValueError, RecursionError):
        if (folder / MANIFEST).is_file():
            document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Origin(path=folder, manifest=document if isinstance(document, dict) else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFile:
    """A data file that a manifest names, with the rows that were used.

    Args:
        entry: Its manifest entry.
        hashes: The rows; None for older manifests, which do not record them.
    """

    entry: Mapping[str, object]
    hashes: RowHashes | None

    @property
    def name(self) -> str:
        """The file's name."""
        return str(self.entry.get("name"))

    @property
    def file_hashes(self) -> set[str]:
        """Hashes of the whole file: of its bytes and, if the manifest has it, of its lines."""
        return {str(self.entry[name]) for name in ("sha256", "text") if name in self.entry}

    @property
    def picked(self) -> str | None:
        """The rows that were used, as `START:STOP[:STEP]`; None for all."""
        value = self.entry.get("picked")
        return value if isinstance(value, str) else None


def seen_files(origins: Sequence[Origin], names: Sequence[str] = SEEN) -> list[SeenFile]:
    """Return the data files that adapters and models have seen, according to their manifests.

    Args:
        origins: Their folders.
        names: Entries to include: `data` lists training files, `dev` files used for selection.
    """
    return [
        SeenFile(entry=entry, hashes=remembered(entry.get("row_hashes")))
        for new in origins
        for name in names
        for entry in _files_with_rows(new, name)
    ]


def files_of(origins: Sequence[Origin], new: Manifest) -> dict[str, list[Mapping[str, object]] | None]:
    """Return the entries that list data files: those of a document and of folders, without duplicates; None if empty.

    Args:
        origins: The folders.
        new: A document with entries.
    """
    together: dict[str, list[Mapping[str, object]] | None] = {}
    for name in _ROLES:
        entries: dict[tuple[str, str], Mapping[str, object]] = {}
        for entry in (*(new.get(name) or ()), *(entry for one in origins for entry in _files_with_rows(one, name))):
            entries.setdefault((str(entry["sha256"]), str(entry.get("row_hashes"))), entry)
        together[name] = list(entries.values()) or None
    return together


def _files_with_rows(new: Origin, name: str) -> Iterator[Mapping[str, object]]:
    """Yield the files of an entry. Hashes of their rows are read first, unless that file is damaged."""
    files = _files(new.manifest, name)
    if any("row_hashes" in entry for entry in files):
        with suppress(OSError, ValueError):
            read_sets(new.path / ROWS_FILE)
    yield from files


def _files(document: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """Return the files of an entry. Users edit manifests, so malformed entries are skipped."""
    entries = document.get(name)
    return [e for e in entries if isinstance(e, Mapping) and "sha256" in e] if isinstance(entries, list) else []


def _common(sources: Sequence[AdapterSource], name: str) -> object:
    """Return an entry's value if all adapters that have the entry agree on it."""
    values = [entry for source in sources if (entry := source.meta.manifest.get(name))]
    return values[0] if values and all(entry == values[0] for entry in values) else None


def _languages(document: Mapping[str, object]) -> list[tuple[str, list[str]]]:
    """Return languages by role. Users edit manifests, so malformed entries are skipped."""
    roles = document.get("languages")
    if not isinstance(roles, Mapping):
        return []
    return [
        (role, [name for name in names if isinstance(name, str)])
        for role, names in roles.items()
        if isinstance(names, list)
    ]


def dump(document: Mapping[str, object]) -> bytes:
    """Return a manifest's bytes: sorted keys, two spaces, a final newline."""
    return manifest_bytes(document)


def write(folder: Path, document: Mapping[str, object]) -> None:
    """Write the manifest into an output folder, and the rows of the data files that it names."""
    write_sets(folder, [entry.get("row_hashes") for name in _ROLES for entry in _files(document, name)])
    (folder / MANIFEST).write_bytes(dump(document))
