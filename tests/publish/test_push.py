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
from safetensors.torch import load_file, save_file

from adaptermix import PushSettings, merge, push
from adaptermix.errors import AdapterFormatError, OutputError, PublishError
from adaptermix.publish.private import text_without_paths

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
    return PushSettings(**({"folder": str(folder), "repo": "me/slots-merged"} | more))


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
    with pytest.raises(PublishError, match=f"{name} is a symbolic link"):
        push(settings(merged))
    assert hub.requests == []


def test_a_link_of_another_name_is_left_out(merged: Path, hub: Hub) -> None:
    (merged / "hosts").symlink_to("/etc/hosts")
    assert push(settings(merged)).left_out == ["hosts"]
    assert "hosts" not in hub.repositories["me/slots-merged"].files


@pytest.mark.parametrize("edit", ["license", "appended", "rewritten"])
def test_a_card_that_somebody_edited_is_sent_as_it_is(edit: str, merged: Path, hub: Hub) -> None:
    text = (merged / "README.md").read_text()
    changed = {
        "license": text.replace("library_name: peft", "library_name: peft\nlicense: mit"),
        "appended": text + "\nI trained it on my own data. [More Information Needed]\n",
        "rewritten": "# Mine\n\nMade with adaptermix, and by hand.\n",
    }[edit]
    (merged / "README.md").write_text(changed)
    for dry_run in (True, False):
        report = push(settings(merged, dry_run=dry_run))
        assert report.card == changed
        assert (merged / "README.md").read_text() == changed
    assert hub.repositories["me/slots-merged"].files["README.md"].decode() == changed
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
    assert push(settings(adapter, base_id="org/base", dry_run=True)).card == edited


@pytest.fixture
def of_jane(tmp_path: Path) -> Path:
    """Make a merge of adapters and base in a private folder, of which two levels have telling names."""
    home = tmp_path / "home" / "jane.doe" / "secret-project"
    tiny_llama(home / "base")
    for seed, name in enumerate("ab"):
        write_lora(home / name, MODULES, seed=seed, base=str(home / "base"))
    merge([home / "a", home / "b"], weights=[0.7], out=home / "m")
    return home / "m"


def test_a_local_base_is_refused_without_its_id_on_the_hub(of_jane: Path, hub: Hub) -> None:
    before = contents(of_jane)
    for dry_run in (True, False):
        with refuses("push.local-base: 'base'"):
            push(settings(of_jane, dry_run=dry_run))
    assert contents(of_jane) == before
    assert hub.requests == []


def test_nothing_that_is_sent_names_a_folder_of_this_machine(of_jane: Path, hub: Hub) -> None:
    push(settings(of_jane, base_id="org/base@v1"))
    files = hub.repositories["me/slots-merged"].files
    for name, content in files.items():
        assert not any(
            word in content for word in (b"secret-project", b"jane.doe", str(of_jane.parents[3]).encode())
        ), name
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    manifest = json.loads(files["adaptermix.json"])
    assert (manifest["base"]["id"], manifest["base"]["revision"]) == ("org/base", "v1")
    assert [entry["path"] for entry in manifest["inputs"]] == ["a", "b"]
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert b"from_pretrained('org/base', revision='v1')" in files["README.md"]


def test_the_card_on_disk_names_no_folder_either_so_that_an_edited_one_can_be_sent(of_jane: Path, hub: Hub) -> None:
    text = (of_jane / "README.md").read_text()
    assert "secret-project" not in text
    assert "local folder `base`" in text
    (of_jane / "README.md").write_text(text + "\nAnd more.\n")
    push(settings(of_jane, base_id="org/base"))
    (of_jane / "README.md").write_text(text + f"\nFrom {of_jane}.\n")
    with pytest.raises(PublishError, match=r"README.md:\d+ names a path of this machine"):
        push(settings(of_jane, base_id="org/base"))
    assert len(hub.repositories["me/slots-merged"].commits) == 1


def test_no_entry_of_the_config_names_a_folder_of_this_machine(of_jane: Path, hub: Hub) -> None:
    config = json.loads((of_jane / "adapter_config.json").read_text())
    config["target_modules"] = r".*\.q_proj"
    config["corda_config"] = {"cache_file": "/data/jane.doe/secret-project/cache.pt", "corda_method": "ipm"}
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": "/gpfs/jane.doe/x/code.py"}
    (of_jane / "adapter_config.json").write_text(json.dumps(config))
    push(settings(of_jane, base_id="org/base"))
    sent = json.loads(hub.repositories["me/slots-merged"].files["adapter_config.json"])
    assert "jane.doe" not in json.dumps(sent)
    assert sent["corda_config"] == {"cache_file": "cache.pt", "corda_method": "ipm"}
    assert sent["target_modules"] == config["target_modules"]


def test_weights_whose_header_names_a_folder_of_this_machine_are_refused(merged: Path, hub: Hub) -> None:
    path = merged / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "ss_args": '{"out": "/home/jane.doe/secret-project/x"}'})
    with refuses("push.header-path: ss_args"):
        push(settings(merged))
    assert hub.requests == []
    save_file(tensors, path, metadata={"format": "pt"})
    push(settings(merged))


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


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("sqlite:////home/jane/secret/search.db", "sqlite:///search.db"),
        ("sqlite:///jane/search.db", "sqlite:///search.db"),
        ("postgresql://me:p@ss/w0rd@host/db", "postgresql://host/db"),
        ("https://hf_token@huggingface.co/me/x", "https://huggingface.co/me/x"),
        ("mysql://host/db?user=me&password=secret&ssl=1", "mysql://host/db?user=me&password=***&ssl=1"),
        ("from /gpfs/users/jane/x.tsv on", "from x.tsv on"),
        ("from $HOME/jane/x.tsv on", "from x.tsv on"),
        (r"from \\server\jane\x.tsv on", "from x.tsv on"),
        ("/home/jane", "folder"),
        ("and/or /s/he, see https://x.org/a/b/c/d/e and a1+/b2/c3/d4/e5", None),
    ],
)
def test_what_is_published_of_a_text(text: str, published: str | None) -> None:
    assert text_without_paths(text) == (text if published is None else published)


def test_relative_folders_are_not_taken_for_ids_of_the_hub(of_jane: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(of_jane.parents[1])
    write_lora(Path("secret-project/c"), MODULES, base="secret-project/base")
    with refuses("push.local-base"):
        push(settings(Path("secret-project/c"), dry_run=True))


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
    with pytest.raises(PublishError, match="--private was passed, and the repository me/slots-merged is public"):
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
