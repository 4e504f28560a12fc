"""The report of `inspect` per module, with aggregates over layers, kinds and adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..models.location import ModuleLocation, kinds_of, layers_of, mean
from ..pictures import Picture, picture_of
from .inspect_stack import StackInspection

Numbers = dict[str, float | None]
_MEASURES = (
    "cosine",
    "sign_conflict",
    "overlap",
    "overlap_left",
    "overlap_right",
    "overlap_by_chance",
    "share_a_in_b",
    "share_b_in_a",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNumbers:
    """One module of one adapter.

    Args:
        rank: Rank of the stored factors.
        numerical_rank: Singular values above rounding; 0 for a zero update.
        norm: Frobenius norm of the update, scale included.
        stable_rank: Squared norm over squared largest singular value; 0 for a zero update.
    """

    rank: int
    numerical_rank: int
    norm: float
    stable_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairNumbers:
    """One module that adapters a and b both have; None for values that a zero update makes undefined.

    Args:
        cosine: Cosine of the angle between the two updates.
        sign_conflict: Share of entries with opposite signs, of at most 16,384 drawn over the module.
        overlap_left: Mean squared cosine of the principal angles between the column spaces of the two B.
        overlap_right: The same for the row spaces of the two A.
        first_factors: Mean cosine of row i of one A and row i of the other, if they have the same number of rows and
            are not equal; near 1 if both trainings started with the same random A.
        overlap_by_chance: Expected overlap of random subspaces of these dimensions, mean of both sides.
        share_a_in_b: Share of the squared norm of a in the subspaces of b.
        share_b_in_a: The other way round.
    """

    cosine: float | None
    sign_conflict: float
    overlap_left: float | None
    overlap_right: float | None
    overlap_by_chance: float | None
    share_a_in_b: float | None
    share_b_in_a: float | None
    first_factors: float | None = None

    @property
    def overlap(self) -> float | None:
        """Mean of both sides."""
        return mean([self.overlap_left, self.overlap_right])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInspection:
    """One adapter.

    Args:
        name: Name of the folder; made unique as `task#2`.
        path: The folder.
        base: Its base model.
        modules: Numbers per module path.
        notes: Its content besides the factors.
    """

    name: str
    path: str
    base: str | None
    modules: Mapping[str, ModuleNumbers]
    notes: tuple[str, ...] = ()

    def norm(self, paths: Iterable[str] | None = None) -> float:
        """Frobenius norm over some modules, or all; those that the adapter lacks count as zero."""
        chosen = self.modules if paths is None else [path for path in paths if path in self.modules]
        return math.hypot(*(self.modules[path].norm for path in chosen))

    def share(self, paths: Iterable[str]) -> float:
        """Share of the adapter's squared norm in some modules; 0 in a zero adapter."""
        whole = self.norm()
        return (self.norm(paths) / whole) ** 2 if whole > 0 else 0.0

    def group(self, paths: Iterable[str]) -> Numbers | None:
        """Return the aggregate of some modules; None if the adapter lacks all of them."""
        present = [path for path in paths if path in self.modules]
        if not present:
            return None
        return {
            "modules": len(present),
            "rank": max(self.modules[path].rank for path in present),
            "numerical_rank": max(self.modules[path].numerical_rank for path in present),
            "norm": self.norm(present),
            "share": self.share(present),
        }

    def document(self, located: Mapping[str, ModuleLocation]) -> JsonObject:
        """Return the adapter's part of the JSON document."""
        return {
            "path": self.path,
            "base": self.base,
            **(self.group(self.modules) or {}),
            "modules": {path: asdict(m) | {"share": self.share([path])} for path, m in self.modules.items()},
            "layers": _groups(layers_of(located), self.group),
            "kinds": _groups(kinds_of(located), self.group),
            "notes": list(self.notes),
        }


def _groups(groups: Mapping[str, tuple[str, ...]], numbers: Callable[[Iterable[str]], Numbers | None]) -> JsonObject:
    made = {name: numbers(paths) for name, paths in groups.items()}
    return {name: value for name, value in made.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairInspection:
    """Two adapters.

    Args:
        a: The first.
        b: The second.
        modules: Numbers per module that both have, in one shape.
        notes: Caveats of the comparison.
    """

    a: AdapterInspection
    b: AdapterInspection
    modules: Mapping[str, PairNumbers]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Key in the JSON document."""
        return f"{self.a.name}|{self.b.name}"

    def cosine(self, paths: Iterable[str]) -> float | None:
        """Cosine of the two deltas over some modules; one that an adapter lacks counts as zero in it."""
        paths = list(paths)
        first, second = self.a.norm(paths), self.b.norm(paths)
        shared = [path for path in paths if path in self.modules]
        if not (shared and first > 0 and second > 0):
            return None
        return sum(
            (self.modules[path].cosine or 0.0)
            * (self.a.modules[path].norm / first)
            * (self.b.modules[path].norm / second)
            for path in shared
        )

    def _share(self, inner: AdapterInspection, paths: list[str], shares: Mapping[str, float | None]) -> float | None:
        whole = inner.norm(paths)
        if not whole > 0:
            return None
        return sum((shares[path] or 0.0) * (inner.modules[path].norm / whole) ** 2 for path in shares)

    def group(self, paths: Iterable[str]) -> Numbers | None:
        """Return the aggregate of some modules; None if the two share no such module.

        Cosine and shares are computed on the joined deltas; sign conflict and overlaps are means over the modules.
        """
        paths = list(paths)
        present = {path: self.modules[path] for path in paths if path in self.modules}
        if not present:
            return None
        return {
            "modules_in_common": len(present),
            "cosine": self.cosine(paths),
            "sign_conflict": mean(m.sign_conflict for m in present.values()),
            "overlap": mean(m.overlap for m in present.values()),
            "overlap_left": mean(m.overlap_left for m in present.values()),
            "overlap_right": mean(m.overlap_right for m in present.values()),
            "overlap_by_chance": mean(m.overlap_by_chance for m in present.values()),
            "share_a_in_b": self._share(self.a, paths, {path: m.share_a_in_b for path, m in present.items()}),
            "share_b_in_a": self._share(self.b, paths, {path: m.share_b_in_a for path, m in present.items()}),
        }

    def document(self, located: Mapping[str, ModuleLocation]) -> JsonObject:
        """Return the pair's part of the JSON document; all numbers are null for adapters with no module in common."""
        everything = self.group(located) or {"modules_in_common": 0} | dict.fromkeys(_MEASURES)
        return {
            "a": self.a.name,
            "b": self.b.name,
            **everything,
            "modules": {path: asdict(numbers) | {"overlap": numbers.overlap} for path, numbers in self.modules.items()},
            "layers": _groups(layers_of(located), self.group),
            "kinds": _groups(kinds_of(located), self.group),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Inspection(ResultView):
    """The content of some adapters, and the interference of every two of them.

    Args:
        adapters: The adapters, in the order of the arguments.
        pairs: Every pair of them.
        locations: Layer and kind of every module of any of them.
        stacks: The stacks among the arguments, by name.
    """

    adapters: tuple[AdapterInspection, ...]
    pairs: tuple[PairInspection, ...]
    locations: Mapping[str, ModuleLocation]
    stacks: Mapping[str, StackInspection] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Modules per layer, in the order of the model."""
        return layers_of(self.locations)

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Modules per kind."""
        return kinds_of(self.locations)

    def plot(self) -> Picture:
        """Return heatmaps of cosine, overlap and sign conflict as SVG, for notebooks and `save`."""
        return picture_of(self.document())

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix inspect`."""
        document: JsonObject = {
            "adapters": {adapter.name: adapter.document(self.locations) for adapter in self.adapters},
            "pairs": {pair.name: pair.document(self.locations) for pair in self.pairs},
        }
        stacks = {name: stack.document() for name, stack in self.stacks.items()}
        return document | ({"stacks": stacks} if stacks else {})
