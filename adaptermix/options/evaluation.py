"""Options of the commands that measure."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..errors import InvalidValueError
from .base import BASE, TASK, GenerationSettings, Placed, ReadsRows, Scored, refuse
from .fields import Files, Positive, Rows, check_vectors
from .roles import ADAPTER, MODEL, OTHER, SCORED, SPLIT, Argument, Flag, Panel, Reads, Role, Writes

Split = Literal["dev", "test"] | None
SPLIT_HELP = (
    "split of the data; test rows are recorded, so that no later command chooses or trains on them, and must not "
    "be rows that an adapter or the base here was trained or chosen on; default: neither, and no rows are recorded"
)


class EvaluateSettings(ReadsRows, GenerationSettings, Scored):
    """Score a base model, with an adapter or without, per language."""

    panel = Panel.SCORES
    is_long: ClassVar[bool] = True

    base: Annotated[str, Reads(MODEL), Panel.MODEL] = Field(description=BASE)
    adapter: Annotated[str | None, Reads(ADAPTER), Role.COMMON, Panel.MODEL] = Field(
        None, description="adapter folder; none scores the base model alone"
    )
    task: Annotated[str, Panel.DATA] = Field(description=TASK)
    data: Annotated[Files, Reads(SPLIT, rows="rows"), Panel.DATA] = Field(
        description="data files, one or more languages"
    )
    rows: Annotated[Rows | None, Role.COMMON, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each file to use"
    )
    source: Annotated[list[str], Reads(SPLIT, rows="rows"), Panel.DATA] = Field(
        [], description="the rows in the source language of a fused adapter (train-fusion): row i belongs to row i"
    )
    source_encoder: Annotated[str | None, Reads(MODEL), Panel.MODEL] = Field(
        None, description="present path of the source encoder that the adapter was trained with"
    )
    source_alignment: Annotated[Literal["position", "end", "row-end", "last", "index"] | None, Panel.MODEL] = Field(
        None, description="align sources with texts in another way than in training; the release generates with last"
    )
    split: Annotated[Split, Role.COMMON, Panel.DATA] = Field(None, description=SPLIT_HELP)
    against: Annotated[str | None, Reads(ADAPTER), Role.COMMON] = Field(
        None, description="adapter folder, or 'base', to compare with on the same rows (paired bootstrap)"
    )
    predictions: Annotated[str | None, Writes("predictions", is_main=True), Role.COMMON] = Field(
        None, description="file for the answers, row by row, as JSONL; `compare` reads it"
    )
    overwrite: Annotated[bool, Role.HANDLING] = Field(False, description="replace an existing file of answers")
    server: Annotated[str | None, Role.COMMON, Panel.MODEL] = Field(
        None,
        description="URL of an inference server with the completions interface of OpenAI, such as vLLM or llama.cpp, "
        "that generates the answers; of the base model only tokenizer and configuration are read",
    )
    server_model: Annotated[str | None, Panel.MODEL] = Field(
        None, description="name of the adapter or model at the server; default that of the adapter's folder"
    )

    @model_validator(mode="after")
    def _check_server(self) -> EvaluateSettings:
        refuse(
            (
                self.server is not None and not self.server.startswith(("http://", "https://")),
                f"server.url: --server must start with http:// or https://, got {self.server!r}",
            ),
            (bool(self.server_model) and not self.server, "server.model-only: --server-model needs --server"),
            (
                bool(self.server and self.server_model and self.against),
                "server.against: --against compares two models of the server, so that --server-model cannot name one: "
                "drop it",
            ),
            (
                bool(self.server) and self.quantize != "none",
                "server.quantize: --quantize loads the model here, and --server does not: drop one",
            ),
        )
        return self


class PredictSettings(GenerationSettings):
    """Show the answers of adapters to texts of your own, side by side."""

    panel = Panel.SCORES
    is_long: ClassVar[bool] = True

    inputs: Annotated[list[str], Argument("TEXT...")] = Field(
        [],
        description="texts; for tasks with several fields a JSON object each, such as {"
        '"premise": ..., "hypothesis": ...}',
    )
    base: Annotated[str, Reads(MODEL), Panel.MODEL] = Field(description=BASE)
    adapter: Annotated[list[str], Reads(ADAPTER), Role.COMMON, Panel.MODEL] = Field(
        [], description="adapter folders, and 'base' for the base model alone; default the base model"
    )
    task: Annotated[str | None, Role.COMMON, Panel.DATA] = Field(
        None, description=f"{TASK}; default: the one that the first adapter was trained for"
    )
    language: Annotated[str, Role.COMMON, Panel.DATA] = Field(
        "en", description="language of the texts, for translate a pair such as de-en"
    )
    file: Annotated[str | None, Reads(OTHER), Role.COMMON, Panel.DATA] = Field(
        None, description="file with a text in each line"
    )

    @model_validator(mode="after")
    def _check_texts(self) -> PredictSettings:
        if bool(self.inputs) == bool(self.file):
            raise InvalidValueError("give either TEXT... or --file FILE", code="predict.texts")
        return self


class CompareSettings(ReadsRows, Scored):
    """Compare systems, each with one run per seed: scores, differences, share of a gap that is closed."""

    systems: Annotated[Files, Reads(OTHER), Argument("NAME=FILE...")] = Field(
        description="NAME=FILE of `evaluate --predictions`; several files of a name are its runs"
    )
    task: str = Field(description=TASK)
    data: Annotated[Files, Reads(SCORED, rows="rows")] = Field(description="data files, as given to `evaluate`")
    rows: Rows | None = Field(None, description="START:STOP[:STEP], as given to `evaluate`")
    baseline: str | None = Field(None, description="name of the system that the others are compared with")
    ceiling: str | None = Field(None, description="name of the system whose gain over the baseline is the gap")
    supervised: Annotated[list[str], Flag(metavar="LANG...")] = Field(
        [], description="languages of the task's training rows"
    )
    aligned: Annotated[list[str], Flag(metavar="LANG...")] = Field([], description="languages of the alignment pairs")
    markdown: Annotated[str | None, Writes("markdown")] = Field(None, description="file for the table in Markdown")
    document: Annotated[str | None, Writes("document")] = Field(
        None, description="file for the JSON document, for --beside of another data set's"
    )
    beside: Annotated[list[str], Reads(OTHER)] = Field(
        [], description="NAME=FILE of --document: other data sets whose means are shown too, with the mean of all"
    )
    name: str | None = Field(None, description="name of this data set among others; default the task")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the resampling")

    @model_validator(mode="after")
    def _check_compare(self) -> CompareSettings:
        if self.ceiling and (not self.baseline or self.baseline == self.ceiling):
            raise InvalidValueError(
                "--ceiling needs another system as --baseline: the gap is from that one to the ceiling",
                code="compare.ceiling",
            )
        return self


class RetrieveSettings(Placed):
    """Translation retrieval per layer and direction."""

    panel = Panel.RETRIEVAL
    is_long: ClassVar[bool] = True

    base: Annotated[str, Reads(MODEL), Panel.MODEL] = Field(description=BASE)
    adapter: Annotated[str | None, Reads(ADAPTER), Role.COMMON, Panel.MODEL] = Field(
        None, description="adapter folder; none measures the base model alone"
    )
    data: Annotated[Files, Reads(SPLIT, "parallel", "rows"), Panel.DATA] = Field(
        description="pair files (de-en.tsv) or one text per language (de.txt en.txt)"
    )
    rows: Annotated[Rows | None, Role.COMMON, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each file to use"
    )
    batch_size: Annotated[Positive, Panel.MODEL] = Field(64, description="sentences per batch")
    max_length: Annotated[Positive, Panel.DATA] = Field(
        256, description="longest sentence in tokens; longer ones are cut"
    )
    pooling: Literal["auto", "mean", "bos"] = Field(
        "auto", description="sentence vector: mean over tokens, first token, or as the adapter's alignment was trained"
    )
    exclude_bos: bool = Field(False, description="leave the first special token out of the mean")
    standardize: Literal["auto", "none", "all", "languages"] = Field(
        "auto",
        description="compare z-scores of means of unit states, over all sentences or those of each language, or as the "
        "adapter's alignment was trained",
    )
    split: Annotated[Split, Role.COMMON, Panel.DATA] = Field(None, description=SPLIT_HELP)
    to: Annotated[list[str], Flag(metavar="LANG..."), Role.COMMON, Panel.DATA] = Field(
        [], description="measure only the directions to these languages; default all"
    )
    groups: Annotated[list[str], Flag(metavar="NAME=LANG,LANG...")] = Field(
        [], description="groups of languages: the mean over the directions from or to them is shown for each"
    )
    candidates_from: Annotated[str | None, Reads(MODEL)] = Field(
        None, description="another model, or an adapter of the base, that embeds the candidates; default as the queries"
    )
    neighbours: Positive = Field(4, description="nearest neighbours that the margin looks at")
    compare: bool = Field(False, description="measure the base model without the adapter too")
    transfer: Annotated[str | None, Reads(OTHER)] = Field(
        None, description="`evaluate --json`: correlate with its transfer languages' scores"
    )
    plot: Annotated[str | None, Writes("plot")] = Field(
        None,
        description="PNG file: heatmap over layers and directions (above 60 directions over languages), mean per layer",
    )

    @model_validator(mode="after")
    def _check_vectors(self) -> RetrieveSettings:
        check_vectors(exclude_bos=self.exclude_bos, pooling=self.pooling)
        return self
