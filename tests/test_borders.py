"""What stays inside which part of the package, and what the outside can rely on."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import adaptermix

ROOT = Path(adaptermix.__path__[0])
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
VERBS = ("evaluate", "load_adapter", "merge", "push", "retrieve", "run_recipe", "search", "train_align", "train_task")


def _modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(adaptermix.__path__, "adaptermix.")
    return [adaptermix, *(importlib.import_module(info.name) for info in found)]


MODULES = _modules()


def _public() -> Iterator[tuple[str, Any]]:
    """Every class, function, method and property whose whole path is without a leading underscore."""
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for inner, member in vars(value).items():
                    if not inner.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                        yield f"{module.__name__}.{name}.{inner}", member


def _imports(tree: ast.AST) -> Iterator[str]:
    """Names of modules outside the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def _users(libraries: set[str]) -> set[str]:
    return {name for name, tree in TREES.items() if {module.split(".")[0] for module in _imports(tree)} & libraries}


def test_the_hub_is_met_in_few_places_only() -> None:
    publishing = {f"publish/{name}.py" for name in ("header", "hub", "patience", "repository", "template")}
    loading = {"models/pretrained.py", "io/checkpoint_files.py", "demo/base.py"}
    client = {"evaluation/server.py"}  # takes its HTTP library
    assert _users({"huggingface_hub"}) <= publishing | loading | client


def test_only_the_command_line_knows_the_terminal() -> None:
    assert {name for name in _users({"click", "rich"}) if not name.startswith("cli/")} == set()


def test_nothing_outside_the_command_line_prints_or_exits() -> None:
    calls = {"print", "exit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if not name.startswith("cli/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    ]
    assert wrong == []


def test_training_and_evaluation_do_not_know_each_other() -> None:
    for one, other in (("train", "evaluation"), ("evaluation", "train")):
        wrong = [
            name
            for name, tree in TREES.items()
            if name.startswith(f"{one}/")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level and str(node.module).split(".")[0] == other
        ]
        assert wrong == []


def test_all_lists_what_is_loaded_on_use_sorted_and_once() -> None:
    assert sorted(set(adaptermix.__all__)) == adaptermix.__all__
    assert set(adaptermix.__all__) == {*adaptermix._HOME_OF, *adaptermix._FUNCTIONS}
    assert all(getattr(adaptermix, name) is not None for name in adaptermix.__all__)
    assert set(dir(adaptermix)) == {*adaptermix.__all__, "__version__"}


def test_every_settings_class_of_a_command_is_public() -> None:
    from adaptermix.commands.recipe_file import STEPS

    names = {schema.__name__ for command, schema in STEPS.items() if not command.startswith("demo")}
    assert names <= set(adaptermix.__all__)


@pytest.mark.parametrize("name", VERBS)
def test_no_module_has_the_name_of_a_public_function(name: str) -> None:
    """All submodules are imported by now, and each becomes an attribute of the package."""
    assert inspect.isfunction(getattr(adaptermix, name))
    assert f"adaptermix.{name}" not in sys.modules


def test_the_mark_of_a_typed_package_is_shipped() -> None:
    assert '"adaptermix": ["py.typed"' in (ROOT.parent / "setup.py").read_text(encoding="utf-8")


def test_every_module_is_described() -> None:
    assert [module.__name__ for module in MODULES if not module.__doc__] == []


def test_every_public_class_function_and_method_is_described() -> None:
    """A method that implements a documented one of a base class or of a protocol needs no docstring."""
    protocols = [value for _, value in _public() if getattr(value, "_is_protocol", False)]
    described = {name for protocol in protocols for name, member in vars(protocol).items() if member.__doc__}
    missing = []
    for name, value in _public():
        if not inspect.isclass(value) and name.rpartition(".")[2] in described:
            continue
        own = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
        # a dataclass without a docstring is given its signature
        if not own or re.match(r"\w+\(.*\)( -> None)?$", own, re.DOTALL):
            missing.append(name)
    assert missing == []


def test_every_public_function_has_a_type_for_every_argument_and_its_result() -> None:
    untyped = []
    for name, value in _public():
        if inspect.isfunction(value):
            given = set(value.__annotations__)
            if not {*inspect.signature(value).parameters, "return"} - {"self", "cls"} <= given:
                untyped.append(name)
    assert untyped == []


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import adaptermix", "torch pydantic transformers peft optuna mergekit huggingface_hub numpy"),
        ("import adaptermix; dir(adaptermix); adaptermix.MergeSettings", "torch transformers peft huggingface_hub"),
        (
            "import adaptermix; adaptermix.merge, adaptermix.load_adapter",
            "transformers peft optuna mergekit huggingface_hub click",
        ),
    ],
    ids=["the package", "settings", "merging"],
)
def test_importing_loads_nothing_that_is_not_needed(code: str, heavy: str) -> None:
    code += f"; import sys; print([name for name in {heavy.split()} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")


@pytest.mark.parametrize("path", sorted((ROOT.parent / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_exists(path: Path) -> None:
    """No test runs the benchmarks, and most of their imports are inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adaptermix"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module
