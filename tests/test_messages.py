"""Every error has a code, and its text stands in messages.json, where a change of words is reviewed.

After a change: `pytest tests/test_messages.py --update-messages`, then read the difference.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "adaptermix"
MESSAGES = Path(__file__).with_name("messages.json")
CODE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+")
TREES = {path.relative_to(ROOT.parent): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def errors() -> set[str]:
    """Return the names of the classes that have codes."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"Coded"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found


ERRORS = errors()


def template(node: ast.AST) -> str:
    """Return the words of a message, with {} for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{}"


def code_in(node: ast.AST | None) -> str | None:
    """Return a code that is a constant, or the default of `code_of`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "code_of":
        node = node.args[1]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def row_of_table(node: ast.AST) -> tuple[str, str] | None:
    """Return code and message of a row (condition, "code: message") that `options.base.refuse` takes."""
    if not (
        isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[1], ast.Constant | ast.JoinedStr)
    ):
        return None
    code, _, text = template(node.elts[1]).partition(": ")
    return (code, text) if text and CODE.fullmatch(code) else None


def sites() -> Iterator[tuple[str, str, str, str | None]]:
    """Yield (place, class, message, code) of each error; the code is "" where a table has it."""
    for path, tree in sorted(TREES.items()):
        for node in ast.walk(tree):
            if row := row_of_table(node):
                yield f"{path}:{node.lineno}", "InvalidValueError", row[1], row[0]
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS):
                continue
            value = next((word.value for word in node.keywords if word.arg == "code"), None)
            code = "" if isinstance(value, ast.Name) else code_in(value)
            yield f"{path}:{node.lineno}", node.func.id, template(node.args[0]) if node.args else "", code


SITES = list(sites())


def test_every_error_has_a_code() -> None:
    assert len(SITES) > 500
    assert [(place, text) for place, _, text, code in SITES if code is None] == []
    assert [(place, code) for place, _, _, code in SITES if code and not CODE.fullmatch(code)] == []


def test_options_refuse_values_with_a_code() -> None:
    plain = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        if path.parts[1] == "options"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ValueError"
    ]
    assert plain == []


def test_messages_are_as_reviewed(request: pytest.FixtureRequest) -> None:
    found: dict[str, dict[str, list[str]]] = {}
    for code, kind, text in sorted({(code, kind, text) for _, kind, text, code in SITES if code}):
        found.setdefault(code, {}).setdefault(kind, []).append(text)
    if request.config.getoption("--update-messages"):
        lines = [f" {json.dumps(code)}: {json.dumps(texts, ensure_ascii=False)}" for code, texts in found.items()]
        MESSAGES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    reviewed = json.loads(MESSAGES.read_text(encoding="utf-8"))
    assert found == reviewed, "run pytest tests/test_messages.py --update-messages, and read the difference"
