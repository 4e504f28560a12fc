r"""Adapters whose factors are not their whole delta, against the base weight they belong to.

PiSSA and OLoRA begin training from a part of the base weight, which PEFT takes out of the base each time it loads the
adapter; saved as they are, their delta is the product of the factors less that part. DoRA rescales each row of the
weight plus update to a trained length, so its delta needs the weight; a weighted sum of DoRAs is again a DoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..algebra import LowRank
from ..errors import ModelError, PlanError
from ..io.checkpoint_files import Checkpoint, loaded_names
from .keys import PREFIX, is_embedding
from .paths import same_text
from .source import AdapterSource

_ROWS = 1024


def find_weight(checkpoint: Checkpoint, module: str) -> str:
    """Return the name of a module's weight in a checkpoint.

    Args:
        checkpoint: The base model.
        module: Path of the module. The path or the name may have a prefix that the other lacks, as encoders are saved
            with and without one (`bert.`), as long as no numbered block is lost and only one weight fits. Names that
            transformers changes on loading, as of vision-language models, may be those of the file or of the model.

    Raises:
        ModelError: there is none, or there are several.
    """
    if f"{module}.weight" in checkpoint.tensors:
        return f"{module}.weight"
    pieces = module.split(".")
    found: list[str] = []
    for start in range(len(pieces)):
        if start and pieces[start - 1].isdigit():
            break
        tail = ".".join(pieces[start:]) + ".weight"
        found = [key for key in checkpoint.tensors if key == tail or (not start and key.endswith(f".{tail}"))]
        if found:
            break
    found = found or _renamed_on_loading(checkpoint, module)
    # A vision-language model's files may keep the names of another release than the class that is loaded.
    found = found or [key for key in checkpoint.tensors if same_text(key, f"{module}.weight")]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} weights end like it ({', '.join(found[:3])})" if found else "no weight ends like it"
    raise ModelError(
        f"the base model {checkpoint.path} must hold one weight for module '{module}', but {what}. "
        "Give the base model that the adapter was trained on, in whole precision and with its parts unfused."
    )


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether one of two tensors is the other, or the other rounded to its dtype."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def without_copies(source: AdapterSource, checkpoint: Checkpoint) -> AdapterSource:
    """Return an adapter without the whole tensors that are the base model's own.

    PEFT stores the tables of embeddings and output heads that it adapts, as they were.

    Args:
        source: The adapter.
        checkpoint: The base model.

    Raises:
        AdapterFormatError: a tensor holds NaN or infinity.
    """

    def is_copy(key: str) -> bool:
        module = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        if not key.endswith(".weight") or not is_embedding(module):
            return False
        try:
            name = find_weight(checkpoint, module)
        except ModelError:
            return False
        return _is_equal(source.load_saved(key), checkpoint.load(name))

    kept = {key: header for key, header in source.saved_headers.items() if not is_copy(key)}
    return replace(source, saved_headers=kept)


def _renamed_on_loading(checkpoint: Checkpoint, module: str) -> list[str]:
    """Return the name in the files of a weight that has another one in the model that transformers makes of them."""
    rename, names = loaded_names(checkpoint.path, tuple(checkpoint.tensors))
    wanted = f"{module}.weight"
    return [names[name] for name in (wanted, rename(wanted)) if name in names][:1]


def base_weight(
    checkpoint: Checkpoint, module: str, shape: tuple[int, int], *, fan_in_fan_out: bool = False
) -> Float[Tensor, "out in"]:
    """Read the weight of one linear module, in the dtype of the file.

    Args:
        checkpoint: The base model.
        module: Path of the module.
        shape: Shape [out in] of the module's update.
        fan_in_fan_out: Whether the base keeps its weights as [in out]; the result is [out in] all the same.

    Raises:
        ModelError: there is no such weight, it has another shape, is not of a float dtype, or is not finite.
    """
    key = find_weight(checkpoint, module)
    weight = checkpoint.load(key)
    weight = weight.T if fan_in_fan_out and weight.ndim == 2 else weight
    if not weight.is_floating_point() or weight.itemsize < 2 or tuple(weight.shape) != shape:
        raise ModelError(
            f"{checkpoint.path}: {key} must be a float matrix {list(shape)} like the update of '{module}', "
            f"found {weight.dtype} {list(weight.shape)}. Give the base model that the adapter was trained on."
        )
    if not torch.isfinite(weight).all():
        raise ModelError(f"{checkpoint.path}: {key} must be finite, and holds NaN or infinity. Fetch the model again.")
    return weight


def _less(update: LowRank, left: Tensor, right: Tensor) -> LowRank:
    """Return an update less a product of two factors, with both sides of the product balanced."""
    dtype = torch.promote_types(update.a.dtype, torch.float32)
    lengths = right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny).sqrt()
    left, right = left * lengths, right / lengths[:, None]
    return LowRank(
        b=torch.cat([update.b.to(dtype), -left.to(dtype)], dim=1),
        a=torch.cat([update.scale * update.a.to(dtype), right.to(dtype)]),
    )


def pissa_delta(update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
    r"""Return the delta of a PiSSA that was saved as it was trained, $\Delta = s B A - W_r$.

    $W_r$ is the best approximation of rank r of the base weight, which PEFT takes out of it at the start. It is found
    from the r largest eigenvectors of the smaller of $W W^T$ and $W^T W$, in float64.

    Args:
        update: The trained factors with their scale.
        weight: The base weight.

    Shapes: weight is [out in]; the result has rank 2r.

    Differs from PEFT: PEFT's SVD is in float32 and the rest is rounded to the base's dtype. Where the r-th and the next
    singular value are nearly equal, $W_r$ is ill-conditioned, there as here.

    Reference: Meng et al., PiSSA, NeurIPS 2024, arXiv 2404.02948, section 3.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        left = torch.linalg.eigh(w @ w.T).eigenvectors[:, -update.rank :]
        return _less(update, left, left.T @ w)
    right = torch.linalg.eigh(w.T @ w).eigenvectors[:, -update.rank :].T
    return _less(update, w @ right.T, right)


def olora_delta(update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
    r"""Return the delta of an OLoRA that was saved as it was trained, $\Delta = s (B A - Q_r R_r)$ with $W = Q R$.

    $Q_r$ spans the first r columns of the base weight, and $R_r = Q_r^T W$, whatever the signs of Q.

    Args:
        update: The trained factors with their scale.
        weight: The base weight.

    Shapes: weight is [out in]; the result has rank 2r.

    Reference: Büyükakyüz, OLoRA, 2024, arXiv 2406.01775, section 3.
    """
    w = weight.double()
    q, _ = torch.linalg.qr(w[:, : update.rank])
    return _less(update, update.scale * q, q.T @ w)


def load_delta(source: AdapterSource, module: str, checkpoint: Checkpoint | None) -> LowRank:
    """Read a module's whole delta, but for the row lengths of a DoRA.

    Args:
        source: The adapter.
        module: Path of the module.
        checkpoint: The base model, needed for PiSSA and OLoRA.

    Raises:
        AdapterFormatError: a factor holds NaN or infinity.
        ModelError: the base model does not fit.
        PlanError: the base model is needed and not given.
    """
    update, initial = source.load(module), source.meta.initial
    # PEFT takes nothing out of embeddings, and leaves convolutions to plain LoRA.
    if initial is None or source.modules[module].layout.kind != "linear":
        return update
    if checkpoint is None:
        raise PlanError(
            f"adapter '{source.name}' began from a part of the base weights (init_lora_weights={initial!r}), so its "
            "delta needs the base model, and none is given. Pass --base, or convert the adapter to a plain LoRA."
        )
    weight = base_weight(checkpoint, module, update.shape, fan_in_fan_out=source.meta.fan_in_fan_out)
    return {"pissa": pissa_delta, "olora": olora_delta}[initial](update, weight)


def _blocks(rows: int) -> Iterator[slice]:
    """Blocks of rows, so that no whole weight is copied to float64."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def dora_row_norms(weight: Float[Tensor, "out in"], update: LowRank) -> Float[Tensor, " out"]:
    r"""Return the length of each row of weight plus update, without forming the sum.

    $\|w + s b A\|^2 = \|w\|^2 + 2 s \langle w A^T, b \rangle + s^2 \langle b (A A^T), b \rangle$ per row, in float64.

    Args:
        weight: The base weight.
        update: The update.

    Shapes: weight is [out in]; the result is [out], in float64.

    Reference: Liu et al., DoRA, ICML 2024, arXiv 2402.09353, section 4.1 (their columns are rows of a [out in] weight).
    """
    a = update.a.double()
    gram = a @ a.T
    norms = []
    for rows in _blocks(weight.shape[0]):
        w, b = weight[rows].double(), update.scale * update.b[rows].double()
        squares = (w * w).sum(dim=1) + 2 * ((w @ a.T) * b).sum(dim=1) + ((b @ gram) * b).sum(dim=1)
        norms.append(squares.clamp_min(0).sqrt())
    return torch.cat(norms)


def _gains(weight: Tensor, update: LowRank, magnitude: Tensor) -> Tensor:
    """Return what DoRA multiplies each row of weight plus update with."""
    norms = dora_row_norms(weight, update)
    if (norms == 0).any():
        raise ValueError("each row of weight plus update must have a length for DoRA to rescale, and one is zero")
    return magnitude.double() / norms


def dora_delta(
    weight: Float[Tensor, "out in"], update: LowRank, magnitude: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    r"""Return the dense delta of a DoRA, $g (W + \Delta) - W$ with $g_j = m_j / \|W_j + \Delta_j\|$ per row.

    Args:
        weight: The base weight.
        update: The update.
        magnitude: The trained lengths.

    Shapes: weight is [out in], magnitude [out]; the result is [out in], in float32 or wider.

    Raises:
        ValueError: a row of weight plus update is zero.

    Reference: Liu et al., DoRA, ICML 2024, arXiv 2402.09353, section 4.1, equation 5.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, update.a.dtype), torch.float32)
    gains = _gains(weight, update, magnitude)
    a = update.a.double()
    dense = torch.empty(weight.shape, dtype=dtype)
    for rows in _blocks(weight.shape[0]):
        w, g = weight[rows].double(), gains[rows, None]
        # (g - 1) W + g D rather than g (W + D) - W, so that a gain near 1 loses no digits.
        dense[rows] = ((g - 1) * w + g * (update.scale * (update.b[rows].double() @ a))).to(dtype)
    return dense


def merge_dora(
    weight: Float[Tensor, "out in"],
    updates: Sequence[LowRank],
    magnitudes: Sequence[Float[Tensor, " out"] | None],
    weights: Sequence[float],
) -> tuple[LowRank, Float[Tensor, " out"]]:
    r"""Return the weighted sum of DoRAs as one DoRA, exactly.

    With gains $g_i = m_i / \|W + \Delta_i\|$ (1 for a plain LoRA), the sum of the deltas is
    $W + \sum_i w_i (g_i (W + \Delta_i) - W) = h (W + \Delta')$ with $h = 1 + \sum_i w_i (g_i - 1)$ and
    $\Delta' = \sum_i w_i (g_i / h) \Delta_i$, all per row; so its magnitude is $h \|W + \Delta'\|$.

    Args:
        weight: The base weight.
        updates: Update per adapter.
        magnitudes: Trained lengths per adapter, None for a plain LoRA.
        weights: Weight per adapter.

    Returns:
        The merged update, whose rank is the sum of the ranks, and its magnitude.

    Shapes: weight is [out in], magnitudes [out] each; the update is [out in], the magnitude [out].

    Raises:
        ValueError: a row of weight plus update is zero, or h is not positive somewhere, where no DoRA gives the sum.
    """
    gains = [
        None if magnitude is None else _gains(weight, update, magnitude)
        for update, magnitude in zip(updates, magnitudes, strict=True)
    ]
    height = torch.ones(weight.shape[0], dtype=torch.float64)
    for gain, share in zip(gains, weights, strict=True):
        height += 0 if gain is None else share * (gain - 1)
    if not (height > 0).all():
        raise ValueError(
            f"the merged rows must keep a positive share of the base, and the least is {float(height.min()):g}: "
            "the weights are too large or too negative for these DoRAs"
        )
    parts = []
    for update, gain, share in zip(updates, gains, weights, strict=True):
        rows = share * update.scale * ((1.0 if gain is None else gain) / height)
        parts.append(rows[:, None] * update.b.double())
    dtype = torch.float32
    for update in updates:
        dtype = torch.promote_types(dtype, update.a.dtype)
    merged = LowRank(b=torch.cat(parts, dim=1).to(dtype), a=torch.cat([update.a.to(dtype) for update in updates]))
    return merged, (height * dora_row_norms(weight, merged)).to(dtype)
