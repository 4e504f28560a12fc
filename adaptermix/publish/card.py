"""The model card, made from the manifest and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_WHAT = {
    "merge": "a weighted merge of LoRA adapters",
    "search": "a weighted merge of LoRA adapters, its weights chosen on a dev set",
    "train-align": "an alignment LoRA: it draws translations together in a middle layer",
    "train-task": "a task LoRA",
}
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_ROLES = {"supervised": "trained on the task in", "aligned": "aligned with English in"}


def hub_id(base: object) -> str | None:
    """Return the base model's id if it can be one on the Hub; a local path is not, and would make the card invalid."""
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
        return None
    return base


def _header(document: Mapping[str, Any]) -> str:
    languages = sorted({name for names in document.get("languages", {}).values() for name in names})
    base = hub_id(document.get("base", {}).get("id"))
    header: dict[str, Any] = {
        "library_name": "peft",
        "tags": ["lora", "adaptermix", str(document.get("kind"))],
    }
    if base:
        header |= {"base_model": base, "base_model_relation": "adapter"}
    if languages:
        header["language"] = languages
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _inputs(document: Mapping[str, Any]) -> str:
    rows = [
        [str(entry["name"]), f"{entry['weight']:g}", f"`{entry['weights_sha256'][:12]}`"]
        for entry in document.get("inputs", ())
    ]
    return "## Made from\n\n" + _table(["adapter", "weight", "sha256"], rows) if rows else ""


def _fidelity(document: Mapping[str, Any]) -> str:
    fidelity = document.get("fidelity")
    if not fidelity:
        return ""
    return (
        "## Fidelity\n\n"
        f"Norm of the merged delta {fidelity['norm']:.4g}; lost to truncation {fidelity['residual']:.2%} of it; "
        f"mean share of sign conflicts {fidelity['sign_conflict']:.1%}. Per module: `adaptermix.json`."
    )


def _scores(document: Mapping[str, Any]) -> str:
    scores = document.get("scores")
    if not scores:
        return ""
    rows = [
        [name, f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}", str(score["n"])]
        for name, score in scores["scores"].items()
    ]
    title = f"## Scores\n\n{scores['task']}, {scores['metric']} on {scores.get('split', 'dev')}\n\n"
    return title + _table(["language", "value", "95 % interval", "rows"], rows)


def _languages(document: Mapping[str, Any]) -> str:
    parts = [f"{_ROLES.get(role, role)} {', '.join(names)}" for role, names in document.get("languages", {}).items()]
    return f"Languages: {'; '.join(parts)}." if parts else ""


def card(document: Mapping[str, Any], *, name: str, reference: str | None = None) -> str:
    """Return the README of an output adapter.

    Args:
        document: Its manifest.
        name: Title.
        reference: Where the adapter will be loaded from; default the title.
    """
    base = document.get("base", {}).get("id") or "BASE MODEL"
    what = _WHAT.get(str(document.get("kind")), "a LoRA adapter")
    use = (
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f'model = PeftModel.from_pretrained(base, "{reference or name}")\n```'
    )
    if document.get("base", {}).get("class") == "encoder":
        use = use.replace("AutoModelForCausalLM", "AutoModel")
    plan = "## Settings\n\n```json\n" + json.dumps(document.get("plan", {}), indent=2, default=str) + "\n```"
    made = ", ".join(f"{package} {number}" for package, number in document.get("versions", {}).items())
    sections = [
        f"---\n{_header(document)}---",
        f"# {name}",
        f"This is {what}, for the base model `{base}`. Made with adaptermix ({made}).",
        _languages(document),
        use,
        _inputs(document),
        _fidelity(document),
        _scores(document),
        plan,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
