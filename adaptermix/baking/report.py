"""The report of a bake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from .fidelity import Fidelity, over_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class BakedModule:
    """One module of an adapter after baking.

    Args:
        strategy: How it was written.
        fidelity: How much of the adapter's effect remains.
        on_texts: Whether that was measured on held-out texts; otherwise on the weights.
        size: Bytes of the module, including its residual LoRA; 0 if not requested.
        rank: Rank of its residual LoRA, if there is one.
        compared: Fidelity and bytes under other strategies.
    """

    strategy: str
    fidelity: Fidelity
    on_texts: bool
    size: int = 0
    rank: int | None = None
    compared: Mapping[str, tuple[Fidelity, int]] = field(default_factory=dict)

    def document(self) -> JsonObject:
        """Return plain data."""
        entry: JsonObject = {"strategy": self.strategy, "on_texts": self.on_texts, **self.fidelity.document()}
        return entry if self.rank is None else entry | {"rank": self.rank}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Estimated result of another strategy.

    Args:
        kept: Mean share of the effect that remains.
        error: Mean relative error.
        bytes: Size of the result, including residual LoRAs.
        kept_rest: `kept` without the first token of each text.
        error_rest: `error` without these tokens.
    """

    kept: float
    error: float
    bytes: int
    kept_rest: float | None = None
    error_rest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BakeReport(ResultView):
    """The report of a bake.

    Args:
        strategy: The requested strategy.
        modules: By path, the modules that the adapter changes.
        bytes: Size of all tensors of the result; for `keep`, of the LoRA's weights file.
        least: Share of the effect that must remain.
        out: The output folder.
        lora_bytes: Size of all adapters as one LoRA.
        whole_bytes: Size of the whole model in 16 bits.
        task: Dev scores: `unmerged`, the base with its adapters, and `baked`.
    """

    strategy: str
    modules: Mapping[str, BakedModule]
    bytes: int
    least: float
    out: Path | None
    lora_bytes: int = 0
    whole_bytes: int = 0
    task: Mapping[str, float] | None = None

    def compared(self) -> dict[str, Compared]:
        """Return the estimated results of the other measured strategies, including `keep`."""
        modules = list(self.modules.values())
        names = {name for module in modules for name in module.compared}
        common = [name for name in sorted(names) if all(name in module.compared for module in modules)]
        by_strategy = {}
        for name in common:
            overall = over_modules([module.compared[name][0] for module in modules])
            size = self.bytes + sum(module.compared[name][1] - module.size for module in modules)
            size = self.whole_bytes if name == "dequant-16" else size
            rest = {"kept_rest": overall.kept_rest, "error_rest": overall.error_rest}
            by_strategy[name] = Compared(kept=overall.kept, error=overall.error, bytes=size, **rest)
        if "requantize" in by_strategy:
            size = by_strategy["requantize"].bytes + self.lora_bytes
            by_strategy["keep"] = Compared(kept=1.0, error=0.0, bytes=size, kept_rest=1.0, error_rest=0.0)
        return dict(sorted(by_strategy.items(), key=lambda item: item[1].bytes))

    @property
    def measured_on(self) -> str:
        """What most modules were measured on: `held-out texts`, or `weights` where no text reached a module."""
        count = sum(module.on_texts for module in self.modules.values())
        return "held-out texts" if 2 * count > len(self.modules) else "weights"

    @property
    def is_enough(self) -> bool:
        """Whether enough remains under every weighting of tokens; a limit of 0 accepts everything."""
        return self.least == 0 or self.overall.least_kept >= self.least

    @property
    def lost(self) -> list[str]:
        """Paths of modules whose outputs are no closer to the intended ones than without the adapter."""
        return [path for path, module in self.modules.items() if module.on_texts and module.fidelity.most_error >= 1]

    @property
    def overall(self) -> Fidelity:
        """Means over the modules."""
        return over_modules([module.fidelity for module in self.modules.values()])

    def counts(self) -> dict[str, int]:
        """Return the number of modules per strategy."""
        numbers: dict[str, int] = {}
        for module in self.modules.values():
            numbers[module.strategy] = numbers.get(module.strategy, 0) + 1
        return dict(sorted(numbers.items()))

    def document(self) -> JsonObject:
        """Return the JSON document."""
        return {
            "strategy": self.strategy,
            "kept": self.overall.kept,
            "error": self.overall.error,
            "kept_rest": self.overall.kept_rest,
            "error_rest": self.overall.error_rest,
            "measured_on": self.measured_on,
            "enough": self.is_enough,
            "modules": {path: module.document() for path, module in self.modules.items()},
            "bytes": self.bytes,
            "out": None if self.out is None else str(self.out),
            **(
                {"strategies": {name: asdict(one) for name, one in entry.items()}} if (entry := self.compared()) else {}
            ),
            **({"task": dict(self.task)} if self.task else {}),
        }
