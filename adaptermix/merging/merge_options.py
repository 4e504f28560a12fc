"""The options of a merge, as one typed value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from ..errors import PlanError, did_you_mean
from .output_form import KEEP, Form, Rank
from .plan import Fill

DTYPES = ("float32", "bfloat16", "float16")


class MergeKeywords(TypedDict, total=False):
    """The keyword arguments of `merge`: the fields of `MergeOptions` that have defaults."""

    method: str
    options: Mapping[str, object] | None
    places: Sequence[Mapping[str, object]]
    fill: Fill
    form: Form | None
    rank: Rank | None
    keep: float
    base: str | None
    saved: str | int
    statistics: Sequence[str | Path]
    allow_pickle: bool
    allow_base_mismatch: bool
    seed: int
    model_modules: Collection[str]
    max_residual: float
    dtype: str | None
    compact: bool
    device: str
    overwrite: bool
    dry_run: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Options of a merge of adapters.

    Args:
        adapters: Adapter folders. Rank, alpha, rsLoRA and target modules may differ.
        weights: One per adapter; a single weight w for two adapters means w and 1 - w. Not normalised.
        method: Name of a merge method.
        options: Its hyper-parameters; `KEY@GLOB` and `KEY@layers:FIRST-LAST` apply to some modules only;
            KEY may also be `weights` or `curve`.
        places: The same overrides as a list of mappings.
        fill: "one" gives the weight 1 to an adapter in the modules that only this adapter has.
        form: Form of the result; see `output_form.Shape`, also for `rank` and `keep`.
        rank: Rank of the result, or "auto".
        keep: Share of each module's squared norm that an automatic rank keeps.
        base: Folder or Hub id of the base model, for adapters whose delta depends on it (DoRA, PiSSA and OLoRA) and for
            full checkpoints.
        saved: What to do with fully trained tensors; see `whole_tensors.merge_saved`.
        statistics: One safetensors file per adapter with a tensor per module path.
        allow_pickle: Read `adapter_model.bin` too.
        allow_base_mismatch: Merge adapters although they name different base models.
        seed: Seed of random methods.
        model_modules: Paths of all modules of the base model's class; the result gets these paths.
        out: Folder to write; None computes and reports only.
        max_residual: Refuse to write if truncation and rounding lose more than this share of the whole delta's norm.
        dtype: Storage dtype; default float32. Arithmetic is in float32 or wider, SVDs of factors in float64.
        compact: Keep each module's own rank (`rank_pattern`). By default all modules are padded with zeros to one rank,
            so that programs that ignore patterns read them correctly too.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; where methods compute.
        overwrite: Replace an existing output folder.
        dry_run: Do everything but write.

    Raises:
        PlanError: the options contradict each other.
    """

    adapters: Sequence[str | Path]
    weights: Sequence[float]
    method: str = "exact"
    options: Mapping[str, object] | None = None
    places: Sequence[Mapping[str, object]] = ()
    fill: Fill = "weight"
    form: Form | None = None
    rank: Rank | None = None
    keep: float = KEEP
    base: str | None = None
    saved: str | int = "refuse"
    statistics: Sequence[str | Path] = ()
    allow_pickle: bool = False
    allow_base_mismatch: bool = False
    seed: int = 0
    model_modules: Collection[str] = field(default=(), repr=False)
    out: Path | None = None
    max_residual: float = 0.1
    dtype: str | None = None
    compact: bool = False
    device: str = "auto"
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PlanError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.", code="option.dtype")
        if not 0 <= self.max_residual <= 1:
            raise PlanError(f"--max-residual must be in [0, 1], got {self.max_residual:g}.", code="option.max-residual")
        if self.compact and self.form == "dense":
            raise PlanError(
                "--compact applies to the ranks of an adapter, but --form dense has no ranks. Leave one of them out.",
                code="merge.compact-dense",
            )

    @property
    def written_out(self) -> Path | None:
        """The folder to write; None for a dry run, or if there is no `out`."""
        return None if self.dry_run else self.out

    @property
    def inputs(self) -> list[str | Path]:
        """The files and folders that are read."""
        return [*self.adapters, *([self.base] if self.base else []), *self.statistics]


def check_arguments(keywords: Iterable[str], known: type) -> None:
    """Refuse keyword arguments that a function does not have.

    Args:
        keywords: Names of the arguments.
        known: The TypedDict of the arguments that it has.

    Raises:
        PlanError: an argument is unknown.
    """
    names = list(known.__annotations__)
    for name in keywords:
        if name not in names:
            raise PlanError(
                f"unknown argument {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.",
                code="merge.unknown-argument",
            )


def merge_options(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | float,
    out: str | Path | None,
    keywords: MergeKeywords,
) -> MergeOptions:
    """Return the options of a merge from the arguments of `merge`.

    Raises:
        PlanError: an argument is unknown, or they contradict each other.
    """
    check_arguments(keywords, MergeKeywords)
    keywords["statistics"] = keywords.get("statistics") or ()
    return MergeOptions(
        adapters=adapters,
        weights=[weights] if isinstance(weights, int | float) else weights,
        out=None if out is None else Path(out),
        **keywords,
    )
