"""What a push reads of repositories: cards, licences, pull requests, and whether its commit arrived."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.files import MANIFEST
from .content import README
from .patience import status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


_FRONT = re.compile(r"\A---\n.*?^---\s*", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardThere:
    """The card of a repository.

    Args:
        text: Its text.
        is_pushed: Whether the text is that of an earlier push, by the hash in the repository's manifest; None if the
            repository has no manifest.
    """

    text: str
    is_pushed: bool | None


def card_there(api: HfApi, repo: str, *, revision: str) -> CardThere | None:
    """Return the card of a repository; None without a card, or with a header only, as the Hub's web page makes it."""
    names = {entry.path for entry in api.get_paths_info(repo, [README, MANIFEST], revision=revision)}
    if README not in names:
        return None
    contents = {name: _read(api, repo, name, revision) for name in (README, MANIFEST) if name in names}
    text = contents[README].decode(errors="replace")
    if not _FRONT.sub("", text).strip():
        return None
    if MANIFEST not in contents:
        return CardThere(text=text, is_pushed=None)
    try:
        digest = json.loads(contents[MANIFEST])["card_sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        digest = None
    return CardThere(text=text, is_pushed=digest == hashlib.sha256(contents[README]).hexdigest())


def _read(api: HfApi, repo: str, name: str, revision: str) -> bytes:
    # hf_hub_download would keep a copy in the cache, and repeats failed requests itself.
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    address = f"{api.endpoint}/{repo}/resolve/{revision}/{name}"
    response = get_session().get(address, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(response)
    content: bytes = response.content
    return content


def licence_there(api: HfApi, reference: str) -> str | None:
    """Return the licence of a model of the Hub, `OWNER/NAME[@REVISION]`; None if it names no licence."""
    from huggingface_hub.errors import HFValidationError

    name, _, revision = reference.partition("@")
    try:
        info = api.model_info(name, revision=revision or None)
    except HFValidationError:
        return None
    except Exception as error:
        if status_of(error) in (401, 403, 404):
            return None
        raise
    licence = getattr(info.card_data, "license", None)
    return licence.lower() if isinstance(licence, str) and licence else None


def operations(files: Mapping[str, bytes | Path]) -> list[CommitOperationAdd]:
    """Return the operations that add files, by name in the repository."""
    from huggingface_hub import CommitOperationAdd

    return [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]


def has_arrived(api: HfApi, repo: str, files: Mapping[str, bytes | Path], *, revision: str | None) -> bool:
    """Return whether a revision of a repository contains exactly these files, by their hashes."""
    from huggingface_hub.hf_api import RepoFile

    there = api.get_paths_info(repo, list(files), revision=revision)
    entries = [entry for entry in there if isinstance(entry, RepoFile)]
    hashes = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}
    return all(
        hashes.get(operation.path_in_repo) in (_blob_id(operation), operation.upload_info.sha256.hex())
        for operation in operations(files)
    )


def pull_requests(api: HfApi, repo: str) -> list[str]:
    """Return the references of a repository's pull requests, such as `refs/pr/1`."""
    references = api.list_repo_refs(repo, include_pull_requests=True)
    return [request.ref for request in references.pull_requests or []]


def _blob_id(operation: CommitOperationAdd) -> str:
    """Return Git's hash of a file."""
    with operation.as_file() as file:
        digest = hashlib.sha1(b"blob %d\0" % operation.upload_info.size, usedforsecurity=False)
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
