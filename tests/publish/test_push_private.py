"""Folders of this machine are not published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from adaptermix import merge, push
from adaptermix.publish.private import text_without_paths

from ..factories import contents, tiny_llama, write_lora
from ..refusals import refuses
from .conftest import MODULES
from .loopback import Hub
from .test_push import settings


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
    with refuses(r"push.card-path: README.md:\d+"):
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
