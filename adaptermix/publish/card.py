"""The model card, made from the manifest and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..head_forms import HEAD_FORMS
from ..manifest import START

_WHAT = {
    "merge": "a weighted merge of LoRA adapters",
    "search": "a weighted merge of LoRA adapters, its weights chosen on a dev set",
    "extract": "the difference between a tuned model and its base, as a LoRA",
    "train-align": "an alignment LoRA: it draws translations together in a middle layer",
    "train-task": "a task LoRA",
    "train-fusion": "a LoRA that fuses each text with its source in another language",
    "train-joint": "a LoRA trained for a task and for alignment",
}
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_ROLES = {"supervised": "trained on the task in", "aligned": "aligned with English in"}


def hub_id(base: object) -> str | None:
    """Return the base model's id if it can be one on the Hub; a local path is not, and would make the card invalid."""
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
        return None
    return base


def _is_full(document: Mapping[str, Any]) -> bool:
    """Whether the output is a whole checkpoint."""
    return document.get("artifact") == "checkpoint"


def _header(document: Mapping[str, Any]) -> str:
    names = {name for names in document.get("languages", {}).values() for name in names}
    # the Hub takes codes of ISO 639 alone: those of pairs (de-en) one by one, without scripts (zh-Hant)
    languages = sorted({code for name in names for code in re.findall(r"(?<![A-Za-z])[a-z]{2,3}(?![A-Za-z])", name)})
    base = hub_id(document.get("base", {}).get("id"))
    library, kind, relation = ("transformers", "model", "merge") if _is_full(document) else ("peft", "lora", "adapter")
    header: dict[str, Any] = {
        "library_name": library,
        "tags": [kind, "adaptermix", str(document.get("kind"))],
    }
    if base:
        header |= {"base_model": base, "base_model_relation": relation}
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
        if entry.get("use") != START
    ]
    mean = bool(document.get("plan", {}).get("places"))
    title = "weight, mean over the places of the settings below" if mean else "weight"
    return "## Made from\n\n" + _table(["adapter", title, "sha256"], rows) if rows else ""


def _begun(document: Mapping[str, Any]) -> str:
    names = [
        f"`{entry['name']}` (sha256 `{entry['weights_sha256'][:12]}`)"
        for entry in document.get("inputs", ())
        if entry.get("use") == START
    ]
    return f"Training began from the adapter {', '.join(names)}." if names else ""


def _fidelity(document: Mapping[str, Any]) -> str:
    fidelity = document.get("fidelity")
    if not fidelity:
        return ""
    if "kept" in fidelity:
        rest = ""
        if fidelity.get("kept_rest") is not None:
            rest = (
                f" Without the first token of each text: kept {fidelity['kept_rest']:.3f}, error "
                f"{fidelity['error_rest']:.3f}."
            )
        return (
            f"## Fidelity\n\nKept {fidelity['kept']:.3f} of the adapter's effect on outputs, error "
            f"{fidelity['error']:.3f} of it, measured on {fidelity['measured_on']}, mean over modules.{rest} Per "
            "module: `adaptermix.json`."
        )
    more = {
        "sign_conflict": "mean share of sign conflicts {:.1%}",
        "left_out_share": "share of the whole difference that is left out {:.2%}",
    }
    parts = [
        f"Norm of the {'merged ' if 'sign_conflict' in fidelity else ''}delta {fidelity['norm']:.4g}",
        f"lost to truncation{' and rounding' if fidelity.get('rounding') else ''} {fidelity['residual']:.2%} of it",
        *(text.format(fidelity[key]) for key, text in more.items() if key in fidelity),
    ]
    return f"## Fidelity\n\n{'; '.join(parts)}. Per module: `adaptermix.json`."


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


def _tested(document: Mapping[str, Any]) -> str:
    names = ", ".join(sorted({f"`{entry['name']}`" for entry in document.get("tested", ())}))
    return f"Trained or chosen on data that were evaluated as test before: {names}." if names else ""


_FUSED = {
    "input": '\n# a text\'s source stands before it: f"{source} {text}", of a pair before each of its texts',
    "x-mixup": "\n# its sources are mixed in by `adaptermix evaluate --source`, or adaptermix.fusion.mixup.Mixer",
}
"""How adapters that do not fuse in their bottleneck see their sources."""


def _fused(document: Mapping[str, Any], lines: str) -> str:
    """Return how an adapter is loaded that sees texts beside their sources."""
    entry = document.get("fusion")
    fusion = entry if isinstance(entry, Mapping) else {}
    name = str(fusion.get("fusion"))
    if name != "input":
        lines = lines.replace("from peft import PeftModel", "from adaptermix.fusion.lora import load_fusion")
        lines = lines.replace("PeftModel.from_pretrained(", "load_fusion(")
    if name in _FUSED:
        return lines + _FUSED[name]
    plain = "\n# PEFT alone loads a plain LoRA, which does not see the sources"
    if encoder := fusion.get("fusion_encoder"):
        known = hub_id(encoder) or "see the settings"
        return (
            f"{lines}\n# its sources are states of another encoder ({known}): `adaptermix evaluate` reads them{plain}"
        )
    settings = f"norm={fusion.get('fusion_norm', True)}, offset={fusion.get('fusion_offset', 0)}"
    return (
        f"from adaptermix.fusion import fused, read_sources\n{lines}"
        f"\nsources = read_sources(model, tokenizer(source_texts, padding=True, return_tensors='pt'), {settings})"
        "\nwith fused(model, sources):"
        "\n    output = model(**tokenizer(texts, padding=True, return_tensors='pt'))"
        f"{plain}"
    )


def _use(document: Mapping[str, Any], base: str, reference: str) -> str:
    if document.get("artifact") == "delta":
        lines = (
            "from safetensors.torch import load_file\n\n"
            f'delta = load_file("{reference}/delta.safetensors")  # add each to the weight of its name'
        )
    elif _is_full(document):
        lines = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{reference}")'
        )
    else:
        lines = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
            f'model = PeftModel.from_pretrained(base, "{reference}")'
        )
    task = document.get("task")
    labels = task.get("labels") if isinstance(task, Mapping) else None
    if isinstance(task, Mapping) and labels:
        form = HEAD_FORMS.get(str(task.get("head")), HEAD_FORMS["classes"])
        lines = lines.replace("AutoModelForCausalLM", form.auto_class)
        outputs = form.outputs or len(labels)
        lines = lines.replace(f"pretrained({base!r})", f"pretrained({base!r}, num_labels={outputs})")
        lines += "" if form.outputs else f"\nlabels = {list(labels)!r}  # in the order of the logits"
    elif document.get("base", {}).get("class") == "encoder":
        lines = lines.replace("AutoModelForCausalLM", "AutoModel")
    if document.get("kind") == "train-fusion":
        lines = _fused(document, lines)
    modules = (document.get("fidelity") or {}).get("modules", {})
    if document.get("kind") == "bake" and any("rank" in module for module in modules.values()):
        beside = f"model = PeftModel.from_pretrained(model, {f'{reference}/residual'!r})"
        lines = f"from peft import PeftModel\n{lines}\n{beside}"
    return f"## Use\n\n```python\n{lines}\n```"


def card(document: Mapping[str, Any], *, name: str, reference: str | None = None) -> str:
    """Return the README of an output adapter.

    Args:
        document: Its manifest.
        name: Title.
        reference: Where the adapter will be loaded from; default the title.
    """
    base = document.get("base", {}).get("id") or "BASE MODEL"
    what = _WHAT.get(str(document.get("kind")), "a LoRA adapter")
    if _is_full(document):
        what = (
            "a full model that an adapter was written into"
            if document["kind"] == "bake"
            else "a full model that was merged"
        )
    if document.get("artifact") == "delta":
        what = "a merged delta as full matrices, which is no PEFT adapter: it is to be added to the weights"
    plan = "## Settings\n\n```json\n" + json.dumps(document.get("plan", {}), indent=2, default=str) + "\n```"
    made = ", ".join(f"{package} {number}" for package, number in document.get("versions", {}).items())
    sections = [
        f"---\n{_header(document)}---",
        f"# {name}",
        f"This is {what}, for the base model `{base}`. Made with adaptermix ({made}).",
        _begun(document),
        _languages(document),
        _tested(document),
        _use(document, str(base), reference or name),
        _inputs(document),
        _fidelity(document),
        _scores(document),
        plan,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
