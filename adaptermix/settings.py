"""Settings of every command, once: recipes are validated by them, command-line options are made from them.

Importing this module costs no torch, so `adaptermix --help` stays fast. A field's description is its help text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from . import checks

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Layer = int | Literal["middle"]
Positive = Annotated[int, Field(ge=1)]
Files = Annotated[list[str], Field(min_length=1)]
TASK = "task: slots, classify, nli, translate, ner-json, qa or sft"


class Settings(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


class Place(TypedDict):
    """Where and how a base model is loaded."""

    device: str
    dtype: str
    quantize: str


class Placed(Settings):
    """Where and how to compute."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="dtype of the base model; auto is bfloat16 where the hardware has it")
    quantize: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="load the base model in 4 or 8 bits (bitsandbytes)"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")

    def place(self) -> Place:
        """Return what `load_base` must know of it."""
        return {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}


class Written(Settings):
    """What is written where."""

    out: str = Field(description="output folder; appears whole or not at all")
    overwrite: bool = Field(False, description="replace an existing adapter folder")
    dry_run: bool = Field(False, description="check everything and show the plan; write nothing")


class TrainingSettings(Placed, Written):
    """What all training commands share. Defaults are those of the mid-align paper where it states them."""

    model_config = ConfigDict(allow_inf_nan=False)

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    resume: bool = Field(False, description="go on with an interrupted run")
    on_top_of: str | None = Field(
        None, description="frozen adapter to train on top of; merge both with --weights 1,1 afterwards"
    )
    rank: Positive = Field(8, description="rank of the LoRA")
    alpha: float = Field(16.0, gt=0, description="alpha of the LoRA; its scale is alpha/rank")
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank) instead (rsLoRA)")
    dora: bool = Field(False, description="learn the length of every row of the weights too (DoRA)")
    lora_plus: float = Field(
        1.0, gt=0, description="learning rate of B in multiples of that of A (LoRA+; its authors take 16)"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the LoRA")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["all-linear"], description="names of the modules to adapt"
    )
    blocks: checks.Blocks | None = Field(
        None, description="FIRST-LAST, the blocks to adapt, both included, counted from 0; default all that are run"
    )
    norm_budget: float | None = Field(
        None, gt=0, description="most that each module's update may weigh, as a share of its weight's Frobenius norm"
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    schedule: Literal["inverse_sqrt", "linear", "cosine", "constant"] = Field(
        "inverse_sqrt", description="how the learning rate falls"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: Positive = Field(32, description="rows per step and per accumulation")
    accumulate: Positive = Field(1, description="batches per optimizer step")
    epochs: float = Field(5.0, gt=0, description="passes over the rows")
    steps: Positive | None = Field(None, description="optimizer steps; takes the place of --epochs")
    max_length: Positive = Field(256, description="longest text in tokens; longer ones are cut")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them: less memory, a third more time"
    )
    compile: bool = Field(
        False, description="compile the blocks (torch.compile): a slow first step, then faster; the last digits differ"
    )
    checkpoint_every: Positive = Field(25, description="optimizer steps between checkpoints")

    _sound_training = model_validator(mode="after")(checks.sound_training)


class AlignOptions(Settings):
    """The alignment objective."""

    pairs: Files = Field(description="parallel pair files, such as de-en.tsv")
    layer: Layer = Field("middle", description="number of blocks to run: middle (n/2) or 1 to n")
    temperature: float = Field(0.1, gt=0, description="temperature of the contrastive loss")
    symmetric: bool = Field(False, description="average both directions; published: source to target only")
    anchor: Literal["pair", "base"] = Field(
        "pair", description="targets' states: of the model in training, or of the frozen base (a fixed teacher)"
    )
    stop_gradient: bool = Field(False, description="train the source side only: no gradient through the targets")
    pooling: Literal["mean", "bos"] = Field("mean", description="sentence vector: mean over tokens, or the first token")
    mask_duplicates: bool = Field(False, description="do not count equal target sentences as negatives")
    exclude_bos: bool = Field(False, description="leave the first special token out of the mean")
    gather_negatives: bool = Field(
        True,
        description="where several processes share a batch: contrast a pair with those of all of them, as one process "
        "would; else with its own process's share",
    )
    balance: Literal["languages", "rows"] = Field(
        "languages", description="draw every language pair equally often, or every row"
    )
    keeper: float = Field(
        0.0, ge=0, description="weight of a term that keeps the targets' states (English) as the frozen base has them"
    )

    _sound_align = model_validator(mode="after")(checks.sound_align)


class TaskOptions(Settings):
    """The task objective."""

    task: str = Field(description=TASK)
    train: Files = Field(description="training files")
    dev: list[str] = Field([], description="dev files; their loss is logged")
    rows: str | None = Field(None, description="START:STOP, the rows of each training file to use")
    template: str | None = Field(
        None, description="prompt template, such as plain or mid-align; saved with the adapter"
    )
    head: Literal["auto", "none", "classes", "tokens", "span"] = Field(
        "auto",
        description="none: the answer is generated; a head, trained whole, gives it: classes (classify, nli), tokens: "
        "tags of words (slots, ner-json), span: a part of the text (qa); auto: the task's head on encoders",
    )
    group_by_length: bool = Field(False, description="batch rows of like length together, so that less is padding")
    evaluate_every: Positive | None = Field(
        None, description="optimizer steps between looks at the dev loss; default after each epoch"
    )
    patience: Positive | None = Field(
        None, description="stop after so many looks at the dev loss without a new best, and keep the best"
    )

    _sound_task = model_validator(mode="after")(checks.sound_task)


class AlignSettings(AlignOptions, TrainingSettings):
    """Train a stand-alone alignment LoRA: contrastive, at a middle layer."""

    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="pairs per step; the others are the negatives")
    rows: str | None = Field(None, description="START:STOP, the rows of each file to use")


class TaskSettings(TaskOptions, TrainingSettings):
    """Train a task LoRA."""


class JointSettings(TaskOptions, AlignOptions, TrainingSettings):
    """Train one LoRA for a task and for alignment, the two taking turns."""

    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="rows, and pairs, per batch")
    pair_rows: str | None = Field(None, description="START:STOP, the rows of each pair file to use")
    dev_pairs: list[str] = Field([], description="pair files whose loss is logged too")
    alternate: Literal["step", "batch", "sum"] = Field(
        "step",
        description="whose turn it is: another objective every optimizer step (paper), every batch (release), or "
        "both summed",
    )
    align_weight: float = Field(1.0, ge=0, description="weight of the alignment loss")
    discard: bool = Field(
        False, description="pass over the rows of the objective whose turn it is not, as the release does"
    )
    select: Literal["task", "align", "sum"] = Field(
        "task", description="dev loss that --patience looks at; the release takes the sum"
    )

    _sound_joint = model_validator(mode="after")(checks.sound_joint)


class GenerationSettings(Placed):
    """Greedy generation."""

    batch_size: Positive = Field(32, description="rows per batch")
    max_new_tokens: Positive = Field(64, description="most tokens to generate per row")


class EvaluateSettings(GenerationSettings):
    """Score a base model, with an adapter or without, per language."""

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    adapter: str | None = Field(None, description="adapter folder; none scores the base model alone")
    task: str = Field(description=TASK)
    data: Files = Field(description="data files, one or more languages")
    rows: str | None = Field(None, description="START:STOP, the rows of each file to use")
    template: str | None = Field(None, description="prompt template; default: the one the adapter was trained with")
    against: str | None = Field(
        None, description="adapter folder, or 'base', to compare with on the same rows (paired bootstrap)"
    )
    predictions: str | None = Field(None, description="file for the answers, row by row, as JSONL; `compare` reads it")


class CompareSettings(Settings):
    """Put systems side by side, each with one run per seed: scores, differences, share of a gap that is closed."""

    systems: Files = Field(description="NAME=FILE of `evaluate --predictions`; several files of a name are its runs")
    task: str = Field(description=TASK)
    data: Files = Field(description="data files, as given to `evaluate`")
    rows: str | None = Field(None, description="START:STOP, as given to `evaluate`")
    baseline: str | None = Field(None, description="name of the system that the others are held against")
    ceiling: str | None = Field(None, description="name of the system whose gain over the baseline is the gap")
    supervised: list[str] = Field([], description="languages of the task's training rows")
    aligned: list[str] = Field([], description="languages of the alignment pairs")
    markdown: str | None = Field(None, description="file for the table in Markdown")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the resampling")

    _sound_compare = model_validator(mode="after")(checks.sound_compare)


class RetrieveSettings(Placed):
    """Translation retrieval per layer and direction."""

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    adapter: str | None = Field(None, description="adapter folder; none measures the base model alone")
    data: Files = Field(description="pair files (de-en.tsv) or one text per language (de.txt en.txt)")
    rows: str | None = Field(None, description="START:STOP, the rows of each file to use")
    batch_size: Positive = Field(64, description="sentences per batch")
    max_length: Positive = Field(256, description="longest sentence in tokens; longer ones are cut")
    neighbours: Positive = Field(4, description="nearest neighbours that the margin looks at")
    compare: bool = Field(False, description="measure the base model without the adapter too")
    transfer: str | None = Field(None, description="`evaluate --json`: correlate with its transfer languages' scores")
    plot: str | None = Field(None, description="PNG file: heatmap over layers and directions, mean per layer")


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
    """Merge adapters; no base model is loaded."""

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
        0.1, ge=0, le=1, description="refuse if truncation loses more than this share of the delta's norm"
    )
    base: str | None = Field(
        None, description="base model, where deltas depend on it (DoRA, PiSSA) or the result is to be a full checkpoint"
    )
    saved: str = Field(
        "refuse",
        description="fully trained tensors (heads) that differ: refuse, average, or an adapter's name or number",
    )
    statistics: list[str] = Field(
        [], description="for fisher and regmean: one safetensors file per adapter, a tensor per module path"
    )
    allow_pickle: bool = Field(False, description="read adapter_model.bin too (weights only, no code)")
    allow_base_mismatch: bool = Field(False, description="merge adapters that name different base models")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="storage dtype of the result; default float32, or the base's for a checkpoint"
    )
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of random methods")


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
    max_residual: float | None = Field(
        None, ge=0, le=1, description="refuse if more than this share of the difference's norm is lost"
    )
    device: str = Field("auto", description="where to decompose: auto, cpu, cuda or cuda:N")

    _sound_rank = field_validator("rank", mode="before")(checks.rank_or_auto)


class MethodsSettings(Settings):
    """List the merge methods with their options."""

    names: list[str] = Field([], description="methods to show; default all")


class SearchSettings(GenerationSettings, Written):
    """Find the weight of a pair of adapters on dev data."""

    adapters: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        description="two adapter folders; the weight is that of the first"
    )
    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    task: str = Field(description=TASK)
    dev: Files = Field(description="dev files, one or more languages")
    rows: str | None = Field(None, description="START:STOP, the rows of each file to use")
    grid: Annotated[list[float], Field(min_length=1)] = Field(
        description="weights of the first adapter to try; the second gets 1 - w"
    )
    template: str | None = Field(None, description="prompt template; default: the task adapter's own")
    rank: Positive | None = Field(None, description="recompress the merged adapter to this rank")
    allow_base_mismatch: bool = Field(False, description="merge adapters that name different base models")

    _sound_search = model_validator(mode="after")(checks.sound_search)


class PushSettings(Settings):
    """Publish an output folder on the Hub."""

    folder: str = Field(description="output folder of adaptermix, or any PEFT adapter")
    repo: str = Field(description="repository, as owner/name")
    private: bool = Field(False, description="make the repository private")
    revision: str | None = Field(None, description="branch to push to")
    message: str = Field("Upload adapter", description="commit message")
    dry_run: bool = Field(False, description="write the card and list the files; no network")


class InspectSettings(Settings):
    """Look into adapters: norms, ranks and shares per layer and module; how every two of them interfere."""

    adapters: Files = Field(description="adapter folders")
    plot: str | None = Field(None, description="PNG file for heatmaps over layers and module kinds")


class SpectrumSettings(Settings):
    """Compare the singular values of two models per layer and module: how far each weight was scaled."""

    model_a: str = Field(description="the base: checkpoint or adapter, folder or Hub id, with @REVISION if wanted")
    model_b: str = Field(description="the other model, or an adapter of the base")
    layers: list[str] = Field([], description="blocks: numbers, ranges such as 8-11, or globs such as 'encoder.*'")
    modules: list[str] = Field([], description="globs over module paths or kinds; default all inside the blocks")
    include: list[str] = Field([], description="globs of modules to take besides, such as embeddings and heads")
    exclude: list[str] = Field([], description="globs of modules to leave out")
    csv: str | None = Field(None, description="file for a table with one row per module")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


class DemoInputsSettings(Settings):
    """Make what the demo needs: a small real base model and small parallel data."""

    out: str = Field(description="folder for the data files, and for a link to the base model")
    task_rows: Positive = Field(400, description="training rows per task language")
    dev_rows: Positive = Field(12, description="dev rows per language")
    test_rows: Positive = Field(40, description="test rows per language")
    pairs: Positive = Field(200, description="parallel pairs per alignment language")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the draw")


class DemoSettings(Placed):
    """Run the main job on a small real model: train both adapters, find the weight, score every language."""

    out: str = Field("demo-out", description="folder for everything the demo makes")
    base: str | None = Field(None, description="base model; default SmolLM2-135M-Instruct")
    data: str | None = Field(None, description="folder with xsid/ and tatoeba/; default the demo's own data")
    fresh: bool = Field(False, description="start again instead of going on with an earlier run")
