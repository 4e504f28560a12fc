"""Settings of merging, extracting and searching."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from . import checks
from .base import ALLOW_TESTED, TASK, Files, GenerationSettings, Positive, Scored, Settings, Written
from .roles import DEV, TRAINING, Reads

COMPACT = "keep each module's own rank (rank_pattern); default: one rank for all, which every program reads rightly"


class PlaceSettings(Settings):
    """Weights or method options that hold at some modules only."""

    modules: str = Field("*", description="glob over module paths")
    layers: int | str | None = Field(None, description="FIRST-LAST, both included, or one number, or all")
    weights: float | str | list[float] | None = Field(None, description="weights there")
    curve: list[float | str | list[float]] | None = Field(
        None, description="weights along the layers: evenly spaced points, interpolated"
    )
    options: dict[str, Any] = Field({}, description="options of the method there")


class MergeSettings(Written):
    """Merge adapters; no base model is loaded, but by methods that learn their weights."""

    adapters: Files = Field(description="adapter folders, or checkpoint folders with --base")
    weights: list[float] = Field(min_length=1, description="one per adapter; a single w for two means w and 1 - w")
    method: str = Field("exact", description="merge method; `adaptermix methods` lists them")
    options: dict[str, Any] = Field(
        {}, description="options of the method; at a place: KEY@GLOB=VALUE or KEY@layers:0-15=VALUE, KEY also weights"
    )
    places: list[PlaceSettings] = Field([], description="weights and options at some modules (recipes; else --set)")
    fill: Literal["weight", "one"] = Field(
        "weight", description="what an adapter weighs where it alone acts: its weight, or one"
    )
    form: Literal["concat", "lowrank", "dense"] | None = Field(
        None, description="form of the result: factors side by side, recompressed, or full matrices"
    )
    rank: Positive | Literal["auto"] | None = Field(
        None, description="recompress to this rank; auto finds the least that keeps --keep; default keeps everything"
    )
    keep: float = Field(0.999, gt=0, le=1, description="share of each module's squared norm that --rank auto keeps")
    max_residual: float = Field(
        0.1, ge=0, le=1, description="refuse if truncation and rounding lose more than this share of the delta's norm"
    )
    compact: bool = Field(False, description=COMPACT)
    base: str | None = Field(
        None,
        description="base model, where deltas depend on it (DoRA, PiSSA), weights are learned on it (fuse), or the "
        "result is to be a full checkpoint",
    )
    saved: str = Field(
        "refuse",
        description="fully trained tensors (heads) that differ: refuse, average, or an adapter's name or number",
    )
    statistics: list[str] = Field(
        [], description="for fisher and regmean: one file of `adaptermix statistics` per adapter, in their order"
    )
    allow_pickle: bool = Field(False, description="read adapter_model.bin too (weights only, no code)")
    allow_base_mismatch: bool = Field(False, description="merge adapters that name different base models")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="storage dtype of the result; default float32, or the base's for a checkpoint"
    )
    device: checks.Device = Field("auto", description="where to compute: auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of random methods, and of the rows that weights learn from")
    task: str | None = Field(None, description="of methods that learn their weights (fuse): the task")
    objective: Literal["task", "agreement", "entropy"] = Field(
        "task",
        description="of methods that learn: the task's loss on --train; or without labels, agreement of the answers to "
        "both sides of --pairs with the first adapter's to the second side, or the entropy of answers to --texts",
    )
    train: Annotated[list[str], Reads(TRAINING, rows="rows")] = Field(
        [], description="of methods that learn: the task's rows to learn from; entropy does not look at their labels"
    )
    pairs: Annotated[list[str], Reads(TRAINING, "pairs", rows="rows")] = Field(
        [], description="for agreement: parallel pair files such as de-en.tsv, the task adapter's language second"
    )
    texts: Annotated[list[str], Reads(TRAINING, "texts")] = Field(
        [],
        description="for entropy: texts in the wanted languages, one a line; for regmean-plus: a file per adapter",
    )
    dev: Annotated[list[str], Reads(DEV)] = Field(
        [], description="of methods that learn: rows whose loss says when the weights are best"
    )
    dev_pairs: Annotated[list[str], Reads(DEV, "pairs")] = Field(
        [], description="the same without labels: pairs whose agreement says when the weights are best"
    )
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each file to learn from")
    allow_tested: bool = Field(False, description=ALLOW_TESTED)


class ExtractSettings(Written):
    """Turn the difference between two checkpoints into a LoRA: tuned less base, without loading either."""

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    tuned: str = Field(description="model tuned from it: folder or Hub id, with @REVISION if wanted")
    rank: Positive | Literal["auto"] = Field(description="rank of every module; auto finds the least that keeps --keep")
    keep: float = Field(0.99, gt=0, le=1, description="share of each module's squared norm that --rank auto keeps")
    modules: list[str] = Field(
        [], description="globs over module paths or kinds; default every matrix inside the blocks"
    )
    exact: bool = Field(False, description="take the exact SVD, not the verified randomised one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="storage dtype of the factors")
    compact: bool = Field(False, description=COMPACT)
    max_residual: float | None = Field(
        None, ge=0, le=1, description="refuse if more than this share of the difference's norm is lost"
    )
    device: checks.Device = Field("auto", description="where to decompose: auto, cpu, cuda or cuda:N")

    _sound_rank = field_validator("rank", mode="before")(checks.rank_or_auto)


class MethodsSettings(Settings):
    """List the merge methods with their options."""

    names: list[str] = Field([], description="methods to show; default all")


class SearchSettings(GenerationSettings, Scored, Written):
    """Find merge weights, and options of the merge method, on dev data or on pairs without labels."""

    adapters: Files = Field(
        description="adapter folders; the first is the task adapter, alone of which every candidate is held against"
    )
    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    task: str = Field(description=TASK)
    dev: Annotated[list[str], AfterValidator(checks.no_numbers), Reads(DEV, rows="rows")] = Field(
        [], description="dev files, one or more languages; with --objective agreement they are only reported"
    )
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each dev file to use")
    pairs: Annotated[list[str], AfterValidator(checks.no_numbers), Reads(DEV, "pairs", rows="pair_rows")] = Field(
        [], description="for --objective agreement: parallel pair files such as de-en.tsv, the task's language second"
    )
    pair_rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each pair file to use")
    grid: list[float] = Field(
        [], description="weights to try; of two adapters the second gets 1 - w, of more the last gets what is left"
    )
    trials: Positive | None = Field(None, description="candidates that a sampler tries, instead of a grid")
    sampler: Literal["auto", "random", "tpe", "cmaes", "gp"] = Field(
        "auto", description="what proposes candidates (optuna): gp for up to 8 numbers, else tpe"
    )
    space: Literal["simplex", "free", "sum", "both"] = Field(
        "simplex",
        description="weights that are not negative and sum to 1, or each within --bounds; of a grid also sum: the "
        "whole first adapter plus shares of the others, or both: averages and sums",
    )
    candidates: list[str] = Field(
        [],
        description="merges of these adapters that are candidates beside a grid, such as of merge --method fuse",
    )
    bounds: list[float] = Field([0.0, 1.5], description="least and largest free weight; 1,1 fixes all weights at 1")
    groups: list[str] = Field(
        [], description="places with weights of their own: a number of equal ranges of layers, or globs over modules"
    )
    curve: Annotated[int, Field(ge=2)] | None = Field(
        None, description="let weights change smoothly over the layers, by this many evenly spaced points"
    )
    method: str = Field("exact", description="merge method; `adaptermix methods` lists them")
    options: dict[str, Any] = Field({}, description="options of the method that are fixed")
    vary: dict[str, str] = Field({}, description="options of the method to search: KEY=LOW:HIGH[:log], or KEY=V,V")
    objective: Literal["mean", "worst-language", "agreement"] = Field(
        "mean",
        description="how a candidate is scored: mean or minimum of the scores of the languages on --dev; or, without "
        "labels, the agreement of its answers to both sides of --pairs with the first adapter's to the second side",
    )
    choose: Literal["best", "one-se"] = Field(
        "best",
        description="the candidate to take: the best, or of those less than a standard error below it the nearest to "
        "the task adapter alone",
    )
    control: int = Field(
        1,
        ge=0,
        description="where a gain is found, try so many random adapters of the ranks and norms of all but the first, "
        "in their place at the chosen weights: a gain that these have too does not count; 0 tries none",
    )
    race: bool = Field(
        False, description="stop weak candidates early: successive halving over the dev rows, with paired tests"
    )
    workers: Positive = Field(
        1, description="processes on this machine that share the trials, each with the base model"
    )
    report: bool = Field(False, description="write report.html, one page with pictures, and these as PNGs")
    storage: str | None = Field(
        None, description="journal file or database URL of the trials, which processes on other machines can share"
    )
    study: str | None = Field(None, description="name of the search in the storage; default that of the output folder")
    rank: Positive | None = Field(None, description="recompress the merged adapter to this rank")
    compact: bool = Field(False, description=COMPACT)
    allow_base_mismatch: bool = Field(False, description="merge adapters that name different base models")
    allow_tested: bool = Field(False, description=ALLOW_TESTED)

    batch_size: Positive | None = Field(
        None, description="rows per batch, of all candidates that share it; default: as many as fit the free memory"
    )

    _sound_search = model_validator(mode="after")(checks.sound_search)
