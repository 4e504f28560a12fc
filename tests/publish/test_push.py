"""What a push sends, and what it leaves alone: the folder, edited cards, private files."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptermix import PushSettings, merge, push
from adaptermix.errors import AdapterFormatError, OutputError, PublishError

from ..factories import contents, peft_lora, tiny_llama, write_lora
from ..refusals import refuses
from .conftest import MODULES
from .loopback import Hub, Repository


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def settings(folder: Path, **more: Any) -> PushSettings:
    return PushSettings(**({"folder": str(folder), "repo": "me/slots-merged", "license": "mit"} | more))


@pytest.mark.usefixtures("no_network")
def test_a_dry_run_shows_the_card_and_the_files_and_writes_nothing(merged: Path) -> None:
    before = contents(merged)
    report = push(settings(merged, dry_run=True)).document()
    assert contents(merged) == before
    assert report["dry_run"] is True
    assert report["url"] is None
    assert report["card"].split("---\n")[2].startswith("\n# slots-merged")
    listed = {entry["name"]: entry["bytes"] for entry in report["files"]}
    assert set(listed) == {"adapter_config.json", "adapter_model.safetensors", "adaptermix.json", "README.md"}
    assert listed["adapter_model.safetensors"] == (merged / "adapter_model.safetensors").stat().st_size
    assert listed["README.md"] == len(report["card"].encode())


PRIVATE = (
    *(
        "notes.md",
        "notes.txt",
        ".env",
        ".token",
        "id_rsa",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "secrets.json",
    ),
    *(
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/adapter_model.safetensors",
    ),
    *(
        "runs/x/events.out.tfevents.1",
        "global_step10/zero.pt",
        "plots/a.png",
        ".cache/x",
        "old.partial",
        "README.md.bak",
    ),
    *("adapter_config.json~", "__pycache__/x.pyc", "model.safetensors", "predictions.jsonl", "sub/README.md"),
)


def test_only_what_belongs_to_the_adapter_arrives_in_one_commit_and_the_folder_stays(merged: Path, hub: Hub) -> None:
    for name in PRIVATE:
        (merged / name).parent.mkdir(exist_ok=True, parents=True)
        (merged / name).write_text("private")
    before = contents(merged)
    report = push(settings(merged, private=True, message="First"))
    assert contents(merged) == before
    repository = hub.repositories["me/slots-merged"]
    assert set(repository.files) == {name for name, _ in report.files}
    assert set(repository.files) == {
        *("adapter_config.json", "adapter_model.safetensors", "adaptermix.json", "README.md")
    }
    assert sorted(report.left_out) == sorted(PRIVATE)
    assert report.notes[-1] == f"{len(PRIVATE)} other files in the folder: not published."
    assert not any(b"private" in content for name, content in repository.files.items() if name != "README.md")
    assert repository.private is True
    assert [commit["summary"] for commit in repository.commits] == ["First"]
    assert report.url == f"{hub.url}/me/slots-merged"
    assert repository.files["adapter_model.safetensors"] == (merged / "adapter_model.safetensors").read_bytes()


def test_a_manifest_that_lists_files_decides_and_cannot_ask_for_others(merged: Path, hub: Hub) -> None:
    document = json.loads((merged / "adaptermix.json").read_text())
    files = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "notes.txt",
        ".env",
        "../task/x",
        "/etc/passwd",
    ]
    (merged / "adaptermix.json").write_text(json.dumps(document | {"files": files}))
    for name in ("notes.txt", ".env", "tokenizer.json", "results.json", "LICENSE"):
        (merged / name).write_text("{}")
    report = push(settings(merged))
    assert {name for name, _ in report.files} == {
        *("adapter_config.json", "adapter_model.safetensors", "adaptermix.json", "README.md", "LICENSE")
    }
    assert report.left_out == [".env", "notes.txt", "results.json", "tokenizer.json"]
    assert len(hub.repositories["me/slots-merged"].files) == 5


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "LICENSE", "tokenizer.json", "a_folder"])
def test_links_are_refused_by_name_before_anything_is_sent(name: str, merged: Path, hub: Hub) -> None:
    target = merged / name
    elsewhere = merged.parent / "elsewhere"
    if target.exists():
        target.rename(elsewhere)
    elif name == "a_folder":
        elsewhere.mkdir()
    else:
        elsewhere.write_text("of the system")
    target.symlink_to(elsewhere)
    with refuses(f"push.link: {name}"):
        push(settings(merged))
    assert hub.requests == []


def test_a_link_of_another_name_is_left_out(merged: Path, hub: Hub) -> None:
    (merged / "hosts").symlink_to("/etc/hosts")
    assert push(settings(merged)).left_out == ["hosts"]
    assert "hosts" not in hub.repositories["me/slots-merged"].files


@pytest.mark.parametrize("edit", ["license", "appended", "rewritten"])
def test_a_card_that_somebody_edited_is_sent_with_its_text(edit: str, merged: Path, hub: Hub) -> None:
    text = (merged / "README.md").read_text()
    changed = {
        "license": text.replace("library_name: peft", "library_name: peft\nlicense: mit"),
        "appended": text + "\nI trained it on my own data. [More Information Needed]\n",
        "rewritten": "# Mine\n\nMade with adaptermix, and by hand.\n",
    }[edit]
    (merged / "README.md").write_text(changed)
    line = "license: mit\n"
    sent = {
        "license": changed,
        "appended": changed.replace("---\n", f"---\n{line}", 1),
        "rewritten": f"---\n{line}---\n\n{changed}",
    }[edit]
    for dry_run in (True, False):
        report = push(settings(merged, dry_run=dry_run))
        assert report.card == sent
        assert (merged / "README.md").read_text() == changed
    assert hub.repositories["me/slots-merged"].files["README.md"].decode() == sent
    assert any("edited" in note for note in report.notes)


def test_the_manifest_has_the_hash_of_the_card_on_disk_and_of_the_one_that_is_sent(merged: Path, hub: Hub) -> None:
    stored = json.loads((merged / "adaptermix.json").read_text())
    assert stored["card_sha256"] == hashlib.sha256((merged / "README.md").read_bytes()).hexdigest()
    push(settings(merged))
    files = hub.repositories["me/slots-merged"].files
    assert json.loads(files["adaptermix.json"])["card_sha256"] == hashlib.sha256(files["README.md"]).hexdigest()
    assert b"# slots-merged" in files["README.md"]


def test_pefts_untouched_template_gives_way_to_a_card_that_claims_nothing(tmp_path: Path, hub: Hub) -> None:
    adapter = peft_lora(tiny_llama(tmp_path / "base"), tmp_path / "plain", r=2, target_modules=["q_proj"])
    template = (adapter / "README.md").read_text()
    assert "[More Information Needed]" in template
    card = push(settings(adapter, base_id="org/base")).card
    assert "adaptermix" not in card
    assert "[More Information Needed]" not in card
    assert "This is a LoRA adapter, for the base model `org/base`." in card
    assert set(hub.repositories["me/slots-merged"].files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    edited = template.replace("Provide a quick summary", "A summary of mine").replace(
        str(tmp_path / "base"), "org/base"
    )
    assert edited != template
    (adapter / "README.md").write_text(edited)
    sent = push(settings(adapter, base_id="org/base", dry_run=True)).card
    assert sent == edited.replace("---\n", "---\nlicense: mit\n", 1)


def test_a_folder_is_not_replaced_while_it_is_sent(merged: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge in another thread would mix its weights with the manifest that was read before."""
    from adaptermix.publish import hub as module

    weights, said = (merged / "adapter_model.safetensors").read_bytes(), []
    prepare = module.prepare

    def slow(*given: Any, **more: Any) -> Any:
        found = prepare(*given, **more)

        def other() -> None:
            inputs = [merged.parent / "task", merged.parent / "align"]
            try:
                merge(inputs, weights=[0.1], out=merged, overwrite=True)
            except OutputError as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found

    monkeypatch.setattr(module, "prepare", slow)
    push(settings(merged))
    assert "another process is working on" in said[0]
    assert hub.repositories["me/slots-merged"].files["adapter_model.safetensors"] == weights


def test_an_adapter_made_elsewhere_gets_a_card_from_its_config(tmp_path: Path) -> None:
    write_lora(tmp_path / "foreign", MODULES, base="org/base")
    front = yaml.safe_load(push(settings(tmp_path / "foreign", dry_run=True)).card.split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert front["tags"] == ["lora"]


def test_an_adapter_that_names_no_base_is_sent_with_a_warning(tmp_path: Path) -> None:
    write_lora(tmp_path / "foreign", MODULES, base=None)
    report = push(settings(tmp_path / "foreign", dry_run=True))
    assert any("--base-id" in note for note in report.notes)
    assert "base_model" not in report.card.split("---\n")[1]


@pytest.mark.parametrize("repo", ["merged", "a/b/c", "me/", "/x", "", "https://hf.co/me/x"])
def test_a_name_without_an_owner_is_refused(merged: Path, repo: str) -> None:
    with refuses("push.repository"):
        push(settings(merged, repo=repo, dry_run=True))


@pytest.mark.parametrize(
    "repo", ["me/a b", "../x", "me/-x", "me/a--b..c", "me/a--b", "me/a..b", "me/model.git", "me/x.", "me/" + "x" * 100]
)
def test_names_that_the_hub_refuses_are_refused_in_the_dry_run_too(merged: Path, repo: str) -> None:
    before = contents(merged)
    with pytest.raises(PublishError, match="is not a valid name on the Hub") as caught:
        push(settings(merged, repo=repo, dry_run=True))
    assert contents(merged) == before
    assert "\n" not in str(caught.value)
    with refuses("push.hub-id: --base-id"):
        push(settings(merged, base_id=repo, dry_run=True))


def test_a_folder_without_an_adapter_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(AdapterFormatError):
            push(settings(tmp_path / name, dry_run=True))
    assert contents(tmp_path / "empty") == {}


def test_more_than_250_files_are_one_commit_too(merged: Path, hub: Hub) -> None:
    (merged / "additional_chat_templates").mkdir()
    for number in range(300):
        (merged / "additional_chat_templates" / f"t{number}.jinja").write_text(str(number))
    manifest = json.loads((merged / "adaptermix.json").read_text())
    manifest["files"] += [f"additional_chat_templates/t{number}.jinja" for number in range(300)]
    (merged / "adaptermix.json").write_text(json.dumps(manifest))
    report = push(settings(merged))
    repository = hub.repositories["me/slots-merged"]
    assert len(report.files) == len(repository.files) == 304
    assert len(repository.commits) == 1


def test_private_on_a_public_repository_stops_before_anything_is_sent(merged: Path, hub: Hub) -> None:
    hub.repositories["me/slots-merged"] = Repository(private=False)
    with refuses("push.public: --private.*me/slots-merged"):
        push(settings(merged, private=True))
    assert hub.repositories["me/slots-merged"].files == {}
    assert {method for method, _ in hub.requests} == {"GET"}


@pytest.mark.skipif(os.name != "posix", reason="folders that cannot be written")
def test_a_folder_that_is_read_only_can_be_pushed(merged: Path, hub: Hub) -> None:
    (merged / "README.md").unlink()
    merged.chmod(0o555)
    push(settings(merged))
    merged.chmod(0o755)
    assert "README.md" in hub.repositories["me/slots-merged"].files


@pytest.mark.parametrize(
    "entries", [[], {"languages": ["de"]}, {"base": "org/base"}, {"scores": {"de": 1}}, {"inputs": [{"name": "task"}]}]
)
def test_a_manifest_that_someone_edited_is_refused_by_name_or_passed_over(merged: Path, entries: Any) -> None:
    if isinstance(entries, dict):
        entries = json.loads((merged / "adaptermix.json").read_text()) | entries
    (merged / "adaptermix.json").write_text(json.dumps(entries))
    before = contents(merged)
    try:
        push(settings(merged, dry_run=True))
    except PublishError as error:
        assert "adaptermix.json" in str(error)  # noqa: PT017  (either outcome is right)
    assert contents(merged) == before


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["_orig_mod.layers.0.q"], "adapter-file.stored-names: wrapper modules.*Rewrite it: adaptermix merge"),
        (["bert.encoder.layer.0.q", "encoder.layer.0.k"], "adapter-file.stored-names: two model classes"),
    ],
)
def test_a_folder_that_peft_would_load_in_part_is_not_pushed(tmp_path: Path, names: list[str], words: str) -> None:
    write_lora(tmp_path / "a", dict.fromkeys(names, (4, 4, 2)))
    with refuses(words):
        push(PushSettings(folder=str(tmp_path / "a"), repo="me/x", dry_run=True))
