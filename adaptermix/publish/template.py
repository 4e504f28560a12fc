"""PEFT's model card template."""

from __future__ import annotations

import re

import yaml

_FILLED_BY_PEFT = {"base_model", "library_name", "pipeline_tag", "tags"}
_FRONT = re.compile(r"\A---\n(.*?)\n---\n?", re.DOTALL)
_QUANTIZED = re.compile(r"\n## Training procedure\n\nThe following `bitsandbytes`.*?(?=\n#|\Z)", re.DOTALL)
_VERSIONS = re.compile(r"### Framework versions\n\n(- PEFT \S+\n?)+")


def is_untouched(text: str) -> bool:
    """Return whether a card is PEFT's unedited template.

    A card from a PEFT version with another template counts as written by hand, so it is not replaced.

    Args:
        text: The README.
    """
    if "[More Information Needed]" not in text:
        return False
    from huggingface_hub import ModelCard, ModelCardData

    front = _FRONT.match(text)
    try:
        entries = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return False
    if entries is not None and not (isinstance(entries, dict) and set(entries) <= _FILLED_BY_PEFT):
        return False
    template = ModelCard.from_template(ModelCardData()).text
    return _body(text[front.end() :] if front else text) == _body(template)


def _body(text: str) -> list[str]:
    """Return the nonblank lines of a card except those that PEFT adds later."""
    return [line.strip() for line in _VERSIONS.sub("", _QUANTIZED.sub("", text)).splitlines() if line.strip()]
