"""The package from outside."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path

import pytest

import adaptermix

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there() -> None:
    for name in adaptermix.__all__:
        assert getattr(adaptermix, name) is not None
    assert set(adaptermix.__all__) <= set(dir(adaptermix))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adaptermix.nothing  # type: ignore[attr-defined]


def test_no_module_hides_a_public_function() -> None:
    for module in pkgutil.walk_packages(adaptermix.__path__, "adaptermix."):
        importlib.import_module(module.name)
    for name in ("merge", "search", "evaluate", "retrieve", "push", "train_align", "train_task", "load_adapter"):
        assert callable(getattr(adaptermix, name)), name


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert adaptermix.__version__ == project["version"]
    assert (ROOT / "adaptermix" / "py.typed").exists()


@pytest.mark.parametrize("name", adaptermix.__all__)
def test_public_names_say_what_they_are(name: str) -> None:
    documented = inspect.getdoc(getattr(adaptermix, name))
    assert documented
    assert documented.splitlines()[0].endswith((".", "?"))
