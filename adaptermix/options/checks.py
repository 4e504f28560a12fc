"""What settings must hold together, beyond what each field says of itself."""

from __future__ import annotations

import os
import re
from math import isfinite
from operator import ge, gt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from . import (
        AlignOptions,
        BakeSettings,
        CompareSettings,
        FusionSettings,
        JointSettings,
        RetrieveSettings,
        SearchSettings,
        Settings,
        TaskOptions,
        TrainingSettings,
    )

    Vectors = TypeVar("Vectors", AlignOptions, RetrieveSettings)

MOVING = ("pissa", "olora")
"""Ways to begin a LoRA that move a part of the base's weights into it."""
ROWS = re.compile(r"(?P<start>\d{0,18}):(?P<stop>\d{0,18})(?::(?:0{0,18}(?P<step>[1-9]\d{0,17}))?)?")
"""`START:STOP` or `START:STOP:STEP`, each of which may be missing."""
_HOME = re.compile(r"((?:[^/=]*=)?)((?:~[\w.-]*|\$HOME)(?=/|$))?(.*)", re.DOTALL)
"""The name before `=` if there is one, the home folder, and the rest."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_BLOCKS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")


def text(value: str, *, kind: Literal["text", "read", "written"]) -> str:
    """Return a text of the settings; in a path that begins with `~` or `$HOME` these are the home folder.

    Raises:
        ValueError: no file name can hold it, or another variable of the shell stands where nothing replaces it.
    """
    try:
        if b"\0" in os.fsencode(value):
            raise ValueError("must not hold a NUL character")
    except UnicodeEncodeError as error:
        raise ValueError(f"must be text, and holds a lone surrogate ({error.object[error.start]!a})") from error
    if kind == "text":
        return value
    found = _HOME.fullmatch(value)
    if found and found[2]:
        value = f"{found[1]}{os.path.expanduser(found[2].replace('$HOME', '~'))}{found[3]}"
    if kind == "written" and re.match(r"\$\w", value):
        raise ValueError("must be a path, and variables of the shell other than $HOME are not replaced here")
    return value


def _block_text(value: Any) -> Any:
    """Return `FIRST-LAST` for a range of blocks, or for one number, as text or as YAML reads it."""
    found = _BLOCKS.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if value is not None and (found is None or int(found[2] or found[1]) < int(found[1])):
        raise ValueError("FIRST-LAST is needed, such as 0-15, or one number")
    return None if found is None else f"{int(found[1])}-{int(found[2] or found[1])}"


def _rows_text(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and ROWS.fullmatch(value)):
        raise ValueError("START:STOP is needed, or with :STEP, in whole numbers, such as 0:300, 500: or ::10")
    return value


def _device_text(value: Any) -> Any:
    if not (isinstance(value, str) and _DEVICE.fullmatch(value)):
        raise ValueError("auto, cpu, cuda or cuda:N is needed")
    return value


Blocks = Annotated[str, BeforeValidator(_block_text)]
Rows = Annotated[str, BeforeValidator(_rows_text)]
Device = Annotated[str, BeforeValidator(_device_text)]


def block_range(text: str) -> range:
    """Return the numbers of the blocks of `FIRST-LAST`, both included."""
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


def beyond_the_layer(blocks: str | None, layer: int, *, whole: bool) -> str | None:
    """Return what is wrong with adapted blocks for a loss at a layer, or None.

    Args:
        blocks: The adapted blocks, as `FIRST-LAST`.
        layer: Number of blocks that the loss runs.
        whole: Other losses run all blocks; then it is enough that some adapted block is run.
    """
    chosen = range(0) if blocks is None else block_range(blocks)
    runs = f"--layer {layer} runs blocks 0-{layer - 1}"
    if whole and chosen and chosen.start >= layer:
        return f"--blocks must begin below the aligned layer: {runs} only, and --blocks is {blocks}"
    if not whole and chosen.stop > layer:
        return f"--blocks must end below the aligned layer: {runs} only, and --blocks is {blocks}"
    return None


def sound_training(settings: TrainingSettings) -> TrainingSettings:
    """Refuse what does not go together in any training."""
    if settings.norm_budget is not None and settings.dora:
        raise ValueError("--norm-budget bounds the low-rank update, and --dora changes the weights beyond it: drop one")
    if settings.on_top_of and settings.dora:
        raise ValueError("--dora scales what lies under it, so it cannot be merged with --on-top-of: drop one")
    if settings.start_from and settings.init != "kaiming":
        raise ValueError(f"--start-from begins with an adapter's own factors: drop --init {settings.init}")
    if settings.allow_base_mismatch and not settings.start_from:
        raise ValueError("--allow-base-mismatch is about the adapter of --start-from, and none is given: drop it")
    if settings.init == "orthogonal" and settings.rank % 2:
        raise ValueError(f"--init orthogonal needs an even rank, got {settings.rank}")
    if settings.init == "orthogonal" and settings.quantize != "none":
        raise ValueError("--init orthogonal needs plain weights: drop --quantize")
    if settings.init in MOVING:
        objective = getattr(settings, "objective", "contrastive")
        trains = getattr(settings, "fit", "gradient") == "gradient"
        own = {
            "quantize": settings.quantize != "none",
            "dora": settings.dora,
            "shard-base": settings.shard_base,
            "norm-budget": settings.norm_budget is not None,
            "keeper": getattr(settings, "keeper", 0) > 0,
            "standardize": getattr(settings, "standardize", "none") != "none",
            "anchor base": getattr(settings, "anchor", "pair") == "base",
            f"objective {objective}": trains and objective != "contrastive",
        }
        if clash := next((name for name, given in own.items() if given), None):
            raise ValueError(f"--init {settings.init} takes a part out of the base's weights, so drop --{clash}")
    measured = {name: getattr(settings, name) for name in ("dev", "dev_pairs") if hasattr(settings, name)}
    if not any(measured.values()) and (settings.patience or settings.evaluate_every):
        option = next(iter(measured)).replace("_", "-")
        raise ValueError(f"--patience and --evaluate-every need dev files, and none are given: add --{option} FILE")
    return settings


def sound_vectors(settings: Vectors) -> Vectors:
    """Refuse to take a token and to leave it out."""
    if settings.exclude_bos and settings.pooling == "bos":
        raise ValueError("--exclude-bos leaves out the token that --pooling bos takes: drop one")
    return settings


def sound_task(settings: TaskOptions) -> TaskOptions:
    """Refuse a prompt that nobody reads."""
    if settings.template and settings.head not in ("auto", "none"):
        raise ValueError(f"--head {settings.head} reads no prompt: drop --template")
    return settings


def sound_joint(settings: JointSettings) -> JointSettings:
    """Refuse a choice by a loss that is not measured, or of nothing."""
    if settings.select != "task" and not settings.dev_pairs:
        raise ValueError(f"--select {settings.select} needs dev pairs, and none are given: add --dev-pairs FILE")
    if settings.select != "align" and settings.patience and not settings.dev:
        raise ValueError(
            f"--select {settings.select} needs dev files of the task, and none are given: add --dev FILE, or --select "
            "align"
        )
    if settings.select != "task" and not settings.patience:
        raise ValueError(
            f"--select {settings.select} chooses the dev loss that --patience looks at, and it is not given: add "
            "--patience N or drop --select"
        )
    if settings.discard and settings.alternate == "sum":
        raise ValueError("--alternate sum uses every row of both objectives: drop --discard")
    return settings


def sound_compare(settings: CompareSettings) -> CompareSettings:
    """Refuse a gap without two ends."""
    if settings.ceiling and (not settings.baseline or settings.baseline == settings.ceiling):
        raise ValueError("--ceiling needs another system as --baseline: the gap is from that one to the ceiling")
    return settings


def no_numbers(files: list[str]) -> list[str]:
    """Refuse numbers where files or folders are wanted: `--weights 0.5 0.5` leaves the second one over."""
    for name in files:
        try:
            float(name)
        except ValueError:
            continue
        if not Path(name).exists():
            raise ValueError(
                f"{name!r} is neither a file nor a folder; the numbers of one option are separated by commas, "
                "such as --weights 0.5,0.5"
            )
    return files


def _number(value: Any) -> Any:
    """Return a whole number that is written as text; anything else as it is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def rank_or_auto(value: Any) -> Any:
    """Return a rank as a number, also from text; `auto` and None as they are."""
    number = _number(value)
    if value in (None, "auto") or (type(number) is int and number >= 1):
        return number
    raise ValueError("a whole number of at least 1, or auto, is needed")


def layer_or_name(value: Any) -> Any:
    """Return a layer as a number, also from text; `middle` and `last` as they are."""
    number = _number(value)
    if value in ("middle", "last") or type(number) is int:
        return number
    raise ValueError("a whole number, middle or last is needed")


def sound_search(settings: SearchSettings) -> SearchSettings:
    """Refuse searches without an end, options that contradict each other, and those that would do nothing."""
    grid, bounds, groups = settings.grid, settings.bounds, settings.groups
    free = settings.space == "free"
    twice = sorted(set(settings.options) & set(settings.vary))
    faults = (
        (bool(grid) == (settings.trials is not None), "what to try must be told once: --grid W,W,... or --trials N"),
        (not all(map(isfinite, grid)), f"grid must hold finite numbers, got {grid}"),
        (len(set(grid)) != len(grid), f"grid must hold each weight once, got {grid}"),
        (
            bool(grid) and settings.sampler != "auto",
            f"--sampler {settings.sampler} proposes --trials, and a grid is given: drop one",
        ),
        (
            len(bounds) != 2 or not all(map(isfinite, bounds)) or (gt if settings.vary else ge)(*bounds),
            f"--bounds must be LOW,HIGH with LOW < HIGH, or LOW,LOW with --vary, got {','.join(map(str, bounds))}",
        ),
        (
            not free and bounds != type(settings).model_fields["bounds"].default,
            "--bounds are those of free weights: add --space free, or drop them",
        ),
        (
            len(settings.adapters) == 1 and not free,
            "a single adapter has no weight to share with others: add --space free, or another adapter",
        ),
        (
            bool(grid) and bool(groups or settings.curve),
            "--grid gives weights for the whole model: --groups and --curve need --trials N",
        ),
        (
            bool(settings.curve and groups) and not groups[0].isdecimal(),
            "--curve goes over the layers: give it alone, or with a number of --groups",
        ),
        (
            settings.space in ("sum", "both") and not grid,
            f"--space {settings.space} is for a grid: add --grid W,W,..., or choose another space",
        ),
        (
            bool(settings.candidates) and (not grid or settings.method != "exact" or settings.rank is not None),
            "--candidates stand beside weights of a grid, merged exactly: add --grid, and drop --method and --rank",
        ),
        (settings.storage == "", "--storage must be a file, or the URL of a database, and is empty"),
        (bool(settings.study) and not settings.storage, "--study names a search in a storage: add --storage"),
        (bool(twice), f"{', '.join(twice)} must be fixed (--set) or searched (--vary), and both are asked: drop one"),
    )
    for is_faulty, message in (*_faults_of_agreement(settings), *faults):
        if is_faulty:
            raise ValueError(message)
    return settings


def _faults_of_agreement(settings: SearchSettings) -> tuple[tuple[bool, str], ...]:
    agreement = settings.objective == "agreement"
    return (
        (agreement and not settings.pairs, "--objective agreement compares answers to translations: add --pairs FILE"),
        (bool(settings.pairs) and not agreement, "--pairs are for --objective agreement: add it, or drop them"),
        (
            not agreement and not settings.dev,
            "candidates are scored on dev rows: add --dev FILE, or --objective agreement --pairs FILE (no labels)",
        ),
        (bool(settings.pair_rows) and not settings.pairs, "--pair-rows chooses rows of --pairs: add them, or drop it"),
        (bool(settings.rows) and not settings.dev, "--rows chooses rows of --dev: add them, or take --pair-rows"),
        (agreement and settings.race and bool(settings.dev), "--race would not ask stopped candidates --dev: drop one"),
    )


def changed(settings: Settings, names: Iterable[str]) -> list[str]:
    """Return which of these settings do not have their default value, in the order of the names."""
    fields = type(settings).model_fields
    return [name for name in names if getattr(settings, name) != fields[name].default]


_OF_BOTTLENECK = (
    *("alignment", "source_norm", "source_offset", "source_pads", "source_dropout"),
    *("source_encoder", "source_tag"),
)


def sound_fusion(settings: FusionSettings) -> FusionSettings:
    """Refuse what a fusion cannot have, and rows without sources."""
    read = bool(settings.source_encoder)  # it can read the rows themselves
    whole = settings.fusion in ("input", "x-mixup")
    moved = changed(settings, _OF_BOTTLENECK)
    faults = (
        (
            not settings.source and not read,
            "rows need sources: give --source, or --source-encoder for an encoder that reads the rows themselves",
        ),
        (
            bool(settings.dev_source) != bool(settings.dev and settings.source),
            "dev rows need sources as training rows do: give --dev and --dev-source together",
        ),
        (
            settings.shard_base,
            "--shard-base wants every process to read as often, and those that fuse read sources as they come: drop it",
        ),
        (
            read and not (settings.source_norm and settings.source_offset == 0 and not settings.source_dropout),
            "--source-norm, --source-offset and --source-dropout are about the base's own states: drop them, or "
            "--source-encoder",
        ),
        (
            settings.fusion.startswith("cross-attention") and settings.alignment != "position",
            f"--fusion {settings.fusion} looks at all of the source, so --alignment means nothing to it: drop it",
        ),
        (bool(settings.source_tag) and not read, "--source-tag is about --source-encoder: leave it out"),
        (
            whole and bool(moved),
            f"--fusion {settings.fusion} knows no --{(moved or [''])[0].replace('_', '-')}: drop it",
        ),
        (settings.mixup_layer != "middle" and settings.fusion != "x-mixup", "--mixup-layer is about --fusion x-mixup"),
        (
            settings.gradient_checkpointing and settings.fusion == "x-mixup",
            "--gradient-checkpointing does not go with --fusion x-mixup: leave it out",
        ),
        (settings.dora, "--dora changes weights, and a fusion is none: leave one out"),
        (settings.compile, "--compile does not go with a fusion: leave it out"),
        (
            bool(settings.on_top_of or settings.start_from),
            "a fusion begins anew: leave --on-top-of and --start-from out, and bake an earlier stage into the base "
            "(bake --without-heads)",
        ),
        (settings.norm_budget is not None, "--norm-budget is about changes of weights, and a fusion is none"),
        (settings.init not in ("kaiming", "gaussian"), "--init must be kaiming or gaussian for a fusion"),
        (settings.lora_plus != 1, "--lora-plus does not go with a fusion: leave it out"),
    )
    for is_fault, message in faults:
        if is_fault:
            raise ValueError(message)
    return settings


def sound_bake(settings: BakeSettings) -> BakeSettings:
    """Refuse strategies of quantised bases without a format, and those that choose by inputs without any texts."""
    chooses = settings.quantize != "none" and settings.strategy in ("auto", "calibrated", "residual")
    faults = (
        (
            settings.quantize == "none" and settings.strategy not in ("auto", "merge-16", "keep"),
            f"--strategy {settings.strategy} is about a quantised base: add --quantize nf4, or drop it",
        ),
        (
            settings.strategy == "keep" and bool(settings.task or settings.calibration),
            "--strategy keep loses nothing, so there is nothing to score or to measure: leave --task and --calibration "
            "out",
        ),
        (
            bool(settings.task) != bool(settings.dev),
            "a dev score needs a task and its data: give --task and --dev together",
        ),
        (
            chooses and not settings.calibration,
            f"--strategy {settings.strategy} chooses codes for the inputs that occur: give texts with --calibration",
        ),
    )
    for is_fault, message in faults:
        if is_fault:
            raise ValueError(message)
    return settings
