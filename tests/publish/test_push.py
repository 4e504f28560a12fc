"""Pushing to a Hub that is a folder, and to no Hub at all."""

from __future__ import annotations

import fnmatch
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptermix import PushSettings, merge, push
from adaptermix.errors import AdapterFormatError, PublishError

from ..factories import contents, write_lora

MODULES = {"model.layers.0.q_proj": (6, 4, 2)}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, MODULES, seed=seed)
    merge([tmp_path / "task", tmp_path / "align"], weights=[0.9], out=tmp_path / "merged")
    return tmp_path / "merged"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class FolderHub:
    """Does what `HfApi` does with a folder, and remembers how it was asked."""

    root: Path
    calls: list[tuple[str, dict[str, Any]]]

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], **options: Any) -> None:
        self.calls.append(("upload_folder", options))
        for path in folder_path.rglob("*"):
            name = path.relative_to(folder_path).as_posix()
            # as huggingface_hub's filter_repo_objects does
            if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (self.root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.root / repo_id / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FolderHub]:
    class Here(FolderHub):
        root = tmp_path / "hub"
        calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    monkeypatch.setattr("huggingface_hub.HfApi", Here)
    return Here


@pytest.mark.usefixtures("no_network")
def test_a_dry_run_writes_the_card_and_lists_the_files_without_a_network(merged: Path) -> None:
    before = contents(merged)
    report = push(PushSettings(folder=str(merged), repo="me/slots-merged", dry_run=True)).document()
    after = contents(merged)
    assert {name for name in after if after[name] != before.get(name)} <= {"README.md"}
    assert (merged / "README.md").read_text().split("---\n")[2].startswith("\n# slots-merged")
    assert report["dry_run"] is True
    assert report["url"] is None
    listed = {entry["name"]: entry["bytes"] for entry in report["files"]}
    assert listed == {name: len(content) for name, content in after.items() if content is not None}
    assert {"adapter_config.json", "adapter_model.safetensors", "adaptermix.json", "README.md"} <= set(listed)


def test_what_arrives_is_what_was_listed(merged: Path, hub: type[FolderHub]) -> None:
    (merged / ".cache").mkdir()
    (merged / ".cache" / "x").write_text("private")
    (merged / ".token").write_text("private")
    (merged / "plots").mkdir()
    (merged / "plots" / "a.png").write_text("public")
    (merged / "plots" / ".hidden").write_text("private")
    (merged / "plots" / "__pycache__").mkdir()
    (merged / "plots" / "__pycache__" / "x.pyc").write_text("private")
    (merged / "old.partial").write_text("private")
    report = push(PushSettings(folder=str(merged), repo="me/slots-merged", private=True, message="First"))
    there = {name for name, content in contents(hub.root / "me" / "slots-merged").items() if content is not None}
    assert there == {name for name, _ in report.files}
    assert "plots/a.png" in there
    assert not any("private" in (hub.root / "me/slots-merged" / name).read_text(errors="replace") for name in there)
    assert report.url == "https://huggingface.co/me/slots-merged"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[1][1]["commit_message"] == "First"


def test_a_branch_is_made_before_it_is_pushed_to(merged: Path, hub: type[FolderHub]) -> None:
    push(PushSettings(folder=str(merged), repo="me/x", revision="v2"))
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[2][1]["revision"] == "v2"


def test_an_adapter_made_elsewhere_gets_a_card_from_its_config(tmp_path: Path) -> None:
    write_lora(tmp_path / "foreign", MODULES, base="org/base")
    push(PushSettings(folder=str(tmp_path / "foreign"), repo="me/foreign", dry_run=True))
    front = yaml.safe_load((tmp_path / "foreign" / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "org/base"


def test_a_hub_that_refuses_is_a_publish_error_with_its_reason(
    merged: Path, hub: type[FolderHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("403 Forbidden\nand much more")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    before = set(contents(merged))
    with pytest.raises(PublishError, match=r"pushing to me/x failed: 403 Forbidden\. Check the network") as caught:
        push(PushSettings(folder=str(merged), repo="me/x"))
    assert "\n" not in str(caught.value)
    assert set(contents(merged)) == before


def test_an_error_without_words_is_named_by_its_class(
    merged: Path, hub: type[FolderHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(PublishError, match="failed: TimeoutError"):
        push(PushSettings(folder=str(merged), repo="me/x"))


@pytest.mark.parametrize("repo", ["merged", "a/b/c", "me/", "/x", "me/a b", "../x", "me/-x", "https://hf.co/me/x", ""])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_written(merged: Path, repo: str) -> None:
    before = contents(merged)
    with pytest.raises(PublishError, match="must be named owner/name"):
        push(PushSettings(folder=str(merged), repo=repo, dry_run=True))
    assert contents(merged) == before


def test_a_folder_without_an_adapter_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFormatError):
        push(PushSettings(folder=str(tmp_path / "empty"), repo="me/x", dry_run=True))
    assert contents(tmp_path / "empty") == {}


@pytest.mark.parametrize(
    "entries", [[], {"languages": ["de"]}, {"base": "org/base"}, {"scores": {"de": 1}}, {"inputs": [{"name": "task"}]}]
)
def test_a_manifest_that_someone_edited_is_refused_by_name_or_passed_over(merged: Path, entries: Any) -> None:
    if isinstance(entries, dict):
        entries = json.loads((merged / "adaptermix.json").read_text()) | entries
    (merged / "adaptermix.json").write_text(json.dumps(entries))
    before = contents(merged)
    try:
        push(PushSettings(folder=str(merged), repo="me/x", dry_run=True))
    except PublishError as error:
        assert "adaptermix.json" in str(error)  # noqa: PT017  (either outcome is right)
        assert contents(merged) == before


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["_orig_mod.layers.0.q"], "wrapper modules.* Rewrite it: adaptermix merge"),
        (["bert.encoder.layer.0.q", "encoder.layer.0.k"], "two model classes"),
    ],
)
def test_a_folder_that_peft_would_load_in_part_is_not_pushed(tmp_path: Path, names: list[str], words: str) -> None:
    write_lora(tmp_path / "a", dict.fromkeys(names, (4, 4, 2)))
    with pytest.raises(AdapterFormatError, match=words):
        push(PushSettings(folder=str(tmp_path / "a"), repo="me/x", dry_run=True))
