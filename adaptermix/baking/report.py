"""What a bake gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .fidelity import Fidelity, over_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class BakedModule:
    """One module of an adapter in its base model.

    Args:
        strategy: How it was written.
        fidelity: What is left of the adapter there.
        on_texts: Whether that was measured on held-out texts; else on the weights.
        size: Bytes that it takes, a LoRA beside it included; 0 where that was not asked for.
        rank: Rank of a LoRA that stays beside it, if one does.
        compared: What other strategies leave of it, and the bytes that it takes then.
    """

    strategy: str
    fidelity: Fidelity
    on_texts: bool
    size: int = 0
    rank: int | None = None
    compared: Mapping[str, tuple[Fidelity, int]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        found: dict[str, Any] = {"strategy": self.strategy, "on_texts": self.on_texts, **self.fidelity.document()}
        return found if self.rank is None else found | {"rank": self.rank}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What another strategy would give.

    Args:
        kept: Mean share of the effect that is left.
        error: Mean of how far the rest is off.
        bytes: Size of the result, a LoRA beside it included.
        kept_rest: `kept` without the first token of each text.
        error_rest: `error` without these tokens.
    """

    kept: float
    error: float
    bytes: int
    kept_rest: float | None = None
    error_rest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeReport:
    """What a bake gave.

    Args:
        strategy: What was asked for.
        modules: By path, those that the adapter acts on.
        bytes: Size of all tensors of the result; of `keep`, that of the weights file of the LoRA.
        least: Share of the effect that must be kept.
        out: The output folder.
        lora_bytes: Size of all adapters as one LoRA.
        whole_bytes: Size of the whole model in 16 bits.
        task: Dev scores by what was scored: `unmerged`, the base with the adapters beside it, and `baked`.
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
        """Return what the strategies that were measured beside this one would give, `keep` among them."""
        modules = list(self.modules.values())
        names = {name for module in modules for name in module.compared}
        common = [name for name in sorted(names) if all(name in module.compared for module in modules)]
        found = {}
        for name in common:
            overall = over_modules([module.compared[name][0] for module in modules])
            size = self.bytes + sum(module.compared[name][1] - module.size for module in modules)
            size = self.whole_bytes if name == "dequant-16" else size
            rest = {"kept_rest": overall.kept_rest, "error_rest": overall.error_rest}
            found[name] = Compared(kept=overall.kept, error=overall.error, bytes=size, **rest)
        if "requantize" in found:
            size = found["requantize"].bytes + self.lora_bytes
            found["keep"] = Compared(kept=1.0, error=0.0, bytes=size, kept_rest=1.0, error_rest=0.0)
        return dict(sorted(found.items(), key=lambda item: item[1].bytes))

    @property
    def measured_on(self) -> str:
        """Where most was measured: `held-out texts`, or `weights` where no text reached a module."""
        count = sum(module.on_texts for module in self.modules.values())
        return "held-out texts" if 2 * count > len(self.modules) else "weights"

    @property
    def is_enough(self) -> bool:
        """Whether as much is kept as must be, however tokens are counted; 0 asks for nothing."""
        return self.least == 0 or self.overall.least_kept >= self.least

    @property
    def lost(self) -> list[str]:
        """Paths of modules whose outputs are no nearer to what is meant than without the adapter."""
        return [path for path, module in self.modules.items() if module.on_texts and module.fidelity.most_error >= 1]

    @property
    def overall(self) -> Fidelity:
        """Means over the modules."""
        return over_modules([module.fidelity for module in self.modules.values()])

    def counts(self) -> dict[str, int]:
        """Return how many modules were written in which way."""
        found: dict[str, int] = {}
        for module in self.modules.values():
            found[module.strategy] = found.get(module.strategy, 0) + 1
        return dict(sorted(found.items()))

    def document(self) -> dict[str, Any]:
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
                {"strategies": {name: asdict(one) for name, one in found.items()}} if (found := self.compared()) else {}
            ),
            **({"task": dict(self.task)} if self.task else {}),
        }
