"""Registries: names of this package, of programs and of other packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptermix.io.registry import Registry

from .refusals import refuses

GROUP = "adaptermix.test-things"


def install(folder: Path, points: str, module: str = "") -> None:
    """Put a package with entry points into a folder of the import path."""
    (folder / "outside_things.py").write_text(module, encoding="utf-8")
    info = folder / "outside_things-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-things\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n", encoding="utf-8")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "outside_things", raising=False)
    return tmp_path


def registry(**more: Any) -> Registry[Any]:
    found: Registry[Any] = Registry("thing", GROUP, built_in=("first", "second"), **more)
    return found


def test_names_are_those_declared_those_set_and_those_of_other_packages(outside: Path) -> None:
    install(outside, "third = outside_things:absent")
    things = registry()
    things["mine"] = 1
    assert things.names() == ["first", "second", "mine", "third"]
    assert all(name in things for name in things.names())
    assert "fourth" not in things
    with pytest.raises(KeyError):
        things["fourth"]


def test_an_entry_point_is_loaded_when_it_is_looked_up_and_once(outside: Path) -> None:
    install(outside, "third = outside_things:Thing", "class Thing:\n    pass\n")
    things, objects = registry(), registry(instances=True)
    assert dict(things) == {}
    assert isinstance(things["third"], type)
    assert isinstance(objects["third"], things["third"])
    assert objects["third"] is objects["third"]


def test_all_of_other_packages_can_be_loaded(outside: Path) -> None:
    install(outside, "third = outside_things:one\nfourth = outside_things:two", "one, two = 1, 2\n")
    things = registry()
    things["fourth"] = "set by the program"
    things.load_all()
    assert dict(things) == {"third": 1, "fourth": "set by the program"}


def test_a_faulty_package_is_one_sentence_and_harms_only_who_uses_it(outside: Path) -> None:
    install(outside, "third = outside_things:Thing", "raise RuntimeError('no luck')\n")
    things = registry()
    assert "third" in things
    with refuses("registry.not-loadable: 'third' of 'outside_things:Thing'.*no luck"):
        things["third"]


def test_a_name_is_registered_once() -> None:
    things = registry()
    things.add("first", 1)
    with pytest.raises(ValueError, match=r"^a thing named 'first' exists: 1$"):
        things.add("first", 2)
    assert things["first"] == 1
