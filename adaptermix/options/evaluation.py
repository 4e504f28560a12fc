"""Settings of what measures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import checks
from .base import TASK, Files, GenerationSettings, Placed, Positive, Scored
from .roles import SCORED, SPLIT, Reads

Split = Literal["dev", "test"] | None
SPLIT_HELP = (
    "what the data are for; test rows are recorded, so that no later command chooses or trains on them, and must not "
    "be rows that an adapter or the base here was trained or chosen on; default: neither, and nothing is recorded"
)


class EvaluateSettings(GenerationSettings, Scored):
    """Score a base model, with an adapter or without, per language."""

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    adapter: str | None = Field(None, description="adapter folder; none scores the base model alone")
    task: str = Field(description=TASK)
    data: Annotated[Files, Reads(SPLIT, rows="rows")] = Field(description="data files, one or more languages")
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each file to use")
    source: Annotated[list[str], Reads(SPLIT, rows="rows")] = Field(
        [], description="the rows in the source language of a fused adapter (train-fusion): row i beside row i"
    )
    source_encoder: str | None = Field(
        None, description="where the encoder lies now from which an adapter was trained to take its sources"
    )
    source_alignment: Literal["position", "end", "row-end", "last", "index"] | None = Field(
        None, description="put sources beside texts otherwise than in training; last is how the release generates"
    )
    split: Split = Field(None, description=SPLIT_HELP)
    against: str | None = Field(
        None, description="adapter folder, or 'base', to compare with on the same rows (paired bootstrap)"
    )
    predictions: str | None = Field(None, description="file for the answers, row by row, as JSONL; `compare` reads it")
    overwrite: bool = Field(False, description="replace an existing file of answers")


class CompareSettings(Scored):
    """Put systems side by side, each with one run per seed: scores, differences, share of a gap that is closed."""

    systems: Files = Field(description="NAME=FILE of `evaluate --predictions`; several files of a name are its runs")
    task: str = Field(description=TASK)
    data: Annotated[Files, Reads(SCORED, rows="rows")] = Field(description="data files, as given to `evaluate`")
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], as given to `evaluate`")
    baseline: str | None = Field(None, description="name of the system that the others are held against")
    ceiling: str | None = Field(None, description="name of the system whose gain over the baseline is the gap")
    supervised: list[str] = Field([], description="languages of the task's training rows")
    aligned: list[str] = Field([], description="languages of the alignment pairs")
    markdown: str | None = Field(None, description="file for the table in Markdown")
    document: str | None = Field(None, description="file for the JSON document, for --beside of another data set's")
    beside: list[str] = Field(
        [], description="NAME=FILE of --document: other data sets whose means stand beside these, with the mean of all"
    )
    name: str | None = Field(None, description="what this data set is called beside others; default the task")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the resampling")

    _sound_compare = model_validator(mode="after")(checks.sound_compare)


class RetrieveSettings(Placed):
    """Translation retrieval per layer and direction."""

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    adapter: str | None = Field(None, description="adapter folder; none measures the base model alone")
    data: Annotated[Files, Reads(SPLIT, "parallel", "rows")] = Field(
        description="pair files (de-en.tsv) or one text per language (de.txt en.txt)"
    )
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each file to use")
    batch_size: Positive = Field(64, description="sentences per batch")
    max_length: Positive = Field(256, description="longest sentence in tokens; longer ones are cut")
    pooling: Literal["auto", "mean", "bos"] = Field(
        "auto", description="sentence vector: mean over tokens, first token, or as the adapter's alignment was trained"
    )
    exclude_bos: bool = Field(False, description="leave the first special token out of the mean")
    standardize: Literal["auto", "none", "all", "languages"] = Field(
        "auto",
        description="compare z-scores of means of unit states, over all sentences or those of each language, or as the "
        "adapter's alignment was trained",
    )
    split: Split = Field(None, description=SPLIT_HELP)
    neighbours: Positive = Field(4, description="nearest neighbours that the margin looks at")
    compare: bool = Field(False, description="measure the base model without the adapter too")
    transfer: str | None = Field(None, description="`evaluate --json`: correlate with its transfer languages' scores")
    plot: str | None = Field(None, description="PNG file: heatmap over layers and directions, mean per layer")

    _sound_vectors = model_validator(mode="after")(checks.sound_vectors)
