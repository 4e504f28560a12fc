"""What options read data files for: a property of the option, which recipes, checks and tests look up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

DEV, TEST, TRAINING, CALIBRATION = "dev data", "test data", "training data", "calibration data"
"""What files are used for."""
SPLIT = "as split says"
"""Use of the data of an evaluation: that of its setting `split`, dev or test, or none where it is not set."""
SCORED = "scored data"
"""Use of rows that stored answers are scored on: no model reads them."""

Form = Literal["task", "pairs", "parallel", "texts"]
"""How rows are read: those of the task, pairs, pairs or one text per language, or plain texts."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Marks an option that takes data files.

    Args:
        use: What the files are for.
        form: How their rows are read.
        rows: The option that chooses rows of each file, if one does.
    """

    use: str
    form: Form = "task"
    rows: str | None = None


def reads_of(settings: BaseModel | type[BaseModel]) -> dict[str, Reads]:
    """Return the options of a command that take data files.

    Args:
        settings: The settings of the command; in an instance, options of use `SPLIT` have the use that its `split`
            names, and are left out if it names none.
    """
    if isinstance(settings, type):
        fields = settings.model_fields.items()
        return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Reads)}
    split = getattr(settings, "split", None)
    found = reads_of(type(settings))
    resolved = {
        name: Reads(f"{split} data" if mark.use == SPLIT else mark.use, mark.form, mark.rows)
        for name, mark in found.items()
    }
    return {name: mark for name, mark in resolved.items() if split or found[name].use != SPLIT}


def used_for(settings: BaseModel) -> set[str]:
    """Return the uses (dev data, ...) of the data options that are set."""
    return {mark.use for name, mark in reads_of(settings).items() if getattr(settings, name)}
