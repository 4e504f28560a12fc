"""One row per merge method: how to make it, and which laws hold for it beyond, or short of, the usual ones.

A new method is entered here once; `test_laws.py` then holds it to everything, and fails if it is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaptermix.methods import METHODS, MergeMethod
from adaptermix.methods.base import build


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method with options that make it do something, what makes it merely add up, and its laws."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    neutral: dict[str, Any] = field(default_factory=dict)
    laws: dict[str, Any] = field(default_factory=dict)

    def make(self) -> MergeMethod:
        return build(self.name, self.options)

    def make_neutral(self) -> MergeMethod:
        return build(self.name, {**self.options, **self.neutral})


FULL = {"density": 1.0}
ADDS: dict[str, Any] = {"additive": True}

TABLE: dict[str, Row] = {
    "exact": Row(name="exact", laws=ADDS | {"linear": True}),
    "layer-swap": Row(
        name="layer-swap",
        options={"bottom": 2, "top": 3, "transition": 2},
        neutral={"bottom": 0, "top": 0},
        laws=ADDS | {"max_k": 2, "permutable": False},
    ),
    "layer-swap, the middle": Row(
        name="layer-swap", options={"bottom": 0, "top": 0}, laws=ADDS | {"max_k": 2, "permutable": False}
    ),
    "adamergex": Row(name="adamergex", options={"t": 0.5}, laws=ADDS | {"max_k": 3, "permutable": False}),
    "svd": Row(name="svd", laws=ADDS | {"linear": True}),
    "task-arithmetic": Row(name="task-arithmetic", laws=ADDS | {"linear": True}),
    "task-arithmetic, gain": Row(name="task-arithmetic", options={"gain": -0.5}, neutral={"gain": 1.0}, laws=ADDS),
    "fuse": Row(name="fuse", laws=ADDS | {"linear": True}),
    "ties": Row(name="ties", options={"density": 0.4}, neutral=FULL),
    "ties, scale first": Row(name="ties", options={"density": 0.4, "order": "scale-first"}, neutral=FULL),
    "ties, summed": Row(name="ties", options={"density": 0.4, "normalize": False}, neutral=FULL),
    "ties, scale first, summed": Row(
        name="ties", options={"density": 0.4, "order": "scale-first", "normalize": False}, neutral=FULL
    ),
    "ties, over the model": Row(name="ties", options={"density": 0.4, "scope": "model"}, neutral=FULL),
    "ties, one entry": Row(name="ties", options={"density": 1e-9}, neutral=FULL),
    "ties, nothing trimmed": Row(name="ties", options=FULL),
    "magnitude-prune": Row(name="magnitude-prune", options={"density": 0.3}, neutral=FULL, laws=ADDS),
    "breadcrumbs": Row(
        name="breadcrumbs", options={"density": 0.4, "outliers": 0.1}, neutral=FULL | {"outliers": 0.0}, laws=ADDS
    ),
    "breadcrumbs, elected": Row(
        name="breadcrumbs",
        options={"density": 0.4, "outliers": 0.1, "elect": True},
        neutral=FULL | {"outliers": 0.0},
    ),
    "dare-linear": Row(name="dare-linear", options={"density": 0.5}, neutral=FULL, laws=ADDS),
    "dare-linear, few kept": Row(name="dare-linear", options={"density": 0.1}, neutral=FULL, laws=ADDS),
    "dare-ties": Row(name="dare-ties", options={"density": 0.5}, neutral=FULL),
    "dare-ties, as mergekit": Row(
        name="dare-ties", options={"density": 0.5, "order": "scale-first", "normalize": False}, neutral=FULL
    ),
    "della": Row(name="della", options={"density": 0.5}, neutral=FULL | {"epsilon": 0.0}),
    "della, linear": Row(
        name="della", options={"density": 0.5, "elect": False}, neutral=FULL | {"epsilon": 0.0}, laws=ADDS
    ),
    "della, widest": Row(
        name="della", options={"density": 0.5, "epsilon": 0.9999999999}, neutral=FULL | {"epsilon": 0.0}
    ),
    "slerp": Row(name="slerp", laws={"max_k": 2, "signed": False}),
    "karcher": Row(name="karcher", laws={"signed": False, "acute": True}),
    "model-stock": Row(name="model-stock"),
    "knots": Row(name="knots", options={"density": 0.5}, neutral=FULL),
    "knots, scale first": Row(name="knots", options={"density": 0.5, "order": "scale-first"}, neutral=FULL),
    "tsv": Row(name="tsv"),
    "tsv, all": Row(name="tsv", options={"share": 1.0}),
    "iso-c": Row(name="iso-c", laws={"returns_single": False, "tolerance": 1e-6}),
    "ties, in core": Row(name="ties", options={"density": 0.4, "space": "core"}, neutral=FULL),
    "ties, in core, over the model": Row(
        name="ties", options={"density": 0.4, "space": "core", "scope": "model"}, neutral=FULL
    ),
    "magnitude-prune, in core": Row(name="magnitude-prune", options={"density": 0.3, "space": "core"}, neutral=FULL),
    "breadcrumbs, in core": Row(
        name="breadcrumbs",
        options={"density": 0.4, "outliers": 0.1, "space": "core"},
        neutral=FULL | {"outliers": 0.0},
    ),
    "dare-linear, in core": Row(name="dare-linear", options={"density": 0.5, "space": "core"}, neutral=FULL),
    "dare-ties, in core": Row(name="dare-ties", options={"density": 0.5, "space": "core"}, neutral=FULL),
    "della, in core": Row(name="della", options={"density": 0.5, "space": "core"}, neutral=FULL | {"epsilon": 0.0}),
    "magnitude-prune, in core, whole": Row(
        name="magnitude-prune", options=FULL | {"space": "core"}, laws=ADDS | {"linear": True}
    ),
    "tsv, in core": Row(name="tsv", options={"space": "core"}),
    "iso-c, in core": Row(name="iso-c", options={"space": "core"}, laws={"returns_single": False, "tolerance": 1e-6}),
    "wudi": Row(name="wudi"),
    "wudi, the minimum": Row(name="wudi", options={"ridge": 0.0}, laws={"tolerance": 1e-6}),
    "do-merging": Row(name="do-merging"),
    "do-merging, by module": Row(name="do-merging", options={"per": "module"}),
    "cat": Row(name="cat", laws=ADDS | {"linear": True}),
    "fisher": Row(name="fisher", laws={"signed": False}),
    "regmean": Row(name="regmean", laws={"signed": False}),
    "regmean, as is": Row(name="regmean", options={"off_diagonal": 1.0}, laws={"signed": False}),
    "regmean-plus": Row(name="regmean-plus", laws={"signed": False}),
    "peft-linear": Row(name="peft-linear", laws={"gauge_free": False, "takes_dense": False}),
    "factor-average": Row(name="factor-average", laws={"gauge_free": False, "takes_dense": False}),
}

assert {row.name for row in TABLE.values()} <= set(METHODS)
