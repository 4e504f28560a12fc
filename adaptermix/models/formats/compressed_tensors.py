"""Four bits of compressed-tensors (W4A16, `pack-quantized`), which inference engines such as vLLM serve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ModelError
from ...io.checkpoint_files import Checkpoint, TensorHeader
from ...io.json_types import JsonObject
from ...io.safetensors_writer import DTYPE_NAMES
from .base import FORMATS, Format, Quantized
from .words import pack_words, unpack_words

GROUPS = (128, 64, 32)
"""Numbers of weights that may share a scale. A row is divided into groups of the first that divides its length."""
_LEAST, _MOST = -8, 7
_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"


def group_of(width: int) -> int | None:
    """Return the size of the groups in rows of this length; None if no size divides it."""
    return next((size for size in GROUPS if width % size == 0), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4(Quantized):
    """A weight in 4 bits, symmetric about 0: integers from -8 to 7 times the scale of their group.

    Args:
        codes: Steps above the least, 0 to 15.
        scales: As in `Quantized`; values of the dtype of the weight.
        group: Number of weights that share a scale; it divides the length of a row.
        form: Dtype of the weight in a forward pass, and of the stored scales.
    """

    group: int
    form: torch.dtype

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], group: int | None = None) -> Int4:
        """Round a weight to the nearest codes. The scale of a group is its largest magnitude divided by 7.5.

        Args:
            weight: The weight, of any float dtype.
            group: Number of weights that share a scale; None for the first of `GROUPS` that fits.

        Raises:
            ModelError: no group size divides the rows.
        """
        size = group or group_of(weight.shape[1])
        if size is None:
            raise ModelError(
                f"rows of a weight in int4 must be divisible by {GROUPS[-1]}, and have {weight.shape[1]} numbers. Use "
                "another format, or leave the layer in 16 bits.",
                code="quantized.int4-rows",
            )
        blocks = weight.float().reshape(-1, size)
        scales = (2 * blocks.abs().amax(1) / (_MOST - _LEAST)).to(weight.dtype)
        scales = torch.where(scales > 0, scales, torch.finfo(weight.dtype).eps).float()
        steps = (blocks / scales[:, None]).round().clamp(_LEAST, _MOST)
        codes = (steps - _LEAST).to(torch.uint8).view(weight.shape)
        return cls(codes=codes, scales=scales, group=size, form=weight.dtype)

    @property
    def table(self) -> Float[Tensor, " 16"]:
        """The values of the codes, from -8 to 7."""
        return torch.arange(_LEAST, _MOST + 1, dtype=torch.float32, device=self.codes.device)

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return self.group

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""
        return self.form

    def identity(self) -> JsonObject:
        return {"format": "int4"}

    def with_scales(self, scales: Tensor) -> Int4:
        """Return a weight of the same codes and these scales, rounded to the dtype of the weight."""
        return replace(self, scales=scales.to(self.form).float())

    def to(self, device: torch.device) -> Int4:
        """Return the weight on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def requantized(self, weight: Tensor) -> Int4:
        """Return another weight, rounded in the same format with the same groups.

        A group keeps its scale unless a new one gives less error. The largest magnitude is rarely 7.5 times the scale
        after rounding, so new scales would move all codes, even without a change of the weight.
        """
        new = self.of(weight.to(self.form), self.group)
        steps = (weight / self.scale_of_each()).round().clamp(_LEAST, _MOST)
        same = self.with_codes(steps - _LEAST)
        errors = [(one.weight() - weight).view(-1, self.group).square().sum(1) for one in (same, new)]
        keeps = errors[0] <= errors[1]
        keeps_each = keeps.repeat_interleave(self.group).view(weight.shape)
        codes, scales = torch.where(keeps_each, same.codes, new.codes), torch.where(keeps, self.scales, new.scales)
        return replace(new, codes=codes, scales=scales)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors from which compressed-tensors, and so transformers and vLLM, load the weight."""
        stem = name.removesuffix("weight")
        rows = len(self.codes)
        return {
            f"{stem}{_PACKED}": pack_words(self.codes),
            f"{stem}{_SCALE}": self.scales.view(rows, -1).to(self.form),
            f"{stem}{_SHAPE}": torch.tensor(self.codes.shape, dtype=torch.int64),
        }


class Int4Format(Format):
    """W4A16 of compressed-tensors, symmetric, in groups along a row."""

    name = "int4"
    package = None
    modules = ("Linear",)
    reach = f"linear layers (no Conv1D) with a number of inputs that {GROUPS[-1]} divides"
    skip_key = "ignore"
    has_experts = False  # transformers 5.23 does not find experts in 16 bits next to quantised layers
    # vLLM computes these as one matrix, and refuses a model in which only some of them are quantised.
    together = (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("query", "key", "value"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
    )

    def __init__(self) -> None:
        self.identity = {"format": self.name}

    def __call__(self, weight: Tensor) -> Int4:
        return Int4.of(weight)

    def fits(self, shape: Sequence[int]) -> bool:
        return group_of(shape[1]) is not None

    def entry(self, dtype: str, skipped: Sequence[str], widths: Mapping[str, int]) -> JsonObject:  # noqa: ARG002
        by_size: dict[int, list[str]] = {}
        for path, width in widths.items():
            by_size.setdefault(group_of(width) or width, []).append(path)
        groups = [
            {"targets": ["Linear"] if len(by_size) == 1 else _targets(paths, widths), "weights": _weights(size)}
            for size, paths in sorted(by_size.items(), reverse=True)
        ]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": list(skipped),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def is_config(self, stored: Mapping[str, object]) -> bool:
        groups = stored.get("config_groups")
        if stored.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
            return False
        return (
            all(
                isinstance(group, Mapping)
                and group.get("format") in (None, "pack-quantized")
                and not group.get("input_activations")
                and not group.get("output_activations")
                and _is_readable(group.get("weights"))
                for group in groups.values()
            )
            and stored.get("format") == "pack-quantized"
        )

    def weight_of(self, tensor: str) -> str | None:
        return f"{tensor.removesuffix(_PACKED)}weight" if tensor.endswith(f".{_PACKED}") else None

    def parts(self, weight: str, tensors: Iterable[str]) -> set[str]:  # noqa: ARG002
        return {f"{weight.removesuffix('weight')}{part}" for part in (_PACKED, _SCALE, _SHAPE)}

    def header(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> TensorHeader:
        stem = weight.removesuffix("weight")
        packed = checkpoint.tensors[f"{stem}{_PACKED}"]
        return replace(packed, shape=_shape(checkpoint, stem), dtype=DTYPE_NAMES[dtype])

    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> Int4:
        stem = weight.removesuffix("weight")
        columns = _shape(checkpoint, stem)[1]
        scales = checkpoint.load(f"{stem}{_SCALE}")
        scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)  # divided by when codes are chosen
        codes = unpack_words(checkpoint.load(f"{stem}{_PACKED}"))[:, :columns]
        # The packed integers have an offset of 8, and these are the codes.
        return Int4(
            codes=codes.contiguous(), scales=scales.float().flatten(), group=columns // scales.shape[1], form=dtype
        )


def _weights(size: int) -> JsonObject:
    """Return the description of weights in groups of this size."""
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }


def _targets(paths: Sequence[str], widths: Mapping[str, int]) -> list[str]:
    """Return patterns of the modules of a group: their last names where no module of another size has that name."""
    sizes: dict[str, set[int | None]] = {}
    for path, width in widths.items():
        sizes.setdefault(path.rpartition(".")[2], set()).add(group_of(width))
    return sorted(
        {rf"re:.*\.{re.escape(last)}$" if len(sizes[last := path.rpartition(".")[2]]) == 1 else path for path in paths}
    )


def _is_readable(weights: object) -> bool:
    """Return whether weights of this description are those of `Int4`."""
    if not isinstance(weights, Mapping):
        return False
    expected = {"num_bits": 4, "type": "int", "symmetric": True}
    return (
        all(weights.get(key) == value for key, value in expected.items())
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") in (None, "weight", "static")
    )


def _shape(checkpoint: Checkpoint, stem: str) -> tuple[int, int]:
    """Return the shape [out in] of a weight.

    Raises:
        ModelError: the stored tensors of the weight do not match it.
    """
    tensors = checkpoint.tensors
    parts = [f"{stem}{part}" for part in (_PACKED, _SCALE, _SHAPE)]
    if all(part in tensors for part in parts) and tensors[parts[2]].shape == (2,):
        rows, columns = (int(size) for size in checkpoint.load(parts[2]))
        packed, scales = tensors[parts[0]], tensors[parts[1]].shape
        is_packed = packed.dtype == "I32" and packed.shape == (rows, -(-columns // 8))
        if is_packed and len(scales) == 2 and scales[0] == rows and scales[1] and columns % scales[1] == 0:
            return rows, columns
    raise ModelError(
        f"{checkpoint.path}: '{parts[0]}' must be int32 with scales and a shape that match it, as compressed-tensors "
        "stores 4 bits, and is not. Fetch or quantise the model again.",
        code="quantized.int4-tensors",
    )


FORMATS.update(int4=Int4Format())
