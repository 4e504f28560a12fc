"""Merges that exist before the search, as candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..adapters import AdapterSource, open_adapter
from ..errors import PlanError
from ..io.json_types import JsonObject
from ..merging.overrides import make_override
from ..merging.plan import MergePlan
from ..methods.base import METHODS, LinearMethod
from ..provenance import manifest
from ..tasks.data import DataFile
from ..tasks.splits import warn_of_seen
from .space import Candidate


def candidate_of(folder: Path, plan: MergePlan) -> Candidate:
    """Return the candidate of a merged adapter: its weights and its overrides.

    Args:
        folder: Output of `merge`.
        plan: The merge of the search, for its adapters.

    Raises:
        PlanError: the output is not a weighted sum of these adapters in this order.
    """
    document = open_adapter(folder).meta.manifest
    inputs = [source.digest.split("+")[0] for source in plan.sources]
    known = document.get("plan") if document.get("kind") == "merge" else None
    if not isinstance(known, dict) or [entry.get("weights_sha256") for entry in document.get("inputs", ())] != inputs:
        adapters = ", ".join(source.name for source in plan.sources)
        raise PlanError(
            f"--candidates must be merges of {adapters} in this order, which {folder} is not.",
            code="candidates.adapters",
        )
    method = METHODS.get(str(known.get("method")))
    if method is None or not issubclass(method, LinearMethod) or not _only_weighs(method):
        raise PlanError(
            f"--candidates must be weighted sums (exact, fuse, cat), and {folder} is of another method, "
            f"{known.get('method')}.",
            code="candidates.method",
        )
    if known.get("rank") or known.get("form") == "lowrank":
        raise PlanError(f"--candidates must be whole sums, and {folder} was cut to a rank.", code="candidates.cut")
    if known.get("fill", "weight") != "weight":
        raise PlanError(
            f"--candidates must not use --fill one, but {folder} does.",
            code="candidates.fill",
        )
    names = [source.name for source in plan.sources]
    overrides = tuple(make_override(override, names, plan.modules) for override in known.get("places", ()))
    return Candidate(weights=tuple(map(float, known["weights"])), overrides=overrides, name=str(folder))


def _only_weighs(method: type[LinearMethod]) -> bool:
    """Return whether a method is determined by the weights alone, without roles of adapters and options."""
    return not (method.depends_on_deltas or method.factor or method.roles)


def entries_of(folders: Iterable[str], name: str) -> list[JsonObject]:
    """Return the entries of files in the manifests of candidates, by a key such as `data` or `dev`."""
    origins = [manifest.origin(open_adapter(Path(folder))) for folder in folders]
    return [dict(known.entry) for known in manifest.seen_files(origins, (name,))]


def chosen_on(files: Sequence[DataFile], folders: Sequence[str], sources: Sequence[AdapterSource]) -> list[str]:
    """Return warnings about dev files that candidates learned from.

    Args:
        files: The dev files.
        folders: The candidates.
        sources: The adapters of the search; other warnings cover their training data.
    """
    origins = [manifest.origin(open_adapter(Path(folder))) for folder in folders]
    inherited = [known.entry for known in manifest.seen_files([manifest.origin(source) for source in sources])]
    learned = [known for known in manifest.seen_files(origins) if known.entry not in inherited]
    return warn_of_seen(files, learned, "a candidate's weights were learned on")
