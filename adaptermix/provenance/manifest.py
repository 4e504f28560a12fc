"""`adaptermix.json`: what was done, to what, with which versions; no clock, no host: equal work is equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters import AdapterMeta, AdapterSource
from ..io.files import MANIFEST, ROWS_FILE, manifest_bytes
from .row_hashes import RowHashes, read_sets, remembered, write_sets

START = "start"
"""Use of an input that training began from."""
_ROLES = ("data", "dev", "calibration", "tested")
"""Entries that list data files."""
SEEN = ("data", "dev", "calibration")
"""Those of them whose files a result has seen: trained on, chosen on, or fitted to."""
_PACKAGES = ("adaptermix", "torch", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def manifest(kind: str, *, plan: Mapping[str, Any], base: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the document of one output.

    Args:
        kind: The command that made it.
        plan: Its resolved settings.
        base: `id`, `revision` and `fingerprint` of the base model.
        more: Further entries; those that are None are left out.
    """
    entries = {"kind": kind, "plan": plan, "base": base, "versions": versions(), **more}
    return {key: value for key, value in entries.items() if value is not None}


def base_entry(metas: Sequence[AdapterMeta]) -> dict[str, Any]:
    """Return the base model's entry of a manifest, from the adapters that were trained on it."""
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
    """Return the kind of base model: as the adapters' manifests have it, else by their task type."""
    entries = [meta.manifest.get("base") for meta in metas]
    named = [entry.get("class") for entry in entries if isinstance(entry, Mapping)]
    if any(name in ("encoder", "causal") for name in named):
        return str(next(name for name in named if name in ("encoder", "causal")))
    return "encoder" if metas[0].task_type == "FEATURE_EXTRACTION" else "causal"


def input_entry(source: AdapterSource, weight: float) -> dict[str, Any]:
    """Return what a merge records of one of its inputs."""
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
    **own: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a merge takes over: languages by role, files, task and sentence vectors where all agree.

    Args:
        sources: The adapters.
        models: Folders of models that go into the result; those that this toolkit wrote name files too.
        acting: Whether each adapter has a weight other than 0; languages of the others are left out. Default all.
        own: Files of the merge itself, in addition to those of its inputs: `data` that it learned from, `dev` that it
            was chosen on, `calibration` that it was fitted to, and those of them that were `tested` before.
    """
    languages: dict[str, list[str]] = {}
    for source, acts in zip(sources, acting or [True] * len(sources), strict=True):
        for role, names in _languages(source.meta.manifest) if acts else ():
            languages[role] = sorted({*languages.get(role, ()), *names})
    return {
        "languages": languages or None,
        **files_of([*map(origin, sources), *map(origin_of, models)], own),
        "task": _common(sources, "task"),
        "vectors": _common(sources, "vectors"),
        # only plain LoRAs, which see sources in their texts, are merged
        "fusion": _common(sources, "fusion"),
    }


def carry_on(
    entries: Mapping[str, Any], start: AdapterSource | None, on: AdapterSource | None = None
) -> dict[str, Any]:
    """Return the entries of a training run with those of the adapter that it began from.

    Languages and files are those of both. Task and sentence vectors are the run's own where it has them.

    Args:
        entries: The run's entries.
        start: The adapter that training began from, if any.
        on: The adapter that training was on top of, if any, whose files count as seen too.
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
        manifest: The manifest, empty where there is none.
    """

    path: Path
    manifest: Mapping[str, Any]


def origin(source: AdapterSource) -> Origin:
    """Return an adapter's folder with its manifest."""
    return Origin(path=source.path, manifest=source.meta.manifest)


def origin_of(folder: Path) -> Origin:
    """Return a folder with its manifest; one without a manifest, or with a damaged one, has an empty one."""
    document = None
    with suppress(OSError, ValueError, RecursionError):
        if (folder / MANIFEST).is_file():
            document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Origin(path=folder, manifest=document if isinstance(document, dict) else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFile:
    """A data file that a manifest names, with the rows that were used.

    Args:
        entry: What the manifest says.
        hashes: The rows; None where they are not known, as in older manifests.
    """

    entry: Mapping[str, Any]
    hashes: RowHashes | None

    @property
    def name(self) -> str:
        """The file's name."""
        return str(self.entry.get("name"))

    @property
    def file_hashes(self) -> set[str]:
        """Hashes of the file as a whole: of its bytes, and of its lines where the manifest has it."""
        return {str(self.entry[name]) for name in ("sha256", "text") if name in self.entry}

    @property
    def picked(self) -> str | None:
        """The rows that were used, as `START:STOP[:STEP]`; None for all."""
        found = self.entry.get("picked")
        return found if isinstance(found, str) else None


def seen_files(origins: Sequence[Origin], names: Sequence[str] = SEEN) -> list[SeenFile]:
    """Return the data files that adapters and models have seen, as far as their manifests name them.

    Args:
        origins: Their folders.
        names: Entries to look at: `data` has the training files, `dev` those that something was chosen on.
    """
    return [
        SeenFile(entry=entry, hashes=remembered(entry.get("row_hashes")))
        for own in origins
        for name in names
        for entry in _own_files(own, name)
    ]


def files_of(origins: Sequence[Origin], own: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]] | None]:
    """Return the entries that list data files: the own ones and those of folders, each once; None where there is none.

    Args:
        origins: The folders.
        own: A document with own entries.
    """
    together: dict[str, list[Mapping[str, Any]] | None] = {}
    for name in _ROLES:
        found: dict[Any, Mapping[str, Any]] = {}
        for entry in (*(own.get(name) or ()), *(entry for one in origins for entry in _own_files(one, name))):
            found.setdefault((str(entry["sha256"]), str(entry.get("row_hashes"))), entry)
        together[name] = list(found.values()) or None
    return together


def _own_files(own: Origin, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the files of an entry, once the rows in the folder are read; damaged ones count as not known."""
    files = _files(own.manifest, name)
    if any("row_hashes" in entry for entry in files):
        with suppress(OSError, ValueError):
            read_sets(own.path / ROWS_FILE)
    yield from files


def _files(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the files of an entry; a manifest is a file that people edit, so what has another form is passed over."""
    found = document.get(name)
    return [e for e in found if isinstance(e, Mapping) and "sha256" in e] if isinstance(found, list) else []


def _common(sources: Sequence[AdapterSource], name: str) -> Any:
    """Return an entry that is the same wherever there is one."""
    found = [entry for source in sources if (entry := source.meta.manifest.get(name))]
    return found[0] if found and all(entry == found[0] for entry in found) else None


def _languages(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return languages by role; a manifest is a file that people edit, so entries of another form are passed over."""
    roles = document.get("languages")
    if not isinstance(roles, Mapping):
        return []
    return [
        (role, [name for name in names if isinstance(name, str)])
        for role, names in roles.items()
        if isinstance(names, list)
    ]


def dump(document: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes: sorted keys, two spaces, a final newline."""
    return manifest_bytes(document)


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the manifest into an output folder, and next to it the rows of the data files that it names."""
    write_sets(folder, [entry.get("row_hashes") for name in _ROLES for entry in _files(document, name)])
    (folder / MANIFEST).write_bytes(dump(document))
