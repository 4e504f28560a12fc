"""Roles of options, for code that handles the options of all commands in the same way.

A role is metadata of a field (`Annotated[..., Reads(DEV)]`). Checks of test data and of paths, the records of recipes
and searches, and the help texts ask for options by role, so that a new option needs no entry in any list of names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

from pydantic import BaseModel

DEV, TEST, TRAINING, CALIBRATION = "dev data", "test data", "training data", "calibration data"
"""Uses of data files."""
SPLIT = "as split says"
"""Use of the data of an evaluation: its setting `split` decides, dev or test; without `split` it is neither."""
SCORED = "scored data"
"""Use of rows that stored answers are scored on: no model reads them."""
ADAPTER, MODEL, OTHER = "adapter", "model", "other files"
"""Other inputs: an adapter folder, a model (folder or Hub id), other files and folders."""

Form = Literal["task", "pairs", "parallel", "texts"]
"""How rows are read: those of the task, pairs, pairs or one text per language, or plain texts."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Marks an option that names inputs of a command: paths, globs, `LANGUAGE=FILE`, `NAME=FILE`, Hub ids.

    Args:
        use: Use of the files.
        form: How the rows of data files are read.
        rows: The option that chooses rows of each data file, if there is one.
        or_model: Whether full models, also of the Hub, are accepted too.
    """

    use: str
    form: Form = "task"
    rows: str | None = None
    or_model: bool = False

    @property
    def is_data(self) -> bool:
        """Whether the option takes data files."""
        return self.use not in (ADAPTER, MODEL, OTHER)


@dataclass(frozen=True, slots=True)
class Writes:
    """Marks an option that names an output of a command.

    Args:
        form: Form of the file, see `adaptermix.options.paths`; None for the output of the command as a whole.
        is_main: Whether it is the output by which a recipe knows that the step is done.
    """

    form: str | None = None
    is_main: bool = False


class Role(Enum):
    """Further properties of options."""

    HANDLING = "whether an existing output is replaced or continued, and whether one is written; not its content"
    SCHEDULING = "how the work is done and checked; the result is the same"
    MACHINE = "where the work is done; results differ in the last digits at most"
    AFTERWARDS = "an interrupted run may continue with another value: computed modules or trials stay unchanged"
    UNRECORDED = "left out of the plan in the manifest, since the result does not depend on it"
    STRATEGY = "only for strategies of bake that choose between outcomes or draw at random"
    DEV_CURVE = "a dev score in training depends on it: only runs with equal values can be compared"
    LEARNING = "for merge methods that learn from data"
    ADAPTERS_ONLY = "for merges of adapters, not of full checkpoints"
    CONTRAST = "for the contrastive objective"
    CLOSED_FORM = "also for adapters that are computed instead of trained"
    BOTTLENECK = "for fusions inside the LoRA"
    COMMON = "shown by --help where it leaves other options to --help-all"


NO_PART_OF_RESULT = (Role.HANDLING, Role.SCHEDULING, Role.MACHINE, Role.UNRECORDED)
"""Roles of options that the plan in a manifest leaves out."""


class Panel(Enum):
    """Titles under which --help of a command with many options groups them."""

    DATA = "Data"
    LORA = "LoRA"
    OBJECTIVE = "Objective"
    OPTIMISER = "Optimiser"
    MERGE = "Merge"
    LEARNING = "Merge methods that learn"
    SEARCH = "Search"
    BAKE = "Format and accuracy"
    SCORES = "Scores and answers"
    RETRIEVAL = "Retrieval"
    MODEL = "Model and device"
    RUN = "Run"
    PROCESSES = "Several processes"


@dataclass(frozen=True, slots=True)
class Flag:
    """Sets how an option is written on the command line, if its name and type do not determine it.

    Args:
        name: Its flag.
        alias: A second flag, such as the one that PEFT's names suggest.
        metavar: Placeholder for its values in the help text.
        also: Further values, which the settings turn into one of the others.
    """

    name: str | None = None
    alias: str | None = None
    metavar: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Argument:
    """Marks an option whose values are given without a flag on the command line.

    Args:
        metavar: Placeholder for its values in the help text.
    """

    metavar: str


Mark = TypeVar("Mark")


def marks_of(settings: BaseModel | type[BaseModel], kind: type[Mark]) -> dict[str, Mark]:
    """Return the options that have a mark of this class, each with its (last) mark."""
    fields = (settings if isinstance(settings, type) else type(settings)).model_fields
    return {name: mark for name, field in fields.items() for mark in field.metadata if isinstance(mark, kind)}


def marked(settings: BaseModel | type[BaseModel], *roles: Role) -> set[str]:
    """Return the names of the options that have one of these roles."""
    fields = (settings if isinstance(settings, type) else type(settings)).model_fields
    return {name for name, field in fields.items() if any(role in field.metadata for role in roles)}


def data_options(settings: BaseModel | type[BaseModel]) -> dict[str, Reads]:
    """Return the options of a command that take data files.

    Args:
        settings: The settings of the command; in an instance, options of use `SPLIT` have the use that its `split`
            names, and are left out if it is not set.
    """
    marks = {name: mark for name, mark in marks_of(settings, Reads).items() if mark.is_data}
    if isinstance(settings, type):
        return marks
    split = getattr(settings, "split", None)
    resolved = {
        name: Reads(f"{split} data" if mark.use == SPLIT else mark.use, mark.form, mark.rows)
        for name, mark in marks.items()
    }
    return {name: mark for name, mark in resolved.items() if split or marks[name].use != SPLIT}


def used_for(settings: BaseModel) -> set[str]:
    """Return the uses (dev data, ...) of the data options that are set."""
    return {mark.use for name, mark in data_options(settings).items() if getattr(settings, name)}


def values_of(settings: BaseModel, names: Iterable[str]) -> list[str]:
    """Return the values of options as texts, one text per item of a list, without options that are not set."""
    values: list[object] = [getattr(settings, name) for name in sorted(names)]
    return [
        str(item) for value in values for item in (value if isinstance(value, list) else [value]) if item is not None
    ]


def main_output(settings: BaseModel) -> tuple[str | None, Writes] | None:
    """Return the value of the option that names the main output, with its mark; None for commands without one."""
    marks = [(name, mark) for name, mark in marks_of(settings, Writes).items() if mark.is_main]
    return (getattr(settings, marks[0][0]), marks[0][1]) if marks else None
