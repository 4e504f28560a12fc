"""The warning of a large adapter, where the base is a stack."""

from __future__ import annotations

from pathlib import Path

from adaptermix.publish.output import size_notes


def test_an_adapter_is_not_compared_with_the_projection_of_a_stack(tmp_path: Path) -> None:
    (tmp_path / "projection.safetensors").write_bytes(bytes(10))
    assert "100% of the base model's" in size_notes(10, tmp_path)[0]
    (tmp_path / "stack.json").write_text("{}")
    assert size_notes(10, tmp_path) == ()
