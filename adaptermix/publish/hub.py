"""Push an output folder to the Hub; the only place that writes to the network."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterFormatError, PublishError, as_line
from ..io.files import output_lock, real_path
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..options import PushSettings
from ..progress import SILENT, Watcher
from .content import README
from .folder import Published, prepare
from .licences import Parent, choose
from .patience import WaitTooLongError, bounded, is_passing, reason_of, repeatedly, status_of
from .repository import card_there, has_arrived, licence_there, operations, pull_requests

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADVICE = {
    401: "Log in with `hf auth login`",
    403: "Log in with a token that may write there (`hf auth login`), or choose another repository",
    404: "Look at the name, and log in with `hf auth login` if the repository is private",
    409: "Something else changes the repository at the moment; push again",
    412: "Another commit changed the repository in the meantime; check it, then push again",
    413: "The Hub takes no files that large",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PushReport(ResultView):
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
        PublishError: the repository's name is invalid, the base model is a local folder, a file is a link, the licence
            is unknown or conflicts with a parent's, the repository is public though a private one was requested, or
            the Hub refuses.
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
    if settings.create_pr and settings.revision not in (None, "main"):
        raise PublishError(
            "the Hub opens pull requests for the branch main only: drop --revision or --create-pr.",
            code="push.request-of-branch",
        )
    if settings.tag is not None and settings.create_pr:
        raise PublishError(
            "a pull request has no tag before it is merged: drop --tag or --create-pr.", code="push.tag-of-request"
        )
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
    published = prepare(
        folder,
        settings.repo,
        base_id=settings.base_id,
        encoder_id=settings.encoder_id,
        licence=settings.license,
    )
    if published.left_out:
        count = len(published.left_out)
        published.notes.append(f"{count} other {'file' if count == 1 else 'files'} in the folder: not published.")
    if settings.dry_run and choose(published.chosen, published.parents) is None:
        published.notes.append(
            "warning: no licence is known here; push asks the Hub for that of the base model. See --license."
        )
    for note in published.notes:
        watch.note(note)
    url = None
    if not settings.dry_run:
        pushing = _Push(settings, published, watch)
        url, published = pushing.run(), pushing.published
    return PushReport(
        repo=settings.repo,
        files=published.sizes(),
        url=url,
        card=published.card,
        left_out=published.left_out,
        notes=published.notes,
    )


class _Push:
    """One push: checks the repository and the licences, creates the repository if needed, and commits once.

    Args:
        settings: The settings.
        published: The files to publish; afterwards those that were published.
        watch: Receives notes.
    """

    def __init__(self, settings: PushSettings, published: Published, watch: Watcher) -> None:
        self._settings, self.published, self._watch = settings, published, watch
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
                url, commit = self._commit(api)
                if self._settings.tag:
                    self._tag(api, self._settings.tag, commit)
        except PublishError:
            raise
        except Exception as error:  # the class of network errors depends on the version of the HTTP library
            raise self._failure(error) from error
        for warning in said:
            if "README" in str(warning.message):
                self._watch.note(as_line(warning.message, 500))
        return url

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
            self._check_tag(api)
        elif self._settings.create_pr:
            raise PublishError(
                f"a pull request needs a repository that exists, and {self._repo} does not or is private. Drop "
                "--create-pr, or log in with `hf auth login`.",
                code="push.no-repository",
            )
        self._check_licence(api)
        if info is None:
            self._create(api)
        if (branch := self._settings.revision) and not self._settings.create_pr:
            self._step = "making the branch"
            repeatedly(lambda: api.create_branch(self._repo, branch=branch, exist_ok=True), self._step, self._watch)

    def _create(self, api: HfApi) -> None:
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

    def _check_licence(self, api: HfApi) -> None:
        """Ask the Hub for the licences of parents that no card on this machine names, and write ours into the card."""
        self._step = "asking for the licences of the models that it was made from"

        def complete(parent: Parent) -> Parent:
            if parent.licence or not parent.hub:
                return parent
            name = parent.hub
            return replace(parent, licence=repeatedly(lambda: licence_there(api, name), self._step, self._watch))

        parents = [*map(complete, self.published.parents)]
        self.published = replace(self.published, parents=parents)
        if choose(self.published.chosen, parents) is None:
            unknown = ", ".join(as_line(parent.name) for parent in parents if parent.must_have) or "the base model"
            raise PublishError(
                f"a model needs a licence, and that of {unknown} is not known or not in the table of licences that "
                "derive from others. Look it up, then give --license.",
                code="push.no-license",
            )
        self.published = self.published.licensed()

    def _check_tag(self, api: HfApi) -> None:
        tag = self._settings.tag
        if not tag:
            return
        refs = repeatedly(lambda: api.list_repo_refs(self._repo), self._step, self._watch)
        if any(reference.name == tag for reference in refs.tags):
            raise PublishError(
                f"a tag must be new, and {self._repo} has the tag {as_line(tag)!r}. Give another --tag.",
                code="push.tag-exists",
            )

    def _tag(self, api: HfApi, tag: str, commit: str | None) -> None:
        self._step, self._there = "tagging the commit", "The files were committed, and only the tag is missing"
        # The tag was new before the commit, so one that exists now is ours, whose answer was lost.
        repeatedly(lambda: api.create_tag(self._repo, tag=tag, revision=commit, exist_ok=True), self._step, self._watch)

    def _check_private(self, info: object, *, made: bool) -> None:
        if not self._settings.private or getattr(info, "private", None) is True:
            return
        raise PublishError(
            f"--private was passed, and the repository {self._repo} is public{' although it was just made' * made}. "
            "No file was sent. Make it private on the Hub, choose another name, or omit --private.",
            code="push.public",
        )

    def _commit(self, api: HfApi) -> tuple[str, str | None]:
        """Commit all files at once, and return the address and the commit's hash.

        After a lost response, check whether the commit arrived before repeating it.
        """
        self._step = "looking at the newest commit"
        head = self._head(api)
        if head:
            self._keep_card(api, head)
        is_request = self._settings.create_pr
        others = repeatedly(lambda: pull_requests(api, self._repo), self._step, self._watch) if is_request else []
        self._step = "committing"
        before, address = self._there, f"{api.endpoint}/{self._repo}"

        def commit() -> tuple[str, str | None]:
            if self._there != before:
                for reference in set(pull_requests(api, self._repo)) - set(others) if is_request else ():
                    if has_arrived(api, self._repo, self.published.files, revision=reference):
                        return f"{address}/discussions/{reference.rpartition('/')[2]}", None
                if (now := self._head(api)) != head:
                    if not is_request and has_arrived(
                        api, self._repo, self.published.files, revision=self._settings.revision
                    ):
                        return address, now
                    raise PublishError(
                        f"{self._repo} was changed by another commit during the push, and no commit was made. "
                        "Check it, then push again.",
                        code="push.conflict",
                    )
            self._there = "It is not known whether the commit arrived: look at the repository before you push again"
            try:
                made = api.create_commit(
                    self._repo,
                    operations(self.published.files),
                    commit_message=self._settings.message,
                    revision=self._settings.revision,
                    create_pr=is_request or None,
                    parent_commit=head if head and _COMMIT.fullmatch(head) else None,
                )
            except Exception as error:
                if status_of(error) is not None and not is_passing(error):
                    self._there = before
                raise
            return made.pr_url or address, made.oid

        return repeatedly(commit, self._step, self._watch)

    def _keep_card(self, api: HfApi, head: str) -> None:
        """Leave the card on the Hub as it is if someone edited it there.

        Raises:
            PublishError: it was edited there and here.
        """
        there = repeatedly(lambda: card_there(api, self._repo, revision=head), self._step, self._watch)
        ours = self.published
        if there is None or there.is_pushed or there.text == ours.card:
            return
        if ours.is_made:
            note = "README.md was edited on the Hub and stays as it is there."
            files = {name: content for name, content in ours.files.items() if name != README}
            self.published = replace(ours, files=files, card=there.text, notes=[*ours.notes, note])
            self._watch.note(note)
        elif there.is_pushed is False:
            raise PublishError(
                f"README.md was edited both here and in {self._repo}, and one text would be lost. Bring the edits "
                "together in one of them, and make the other the same.",
                code="push.card-twice",
            )

    def _head(self, api: HfApi) -> str | None:
        info = self._look(api, self._settings.revision)
        return getattr(info, "sha", None)
