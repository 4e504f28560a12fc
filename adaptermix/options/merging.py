"""Options of merging, extracting and searching."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .base import ALLOW_TESTED, BASE, TASK, GenerationSettings, ReadsRows, Scored, Settings, Written, refuse
from .fields import Device, Files, Positive, Rows, StorageDtype, no_numbers, rank_or_auto
from .roles import ADAPTER, DEV, MODEL, OTHER, TRAINING, Argument, Flag, Panel, Reads, Role

COMPACT = "keep each module's own rank (rank_pattern); default: one rank for all, which every program reads rightly"


class PlaceSettings(Settings):
    """Weights or method options that hold at some modules only."""

    modules: str = Field("*", description="glob over module paths")
    layers: int | str | None = Field(None, description="FIRST-LAST, both included, or one number, or all")
    weights: float | str | list[float] | None = Field(None, description="weights there")
    curve: list[float | str | list[float]] | None = Field(
        None, description="weights along the layers: evenly spaced points, interpolated"
    )
    options: dict[str, object] = Field({}, description="options of the method there")


class MergeSettings(ReadsRows, Written):
    """Merge adapters; no base model is loaded, but by methods that learn their weights."""

    panel = Panel.MERGE
    is_long: ClassVar[bool] = True

    adapters: Annotated[Files, Reads(ADAPTER, or_model=True), Argument("ADAPTER...")] = Field(
        description="adapter folders, stacks, or checkpoint folders with --base"
    )
    weights: list[float] = Field(min_length=1, description="one per adapter; a single w for two means w and 1 - w")
    method: Annotated[str, Role.COMMON] = Field("exact", description="merge method; `adaptermix methods` lists them")
    options: Annotated[dict[str, object], Flag("--set"), Role.COMMON] = Field(
        {}, description="options of the method; at a place: KEY@GLOB=VALUE or KEY@layers:0-15=VALUE, KEY also weights"
    )
    places: Annotated[list[PlaceSettings], Role.ADAPTERS_ONLY] = Field(
        [], description="weights and options at some modules (recipes; else --set)"
    )
    fill: Annotated[Literal["weight", "one"], Role.ADAPTERS_ONLY] = Field(
        "weight", description="weight of an adapter on modules that it alone adapts: its weight, or one"
    )
    form: Annotated[Literal["concat", "lowrank", "dense"] | None, Role.ADAPTERS_ONLY, Role.COMMON] = Field(
        None, description="form of the result: concatenated factors, recompressed, or full matrices"
    )
    rank: Annotated[
        Positive | Literal["auto"] | None, BeforeValidator(rank_or_auto), Role.ADAPTERS_ONLY, Role.COMMON
    ] = Field(
        None, description="recompress to this rank; auto finds the least that keeps --keep; default keeps everything"
    )
    keep: Annotated[float, Role.ADAPTERS_ONLY, Panel.MERGE] = Field(
        0.999, gt=0, le=1, description="share of each module's squared norm that --rank auto keeps"
    )
    max_residual: Annotated[float, Role.ADAPTERS_ONLY] = Field(
        0.1, ge=0, le=1, description="refuse if truncation and rounding lose more than this share of the delta's norm"
    )
    compact: Annotated[bool, Role.ADAPTERS_ONLY] = Field(False, description=COMPACT)
    base: Annotated[str | None, Reads(MODEL), Role.COMMON] = Field(
        None,
        description="base model, where deltas depend on it (DoRA, PiSSA), weights are learned on it (fuse), or the "
        "result is to be a full checkpoint",
    )
    saved: Annotated[str, Role.ADAPTERS_ONLY] = Field(
        "refuse",
        description="fully trained tensors (heads, projections of stacks) that differ: refuse, average, or an "
        "adapter's name or number",
    )
    statistics: Annotated[list[str], Reads(OTHER), Role.ADAPTERS_ONLY] = Field(
        [], description="for fisher and regmean: one file of `adaptermix statistics` per adapter, in their order"
    )
    allow_pickle: Annotated[bool, Role.ADAPTERS_ONLY] = Field(
        False, description="read adapter_model.bin too (weights only, no code)"
    )
    allow_base_mismatch: Annotated[bool, Role.ADAPTERS_ONLY] = Field(
        False, description="merge adapters that name different base models"
    )
    dtype: StorageDtype | None = Field(
        None, description="storage dtype of the result; default float32, or the base's for a checkpoint"
    )
    device: Annotated[Device, Role.MACHINE] = Field("auto", description="where to compute: auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of random methods, and of the rows that weights learn from")
    task: Annotated[str | None, Role.LEARNING, Panel.LEARNING] = Field(
        None, description="for methods that learn their weights (fuse): the task"
    )
    objective: Annotated[Literal["task", "agreement", "entropy"], Role.LEARNING, Panel.LEARNING] = Field(
        "task",
        description="for methods that learn: the task's loss on --train; or without labels, agreement of the answers "
        "to both sides of --pairs with the first adapter's to the second side, or the entropy of answers to --texts",
    )
    train: Annotated[list[str], Reads(TRAINING, rows="rows"), Role.LEARNING, Panel.LEARNING] = Field(
        [], description="for methods that learn: the task's rows to learn from; entropy does not look at their labels"
    )
    pairs: Annotated[list[str], Reads(TRAINING, "pairs", rows="rows"), Role.LEARNING, Panel.LEARNING] = Field(
        [], description="for agreement: parallel pair files such as de-en.tsv, the task adapter's language second"
    )
    texts: Annotated[list[str], Reads(TRAINING, "texts"), Role.LEARNING, Panel.LEARNING] = Field(
        [],
        description="for entropy: texts in the target languages, one a line; for regmean-plus: a file per adapter",
    )
    dev: Annotated[list[str], Reads(DEV), Role.LEARNING, Panel.LEARNING] = Field(
        [], description="for methods that learn: rows whose loss says when the weights are best"
    )
    dev_pairs: Annotated[list[str], Reads(DEV, "pairs"), Role.LEARNING, Panel.LEARNING] = Field(
        [], description="the same without labels: pairs whose agreement says when the weights are best"
    )
    rows: Annotated[Rows | None, Role.LEARNING, Panel.LEARNING] = Field(
        None, description="START:STOP[:STEP], the rows of each file to learn from"
    )
    allow_tested: Annotated[bool, Role.LEARNING, Role.SCHEDULING, Panel.LEARNING] = Field(
        False, description=ALLOW_TESTED
    )


class ExtractSettings(Written):
    """Turn the difference between two checkpoints into a LoRA: tuned less base, without loading either."""

    panel = Panel.MERGE
    is_long: ClassVar[bool] = True

    base: Annotated[str, Reads(MODEL)] = Field(description=BASE)
    tuned: Annotated[str, Reads(MODEL)] = Field(description="model tuned from it: folder or Hub id[@REVISION]")
    rank: Annotated[Positive | Literal["auto"], BeforeValidator(rank_or_auto)] = Field(
        description="rank of every module; auto finds the least that keeps --keep"
    )
    keep: Annotated[float, Role.COMMON] = Field(
        0.99, gt=0, le=1, description="share of each module's squared norm that --rank auto keeps"
    )
    modules: Annotated[list[str], Flag(metavar="GLOB..."), Role.COMMON] = Field(
        [], description="globs over module paths or kinds; default every matrix inside the blocks"
    )
    exact: bool = Field(False, description="take the exact SVD, not the verified randomised one")
    dtype: StorageDtype = Field("float32", description="storage dtype of the factors")
    compact: bool = Field(False, description=COMPACT)
    max_residual: Annotated[float | None, Role.COMMON] = Field(
        None, ge=0, le=1, description="refuse if more than this share of the difference's norm is lost"
    )
    device: Annotated[Device, Role.MACHINE] = Field("auto", description="where to decompose: auto, cpu, cuda or cuda:N")


class MethodsSettings(Settings):
    """List the merge methods with their options."""

    names: Annotated[list[str], Argument("[NAME...]")] = Field([], description="methods to show; default all")


DEFAULT_GRID = (0.25, 0.5, 0.9)
"""Weights of a search without --grid and --trials: shares in averages, and factors of the others in sums."""
_SEARCHED = ("groups", "curve", "vary")
"""Options that need a sampler."""


class SearchSettings(ReadsRows, GenerationSettings, Scored, Written):
    """Find merge weights, and options of the merge method, on dev data or on pairs without labels."""

    panel = Panel.SEARCH
    is_long: ClassVar[bool] = True

    adapters: Annotated[Files, Reads(ADAPTER), Argument("ADAPTER...")] = Field(
        description="adapter folders; the first is the task adapter, which every candidate is compared with"
    )
    base: Annotated[str, Reads(MODEL), Panel.MODEL] = Field(description=BASE)
    task: Annotated[str, Panel.DATA] = Field(description=TASK)
    dev: Annotated[list[str], AfterValidator(no_numbers), Reads(DEV, rows="rows"), Role.COMMON, Panel.DATA] = Field(
        [], description="dev files, one or more languages; with --objective agreement they are only reported"
    )
    rows: Annotated[Rows | None, Role.COMMON, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each dev file to use"
    )
    pairs: Annotated[
        list[str], AfterValidator(no_numbers), Reads(DEV, "pairs", rows="pair_rows"), Role.COMMON, Panel.DATA
    ] = Field(
        [], description="for --objective agreement: parallel pair files such as de-en.tsv, the task's language second"
    )
    pair_rows: Annotated[Rows | None, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each pair file to use"
    )
    grid: Annotated[list[float], Role.COMMON] = Field(
        [],
        description="weights to try, without --trials by default 0.25,0.5,0.9 with --space both; of two adapters the "
        "second gets 1 - w, of more the last gets the rest",
    )
    trials: Annotated[Positive | None, Role.AFTERWARDS, Role.COMMON] = Field(
        None, description="candidates that a sampler tries, instead of a grid"
    )
    sampler: Literal["auto", "random", "tpe", "cmaes", "gp"] = Field(
        "auto", description="sampler of candidates (optuna): gp for up to 8 numbers, else tpe"
    )
    space: Annotated[Literal["simplex", "free", "sum", "both"], Role.COMMON] = Field(
        "simplex",
        description="weights that are not negative and sum to 1, or each within --bounds; of a grid also sum: the "
        "whole first adapter plus shares of the others, or both: averages and sums",
    )
    candidates: Annotated[list[str], Reads(ADAPTER)] = Field(
        [],
        description="merges of these adapters as candidates in addition to a grid, such as by merge --method fuse",
    )
    bounds: list[float] = Field([0.0, 1.5], description="least and largest free weight; 1,1 fixes all weights at 1")
    groups: Annotated[list[str], Flag(metavar="N|GLOB...")] = Field(
        [],
        description="groups of modules with separate weights: the number of equal ranges of layers, or globs",
    )
    curve: Annotated[int, Field(ge=2)] | None = Field(
        None, description="let weights change smoothly over the layers, by this many evenly spaced points"
    )
    method: Annotated[str, Panel.MERGE] = Field("exact", description="merge method; `adaptermix methods` lists them")
    options: Annotated[dict[str, object], Flag("--set"), Panel.MERGE] = Field(
        {}, description="options of the method that are fixed"
    )
    vary: Annotated[dict[str, str], Flag(metavar="KEY=VALUES...")] = Field(
        {}, description="options of the method to search: KEY=LOW:HIGH[:log], or KEY=V,V"
    )
    objective: Annotated[Literal["mean", "worst-language", "agreement"], Role.COMMON] = Field(
        "mean",
        description="how a candidate is scored: mean or minimum of the scores of the languages on --dev, or, without "
        "labels, agreement; that is how far its answers to both sides of --pairs agree with the first adapter's to the "
        "second side",
    )
    choose: Annotated[Literal["best", "one-se"], Role.AFTERWARDS] = Field(
        "best",
        description="the candidate to take: the best, or of those less than a standard error below it the nearest to "
        "the task adapter alone",
    )
    control: Annotated[int, Role.AFTERWARDS] = Field(
        1,
        ge=0,
        description="where a gain is found, try this many random adapters of the ranks and norms of all but the first, "
        "instead of these at the chosen weights: a gain that they have too does not count; 0 tries none",
    )
    race: bool = Field(
        False, description="stop weak candidates early: successive halving over the dev rows, with paired tests"
    )
    workers: Annotated[Positive, Role.SCHEDULING, Panel.PROCESSES] = Field(
        1, description="processes on this machine that share the trials, each with the base model"
    )
    report: Annotated[bool, Role.UNRECORDED, Panel.RUN] = Field(
        False, description="write report.html, one page with pictures, and these as PNGs"
    )
    storage: Annotated[str | None, Role.SCHEDULING, Panel.PROCESSES] = Field(
        None,
        description="journal file, or URL (of a database, grpc://HOST:PORT of optuna's proxy, redis://) of the trials, "
        "which processes on other machines can share",
    )
    study: Annotated[str | None, Role.SCHEDULING, Panel.PROCESSES] = Field(
        None, description="name of the search in the storage; default the name of the output folder"
    )
    rank: Annotated[Positive | None, Panel.MERGE] = Field(
        None, description="recompress the merged adapter to this rank"
    )
    saved: Annotated[str, Panel.MERGE] = Field(
        "refuse",
        description="fully trained tensors (heads) that differ: refuse, or the name or number of the adapter whose "
        "tensors all candidates have",
    )
    compact: Annotated[bool, Role.AFTERWARDS, Panel.MERGE] = Field(False, description=COMPACT)
    allow_base_mismatch: Annotated[bool, Panel.MERGE] = Field(
        False, description="merge adapters that name different base models"
    )
    allow_tested: Annotated[bool, Role.SCHEDULING, Panel.DATA] = Field(False, description=ALLOW_TESTED)

    batch_size: Annotated[Positive | None, Role.UNRECORDED] = Field(
        None, description="rows per batch, of all candidates that share it; default: as many as fit the free memory"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_grid(cls, values: object) -> object:
        """Try averages and sums of the adapters where the request does not say what to try."""
        if not isinstance(values, dict) or any(values.get(name) for name in ("grid", "trials", *_SEARCHED)):
            return values
        if values.get("space") == "free" or not isinstance(values.get("adapters"), list | tuple):
            return values
        return {"space": "both", **values, "grid": list(DEFAULT_GRID)} if len(values["adapters"]) > 1 else values

    @model_validator(mode="after")
    def _check_search(self) -> SearchSettings:
        grid, bounds, groups = self.grid, self.bounds, self.groups
        free = self.space == "free"
        twice = sorted(set(self.options) & set(self.vary))
        faults = (
            (
                bool(grid) == (self.trials is not None),
                "search.grid-or-trials: give exactly one of --grid W,W,... and --trials N",
            ),
            (not all(map(isfinite, grid)), f"search.grid-finite: grid must hold finite numbers, got {grid}"),
            (len(set(grid)) != len(grid), f"search.grid-twice: grid must hold each weight once, got {grid}"),
            (
                bool(grid) and self.sampler != "auto",
                f"search.sampler: --sampler {self.sampler} is for --trials and has no effect on --grid: drop one",
            ),
            (
                len(bounds) != 2
                or not all(map(isfinite, bounds))
                or bounds[0] > bounds[1]
                or (bounds[0] == bounds[1] and not self.vary),
                "search.bounds: --bounds must be LOW,HIGH with LOW < HIGH, or LOW,LOW with --vary, got "
                f"{','.join(map(str, bounds))}",
            ),
            (
                not free and bounds != type(self).model_fields["bounds"].default,
                "search.bounds-space: --bounds are those of free weights: add --space free, or drop them",
            ),
            (
                len(self.adapters) == 1 and not free,
                "search.one-adapter: a single adapter has no weight to share with others: add --space free, or "
                "another adapter",
            ),
            (
                bool(grid) and bool(groups or self.curve),
                "search.grid-groups: --grid gives weights for the whole model: --groups and --curve need --trials N",
            ),
            (
                bool(self.curve and groups) and not groups[0].isdecimal(),
                "search.curve-groups: --curve goes over the layers: give it alone, or with a number of --groups",
            ),
            (
                self.space in ("sum", "both") and not grid,
                f"search.space: --space {self.space} is for a grid: add --grid W,W,..., or choose another space",
            ),
            (
                bool(self.candidates) and (not grid or self.method != "exact" or self.rank is not None),
                "candidates.grid: --candidates are compared with weights of a grid, merged exactly: add --grid, and "
                "drop --method and --rank",
            ),
            (self.storage == "", "storage.empty: --storage must be a file, or the URL of a database, and is empty"),
            (
                bool(self.study) and not self.storage,
                "study.no-storage: --study names a search in a storage: add --storage",
            ),
            (
                bool(twice),
                f"vary.also-set: {', '.join(twice)} must be fixed (--set) or searched (--vary), not both: drop one",
            ),
        )
        refuse(*self._faults_of_agreement(), *faults)
        return self

    @model_validator(mode="after")
    def _check_saved(self) -> SearchSettings:
        fault = "the candidates of a search share one head: give the name or number of an adapter with --saved"
        refuse((self.saved == "average", f"search.saved: {fault}"))
        return self

    def _faults_of_agreement(self) -> tuple[tuple[bool, str], ...]:
        agreement = self.objective == "agreement"
        return (
            (
                agreement and not self.pairs,
                "agreement.no-pairs: --objective agreement compares answers to translations: add --pairs FILE",
            ),
            (
                bool(self.pairs) and not agreement,
                "agreement.pairs-only: --pairs are for --objective agreement: add it, or drop them",
            ),
            (
                not agreement and not self.dev,
                "search.no-dev: candidates are scored on dev rows: add --dev FILE, or --objective agreement --pairs "
                "FILE (no labels)",
            ),
            (
                bool(self.pair_rows) and not self.pairs,
                "agreement.pair-rows: --pair-rows chooses rows of --pairs: add them, or drop it",
            ),
            (
                bool(self.rows) and not self.dev,
                "search.rows: --rows chooses rows of --dev: add them, or take --pair-rows",
            ),
            (
                agreement and self.race and bool(self.dev),
                "agreement.race-dev: --race would not ask stopped candidates --dev: drop one",
            ),
        )
