"""Every key of the JSON documents of real runs is on the page docs/reference/json.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptermix.cli import COMMANDS
from tests.cli.test_commands import run
from tests.golden.inputs import write_inputs

from .pages import ROOT

PAGE = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
SCORE = ("value", "low", "high", "n")
PRINTED = json.loads((ROOT / "tests" / "golden" / "outputs.json").read_text(encoding="utf-8"))
_CPU = "--device cpu --dtype float32"
_CLASSIFY = f"--base causal --task classify --data dev.en.csv --max-new-tokens 2 {_CPU}"
RUNS = {
    "inspect": "inspect task align",
    "spectrum": "spectrum causal tuned",
    "predict": f"predict wake --base causal --adapter one two --task classify --max-new-tokens 2 {_CPU}",
    "methods": "methods ties",
    "export": "export one --for vllm --out exported",
    "push": "push one me/x --dry-run --base-id a/b",
    "merge": "merge one two --weights 0.5 --out merged",
    "verify": "verify merged",
    "report": "report merged --out page.html",
    "recipe": "recipe ls",
    "statistics": "statistics one --base causal --data texts.txt --out one.safetensors --device cpu",
    "retrieve": f"retrieve --base encoder --data de-en.tsv {_CPU}",
    "evaluate": f"evaluate --adapter one --against two --predictions one.jsonl {_CLASSIFY}",
    "compare": "compare one=one.jsonl other=one.jsonl --task classify --data dev.en.csv --baseline one",
}


def section(command: str) -> str:
    title = "Training commands" if command.startswith("train-") else command
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"no section on {command}"
    return match[1]


def listed(command: str) -> list[re.Pattern[str]]:
    """Return patterns of the keys that a section lists."""
    patterns = []
    for line in section(command).splitlines():
        if not line.startswith("| `") and not line.startswith("| *"):
            continue
        before = ""
        for key, is_score in re.findall(r"`([^`]+)`( \*score\*)?", line.split(" | ")[0].replace(r"\|", "|")):
            if key.startswith("."):
                whole = before.rsplit(".", 1)[0] + key
            else:
                before = whole = key
            patterns += [f"{whole}.{end}" for end in SCORE] if is_score else [whole]
            if ", *score*" in line and whole != before:
                patterns += [f"{before.rsplit('.', 1)[0]}.{end}" for end in SCORE]
    return [re.compile(re.sub(r"\b[A-Z]{3,}\b", ".+", re.escape(pattern))) for pattern in patterns]


def groups(patterns: list[re.Pattern[str]]) -> list[re.Pattern[str]]:
    """Return patterns of the levels above the keys: a group without values has one of these."""
    parts = [pattern.pattern.split(r"\.") for pattern in patterns]
    return [re.compile(r"\.".join(part[:end])) for part in parts for end in range(1, len(part))]


def keys_of(value: object, path: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the path of every value in a document, and whether it is a group without values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from keys_of(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for inner in value:
            yield from keys_of(inner, f"{path}.[]")
    else:
        yield path, value in ({}, [], None)


def check(command: str, document: dict[str, object]) -> None:
    patterns = listed(command)
    known = {False: patterns, True: [*patterns, *groups(patterns)]}
    missing = {
        key for key, is_empty in keys_of(document) if not any(pattern.fullmatch(key) for pattern in known[is_empty])
    }
    assert missing == set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json")
    write_inputs(path)
    return path


def test_every_command_has_a_section() -> None:
    for command in COMMANDS:
        assert section(command)


@pytest.mark.parametrize("name", PRINTED)
def test_keys_of_the_golden_documents_are_on_the_page(name: str) -> None:
    check(PRINTED[name]["command"].split()[0], PRINTED[name]["printed"])


def test_keys_of_other_documents_are_on_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for command, words in RUNS.items():
        code, out, said = run(capsys, *words.split(), "--json")
        assert code == 0, said
        check(command, json.loads(out))


def test_a_key_that_is_not_on_the_page_is_found() -> None:
    with pytest.raises(AssertionError, match="unheard"):
        check("merge", {"unheard": 1})
