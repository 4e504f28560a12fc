"""`adaptermix.json`: what was done, to what, with which versions; no clock, no host: equal work is equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .adapters import AdapterMeta, AdapterSource
from .files import MANIFEST

START = "start"
"""Use of an input that training began from."""
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
    acting: Sequence[bool] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    dev: Sequence[Mapping[str, Any]] = (),
    tested: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what a merge takes over: languages by role, files, task and sentence vectors where all agree.

    Args:
        sources: The adapters.
        acting: Whether each has a weight other than 0; languages of the others are left out. Default all of them.
        data: Files that the merge itself learned from, beside those that the adapters were trained on.
        dev: Files that the merge itself is chosen on, beside those that the adapters were chosen on.
        tested: Those of them that were evaluated as test data before, and allowed.
    """
    languages: dict[str, list[str]] = {}
    for source, acts in zip(sources, acting or [True] * len(sources), strict=True):
        for role, names in _languages(source.meta.manifest) if acts else ():
            languages[role] = sorted({*languages.get(role, ()), *names})
    return {
        "languages": languages or None,
        "data": _together(sources, "data", data),
        "dev": _together(sources, "dev", dev),
        "tested": _together(sources, "tested", tested),
        "task": _common(sources, "task"),
        "vectors": _common(sources, "vectors"),
        # only plain LoRAs, which see sources in their texts, are merged
        "fusion": _common(sources, "fusion"),
    }


def carry_on(entries: Mapping[str, Any], start: AdapterSource) -> dict[str, Any]:
    """Return the entries of a training run with those of the adapter that it began from.

    Languages and files are those of both. Task and sentence vectors are the run's own where it has them.

    Args:
        entries: The run's entries.
        start: The adapter.
    """
    before = inherit([start], dev=entries.get("dev") or (), tested=entries.get("tested") or ())
    languages = dict(before["languages"] or {})
    for role, names in entries["languages"].items():
        languages[role] = sorted({*languages.get(role, ()), *names})
    together = {"dev": before["dev"], "tested": before["tested"], "data": _together([start], "data", entries["data"])}
    return before | dict(entries) | together | {"languages": languages}


def _together(
    sources: Sequence[AdapterSource], name: str, own: Sequence[Mapping[str, Any]] = ()
) -> list[Mapping[str, Any]] | None:
    """Return the files of an entry of all adapters after the own ones, each once."""
    found: dict[Any, Mapping[str, Any]] = {}
    for entry in (*own, *(entry for source in sources for entry in _files(source.meta.manifest, name))):
        found.setdefault(entry["sha256"], entry)
    return list(found.values()) or None


def seen(sources: Sequence[AdapterSource], names: Sequence[str] = ("data", "dev")) -> set[str]:
    """Return the SHA-256 of all files that adapters were trained or chosen on, as far as their manifests tell.

    Args:
        sources: The adapters.
        names: Entries to look at: `data` has the training files, `dev` those that something was chosen on.
    """
    return {str(e["sha256"]) for source in sources for name in names for e in _files(source.meta.manifest, name)}


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
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n").encode()


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the manifest into an output folder."""
    (folder / MANIFEST).write_bytes(dump(document))
