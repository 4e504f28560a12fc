"""Imports point one way, and heavy libraries stay where they are needed. Imports inside functions count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "adaptermix"

# From the bottom up: a module may import those of its own room and of rooms before it.
ROOMS = [
    "errors",
    "progress",
    "io",
    "options",
    "algebra",
    "methods",
    "adapters",
    "provenance",
    "models",
    "tasks",
    "testing",
    "pictures",
    "publish",
    "fusion",
    "checkpoints",
    "analysis",
    "merging",
    "serving",
    "evaluation",
    "training",
    "baking",
    "merge_statistics",
    "weight_search",
    "demo",
    "commands",
    "tuning",
    "cli",
    "__main__",
]

HEAVY = {"transformers", "peft", "huggingface_hub", "matplotlib", "gguf", "optuna", "mergekit", "accelerate"}
LATE = {"fusion.lora"}
"""Modules whose classes are heavy libraries' own, and that are themselves imported late."""
HEAVY_HOMES = (
    "io",
    "methods.mergekit",
    "models",
    "tasks",
    "publish",
    "fusion",
    "analysis",
    "merging",
    "evaluation",
    "training",
    "weight_search",
    "baking",
    "demo",
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}


def room_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    assert room in ROOMS, f"{module} is in no room: add it to ROOMS"
    return ROOMS.index(room)


def imports(path: Path, module: str, *, typing: bool = True) -> list[tuple[str, bool]]:
    """Return (dotted name, whether at the top of the file); names of this package start with a dot.

    With `typing=False` imports for the type checker only (`if TYPE_CHECKING`) are left out.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typing:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.append((node.module or "", id(node) in top))
                continue
            parent = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [("." + ".".join([*parent, name]), id(node) in top) for name in names if name]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own = room_of(module)
    for name, _ in imports(MODULES[module], module):
        if name.startswith("."):
            target = name[1:]
            if target not in MODULES:  # a name of the package itself, such as __version__
                continue
            assert room_of(target) <= own, f"{module} imports {target}, which is in a room above it"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_late_and_in_their_homes(module: str) -> None:
    for name, top in imports(MODULES[module], module, typing=False):
        if name.split(".")[0] in HEAVY:
            assert module.startswith(HEAVY_HOMES), f"{module} imports {name}"
            assert not top or module in LATE, f"{module} imports {name} when it is itself imported"
        assert not (top and name.removeprefix(".") in LATE), f"{module} imports {name} when it is itself imported"


def test_every_room_exists() -> None:
    assert {module.split(".")[0] for module in MODULES} == set(ROOMS)


def test_the_algebra_knows_nothing_of_the_project() -> None:
    for module, path in MODULES.items():
        if module.startswith("algebra"):
            inner = {name for name, _ in imports(path, module) if name.startswith(".")}
            assert {name for name in inner if not name.startswith(".algebra")} == set()


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports for types count too: a circle of modules cannot be read from one end."""
    needs = {
        module: {name[1:] for name, _ in imports(path, module) if name[1:] in MODULES and name[1:] != module}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    free: set[str] = set()
    while ready := {module for module, others in needs.items() if module not in free and others & set(needs) <= free}:
        free |= ready
    assert set(needs) - free == set()
