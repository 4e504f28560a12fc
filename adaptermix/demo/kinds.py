"""The demos: what each trains, on which model, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from .base import E5_SMALL, SMOLLM2, PackagedModel
from .plan import DemoPlan, Sizes, intents_data, real_data, slots_data

Options = Mapping[str, Any]
"""Options of a command by name."""


class OwnData(Protocol):
    """Writes data of these sizes into a folder and returns the plan for them."""

    def __call__(self, folder: Path, sizes: Sizes, *, seed: int) -> DemoPlan:
        """Return the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoKind:
    """One demo.

    Args:
        task: The task's name in the toolkit.
        score: What its score is called.
        model: The base model.
        sizes: Rows of the generated data.
        own_data: Writes them and returns the plan.
        real_data: Returns the plan for published data in a folder; None if there is no such data.
        training: Settings of both trainings.
        align: Further settings of alignment training.
        align_layer: Block of `model` that it aligns; of another base (`--base`) the middle one.
        train: Further settings of task training.
        search: Candidates of the search.
        answering: How rows are answered in search and test.
        has_closed_form: Whether the alignment in closed form is shown too.
    """

    task: str
    score: str
    model: PackagedModel
    sizes: Sizes
    own_data: OwnData
    real_data: Callable[[Path], DemoPlan] | None = None
    training: Options
    align: Options
    align_layer: int | Literal["middle"] = "middle"
    train: Options
    search: Options
    answering: Options
    has_closed_form: bool = False


_TRAINING = {"learning_rate": 2e-3, "dropout": 0.0, "schedule": "linear"}

KINDS: dict[str, DemoKind] = {
    "intents": DemoKind(
        task="classify",
        score="accuracy",
        model=E5_SMALL,
        sizes=Sizes(train=240, dev=48, test=96, pairs=450),
        own_data=intents_data,
        training=_TRAINING | {"checkpoint_every": 50},
        align={"objective": "distil", "steps": 200, "batch_size": 32},
        align_layer=9,  # with 200 steps chosen on dev rows: docs/demo.md
        train={"steps": 60, "batch_size": 16},
        # 0 is the task adapter alone, so that no merge can be the answer too
        search={"space": "sum", "grid": [0.0, 0.25, 0.5, 1.0]},
        answering={"batch_size": 96},
        has_closed_form=True,
    ),
    "slots": DemoKind(
        task="slots",
        score="slot F1",
        model=SMOLLM2,
        sizes=Sizes(train=260, dev=8, test=20, pairs=150),
        own_data=slots_data,
        real_data=real_data,
        training=_TRAINING | {"checkpoint_every": 5},
        align={"objective": "contrastive", "steps": 20, "batch_size": 24},
        train={"steps": 28, "batch_size": 16},
        search={"grid": [0.5, 0.7, 0.9, 1.0]},
        answering={"batch_size": 72, "max_new_tokens": 24},
    ),
}
"""By the name of `--task`; the first is the default."""
