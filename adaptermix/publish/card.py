"""The model card, generated from the manifest only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import yaml

from ..algebra import sign_conflict_by_chance
from ..io.json_types import JsonObject
from ..io.markup import as_code, as_markdown, markdown_table
from ..models.head_forms import HEAD_FORMS
from ..provenance.kinds import KINDS
from ..provenance.manifest import START, Manifest
from .engines import fill
from .private import hub_id, last_part, without_paths

__all__ = ["card", "hub_id"]

_PLACEHOLDER = "BASE MODEL"
"""Placeholder in the usage example for a base model without a Hub id."""

_LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "stack": "adaptermix"}
"""The Hub's names of the libraries that read outputs which PEFT and transformers do not."""


def _is_full(document: Manifest) -> bool:
    """Whether the output is a whole checkpoint."""
    return document.get("artifact") == "checkpoint"


def _header(document: Manifest, base: str | None) -> str:
    names = {name for names in document.get("languages", {}).values() for name in names}
    # The Hub accepts only ISO 639 codes: pairs (de-en) become two, and scripts (zh-Hant) are dropped.
    languages = sorted({code for name in names for code in re.findall(r"(?<![A-Za-z])[a-z]{2,3}(?![A-Za-z])", name)})
    library, kind, relation = ("transformers", "model", "merge") if _is_full(document) else ("peft", "lora", "adapter")
    library = _LIBRARIES.get(str(document.get("artifact")), library)
    if is_stack := document.get("artifact") == "stack":
        kind = "stack"
    header: JsonObject = {
        "library_name": library,
        "tags": [kind, "adaptermix", str(document.get("kind"))] if document.get("versions") else [kind],
    }
    if is_stack:
        encoder = hub_id(str(document["stack"]["encoder"]["id"]).partition("@")[0])
        header |= {"base_model": [each for each in (base, encoder) if each]} if base or encoder else {}
    elif base:
        header |= {"base_model": base, "base_model_relation": relation}
    if languages:
        header["language"] = languages
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def _inputs(document: Manifest) -> str:
    rows = [
        [entry["name"], f"{entry['weight']:g}", as_code(entry["weights_sha256"][:12])]
        for entry in document.get("inputs", ())
        if entry.get("use") != START
    ]
    mean = bool(document.get("plan", {}).get("places"))
    title = "weight, mean over the places of the settings below" if mean else "weight"
    return "## Made from\n\n" + markdown_table(["adapter", title, "sha256"], rows).rstrip() if rows else ""


def _started_from(document: Manifest) -> str:
    names = [
        f"{as_code(entry['name'])} (sha256 {as_code(entry['weights_sha256'][:12])})"
        for entry in document.get("inputs", ())
        if entry.get("use") == START
    ]
    return f"Training started from the adapter {', '.join(names)}." if names else ""


def _fidelity(document: Manifest) -> str:
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
            f"{fidelity['error']:.3f} of it, measured on {as_markdown(fidelity['measured_on'])}, mean over "
            f"modules.{rest} Per module: `adaptermix.json`."
        )
    acting = sum(bool(entry.get("weight", 1)) for entry in document.get("inputs", ()))
    more = {
        "sign_conflict": f"mean share of sign conflicts {{:.1%}} ({sign_conflict_by_chance(acting):.0%} is chance)",
        "left_out_share": "share of the whole difference that is left out {:.2%}",
    }
    parts = [
        f"Norm of the {'merged ' if 'sign_conflict' in fidelity else ''}delta {fidelity['norm']:.4g}",
        f"lost to truncation{' and rounding' if fidelity.get('rounding') else ''} {fidelity['residual']:.2%} of it",
        *(text.format(fidelity[key]) for key, text in more.items() if key in fidelity),
    ]
    return f"## Fidelity\n\n{'; '.join(parts)}. Per module: `adaptermix.json`."


def _scores(document: Manifest) -> str:
    scores = document.get("scores")
    if not scores:
        return ""
    rows = [
        [name, f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}", str(score["n"])]
        for name, score in scores["scores"].items()
    ]
    task, metric, split = map(as_markdown, (scores["task"], scores["metric"], scores.get("split", "dev")))
    return (
        f"## Scores\n\n{task}, {metric} on {split}\n\n"
        + markdown_table(["language", "value", "95 % interval", "rows"], rows).rstrip()
    )


def _languages(document: Manifest) -> str:
    parts = []
    for role, names in document.get("languages", {}).items():
        if role == "supervised":
            parts.append(f"trained on the task in {', '.join(map(as_markdown, names))}")
        elif role == "aligned":
            parts.append(_aligned([str(name) for name in names], document))
        else:
            parts.append(f"{as_markdown(role)}: {', '.join(map(as_markdown, names))}")
    return f"Languages: {'; '.join(parts)}." if parts else ""


def _aligned(names: list[str], document: Manifest) -> str:
    """Return which languages were aligned with which, according to the training files."""
    files = [entry.get("languages") for entry in document.get("data", ()) if isinstance(entry, Mapping)]
    pairs = sorted(
        {tuple(pair) for pair in files if isinstance(pair, list) and len(pair) == 2 and set(pair) <= {*names}}
    )
    if not pairs or {name for pair in pairs for name in pair} != set(names):
        return f"aligned in {', '.join(map(as_markdown, names))}"
    if all("en" in pair for pair in pairs):
        return f"aligned with English in {', '.join(as_markdown(name) for name in names if name != 'en')}"
    return f"aligned in the pairs {', '.join(as_markdown('-'.join(pair)) for pair in pairs)}"


def _tested(document: Manifest) -> str:
    names = ", ".join(sorted({as_code(entry["name"]) for entry in document.get("tested", ())}))
    return f"Trained or chosen on data that were evaluated as test before: {names}." if names else ""


_FUSED = {
    "input": '\n# the source is put before its text: f"{source} {text}"; for a pair, before each of its texts',
    "x-mixup": "\n# its sources are mixed in by `adaptermix evaluate --source`, or adaptermix.fusion.mixup.Mixer",
}
"""Usage comments for adapters that do not fuse in their bottleneck."""


def _fused(document: Manifest, lines: str) -> str:
    """Return the loading example of an adapter with sources."""
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
    settings = f"norm={fusion.get('fusion_norm', True)!r}, offset={fusion.get('fusion_offset', 0)!r}"
    return (
        f"from adaptermix.fusion import fused, read_sources\n{lines}"
        f"\nsources = read_sources(model, tokenizer(source_texts, padding=True, return_tensors='pt'), {settings})"
        "\nwith fused(model, sources):"
        "\n    output = model(**tokenizer(texts, padding=True, return_tensors='pt'))"
        f"{plain}"
    )


def _quoted(text: str) -> str:
    """Return a text as a Python literal in double quotes."""
    return json.dumps(text)


def _by_command(document: Manifest, base: str, reference: str) -> str | None:
    """Return usage instructions for an export, a stack or a head on hidden states, which PEFT alone cannot load."""
    if serve := document.get("serve"):
        lines = "\n".join(fill(str(command), base=base, adapter=reference) for command in serve["commands"])
        return f"With {as_markdown(serve['engine'])}:\n\n```bash\n{lines}\n```"
    task = document.get("task")
    task = task if isinstance(task, Mapping) else {}
    data = f"--task {task.get('name', 'TASK')} --data FILE"
    if document.get("artifact") == "stack":
        is_on_hub = "/" in reference
        folder = reference.rpartition("/")[2]
        lines = f"adaptermix evaluate --base {folder} --adapter ADAPTER --task TASK --data FILE"
        lines = f"hf download {reference} --local-dir {folder}\n{lines}" if is_on_hub else lines
        return f"A model folder of adaptermix, for --base of its commands:\n\n```bash\n{lines}\n```"
    if task.get("reader"):
        lines = f"adaptermix evaluate --base {_quoted(base)} --adapter {_quoted(reference)} {data}"
        return (
            "The head reads hidden states in a way that PEFT does not know, so that PEFT alone does not load this "
            f"adapter:\n\n```bash\n{lines}\n```"
        )
    return None


def _use(document: Manifest, base: str, reference: str) -> str:
    if text := _by_command(document, base, reference):
        return f"## Use\n\n{text}"
    revision = document.get("base", {}).get("revision")
    pinned = f", revision={revision!r}" if revision and base != _PLACEHOLDER else ""
    if document.get("artifact") == "delta":
        lines = (
            "from safetensors.torch import load_file\n\n"
            f"delta = load_file({_quoted(f'{reference}/delta.safetensors')})  # add each to the weight of its name"
        )
    elif _is_full(document):
        lines = (
            "from transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({_quoted(reference)})"
        )
    else:
        lines = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({base!r}{pinned})\n"
            f"model = PeftModel.from_pretrained(base, {_quoted(reference)})"
        )
    task = document.get("task")
    labels = task.get("labels") if isinstance(task, Mapping) else None
    if isinstance(task, Mapping) and labels:
        form = HEAD_FORMS.get(str(task.get("head")), HEAD_FORMS["classes"])
        lines = lines.replace("AutoModelForCausalLM", form.auto_class)
        outputs = form.outputs or len(labels)
        lines = lines.replace(f"pretrained({base!r}", f"pretrained({base!r}, num_labels={outputs}")
        lines += "" if form.outputs else f"\nlabels = {list(labels)!r}  # in the order of the logits"
    elif document.get("base", {}).get("class") == "encoder":
        lines = lines.replace("AutoModelForCausalLM", "AutoModel")
    if document.get("fusion"):
        lines = _fused(document, lines)
    modules = (document.get("fidelity") or {}).get("modules", {})
    if document.get("kind") == "bake" and any("rank" in module for module in modules.values()):
        with_lora = f"model = PeftModel.from_pretrained(model, {f'{reference}/residual'!r})"
        lines = f"from peft import PeftModel\n{lines}\n{with_lora}"
    return f"## Use\n\n```python\n{lines}\n```"


def card(document: Manifest, *, name: str, reference: str | None = None, base: str | None = None) -> str:
    """Return the README of an output adapter.

    Args:
        document: Its manifest.
        name: Title.
        reference: Location to load the adapter from; default the title.
        base: Id of the base model on the Hub; default the manifest's, unless that is a local folder.
    """
    named = document.get("base", {}).get("id")
    base = base or hub_id(named)
    which = f"the base model {as_code(base)}" if base else "a base model that is not named here"
    if named and not base:
        which = f"a base model in the local folder {as_code(last_part(str(named)))}"
    what = KINDS.get(str(document.get("kind")), "a LoRA adapter")
    if (document.get("scores") or {}).get("split") == "pairs":
        what = what.replace("a dev set", "translation pairs without labels")
    if _is_full(document):
        what = (
            "a full model that an adapter was written into"
            if document["kind"] == "bake"
            else "a full model that was merged"
        )
    if document.get("artifact") == "stack":
        what = "an encoder under a model (a stack)"
    if document.get("artifact") == "delta":
        what = "a merged delta as full matrices, to be added to the weights; it is not a PEFT adapter"
    settings = without_paths(document.get("plan", {}))
    plan = f"## Settings\n\n```json\n{json.dumps(settings, indent=2, default=str)}\n```" if settings else ""
    packages = ", ".join(
        f"{as_markdown(package)} {as_markdown(number)}" for package, number in document.get("versions", {}).items()
    )
    made = f" Made with adaptermix ({packages})." if packages else ""
    sections = [
        f"---\n{_header(document, base)}---",
        f"# {as_markdown(name)}",
        f"This is {what}, for {which}.{made}",
        _started_from(document),
        _languages(document),
        _tested(document),
        _use(document, base or _PLACEHOLDER, reference or name),
        _inputs(document),
        _fidelity(document),
        _scores(document),
        plan,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
