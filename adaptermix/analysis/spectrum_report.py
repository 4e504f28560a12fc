"""The report of `spectrum` per module, with aggregates over layers and kinds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..models.location import ModuleLocation, kinds_of, layers_of, mean
from .spectrum_table import ScalingTable, scaling_table

_FIELDS = ("norm_a", "norm_b", "ratio", "distance", "relative_distance", "difference_norm", "stable_rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    r"""The difference of one weight's singular values between two models.

    Args:
        norm_a: $\|\sigma_A\|_2$, which is $\|W_A\|_F$.
        norm_b: $\|\sigma_B\|_2$.
        distance: $d = \|\sigma_B - \sigma_A\|_2$.
        difference_norm: $\|W_B - W_A\|_F$, at least d.
        stable_rank: Squared Frobenius norm over squared largest singular value of $W_B - W_A$; 0 if that is zero.
    """

    norm_a: float
    norm_b: float
    distance: float
    difference_norm: float
    stable_rank: float

    def document(self) -> dict[str, float | None]:
        """Return the numbers as plain data; ratios to a zero weight are null."""
        return {
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "ratio": _ratio(self.norm_b, self.norm_a),
            "distance": self.distance,
            "relative_distance": _ratio(self.distance, self.norm_a),
            "difference_norm": self.difference_norm,
            "stable_rank": self.stable_rank,
        }


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SpectrumReport(ResultView):
    """Singular-value scaling from model A, the base, to model B, and to further models.

    Args:
        a: The base's folder or Hub id.
        b: The other's folder or Hub id.
        compared: Kind of comparison: `checkpoints`, `base and base with adapter`, or `adapters`.
        modules: Numbers per module path, as A names it.
        locations: Layer and kind of each of these modules.
        notes: Modules that were left out, with reasons.
        others: The reports of further models with the same base.
    """

    a: str
    b: str
    compared: str
    modules: Mapping[str, Scaling]
    locations: Mapping[str, ModuleLocation]
    notes: tuple[str, ...] = ()
    others: tuple[SpectrumReport, ...] = ()

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Modules per layer, in the order of the model."""
        return layers_of(self.locations)

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Modules per kind."""
        return kinds_of(self.locations)

    def together(self, paths: Iterable[str]) -> dict[str, float | None] | None:
        """Return the numbers of some modules as if their singular values were one vector, and their means.

        Without modules the result is None.
        """
        scalings = [self.modules[path] for path in paths]
        if not scalings:
            return None
        norm_a, norm_b = math.hypot(*(m.norm_a for m in scalings)), math.hypot(*(m.norm_b for m in scalings))
        distance = math.hypot(*(m.distance for m in scalings))
        return {
            "modules": len(scalings),
            "norm_a": norm_a,
            "norm_b": norm_b,
            "ratio": _ratio(norm_b, norm_a),
            "distance": distance,
            "relative_distance": _ratio(distance, norm_a),
            "difference_norm": math.hypot(*(m.difference_norm for m in scalings)),
            "mean_ratio": mean(_ratio(m.norm_b, m.norm_a) for m in scalings),
            "mean_distance": mean(m.distance for m in scalings),
            "mean_relative_distance": mean(_ratio(m.distance, m.norm_a) for m in scalings),
        }

    def cell(self, layer: str, kind: str) -> dict[str, float | None] | None:
        """Return the numbers of one cell of the table; None where a layer has no module of that kind."""
        of_kind = set(self.kinds.get(kind, ()))
        return self.together(path for path in self.layers.get(layer, ()) if path in of_kind)

    def table(self) -> ScalingTable:
        """Return the table of layers and all models, in the form of the paper's appendix."""
        reports = [self, *self.others]
        located = {path: location for report in reports[::-1] for path, location in report.locations.items()}
        ordered = dict(sorted(located.items(), key=lambda item: item[1].order))
        numbers = [{path: (m.norm_a, m.norm_b, m.distance) for path, m in report.modules.items()} for report in reports]
        return scaling_table([_short(self.a), *(_short(report.b) for report in reports)], numbers, ordered)

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix spectrum`: the first model's, the table, and those of the others."""
        document = self._document() | {"table": self.table().document()}
        return document | ({"others": [report._document() for report in self.others]} if self.others else {})

    def _document(self) -> JsonObject:
        return {
            "a": self.a,
            "b": self.b,
            "compared": self.compared,
            "modules": {
                path: {"layer": self.locations[path].layer, "kind": self.locations[path].kind, **numbers.document()}
                for path, numbers in self.modules.items()
            },
            "layers": {layer: self.together(paths) for layer, paths in self.layers.items()},
            "kinds": {kind: self.together(paths) for kind, paths in self.kinds.items()},
            "notes": list(self.notes),
        }

    def csv(self) -> bytes:
        """Return a table with one row per model and module; a ratio to a zero weight is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["module", "layer", "kind", *_FIELDS, "model"])
        for report in (self, *self.others):
            for path, numbers in report.modules.items():
                values, location = numbers.document(), report.locations[path]
                writer.writerow([path, location.layer, location.kind, *(values[f] for f in _FIELDS), report.b])
        return text.getvalue().encode()


def _short(reference: str) -> str:
    """Return the last part of a model's path or Hub id."""
    return reference.rstrip("/").rpartition("/")[2] or reference
