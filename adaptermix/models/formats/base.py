"""The protocols of quantised formats of weights, and their registry.

A quantised weight has codes that index a table of values, and a scale per block of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ...io.checkpoint_files import Checkpoint, TensorHeader
from ...io.json_types import JsonObject
from ...io.registry import Registry
from ...options import registries

if TYPE_CHECKING:
    from transformers.quantizers.base import QuantizationConfigMixin


class Readable(Protocol):
    """A stored weight that can be dequantised."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the dequantised weight in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized(ABC):
    """A weight whose values are codes times scales.

    Args:
        codes: Index of each weight's value in the table.
        scales: Scale of each block of weights, row after row, as dequantised.

    Shapes: `codes` [out in], uint8; `scales` [blocks], float32.
    """

    codes: Integer[Tensor, "out in"]
    scales: Float[Tensor, " blocks"]

    @property
    @abstractmethod
    def table(self) -> Float[Tensor, " levels"]:
        """The values of the codes."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Number of weights that share a scale."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""

    @abstractmethod
    def identity(self) -> JsonObject:
        """Return the manifest entry of the format."""

    @abstractmethod
    def with_scales(self, scales: Tensor) -> Self:
        """Return a weight of the same codes and the storable scales that are nearest to these."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the weight on a device."""

    @abstractmethod
    def requantized(self, weight: Tensor) -> Self:
        """Return another weight, rounded in the same format."""

    @abstractmethod
    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors from which transformers loads the weight.

        Args:
            name: Name of the weight, such as `model.layers.0.self_attn.q_proj.weight`.
        """

    def with_codes(self, codes: Tensor) -> Self:
        """Return a weight of the same scales and other codes."""
        return replace(self, codes=codes.to(torch.uint8))

    def scale_of_each(self) -> Float[Tensor, "out in"]:
        """Return the scale of each weight."""
        return self.scales.repeat_interleave(self.block)[: self.codes.numel()].view(self.codes.shape)

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the dequantised weight in float32."""
        return self.table[self.codes.long()] * self.scale_of_each()


class StoredFormat(ABC):
    """A quantised format that is read.

    Attributes:
        name: Its name in options, manifests and messages.
    """

    name: str

    @abstractmethod
    def is_config(self, stored: Mapping[str, object]) -> bool:
        """Whether a model with this quantisation config is in this format."""

    @abstractmethod
    def weight_of(self, tensor: str) -> str | None:
        """Return the name of the quantised weight that a tensor of a checkpoint belongs to by its name, or None.

        For each weight in this format one tensor has a name that no other format of the registry has.
        """

    @abstractmethod
    def parts(self, weight: str, tensors: Iterable[str]) -> set[str]:
        """Return the names of the tensors that a checkpoint stores with the codes of a weight, such as its scales."""

    @abstractmethod
    def header(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> TensorHeader:
        """Return shape and dtype of a weight of a checkpoint as it is in a forward pass.

        Args:
            checkpoint: The stored files.
            weight: Name of the weight.
            dtype: Dtype of the model.
        """

    @abstractmethod
    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> Readable:
        """Read a weight; arguments as for `header`."""


class Format(StoredFormat):
    """A quantised format that is read and written.

    Attributes:
        package: The package that this package needs for models in this format; None without such a package.
        identity: Its manifest entry.
        together: Names of modules that inference engines join in one matrix. Such modules of one layer are all
            quantised, or all in 16 bits.
        modules: Classes of the modules that can be quantised.
        reach: The weights that the format can hold, in words for messages.
        has_experts: Whether models with a mixture of experts can be written.
        skip_key: Key of a `quantization_config` with the names of the modules that are not quantised.
    """

    package: str | None
    identity: JsonObject
    together: tuple[tuple[str, ...], ...] = ()
    modules: tuple[str, ...] = ("Linear", "Conv1D")
    reach: str = "linear layers"
    has_experts: bool = True
    skip_key: str = "llm_int8_skip_modules"

    @abstractmethod
    def __call__(self, weight: Tensor) -> Quantized:
        """Round a weight to this format."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> Quantized:
        """Read a weight; arguments as for `header`."""

    def fits(self, shape: Sequence[int]) -> bool:  # noqa: ARG002
        """Return whether a weight [out in] of this shape can be in this format; others stay in 16 bits."""
        return True

    def config(self, dtype: torch.dtype | str, skipped: Sequence[str] | None) -> QuantizationConfigMixin | None:
        """Return the config with which transformers rounds a model while it loads it.

        Args:
            dtype: Dtype of computation.
            skipped: Names of modules that are not quantised; None for the output layer of a language model.

        Returns:
            None if transformers cannot do that. The weights are then rounded after loading, and models in this format
            are dequantised while they are loaded.
        """

    def entry(self, dtype: str, skipped: Sequence[str], widths: Mapping[str, int]) -> JsonObject:  # noqa: ARG002
        """Return the `quantization_config` of a model's config.json.

        Args:
            dtype: Dtype of computation.
            skipped: Names of modules that are not quantised.
            widths: Number of inputs of each quantised module, by its path.
        """
        config = self.config(dtype, skipped)
        return {} if config is None else config.to_dict()


FORMATS: Registry[Format] = registries.FORMATS
"""Quantised formats by name. Entry points of other packages: `adaptermix.formats`."""


def known_formats() -> Mapping[str, Format]:
    """Return all formats by name, those of other packages too."""
    FORMATS.load_all()
    return FORMATS
