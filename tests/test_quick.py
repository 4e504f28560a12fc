"""The list of quick tests looks at every part of the package, and names tests that exist."""

from __future__ import annotations

import ast

import pytest

from .conftest import QUICK, ROOT, quick_places


def test_every_part_of_the_package_has_a_quick_test() -> None:
    modules = {path.stem for path in (ROOT / "adaptermix").glob("*.py") if not path.stem.startswith("__")}
    rooms = {path.parent.name for path in (ROOT / "adaptermix").glob("*/__init__.py")}
    assert sorted(QUICK) == sorted(modules | rooms)


@pytest.mark.parametrize("place", quick_places())
def test_what_is_listed_exists(place: str) -> None:
    path, *names = place.split("::")
    assert (ROOT / path).exists()
    inside = ast.parse((ROOT / path).read_text(encoding="utf-8")).body if names else []
    for name in names:
        found = [node for node in inside if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        assert found, f"{path} has no {name}"
        inside = found[0].body
