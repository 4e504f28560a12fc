"""Push an output folder to the Hub; the only place that writes to the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .. import manifest as manifests
from ..adapters import open_adapter
from ..adapters.paths import check_stored_names
from ..errors import PublishError
from ..files import MANIFEST, write_whole
from ..settings import PushSettings
from .card import card

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PRIVATE = (".*", "*/.*", "*.partial", "*__pycache__*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What was pushed, or would be.

    Args:
        repo: Repository.
        files: (name, bytes) of each file.
        url: Where it is now; None after a dry run.
    """

    repo: str
    files: list[tuple[str, int]]
    url: str | None

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `adaptermix push`."""
        return {
            "repo": self.repo,
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "url": self.url,
            "dry_run": self.url is None,
        }


def _card(folder: Path, repo: str) -> bytes:
    """Return the card from the folder's manifest, or from the config alone for adapters made elsewhere."""
    source = open_adapter(folder)
    check_stored_names(source)
    meta = source.meta
    document: Mapping[str, Any] = meta.manifest or manifests.manifest(
        "adapter", plan={}, base=manifests.base_entry([meta])
    )
    try:
        return card(document, name=repo.split("/")[1], reference=repo).encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PublishError(
            f"{folder / MANIFEST} must be as adaptermix wrote it, and a card cannot be made from it "
            f"({type(error).__name__}: {error}). Remove it to publish the adapter without it."
        ) from error


def _replaceable(path: Path) -> bool:
    """Return whether a card may be written: none is there, or ours, or PEFT's form that nobody filled in."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return "Made with adaptermix" in text or "[More Information Needed]" in text


def _files(folder: Path) -> list[tuple[str, int]]:
    """Return name and size of what is published; the upload leaves out the same."""
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return sorted(
        (name, path.stat().st_size) for name, path in found if not any(fnmatch(name, mark) for mark in _PRIVATE)
    )


def push(settings: PushSettings) -> PushReport:
    """Publish an adapter folder with a model card made from its manifest.

    A `README.md` written by hand is kept. With `dry_run` the card is written, the files are listed, and nothing leaves
    the machine.

    Raises:
        AdapterFormatError: the folder holds no adapter that loads.
        PublishError: a name that is no repository, or the Hub refuses.
    """
    folder = Path(settings.folder)
    if not _REPO.fullmatch(settings.repo):
        raise PublishError(f"a repository must be named owner/name, got {settings.repo!r}.")
    made = _card(folder, settings.repo)
    if _replaceable(folder / "README.md"):
        write_whole(folder / "README.md", made)
    files = _files(folder)
    url = None if settings.dry_run else _upload(folder, settings)
    return PushReport(repo=settings.repo, files=files, url=url)


def _upload(folder: Path, settings: PushSettings) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(settings.repo, private=settings.private, exist_ok=True)
        if settings.revision:
            api.create_branch(settings.repo, branch=settings.revision, exist_ok=True)
        api.upload_folder(
            repo_id=settings.repo,
            folder_path=folder,
            commit_message=settings.message,
            revision=settings.revision,
            ignore_patterns=list(_PRIVATE),
        )
    except Exception as error:  # its HTTP library, and so the class of a network error, differs by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PublishError(
            f"pushing to {settings.repo} failed: {reason}. Check the network, and log in with `hf auth login`. "
            "Then push again; on disk only README.md was written."
        ) from error
    return f"https://huggingface.co/{settings.repo}"
