"""What an option reads data files for is a property of the option."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from adaptermix import options as settings
from adaptermix.options import Settings
from adaptermix.options.roles import CALIBRATION, DEV, SCORED, SPLIT, TRAINING, Reads, reads_of, used_for

ROOT = Path(__file__).parent.parent / "adaptermix"
COMMANDS = [
    found
    for found in vars(settings).values()
    if isinstance(found, type) and issubclass(found, Settings) and not found.__name__.endswith("Options")
]
# Lists of texts that are not data files. A new list must be added here, or say what its files are read for.
NO_DATA = {"adapters", "adapter", "candidates", "groups", "include", "exclude", "layers", "modules", "targets", "names"}
NO_DATA |= {"aligned", "supervised", "systems", "beside"}
NO_DATA |= {"statistics"}  # tensors that another program made; they have no rows
READERS = {
    "read",
    "read_pairs",
    "read_parallel",
    "read_texts",
    "texts_of",
    "read_beside",
    "find_files",
    "pairs_of_file",
}


def is_texts(annotation: object) -> bool:
    return "list[str]" in str(annotation)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_option_that_takes_files_says_what_it_reads_them_for(command: type[Settings]) -> None:
    fields = command.model_fields
    marked = reads_of(command)
    lists = {name for name, field in fields.items() if is_texts(field.annotation)}
    assert lists - NO_DATA == set(marked), "mark options that take data files with Reads(...)"
    assert not set(marked) & NO_DATA
    for mark in marked.values():
        assert mark.use in (TRAINING, DEV, CALIBRATION, SPLIT, SCORED)
        assert mark.rows is None or mark.rows in fields
        assert mark.form != "task" or "task" in fields
        assert mark.use != SPLIT or "split" in fields
        assert mark.use in (SPLIT, SCORED) or "allow_tested" in fields


def arguments_of_readers() -> set[str]:
    """Return the settings that are given to what reads data files, by name."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for value in (*node.args, *(keyword.value for keyword in node.keywords)) if name in READERS else ():
                for part in ast.walk(value):
                    if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "settings":
                        found.add(part.attr)
    return found


def test_what_readers_are_given_has_a_role() -> None:
    marked = {name for command in COMMANDS for name in reads_of(command)}
    choosing_rows = {mark.rows for command in COMMANDS for mark in reads_of(command).values()} - {None}
    found = arguments_of_readers()
    assert {"train", "dev", "pairs", "data", "source", "calibration"} <= found  # the walk sees them
    assert found - marked - choosing_rows <= {"start", "task"}


def test_roles_of_each_command() -> None:
    uses = {command.__name__: {name: mark.use for name, mark in reads_of(command).items()} for command in COMMANDS}
    found = {name: use for name, use in uses.items() if use}
    assert found == {
        "AlignSettings": {"pairs": TRAINING, "dev_pairs": DEV},
        "BakeSettings": {"calibration": CALIBRATION, "dev": DEV},
        "CompareSettings": {"data": SCORED},
        "EvaluateSettings": {"data": SPLIT, "source": SPLIT},
        "FusionSettings": {"train": TRAINING, "dev": DEV, "source": TRAINING, "dev_source": DEV},
        "JointSettings": {"train": TRAINING, "dev": DEV, "pairs": TRAINING, "dev_pairs": DEV},
        "MergeSettings": {"train": TRAINING, "pairs": TRAINING, "texts": TRAINING, "dev": DEV, "dev_pairs": DEV},
        "RetrieveSettings": {"data": SPLIT},
        "SearchSettings": {"dev": DEV, "pairs": DEV},
        "StatisticsSettings": {"data": CALIBRATION},
        "TaskSettings": {"train": TRAINING, "dev": DEV},
    }


@pytest.mark.parametrize(("split", "use"), [("test", {"test data"}), ("dev", {DEV}), (None, set())])
def test_the_role_of_an_evaluation_is_its_split(split: str | None, use: set[str]) -> None:
    asked = settings.EvaluateSettings(base="b", task="slots", data=["x"], split=split)
    assert used_for(asked) == use
    assert {name: mark.use for name, mark in reads_of(asked).items()} == {
        name: next(iter(use)) for name in ("data", "source") if use
    }
    assert used_for(settings.AlignSettings(base="b", pairs=["x"], out="o")) == {TRAINING}
    assert Reads(DEV, "pairs") != Reads(DEV)
