"""What an option reads data files for is a property of the option."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import pytest

from adaptermix import options as settings
from adaptermix.options import Settings
from adaptermix.options.roles import (
    CALIBRATION,
    DEV,
    SCORED,
    SPLIT,
    TRAINING,
    Reads,
    Role,
    Writes,
    data_options,
    marked,
    marks_of,
    used_for,
)

ROOT = Path(__file__).parent.parent / "adaptermix"
COMMANDS = [
    found
    for found in map(partial(getattr, settings), settings.__all__)
    if isinstance(found, type) and issubclass(found, Settings) and not found.__name__.endswith("Options")
]
# Lists of texts that are not files. A new list must be added here, or say what its files are read for.
NO_FILES = {
    "labels",
    "groups",
    "to",
    "include",
    "exclude",
    "layers",
    "modules",
    "targets",
    "names",
    "aligned",
    "supervised",
    "inputs",
}
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
    data = data_options(command)
    lists = {name for name, field in fields.items() if is_texts(field.annotation)}
    assert lists - NO_FILES == lists & set(marks_of(command, Reads)), "mark options that take files with Reads(...)"
    assert set(data) <= lists
    for mark in data.values():
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
    data = {name for command in COMMANDS for name in data_options(command)}
    choosing_rows = {mark.rows for command in COMMANDS for mark in data_options(command).values()} - {None}
    found = arguments_of_readers()
    assert {"train", "dev", "pairs", "data", "source", "calibration"} <= found  # the walk sees them
    assert found - data - choosing_rows <= {"start", "task"}


def test_roles_of_each_command() -> None:
    uses = {command.__name__: {name: mark.use for name, mark in data_options(command).items()} for command in COMMANDS}
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
        "StackSettings": {"texts": TRAINING, "dev_texts": DEV, "train": TRAINING, "dev": DEV},
        "StatisticsSettings": {"data": CALIBRATION},
        "TaskSettings": {"train": TRAINING, "dev": DEV},
    }


@pytest.mark.parametrize(("split", "use"), [("test", {"test data"}), ("dev", {DEV}), (None, set())])
def test_the_role_of_an_evaluation_is_its_split(split: str | None, use: set[str]) -> None:
    asked = settings.EvaluateSettings(base="b", task="slots", data=["x"], split=split)
    assert used_for(asked) == use
    assert {name: mark.use for name, mark in data_options(asked).items()} == {
        name: next(iter(use)) for name in ("data", "source") if use
    }
    assert used_for(settings.AlignSettings(base="b", pairs=["x"], out="o")) == {TRAINING}
    assert Reads(DEV, "pairs") != Reads(DEV)


HANDLING = {"overwrite", "resume", "dry_run", "log_with"}
SCHEDULING = {"checkpoint_every", "shard_base", "workers", "allow_tested", "storage", "study"}
OUTPUTS = {"out", "predictions", "plot", "csv", "table", "markdown", "document"}
SCORING = {"task", "dev", "rows", "max_new_tokens"}
AFTERWARDS = {
    settings.BakeSettings: SCORING | {"shard_size"},
    settings.SearchSettings: {"trials", "choose", "compact", "control"},
}
UNRECORDED = {settings.SearchSettings: {"report", "batch_size"}, settings.StatisticsSettings: {"batch_size", "seed"}}
COMPARABLE = {"base", "mode", "dtype", "quantize", "dev", "dev_pairs", "task", "template", "head", "max_length"}
COMPARABLE |= {"layer", "pooling", "exclude_bos", "standardize", "pairs", "rows", "columns"}
COMPARABLE |= {"head_layers", "head_pooling", "aggregate", "gate", "gate_ratio", "head_norm", "dev_texts"}
COMPARABLE |= {"batch_size", "accumulate", "steps", "epochs", "alternate", "discard"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_field_that_a_subclass_defines_again_keeps_its_roles(command: type[Settings]) -> None:
    """A field that is written down again in a subclass loses the marks of its parent's field."""
    fields = set(command.model_fields)
    assert marked(command, Role.HANDLING) == HANDLING & fields
    assert marked(command, Role.SCHEDULING) == SCHEDULING & fields
    assert marked(command, Role.MACHINE) == {"device"} & fields
    assert set(marks_of(command, Writes)) == OUTPUTS & fields
    assert marked(command, Role.AFTERWARDS) == AFTERWARDS.get(command, set())
    assert marked(command, Role.UNRECORDED) == UNRECORDED.get(command, set())
    if issubclass(command, settings.TrainingSettings):
        assert marked(command, Role.DEV_CURVE) == COMPARABLE & fields


def test_what_a_recipe_recognises_a_finished_step_by() -> None:
    main = {
        command.__name__: [name for name, mark in marks_of(command, Writes).items() if mark.is_main]
        for command in COMMANDS
    }
    assert {name for name, names in main.items() if len(names) > 1} == set()
    assert {name for name, names in main.items() if names == ["predictions"]} == {"EvaluateSettings"}
    assert {name for name, names in main.items() if not names} == {
        *("CompareSettings", "InspectSettings", "MethodsSettings", "PlaceSettings", "PushSettings"),
        *("RetrieveSettings", "RunSettings", "SpectrumSettings", "Settings", "Placed", "GenerationSettings"),
        "VerifySettings",
        "PredictSettings",
        "RecipeSettings",
    }


def test_options_that_go_with_one_way_to_merge_only() -> None:
    data = {"train", "pairs", "texts", "dev", "dev_pairs"}
    assert marked(settings.MergeSettings, Role.LEARNING) == data | {
        "task",
        "objective",
        "rows",
        "columns",
        "allow_tested",
    }
    assert marked(settings.MergeSettings, Role.ADAPTERS_ONLY) == {
        *("places", "fill", "form", "rank", "keep", "max_residual", "compact", "saved"),
        *("statistics", "allow_pickle", "allow_base_mismatch"),
    }
