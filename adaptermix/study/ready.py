"""Merges that are there already as candidates of a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import manifest
from ..adapters import AdapterSource, open_adapter
from ..compose.places import make_override
from ..compose.plan import MergePlan
from ..data import DataFile
from ..errors import PlanError
from ..methods.base import METHODS, LinearMethod
from .space import Candidate


def candidate_of(folder: Path, plan: MergePlan) -> Candidate:
    """Return what a merged adapter is as a candidate: its weights, and what holds at its places.

    Args:
        folder: Output of `merge`.
        plan: The search's adapters.

    Raises:
        PlanError: it is no weighted sum of these adapters in this order.
    """
    made = open_adapter(folder)
    document, inputs = made.meta.manifest, [source.digest.split("+")[0] for source in plan.sources]
    known = document.get("plan") if document.get("kind") == "merge" else None
    if not isinstance(known, dict) or [entry.get("weights_sha256") for entry in document.get("inputs", ())] != inputs:
        asked = ", ".join(source.name for source in plan.sources)
        raise PlanError(f"--candidates must be merges of {asked} in this order, and {folder} is none.")
    method = METHODS.get(str(known.get("method")))
    # of others the weights alone do not tell the result
    if method is None or not issubclass(method, LinearMethod) or method.depends_on_deltas or method.factor:
        raise PlanError(f"--candidates must be weighted sums (exact, fuse), and {folder} is of method {method}.")
    if known.get("rank") or known.get("form") == "lowrank":
        raise PlanError(f"--candidates must be whole sums, and {folder} was cut to a rank.")
    if known.get("fill", "weight") != "weight":
        raise PlanError(f"--candidates must weigh adapters alike where they act alone, and {folder} has --fill one.")
    names = [source.name for source in plan.sources]
    overrides = tuple(make_override(place, names, plan.modules) for place in known.get("places", ()))
    return Candidate(weights=tuple(map(float, known["weights"])), overrides=overrides, name=str(folder))


def entries_of(folders: Iterable[str], name: str) -> list[dict[str, Any]]:
    """Return what manifests of candidates say of files, under a name such as `data` or `dev`."""
    found = [open_adapter(Path(folder)).meta.manifest.get(name) for folder in folders if folder]
    return [entry for entries in found if isinstance(entries, list) for entry in entries]


def chosen_on(files: Sequence[DataFile], folders: Sequence[str], sources: Sequence[AdapterSource]) -> list[str]:
    """Return what a person should know of dev files that candidates learned from.

    Args:
        files: The dev files.
        folders: The candidates.
        sources: The search's adapters, of whose own data is told elsewhere.
    """
    made = [open_adapter(Path(folder)) for folder in folders]
    seen = manifest.seen(made) - manifest.seen(sources) if made else set()
    return [
        f"warning: {file.path} is a file that a candidate's weights were learned on; unless --rows picks other rows, "
        "the choice favours it."
        for file in files
        if seen and file.entry()["sha256"] in seen
    ]
