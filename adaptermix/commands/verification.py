"""The result of `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..provenance.differences import Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """An input that is not as it was when the output was made.

    Args:
        option: The option that named it.
        path: The path, or the id of a model.
        text: "missing", "changed", or "new" for a further file that a glob matches.
    """

    option: str
    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Verification(ResultView):
    """The result of `verify`.

    Args:
        output: The output.
        command: The command that made it.
        tolerance: The largest relative difference that counts as the same; 0 compares bytes.
        versions: By package: its version in the manifest and the one that is installed, where they differ.
        inputs: Inputs that changed, are missing or are new.
        is_rebuilt: Whether the output was rebuilt.
        failure: Why it could not be rebuilt, if inputs are not the reason.
        differences: Differences between the output and the rebuilt copy.
    """

    output: Path
    command: str
    tolerance: float = 0.0
    versions: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    inputs: Sequence[InputChange] = ()
    is_rebuilt: bool = False
    failure: str | None = None
    differences: Sequence[Difference] = ()

    @property
    def is_same(self) -> bool:
        """Whether nothing differs, neither the inputs nor the rebuilt copy."""
        return not (self.inputs or self.failure or self.differences)

    def document(self) -> JsonObject:
        """Return the JSON document."""
        return {
            "output": str(self.output),
            "command": self.command,
            "same": self.is_same,
            "rebuilt": self.is_rebuilt,
            "tolerance": self.tolerance,
            "versions": {name: {"output": was, "now": now} for name, (was, now) in self.versions.items()},
            "inputs": [{"option": each.option, "path": each.path, "text": each.text} for each in self.inputs],
            "failure": self.failure,
            "differences": [each.document() for each in self.differences],
        }
