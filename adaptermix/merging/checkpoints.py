"""Merge full checkpoints: apply the merge methods to their differences from the base, one tensor at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ..algebra import Dense, Stack, norm, sign_conflict
from ..checkpoints.adding import rounding_share
from ..checkpoints.reading import FLOATS, base_entry, check_shapes, check_whole, difference, input_entry, open_model
from ..checkpoints.writing import DTYPES, parse_size, write_checkpoint
from ..errors import ModelError, PlanError, code_of
from ..io.checkpoint_files import Checkpoint
from ..io.files import check_not_input, check_output, whole_folder
from ..io.json_types import JsonObject
from ..methods.base import LinearMethod, MergeMethod, build, check_depths, check_roles
from ..models.devices import pick_device
from ..models.location import unique_names
from ..options.paths import locks_out
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import write_documents
from .merge_options import check_arguments
from .overrides import depths_of, layer_of, stack_of
from .report import MergeReport, ModuleReport
from .weights import numbered, resolve_weights

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_SAMPLES = 256


def _embedding(model: Checkpoint, shape: tuple[int, ...]) -> str | None:
    """Return the name of the embedding that a head of this shape may be tied to."""
    names = [key for key, header in model.tensors.items() if key.endswith(_EMBEDDINGS) and header.shape == shape]
    return names[0] if len(names) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """One model that goes in.

    Args:
        checkpoint: Its files.
        keys: Tensor name in this model by name in the base. A tied head that is not stored maps to the embedding.
    """

    checkpoint: Checkpoint
    keys: Mapping[str, str]

    @staticmethod
    def open(reference: str | Path, base: Checkpoint) -> _Model:
        """Open a model and match its tensors with those of the base.

        Raises:
            ModelError: the two differ in the names or shapes of their tensors.
        """
        model = check_whole(open_model(reference))
        keys = {key: key for key in base.tensors if key in model.tensors}
        missing = sorted(set(base.tensors) - set(keys))
        extra = sorted(set(model.tensors) - set(base.tensors))
        if missing == [_HEAD]:
            embedding = _embedding(model, base.tensors[_HEAD].shape)
            if embedding is not None:
                keys[_HEAD], missing = embedding, []
        if extra == [_HEAD] and _is_tied(model):
            extra = []
        if missing or extra:
            sides = {"without": missing, "with": extra}
            parts = [f"{word} {', '.join(names[:3])}" for word, names in sides.items() if names]
            raise ModelError(
                f"{model.path} must hold the same tensors as the base {base.path}, and is {' and '.join(parts)} "
                f"({len(missing) + len(extra)} in all). Give models that were tuned from this base.",
                code="checkpoint.other-tensors",
            )
        check_shapes(base, model, list(keys.items()))
        return _Model(checkpoint=model, keys=keys)

    def load(self, key: str) -> Tensor:
        """Read a tensor by the base's name."""
        return self.checkpoint.load(self.keys[key])


def _is_tied(model: Checkpoint) -> bool:
    """Whether a model's head is a copy of its embedding."""
    name = _embedding(model, model.tensors[_HEAD].shape)
    return name is not None and torch.equal(model.load(name), model.load(_HEAD))


def _identity(model: _Model) -> str:
    """Return a hash of evenly spaced entries of every tensor: the same for the same values, however they are stored."""
    digest = hashlib.sha256()
    for key in sorted(model.keys):
        flat = model.load(key).reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)].double().contiguous()
        digest.update(f"{key}:{len(flat)}:".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _identities(models: Sequence[_Model], weights: Sequence[float], method: MergeMethod) -> tuple[str, ...]:
    """Return the keys of random draws, one per model; models with equal values are numbered by their weights."""
    if not method.is_random:
        return tuple(str(index) for index in range(len(models)))
    return numbered([_identity(model) for model in models], [(weight,) for weight in weights])


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as [out in]: vectors as one column, kernels flattened."""
    return tensor if tensor.ndim == 2 else tensor.reshape(len(tensor) if tensor.ndim else 1, -1)


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """A merge of checkpoints, planned from their headers."""

    base: Checkpoint
    models: tuple[_Model, ...]
    weights: tuple[float, ...]
    method: MergeMethod
    identities: tuple[str, ...]
    labels: tuple[str, ...]
    seed: int
    device: torch.device
    stored: torch.dtype | None = None

    @property
    def names(self) -> list[str]:
        """Tensors that are merged: all of a float dtype."""
        return [key for key, header in self.base.tensors.items() if header.dtype in FLOATS]

    @cached_property
    def depths(self) -> dict[str, int]:
        """Number of blocks of each stack."""
        return depths_of(self.names)

    def stack(self, key: str) -> Stack:
        """Return the deltas of one tensor; a delta of zero takes no memory.

        Models of weight 0 are left out, also from means.
        """
        base = self.base.load(key)
        acting = [index for index, weight in enumerate(self.weights) if weight != 0] or [0]
        differences = [difference(base, self.models[index].load(key)) for index in acting]
        zero = torch.zeros(1, 1, device=self.device).expand(_as_matrix(base).shape)
        deltas = [zero if delta is None else _as_matrix(delta).to(self.device) for delta in differences]
        return Stack(
            updates=tuple(Dense(w=delta) for delta in deltas),
            weights=tuple(self.weights[index] for index in acting),
            names=tuple(self.identities[index] for index in acting),
            module=key,
            seed=self.seed,
            tensor_shape=() if base.ndim == 2 else tuple(base.shape) or (1,),
            adapters=self.labels,
            indices=tuple(acting),
            block=layer_of(key),
            depth=self.depths.get(stack_of(key) or "", 0),
        )

    def fitted(self) -> MergeMethod:
        """Return the method, fitted to the whole model."""

        def stacks() -> Iterator[Stack]:
            for key in self.names:
                yield self.stack(key)

        return self.method.fit(stacks)

    def merge(self, key: str, method: MergeMethod) -> tuple[Tensor | None, ModuleReport]:
        """Merge one tensor.

        Raises:
            PlanError: the method refuses the deltas, or the result overflows.
        """
        stack = self.stack(key)
        if not any(bool(update.dense().any()) for update in stack.updates):
            return None, ModuleReport(rank=None, norm=0.0, residual=0.0, sign_conflict=0.0, weights=self.weights)
        try:
            update, cut = method.measured(stack)
            merged = update.dense()
        except ValueError as error:
            raise PlanError(
                f"method '{method.title}', tensor '{key}': {str(error).rstrip('.')}.",
                code=code_of(error, "method.failed"),
            ) from error
        length = norm(Dense(w=merged))
        if not math.isfinite(length):
            raise PlanError(
                f"tensor '{key}': the merged delta must be finite, and is not, with weights "
                f"{', '.join(f'{weight:g}' for weight in self.weights)}. Choose smaller weights, or check the models.",
                code="merge.overflow",
            )
        conflict = 0.0
        if len(stack.updates) > 1:
            conflict = sign_conflict(stack.updates, stack.weights)
        weights = method.multipliers(stack, self.weights) if isinstance(method, LinearMethod) else self.weights
        report = ModuleReport(rank=None, norm=length, residual=cut, sign_conflict=conflict, weights=weights)
        whole = merged.reshape(self.base.tensors[key].shape).cpu()
        base = self.base.load(key)
        share = rounding_share(base, whole, base.dtype if self.stored is None else self.stored, name=key)
        return whole, report.with_rounding(share)


def _check_buffers(merge: _Merge) -> None:
    """Refuse tensors of whole numbers that are not the same in all models."""
    floats = set(merge.names)
    for key in merge.base.tensors:
        if key in floats:
            continue
        expected = merge.base.load(key)
        for model in merge.models:
            if not torch.equal(expected, model.load(key)):
                raise ModelError(
                    f"'{key}' holds whole numbers, which must be the same in all models, and {model.checkpoint.path} "
                    f"has others than {merge.base.path}. Models that differ in them cannot be merged.",
                    code="checkpoint.whole-numbers",
                )


def _method(name: str, options: Mapping[str, object]) -> MergeMethod:
    method = build(name, options)
    if method.is_learned:
        raise PlanError(
            f"method '{name}' learns its weights on adapters, not on checkpoints. Use another method.",
            code="checkpoint.learned-method",
        )
    if method.statistics is not None:
        raise PlanError(
            f"method '{name}' needs statistics of each module, which checkpoints do not have. Use another method.",
            code="checkpoint.statistics",
        )
    return method


class CheckpointKeywords(TypedDict, total=False):
    """Further keyword arguments of `merge_checkpoints`.

    Args:
        dtype: Storage dtype; default that of each tensor of the base. Results are rounded once.
        shard_size: Size that no weight file exceeds, unless a single tensor does; default 5GB.
        device: `auto`, `cpu` (the default), `cuda` or `cuda:N`; where methods compute.
        overwrite: Replace an existing output folder.
        seed: Seed of random methods; default 0.
    """

    dtype: str | None
    shard_size: int | str
    device: str
    overwrite: bool
    seed: int


@locks_out
def merge_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    weights: Sequence[float],
    *,
    method: str = "task-arithmetic",
    options: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    watch: Watcher = SILENT,
    **more: Unpack[CheckpointKeywords],
) -> MergeReport:
    r"""Merge checkpoints tuned from one base: per tensor $W = W_0 + merge(W_1 - W_0, \dots, W_k - W_0)$.

    One tensor of each model is in memory at a time. Vectors are merged as [n 1], kernels as [out rest]; mergekit's
    methods get them in their original shape. Integer buffers must be the same in all models. Random draws
    are keyed by the values of a model and the name of the tensor, so they do not depend on shards or folder names.

    Args:
        base: Folder or Hub id of the base model; its config and tokenizer go with the result.
        models: Folders or Hub ids of the models tuned from it. A head that is tied to the embedding may be missing.
        weights: One per model; a single weight w for two models means w and 1 - w.
        method: Name of a merge method.
        options: Its hyper-parameters.
        out: Folder to write; None computes and reports only.
        watch: Receives progress.
        more: See `CheckpointKeywords`.

    Returns:
        The report: norm and sign conflict per tensor.

    Raises:
        ModelError: a model is missing or damaged, or has other tensors than the base.
        PlanError: a wrong count of weights, an unknown method or option, or one that refuses the deltas.
        OutputError: the output folder exists or cannot be written, or a sum overflows the storage dtype.
    """
    check_arguments(more, CheckpointKeywords)
    dtype, shard_size, seed = more.get("dtype"), more.get("shard_size", "5GB"), more.get("seed", 0)
    overwrite = more.get("overwrite", False)
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.", code="option.dtype")
    parse_size(shard_size)
    if not models:
        raise PlanError("at least one model is needed to merge, got none.", code="merge.no-model")
    if out is not None:
        check_not_input(Path(out), [base, *models])
        check_output(Path(out), overwrite=overwrite)
    built = _method(method, options or {})
    check_roles(built, len(models))
    origin = check_whole(open_model(base))
    opened = tuple(_Model.open(model, origin) for model in models)
    names = unique_names([model.checkpoint.name for model in opened])
    resolved = resolve_weights(names, weights)
    merge = _Merge(
        base=origin,
        models=opened,
        weights=resolved,
        method=built,
        identities=_identities(opened, resolved, built),
        labels=tuple(names),
        seed=seed,
        device=pick_device(more.get("device", "cpu")),
        stored=None if dtype is None else DTYPES[dtype],
    )
    check_depths(built, merge.depths)
    _check_buffers(merge)
    settings: JsonObject = {
        "method": method,
        "weights": list(merge.weights),
        "options": dict(options or {}),
        "form": "dense",
        "dtype": dtype,
        "shard_size": str(shard_size),
        "base": str(base),
        "seed": seed if built.is_random else None,
    }
    settings = {key: value for key, value in settings.items() if value not in (None, {})}
    folder = None if out is None else Path(out)
    if folder is None:
        return MergeReport(out=None, method=method, weights=merge.weights, modules=_dry(merge, watch), plan=settings)
    with whole_folder(folder, overwrite=overwrite) as target:
        modules = _write(merge, target, shard_size=shard_size, watch=watch)
        report = MergeReport(out=folder, method=method, weights=merge.weights, modules=modules, plan=settings)
        document = _document(merge, report, base, models, watch)
        write_documents(target, document, name=folder.name)
    return report


def _dry(merge: _Merge, watch: Watcher) -> dict[str, ModuleReport]:
    fitted = merge.fitted()
    reports = {}
    with watch.track("merge", len(merge.names)) as advance:
        for key in merge.names:
            reports[key] = merge.merge(key, fitted)[1]
            advance(1, key)
    return reports


def _write(merge: _Merge, target: Path, *, shard_size: int | str, watch: Watcher) -> dict[str, ModuleReport]:
    fitted = merge.fitted()
    reports: dict[str, ModuleReport] = {}

    def maker(key: str) -> Callable[[], Tensor | None]:
        def make() -> Tensor | None:
            delta, reports[key] = merge.merge(key, fitted)
            return delta

        return make

    deltas = {key: maker(key) for key in merge.names}
    write_checkpoint(merge.base, target, deltas, dtype=merge.stored, shard_size=shard_size, watch=watch)
    return {key: reports[key] for key in merge.names}


def _document(
    merge: _Merge, report: MergeReport, base: str | Path, models: Sequence[str | Path], watch: Watcher
) -> JsonObject:
    return manifest.manifest(
        "merge",
        artifact="checkpoint",
        plan=report.plan or {},
        base=base_entry(base, merge.base),
        inputs=[
            input_entry(reference, model.checkpoint, weight, watch=watch)
            for reference, model, weight in zip(models, merge.models, merge.weights, strict=True)
        ],
        fidelity=report.fidelity(),
        **manifest.inherit((), models=[merge.base.path, *(model.checkpoint.path for model in merge.models)]),
    )
