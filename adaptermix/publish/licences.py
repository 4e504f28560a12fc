"""Licences of derived models: which ones the licence of a parent allows, and which one a publication gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import PublishError, as_line
from ..models.pretrained import cached_file
from ..provenance.manifest import Manifest
from .private import hub_id, last_part

_HEADER = re.compile(r"\A\ufeff?---\r?\n(?P<yaml>.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PERMISSIVE = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "bsl-1.0", "zlib"),
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "unlicense", "wtfpl", "pddl", "odc-by", "afl-3.0", "ecl-2.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "ms-pl", "ncsa", "postgresql", "artistic-2.0"),
}
"""Licences that allow a derived model under any licence, as long as their notices stay."""
_SAME_OR = {
    "cc-by-sa-3.0": ("cc-by-sa-4.0",),
    "cc-by-sa-4.0": ("gpl-3.0",),
    "cc-by-nc-2.0": ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    "cc-by-nc-3.0": ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    "cc-by-nc-4.0": ("cc-by-nc-sa-4.0",),
    "cc-by-nc-sa-3.0": ("cc-by-nc-sa-4.0",),
    "gpl-2.0": (),
    "gpl-3.0": ("agpl-3.0",),
    "lgpl-3.0": ("gpl-3.0", "agpl-3.0"),
    "mpl-2.0": ("lgpl-3.0", "gpl-3.0", "agpl-3.0"),
    **dict.fromkeys(
        (
            *(
                "agpl-3.0",
                "cc-by-nc-sa-4.0",
                "odbl",
                "epl-2.0",
                "eupl-1.2",
                "osl-3.0",
                "apple-amlr",
                "fair-noncommercial-research-license",
            ),
            *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m"),
            *("bigcode-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "gfdl"),
            *("deepfloyd-if-license", "h-research", "intel-research"),
        ),
        (),
    ),
}
"""Licences that a derived model must keep, each with other licences that it allows."""
_NO_DERIVED = {"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"}
"""Licences that allow no derived model to be published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A model that an output was made from.

    Args:
        name: Its name in messages: the id on the Hub, or the folder's name.
        hub: Its id on the Hub, with `@REVISION`; None without an id.
        licence: The licence that its card names; None without a card on this machine, or without a licence in it.
        must_have: Whether a push needs to know its licence. Adapters of this machine without one are the user's own.
    """

    name: str
    hub: str | None = None
    licence: str | None = None
    must_have: bool = False


def is_allowed(derived: str, parent: str) -> bool | None:
    """Return whether a model under a licence may derive from one under another; None if the table lacks the parent's.

    Source: the licences' texts; the identifiers are the Hub's.
    """
    if parent in _PERMISSIVE:
        return True
    if parent in _NO_DERIVED:
        return False
    if parent in _SAME_OR:
        return derived == parent or derived in _SAME_OR[parent]
    return None


def check_identifier(licence: str) -> None:
    """Refuse a text that cannot be the identifier of a licence on the Hub.

    Raises:
        PublishError: the text has other characters.
    """
    if not _ID.fullmatch(licence):
        raise PublishError(
            f"--license must be an identifier of the Hub, such as apache-2.0, got {as_line(licence, 60)!r}.",
            code="push.license-name",
        )


def choose(chosen: str | None, parents: Iterable[Parent]) -> str | None:
    """Return the licence of a publication: the chosen one, or one of the parents' that all of them allow.

    Args:
        chosen: The licence that the user chose, if any.
        parents: The parents, the base model first.

    Returns:
        None if the user chose no licence, and that of a base model is unknown or not in the table.

    Raises:
        PublishError: a parent does not allow the chosen licence, or no licence of the parents is allowed by all.
    """
    parents = list(parents)
    known = [parent for parent in parents if parent.licence]
    for parent in known:
        if parent.licence in _NO_DERIVED:
            raise PublishError(
                f"{as_line(parent.name)} is under {parent.licence}, which allows no derived model to be published. "
                "Start from another model.",
                code="push.license-no-derivatives",
            )
        if chosen and is_allowed(chosen, str(parent.licence)) is False:
            allowed = ", ".join([str(parent.licence), *_SAME_OR[str(parent.licence)]])
            raise PublishError(
                f"a model that derives from {as_line(parent.name)} must be under {allowed}, and the licence is "
                f"{chosen}. Give another --license, or change the one in README.md.",
                code="push.license-conflict",
            )
    if chosen or not known or any(parent.must_have and not parent.licence for parent in parents):
        return chosen
    names = list(dict.fromkeys(str(parent.licence) for parent in known))
    if any(name not in _PERMISSIVE and name not in _SAME_OR for name in names):
        return None
    # The base model is the first parent, so its licence decides among several that are allowed.
    common = next((one for one in names if all(is_allowed(one, other) for other in names)), None)
    if common is None:
        listed = ", ".join(f"{as_line(parent.name)} ({parent.licence})" for parent in known)
        raise PublishError(
            f"no licence of the parents is allowed by all of them: {listed}. Leave one of them out.",
            code="push.license-conflict",
        )
    return common


def parents_of(document: Manifest, *, base: str | None, encoder: str | None = None) -> list[Parent]:
    """Return the models that an output was made from, with the licences that cards on this machine name.

    Args:
        document: Its manifest, as it is on the disk.
        base: Id of the base model on the Hub, optionally with `@REVISION`; None without an id.
        encoder: The same of the encoder of a stack.
    """
    entry, stack = document.get("base"), document.get("stack")
    named = entry.get("id") if isinstance(entry, Mapping) else None
    parents = [_parent(str(named or ""), base, must_have=True)]
    if document.get("artifact") == "stack" and isinstance(stack, Mapping):
        reference = str(stack["encoder"]["id"])
        known = reference if hub_id(reference.partition("@")[0]) else None
        parents.append(_parent(reference, encoder or known, must_have=True))
    for one in document.get("inputs") or ():
        path = str(one.get("path") or "") if isinstance(one, Mapping) and one.get("weight", 1) else ""
        if path:
            is_model = one.get("kind") == "checkpoint"
            hub = hub_id(path) if is_model and "/" in path else None
            parents.append(_parent(path, hub, must_have=is_model))
    return parents


def _parent(reference: str, hub: str | None, *, must_have: bool) -> Parent:
    licence = folder_licence(Path(reference)) if reference else None
    if hub and licence is None:
        name, _, revision = hub.partition("@")
        cached = cached_file(name, "README.md", revision or None)
        licence = folder_licence(cached.parent) if cached else None
    name = hub or (last_part(reference) if reference else "the base model")
    return Parent(name=name, hub=hub, licence=licence, must_have=must_have)


def card_licence(text: str) -> str | None:
    """Return the licence that the header of a card names; None without one."""
    match = _HEADER.match(text)
    try:
        entries = yaml.safe_load(match["yaml"]) if match else None
    except yaml.YAMLError:
        return None
    licence = entries.get("license") if isinstance(entries, Mapping) else None
    return licence.lower() if isinstance(licence, str) and licence else None


def folder_licence(folder: Path) -> str | None:
    """Return the licence that the card of a model's folder names; None without one."""
    try:
        return card_licence((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def with_licence(text: str, licence: str) -> str:
    """Return a card whose header names a licence as its first entry; the rest of the text is unchanged.

    Args:
        text: A card whose header names no licence.
        licence: The licence.
    """
    line = f"license: {licence}\n"
    if _HEADER.match(text):
        start = text.index("\n") + 1
        return text[:start] + line + text[start:]
    return f"---\n{line}---\n\n{text}"
