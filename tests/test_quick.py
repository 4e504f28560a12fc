"""The list of quick tests covers every part of the package, and names files that exist."""

from __future__ import annotations

import pytest

from .conftest import QUICK, ROOT, quick_places


def test_every_part_of_the_package_has_a_quick_test() -> None:
    modules = {path.stem for path in (ROOT / "adaptermix").glob("*.py") if not path.stem.startswith("__")}
    packages = {path.parent.name for path in (ROOT / "adaptermix").glob("*/__init__.py")}
    assert sorted(QUICK) == sorted(modules | packages)


@pytest.mark.parametrize("place", quick_places())
def test_what_is_listed_exists(place: str) -> None:
    assert (ROOT / place.partition("::")[0]).exists()
