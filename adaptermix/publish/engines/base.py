"""The protocol of engines, their registry, and the refusal of adapters that an engine cannot serve."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ...adapters import AdapterFile, AdapterMeta, AdapterModule, AdapterSource, ModuleHeader, adapter_writer
from ...adapters.keys import PREFIX, is_embedding
from ...adapters.lora_config import CONFIG, LoraSettings, load_config, read_config
from ...adapters.peft_writer import stored
from ...algebra import LowRank, all_finite
from ...errors import OutputError, PlanError
from ...io.registry import Registry
from ...io.weight_files import WEIGHTS, Safetensors
from ...options import registries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Faults = tuple[tuple[bool, str], ...]
"""For each fault whether it holds, and its code and message, such as "export.dora: DoRA magnitudes."."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainAdapter:
    """An adapter to export: low-rank updates of linear modules.

    Args:
        name: Its name, for messages.
        meta: Its description.
        headers: Shapes per module path; the rank is that of the update, without ranks that are zero.
        load: Reads the update of a module.
        config: Configuration of the base model; None if it is not on disk and the engine does not need it.
        dtype: Storage dtype of the factors.
    """

    name: str
    meta: AdapterMeta
    headers: Mapping[str, ModuleHeader]
    load: Callable[[str], AdapterModule]
    config: PreTrainedConfig | None
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """The largest rank of a module, which every module gets in the output."""
        return max(header.rank for header in self.headers.values())

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The last parts of the module paths, such as `q_proj`, each once."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.headers}))

    def padded(self, path: str) -> LowRank:
        """Read the update of a module with the adapter's rank, scale 1, in the storage dtype.

        Shapes: A is [r in] and B is [out r].

        Raises:
            OutputError: a factor overflows the dtype.
        """
        update = stored(self.load(path).update, rank=self.rank, dtype=self.dtype)
        if not (all_finite(update.a) and all_finite(update.b)):
            raise OutputError(
                f"the factors of module '{path}' must be finite in {str(self.dtype).removeprefix('torch.')}, and "
                "overflow it. Choose a wider dtype.",
                code="write.overflow",
            )
        return update


class Engine(ABC):
    """An inference engine: the adapters that it serves, the files that it reads, and its rule for their deltas."""

    name: ClassVar[str]
    artifact: ClassVar[str] = "adapter"
    """Kind of output in the manifest."""
    largest_rank: ClassVar[int | None] = None
    """Largest rank that the engine accepts; None for no limit."""
    modules: ClassVar[frozenset[str] | None] = None
    """Last parts of the paths of modules that it adapts; None where the base model decides."""
    has_tables: ClassVar[bool] = False
    """Whether it adapts embeddings and output heads."""
    has_experts: ClassVar[bool] = False
    """Whether it adapts the experts of a mixture of experts."""
    needs_config: ClassVar[bool] = False
    """Whether the files depend on the configuration of the base model."""

    def check(self, adapter: PlainAdapter) -> None:
        """Refuse an adapter by its rank, or by the class of its base model.

        Raises:
            PlanError: the engine cannot serve it.
        """
        if self.largest_rank is not None and adapter.rank > self.largest_rank:
            raise PlanError(
                f"{self.name} must get at most rank {self.largest_rank}, and '{adapter.name}' has rank {adapter.rank}. "
                f"Recompress it: adaptermix merge DIR --weights 1 --rank {self.largest_rank} --out NEW.",
                code="export.rank",
            )

    @abstractmethod
    def write(self, folder: Path, adapter: PlainAdapter) -> None:
        """Write the engine's files into an existing folder."""

    @abstractmethod
    def reader(self, folder: Path, adapter: PlainAdapter) -> Callable[[str], LowRank]:
        """Return a function that reads the update of a module from the files, by the rule of the engine.

        Shapes: the update is [out in], with the rows of the PEFT adapter.
        """

    @abstractmethod
    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        """Return the settings or commands that serve the output; `{base}` and `{adapter}` stand for the two models."""


def fill(command: str, *, base: str, adapter: str) -> str:
    """Return a command of an engine with the names of the base model and of the adapter."""
    return command.replace("{base}", base).replace("{adapter}", adapter)


ENGINES: Registry[Engine] = registries.ENGINES


class PeftFolder(Engine):
    """An engine that reads PEFT folders, but only one rank and one scale: the patterns of PEFT are ignored."""

    def description(self, adapter: PlainAdapter) -> AdapterMeta:
        """Return the description of the adapter for the config of the folder."""
        return adapter.meta

    @abstractmethod
    def scale(self, settings: LoraSettings, rank: int) -> float:
        """Return the factor that the engine applies to the product of a module's factors.

        Args:
            settings: Content of `adapter_config.json`, whose patterns the engine ignores.
            rank: Rank of the stored factors.
        """

    def write(self, folder: Path, adapter: PlainAdapter) -> None:
        plan = AdapterFile(meta=self.description(adapter), modules=adapter.headers, dtype=adapter.dtype)
        with adapter_writer(folder, plan) as writer:
            for path in adapter.headers:
                writer.add(path, adapter.load(path))

    def reader(self, folder: Path, adapter: PlainAdapter) -> Callable[[str], LowRank]:
        settings = read_config(load_config(folder / CONFIG), folder / CONFIG, {})
        file = Safetensors(folder / WEIGHTS)

        def read(path: str) -> LowRank:
            kind = "lora_embedding_{}" if adapter.headers[path].layout.kind == "embedding" else "lora_{}.weight"
            a, b = (file.read(f"{PREFIX}{path}.{kind.format(factor)}") for factor in "AB")
            return LowRank(b=b, a=a, scale=self.scale(settings, a.shape[0]))

        return read


def refuse_unserved(engine: Engine, source: AdapterSource, *, is_encoder: bool) -> None:
    """Refuse an adapter with a part that the engine cannot serve.

    Args:
        engine: The engine.
        source: The adapter.
        is_encoder: Whether the base model is an encoder.

    Raises:
        PlanError: it has such a part; the message names it and the alternative.
    """
    for is_fault, fault in (*_faults(source, is_encoder=is_encoder), *_module_faults(engine, source)):
        code, _, message = fault.partition(": ")
        if is_fault:
            raise PlanError(
                f"{engine.name} must serve every part of '{source.name}', but it does not serve {message}", code=code
            )


_PEFT = "Serve it with transformers and peft."


def _bake(source: AdapterSource) -> str:
    return f"Write it into the base model: adaptermix bake --base BASE --adapter {source.path} --out NEW."


def _faults(source: AdapterSource, *, is_encoder: bool) -> Faults:
    """Return for each part that no engine serves whether the adapter has it."""
    whole = sorted(key.removeprefix(PREFIX) for key in source.saved_headers)
    has_bias = any(header.bias for header in source.modules.values())
    return (
        (bool(source.meta.fusion), "export.fusion: a fusion with a source text. Use adaptermix evaluate."),
        (
            bool(whole),
            f"export.whole-tensors: fully trained tensors, heads or biases, such as '{(*whole, '')[0]}'. {_PEFT}",
        ),
        (has_bias, f"export.bias: biases inside the LoRA. {_PEFT}"),
        (is_encoder, f"export.encoder: a LoRA of an encoder. {_bake(source)}"),
        (source.meta.dora, f"export.dora: DoRA magnitudes (use_dora). {_bake(source)}"),
    )


def _module_faults(engine: Engine, source: AdapterSource) -> Iterator[tuple[bool, str]]:
    """Yield for each module, and each reason not to serve it, whether the reason holds."""
    bake = _bake(source)
    for path, header in source.modules.items():
        kind, name = header.layout.kind, path.rpartition(".")[2]
        is_table = kind == "embedding" or is_embedding(path)
        is_expert, known = _EXPERT.search(path) is not None, engine.modules
        yield kind == "convolution", f"export.convolution: convolutions, such as '{path}'. {_PEFT}"
        yield is_table and not engine.has_tables, f"export.embedding: embeddings or heads, such as '{path}'. {bake}"
        yield is_expert and not engine.has_experts, f"export.experts: experts, such as '{path}'. {bake}"
        if known is not None:
            yield name not in known, f"export.module: '{path}', only modules named {', '.join(sorted(known))}. {bake}"
