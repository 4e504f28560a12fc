"""Push an output folder to the Hub; the only place that writes to the network."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterFormatError, PublishError, as_line
from ..io.files import output_lock, real_path
from ..io.json_types import JsonObject
from ..options import PushSettings
from ..progress import SILENT, Watcher
from .folder import Published, prepare
from .patience import WaitTooLongError, bounded, is_passing, reason_of, repeatedly, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADVICE = {
    401: "Log in with `hf auth login`",
    403: "Log in with a token that may write there (`hf auth login`), or choose another repository",
    404: "Look at the name, and log in with `hf auth login` if the repository is private",
    409: "Something else changes the repository at the moment; push again",
    412: "Another commit changed the repository in the meantime; check it, then push again",
    413: "The Hub takes no files that large",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """The result of a push, or of its dry run.

    Args:
        repo: Repository.
        files: (name, bytes) of each file.
        url: Its address; None after a dry run.
        card: The model card.
        left_out: Names of files in the folder that are not published.
        notes: Notes for the user.
    """

    repo: str
    files: list[tuple[str, int]]
    url: str | None
    card: str = ""
    left_out: list[str] | tuple[str, ...] = ()
    notes: list[str] | tuple[str, ...] = ()

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix push`."""
        return {
            "repo": self.repo,
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "url": self.url,
            "dry_run": self.url is None,
            "card": self.card,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def check_id(repo: str, what: str) -> None:
    """Refuse an invalid repository name, by the rules of huggingface_hub.

    Raises:
        PublishError: the name is invalid.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(
            f"{what} {as_line(repo)!r} is not a valid name on the Hub: {as_line(error, 300)}", code="push.hub-id"
        ) from error


def push(settings: PushSettings, *, watch: Watcher = SILENT) -> PushReport:
    """Publish an output folder (also a stack), or any PEFT adapter, with a model card from its manifest, in one commit.

    Only files with known names are published, and if the manifest lists files, only those; local paths are removed. A
    `README.md` that was written or edited by hand is published unchanged. The folder is only read. With `dry_run`
    all requests are skipped.

    Args:
        settings: The folder, and the repository.
        watch: Receives notes about retries.

    Raises:
        AdapterFormatError: the folder has no valid adapter.
        PublishError: the repository's name is invalid, the base model is a local folder, a file is a link, the
            repository is public though a private one was requested, or the Hub refuses.
        OutputError: another process writes the folder.
    """
    folder = Path(settings.folder)
    if settings.repo.count("/") != 1 or not all(settings.repo.split("/")):
        raise PublishError(
            f"a repository must be named owner/name, got {as_line(settings.repo)!r}.", code="push.repository"
        )
    check_id(settings.repo, "the repository")
    for option, name in (("--base-id", settings.base_id), ("--encoder-id", settings.encoder_id)):
        if name is not None:
            check_id(name.partition("@")[0], option)
    if not settings.message.strip():
        raise PublishError(
            "a commit needs a message, and --message is empty. Leave it out, or write one.", code="push.no-message"
        )
    if not folder.is_dir():
        raise AdapterFormatError(
            f"an output folder or an adapter is needed, and {as_line(folder)} is not a folder.", code="push.no-folder"
        )
    with nullcontext() if settings.dry_run else _unchanged(folder):
        return _pushed(settings, folder, watch)


@contextmanager
def _unchanged(folder: Path) -> Iterator[None]:
    """Prevent other commands from replacing the folder during the upload, which would mix two adapters."""
    if not os.access(real_path(folder).parent, os.W_OK):  # in that case no other process can replace it
        yield
        return
    with output_lock(folder):
        yield


def _pushed(settings: PushSettings, folder: Path, watch: Watcher) -> PushReport:
    published = prepare(folder, settings.repo, base_id=settings.base_id, encoder_id=settings.encoder_id)
    if published.left_out:
        count = len(published.left_out)
        published.notes.append(f"{count} other {'file' if count == 1 else 'files'} in the folder: not published.")
    for note in published.notes:
        watch.note(note)
    url = None if settings.dry_run else _Push(settings, published, watch).run()
    return PushReport(
        repo=settings.repo,
        files=published.sizes(),
        url=url,
        card=published.card,
        left_out=published.left_out,
        notes=published.notes,
    )


class _Push:
    """One push: checks the repository, creates it if needed, and commits once."""

    def __init__(self, settings: PushSettings, published: Published, watch: Watcher) -> None:
        self._settings, self._published, self._watch = settings, published, watch
        self._repo = settings.repo
        self._step, self._there = "looking for the repository", "No repository was made"

    def run(self) -> str:
        """Push, and return the address.

        Raises:
            PublishError: the Hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            with bounded(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self._make(api)
                self._commit(api)
        except PublishError:
            raise
        except Exception as error:  # the class of network errors depends on the version of the HTTP library
            raise self._failure(error) from error
        for warning in said:
            if "README" in str(warning.message):
                self._watch.note(as_line(warning.message, 500))
        return f"{api.endpoint}/{self._repo}"

    def _failure(self, error: Exception) -> PublishError:
        reason = reason_of(error)
        if isinstance(error, WaitTooLongError):
            reason, advice = f"the Hub answered {error}", None
        elif is_passing(error):
            advice = "Check the network, or push again later"
        else:
            advice = _ADVICE.get(status_of(error) or 0, "Check the network, and log in with `hf auth login`")
        parts = [reason, advice, self._there, "The folder on disk is unchanged"]
        text = ". ".join(part.rstrip(". ") for part in parts if part)
        return PublishError(f"pushing to {self._repo} failed while {self._step}: {text}.", code="push.failed")

    def _look(self, api: HfApi, revision: str | None = None) -> object:
        """Return the Hub's information about the repository; None if it does not exist or is not visible."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return repeatedly(lambda: api.repo_info(self._repo, revision=revision), self._step, self._watch)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    def _make(self, api: HfApi) -> None:
        """Create the repository if it does not exist, and check that it is private if requested."""
        info = self._look(api)
        if info is not None:
            self._there = "The repository existed before, and no commit was made"
            self._check_private(info, made=False)
        else:
            self._step, self._there = "making the repository", "It is not known whether the repository was made"
            private = self._settings.private or None
            try:
                repeatedly(lambda: api.create_repo(self._repo, private=private), self._step, self._watch)
            except Exception as error:
                if status_of(error) != 409:  # 409 means that it was created but the response was lost
                    self._there = self._there if is_passing(error) else "No repository was made"
                    raise
            kind = "private" if self._settings.private else "public"
            self._there = f"The {kind} repository was made and is empty: push again, or delete it on the Hub"
            if self._settings.private:
                self._step = "checking that the repository is private"
                self._check_private(self._look(api), made=True)
        if branch := self._settings.revision:
            self._step = "making the branch"
            repeatedly(lambda: api.create_branch(self._repo, branch=branch, exist_ok=True), self._step, self._watch)

    def _check_private(self, info: object, *, made: bool) -> None:
        if not self._settings.private or getattr(info, "private", None) is True:
            return
        raise PublishError(
            f"--private was passed, and the repository {self._repo} is public{' although it was just made' * made}. "
            "No file was sent. Make it private on the Hub, choose another name, or omit --private.",
            code="push.public",
        )

    def _commit(self, api: HfApi) -> None:
        """Commit all files at once; after a lost response, check whether the commit arrived before repeating it."""
        self._step = "looking at the newest commit"
        head = self._head(api)
        self._step = "committing"
        before = self._there

        def commit() -> None:
            now = self._head(api) if self._there != before else head
            if now != head:
                if self._arrived(api):
                    return
                raise PublishError(
                    f"{self._repo} was changed by another commit during the push, and no commit was made. "
                    "Check it, then push again.",
                    code="push.conflict",
                )
            self._there = "It is not known whether the commit arrived: look at the repository before you push again"
            try:
                api.create_commit(
                    self._repo,
                    self._operations(),
                    commit_message=self._settings.message,
                    revision=self._settings.revision,
                    parent_commit=head if head and _COMMIT.fullmatch(head) else None,
                )
            except Exception as error:
                if status_of(error) is not None and not is_passing(error):
                    self._there = before
                raise

        repeatedly(commit, self._step, self._watch)

    def _head(self, api: HfApi) -> str | None:
        info = self._look(api, self._settings.revision)
        return getattr(info, "sha", None)

    def _operations(self) -> list[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        return [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for name, content in self._published.files.items()
        ]

    def _arrived(self, api: HfApi) -> bool:
        """Return whether the newest commit contains exactly these files."""
        from huggingface_hub.hf_api import RepoFile

        there = api.get_paths_info(self._repo, list(self._published.files), revision=self._settings.revision)
        files = [entry for entry in there if isinstance(entry, RepoFile)]
        hashes = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in files}
        return all(
            hashes.get(operation.path_in_repo) in (_blob_id(operation), operation.upload_info.sha256.hex())
            for operation in self._operations()
        )


def _blob_id(operation: CommitOperationAdd) -> str:
    """Return Git's hash of a file."""
    from hashlib import sha1

    with operation.as_file() as file:
        digest = sha1(b"blob %d\0" % operation.upload_info.size, usedforsecurity=False)
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
