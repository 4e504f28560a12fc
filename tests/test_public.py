"""What is public: the names in `__all__` of the package and of its rooms. All other names may change."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("algebra", "methods", "adapters", "tasks", "training", "fusion", "testing", "merging")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = {name: importlib.import_module(name) for name in ("adaptermix", *(f"adaptermix.{room}" for room in ROOMS))}
PUBLIC = {f"{module}.{name}": getattr(value, name) for module, value in MODULES.items() for name in value.__all__}


def documented() -> Iterator[tuple[str, Any, list[str]]]:
    """Public functions, classes and methods, with the names that their `Args:` explain."""
    for name, value in PUBLIC.items():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        members = list(vars(value).items()) if inspect.isclass(value) else []
        functions = [(f"{name}.{key}", getattr(member, "__func__", member)) for key, member in members]
        public = [(key, each) for key, each in functions if inspect.isfunction(each) and "._" not in key]
        for key, each in [(name, value), *public]:
            text = inspect.cleandoc(vars(each).get("__doc__") or "") if inspect.isclass(each) else inspect.getdoc(each)
            if block := re.search(r"^Args:\n((?: +.*\n|\n)*)", f"{text}\n", re.MULTILINE):
                yield key, each, re.findall(r"^    \*{0,2}(\w+):", block[1], re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize(("value", "names"), [pytest.param(*rest, id=name) for name, *rest in documented()])
def test_documented_arguments_are_the_parameters(value: Any, names: list[str]) -> None:
    parameters = set(inspect.signature(value).parameters) - {"self", "cls"}
    if is_dataclass(value):  # the docstring explains fields that are set later, too
        parameters |= set(value.__dataclass_fields__) & set(names)
    assert set(names) - {"draw"} == parameters  # hypothesis fills in `draw`


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_public_names_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    imported = re.findall(r"from (adaptermix[\w.]*) import ([\w, ]+)", text)
    named = [(module, name) for module, names in imported for name in re.split(r",\s*", names.strip())]
    named += re.findall(r"`(adaptermix(?:\.[a-z_]+)*)\.([A-Z]\w+)`", text)
    for module, name in named:
        assert name in importlib.import_module(module).__all__, f"{page.name} names {module}.{name}"
