"""The table of `spectrum`: layers and models by the projections of attention and of the feed-forward part."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..io.json_types import JsonObject
from ..io.markup import markdown_table
from ..models.location import OUTSIDE, ModuleLocation, mean, unique_names

PROJECTIONS = {
    "K": r"k_proj|key|key_proj|k_lin|k",
    "Q": r"q_proj|query|query_proj|q_lin|q",
    "V": r"v_proj|value|value_proj|v_lin|v",
    "Out": r"out_proj|o_proj|out_lin|o|(?:attention|self_attention)\.(?:output\.)?dense|attn\.(?:c_proj|proj|Wo)",
    "FC1": r"fc1|up_proj|intermediate\.dense|lin1|wi|wi_1|c_fc|dense_h_to_4h|mlp\.Wi",
    "FC2": r"fc2|down_proj|output\.dense|lin2|wo|dense_4h_to_h|mlp\.(?:c_proj|Wo)",
}
"""Columns of the paper's table, each with the ends of the paths that weights have in common architectures.

Where two patterns match a path, the first counts: BERT has `attention.output.dense` and `output.dense`.
"""
_ENDINGS = {name: re.compile(rf"(?:.*\.)?(?:{pattern})") for name, pattern in PROJECTIONS.items()}
_CROSS = re.compile(r"encoder_attn|EncDecAttention|crossattention|cross_attn")
"""Attention of a decoder to its encoder, which has the names of self-attention and another job."""
MEAN = "mean"
"""Label of the rows with means over the layers."""


def projection_of(path: str) -> str | None:
    """Return which of `PROJECTIONS` a weight is; None for others, such as gates and fused projections.

    Example:
        >>> projection_of("encoder.layers.0.self_attn.k_proj"), projection_of("layers.0.mlp.gate_proj")
        ('K', None)
    """
    if _CROSS.search(path):
        return None
    return next((name for name, ending in _ENDINGS.items() if ending.fullmatch(path)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    r"""The weights of one column in one layer of a model; the singular values of several count as one vector.

    Args:
        norm: $\|\sigma\|_2$ of the model.
        distance: $d = \|\sigma - \sigma_{base}\|_2$; 0 for the base.
        base_norm: $\|\sigma_{base}\|_2$.
    """

    norm: float
    distance: float
    base_norm: float

    @property
    def ratio(self) -> float | None:
        """The norm as a multiple of the base's; None for a base of zeros."""
        return self.norm / self.base_norm if self.base_norm > 0 else None


Numbers = tuple[float, float, float]
"""Norm in the base, norm in the model and distance of one weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingTable:
    """Norms and distances of a base and of the models that are compared with it.

    Args:
        models: Names of the base and of the models.
        columns: Title of each column, with the architecture's own names of its weights: those of `PROJECTIONS` in the
            paper's order, then others.
        layers: Labels of the layers.
        cells: Per model, the cell of a layer and a column; a missing one has no weight in the comparison.
    """

    models: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    layers: tuple[str, ...]
    cells: Mapping[str, Mapping[tuple[str, str], Cell]]

    def means(self, model: str) -> dict[str, dict[str, float | None]]:
        """Return for each column the means over the blocks of norm, distance and ratio of the norms."""
        result = {}
        for column in self.columns:
            cells = [self.cells[model].get((layer, column)) for layer in self.layers if layer != OUTSIDE]
            known = [cell for cell in cells if cell]
            result[column] = {
                "norm": mean(cell.norm for cell in known),
                "distance": mean(cell.distance for cell in known),
                "ratio": mean(cell.ratio for cell in known),
            }
        return result

    def rows(self) -> list[tuple[str, str, dict[str, dict[str, float | None]]]]:
        """Return layer, model and the numbers of each column; the last layer is the mean over the blocks."""
        rows = [
            (
                layer,
                model,
                {
                    column: {"norm": cell.norm, "distance": cell.distance, "ratio": cell.ratio}
                    for column in self.columns
                    if (cell := self.cells[model].get((layer, column)))
                },
            )
            for layer in self.layers
            for model in self.models
        ]
        return [*rows, *((MEAN, model, self.means(model)) for model in self.models)]

    def titles(self) -> list[str]:
        """Return the columns with the architecture's names, such as `K (k_proj)`."""
        return [
            column if names == (column,) else f"{column} ({', '.join(names)})" for column, names in self.columns.items()
        ]

    def by_layer(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows of the table over layers, for display."""
        titles = [f"{title} {number}" for title in self.titles() for number in ("norm", "d")]
        rows = []
        for layer, model, cells in self.rows():
            numbers = [cells.get(column, {}).get(key) for column in self.columns for key in ("norm", "distance")]
            rows.append([layer, model, *map(_number_text, numbers)])
        return ["layer", "model", *titles], rows

    def ratios(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows of the table of mean ratios of the norms to the base's, for display."""
        rows = []
        for model in self.models[1:]:
            means = self.means(model)
            rows.append([model, *(_number_text(means[column]["ratio"]) for column in self.columns)])
        return ["norm / base's, mean over layers", *self.titles()], rows

    def markdown(self) -> str:
        """Return both tables in Markdown."""
        return "\n".join([markdown_table(*self.by_layer(), names=2), markdown_table(*self.ratios())])

    def csv(self) -> str:
        """Return the table over layers as CSV with unrounded numbers, and the ratio of the norms in each layer.

        The columns of K are `K norm`, `K d` and `K ratio`.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        numbers = {"norm": "norm", "d": "distance", "ratio": "ratio"}
        writer.writerow(["layer", "model", *(f"{column} {name}" for column in self.columns for name in numbers)])
        for layer, model, cells in self.rows():
            row = [cells.get(column, {}).get(key) for column in self.columns for key in numbers.values()]
            writer.writerow([layer, model, *row])
        return text.getvalue()

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "models": list(self.models),
            "columns": {column: list(names) for column, names in self.columns.items()},
            "rows": [{"layer": layer, "model": model, "columns": cells} for layer, model, cells in self.rows()],
        }


def _number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def scaling_table(
    names: Sequence[str], models: Sequence[Mapping[str, Numbers]], located: Mapping[str, ModuleLocation]
) -> ScalingTable:
    """Return the table of a base and the models that were compared with it.

    Args:
        names: Names of the base and of the models.
        models: Per model, the numbers of each weight by its path in the base.
        located: Location of each of these paths, in the order of the model.
    """
    column_of = {path: projection_of(path) or location.kind for path, location in located.items()}
    own_names: dict[str, dict[str, None]] = {}
    for path, location in located.items():
        own_names.setdefault(column_of[path], {})[location.kind] = None
    columns = [*(name for name in PROJECTIONS if name in own_names), *(n for n in own_names if n not in PROJECTIONS)]
    unique = unique_names(names)
    of_base = {path: (norm, norm, 0.0) for numbers in models for path, (norm, _, _) in numbers.items()}

    def cells(numbers: Mapping[str, Numbers]) -> dict[tuple[str, str], Cell]:
        members: dict[tuple[str, str], list[Numbers]] = {}
        for path, each in numbers.items():
            members.setdefault((located[path].layer, column_of[path]), []).append(each)
        return {key: _together(each) for key, each in members.items()}

    return ScalingTable(
        models=tuple(unique),
        columns={column: tuple(own_names[column]) for column in columns},
        layers=tuple(dict.fromkeys(location.layer for location in located.values())),
        cells={name: cells(numbers) for name, numbers in zip(unique, [of_base, *models], strict=True)},
    )


def _together(numbers: Sequence[Numbers]) -> Cell:
    base, norm, distance = (math.hypot(*each) for each in zip(*numbers, strict=True))
    return Cell(norm=norm, distance=distance, base_norm=base)
