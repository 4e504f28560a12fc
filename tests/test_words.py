"""A lint of the words of code, messages and documents: patterns in tests/words.txt, allowed hits in tests/words.json.

A room may have at most as many hits as tests/words.json allows, and a room that is not listed there must have none.
`python -m tests.test_words ROOM` lists the hits of a room; `python -m tests.test_words --record` lowers the limits.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adaptermix"
LIMITS = Path(__file__).with_name("words.json")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC_NAMES = {"places", "beside"}
"""Options and keyword arguments of public functions, which are fields of classes: their names stay."""
MIN_SPACES = 2
"""A string with fewer blanks is a key or a name and not a sentence."""


@dataclass(frozen=True)
class Entry:
    pattern: re.Pattern[str]
    advice: str
    sample: str
    is_name: bool


def read_entries(text: str) -> list[Entry]:
    entries, section = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            section = line.strip("[]")
        elif not line.startswith("#"):
            pattern, _, rest = line.partition(" -> ")
            advice, _, sample = rest.partition(" | ")
            is_name = section == "names"
            whole = rf"\A_*({pattern})\Z" if is_name else rf"(?<![\w`'-])(?:{pattern})(?!['`]?\w|-)"
            entries.append(Entry(re.compile(whole, re.IGNORECASE), advice, sample.strip(), is_name))
    return entries


ENTRIES = read_entries(Path(__file__).with_name("words.txt").read_text(encoding="utf-8"))

ANY = {
    in_names: re.compile("|".join(entry.pattern.pattern for entry in ENTRIES if entry.is_name == in_names), re.I)
    for in_names in (False, True)
}
"""All patterns in one, since most texts match none of them."""


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, comments and strings that are sentences."""
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "0" for part in node.values]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        else:
            continue
        if text.strip().count(" ") >= MIN_SPACES:
            yield node.lineno, re.sub(r"``?[^`]*``?", "`x`", re.sub(r"^\s*>>>.*$", "", text, flags=re.MULTILINE))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:)", token.string):
            yield token.start[0], token.string.lstrip("# ")


def names(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each definition: variables, arguments, functions and classes."""
    tree = ast.parse(source)
    fields = {
        id(part.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id in PUBLIC_NAMES
    }
    for node in ast.walk(tree):
        if id(node) in fields:
            continue
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def hits(texts: Iterator[tuple[int, str]], *, in_names: bool = False) -> Iterator[tuple[int, str, Entry]]:
    for line, text in texts:
        joined = re.sub(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)", " ", text)
        for entry in ENTRIES if ANY[in_names].search(joined) else ():
            if entry.is_name == in_names:
                for match in entry.pattern.finditer(joined):
                    yield line, match[0], entry


def hits_of_document(text: str) -> Iterator[tuple[int, str, Entry]]:
    plain = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    lines = (re.sub(r"`[^`]*`", "`x`", line) for line in plain.splitlines())
    return hits(enumerate(lines, 1))


def all_hits() -> dict[str, list[str]]:
    """Return a line of text per hit, by room, and for documents by file name."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        room = path.relative_to(PACKAGE).parts[0]
        for line, text, entry in (*hits(prose(source)), *hits(names(source), in_names=True)):
            rooms.setdefault(room, []).append(f"{path.relative_to(ROOT)}:{line}: {text!r} -> {entry.advice}")
    for path in DOCUMENTS:
        for line, text, entry in hits_of_document(path.read_text(encoding="utf-8")):
            rooms.setdefault(path.name, []).append(f"{path.relative_to(ROOT)}:{line}: {text!r} -> {entry.advice}")
    return rooms


def test_no_room_has_more_hits_than_before() -> None:
    limits = json.loads(LIMITS.read_text(encoding="utf-8"))
    for room, lines in all_hits().items():
        listed = "\n".join(lines[:40])
        assert len(lines) <= limits.get(room, 0), f"{room}: {len(lines)} hits, allowed {limits.get(room, 0)}\n{listed}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.sample)
def test_each_entry_finds_its_sample(entry: Entry) -> None:
    assert entry.pattern.search(entry.sample)
    assert entry.advice


def test_the_lint_reads_docstrings_comments_messages_and_names() -> None:
    source = '''
def f(found):
    """Return it anew."""
    held = "a file that stands here"  # nothing is lost
    raise ValueError(f"{found} is no file")
'''
    assert Counter(text for _, text, _ in hits(prose(source))) == Counter(["is no", "anew", "stands", "nothing is"])
    assert Counter(text for _, text, _ in hits(names(source), in_names=True)) == Counter(["found", "held"])


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the adapter's updates by module.",
        "Cache at most 1/4 of the free memory.",
        "A file that does not exist is not an error here.",
        "The path that stands for the model.",
        "Values lie in [0, 1].",
        "There are no rows.",
        'Use `beside` and "x is None".',
    ],
)
def test_plain_sentences_pass(sentence: str) -> None:
    assert [text for _, text, _ in hits_of_document(sentence)] == []


def main(arguments: list[str]) -> None:
    rooms = all_hits()
    if arguments == ["--record"]:
        old = json.loads(LIMITS.read_text(encoding="utf-8")) if LIMITS.exists() else None
        counts = {room: len(lines) for room, lines in sorted(rooms.items())}
        limits = {room: min(n, old.get(room, 0)) if old is not None else n for room, n in counts.items()}
        LIMITS.write_text(json.dumps({room: n for room, n in limits.items() if n}, indent=2) + "\n", encoding="utf-8")
    for room in arguments:
        sys.stdout.write("\n".join(rooms.get(room, [])) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
