"""The section "Use" of a model card: lines that load an output, and an example with the prompt of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter

from ..errors import UsageError
from ..io.markup import as_markdown
from ..models.head_forms import HEAD_FORMS, HeadForm
from ..provenance.manifest import Manifest
from ..tasks import get_task, get_template
from ..tasks.prompts import Template
from .engines import fill
from .private import hub_id

PLACEHOLDER = "BASE MODEL"
"""Placeholder in the usage example for a base model without a Hub id."""
_FUSED = {
    "input": '\n# the source is put before its text: f"{source} {text}"; for a pair, before each of its texts',
    "x-mixup": "\n# its sources are mixed in by `adaptermix evaluate --source`, or adaptermix.fusion.mixup.Mixer",
}
"""Usage comments for adapters that do not fuse in their bottleneck."""
_PACKAGES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "int4": "compressed-tensors"}
"""Package with which transformers loads a model in a quantised format."""
_ONE_TEXT = "\ninputs = tokenizer(text, return_tensors='pt')"
_HEAD_EXAMPLES = {
    "classes": f"\ntext = '...'{_ONE_TEXT}\nprint(labels[int(model(**inputs).logits[0].argmax())])",
    "tokens": f"\ntext = '...'{_ONE_TEXT}\nprint([labels[n] for n in model(**inputs).logits[0].argmax(-1).tolist()])",
}
"""Examples by the name of a head with one output per label, for tasks about one text."""


def use(document: Manifest, *, base: str | None, reference: str, folder: bool = False) -> str:
    """Return the section on how to use an output.

    Args:
        document: Its manifest.
        base: Id of the base model on the Hub; None without an id.
        reference: Location to load the output from.
        folder: Whether that location is a folder, and not a repository of the Hub.
    """
    named = base or PLACEHOLDER
    if text := _by_command(document, named, reference, folder=folder):
        return f"## Use\n\n{text}"
    if document.get("artifact") == "delta":
        return f"## Use\n\n```python\n{_delta(reference, folder=folder)}\n```"
    return f"## Use\n\n```python\n{_python(document, base, named, reference)}\n```"


def is_own_head(document: Manifest) -> bool:
    """Return whether an output has a head that only this toolkit can load."""
    return bool(_task(document).get("reader"))


def head_of(document: Manifest) -> HeadForm | None:
    """Return the kind of head that an output has according to its manifest; None without a head."""
    task = _task(document)
    return HEAD_FORMS.get(str(task.get("head")), HEAD_FORMS["classes"]) if task.get("labels") else None


def _task(document: Manifest) -> Mapping[str, object]:
    entry = document.get("task")
    return entry if isinstance(entry, Mapping) else {}


def _quoted(text: str) -> str:
    """Return a text as a Python literal in double quotes."""
    return json.dumps(text)


def _by_command(document: Manifest, base: str, reference: str, *, folder: bool) -> str | None:
    """Return usage instructions for an export, a stack or a head on hidden states, which PEFT alone cannot load."""
    if serve := document.get("serve"):
        lines = "\n".join(fill(str(command), base=base, adapter=reference) for command in serve["commands"])
        return f"With {as_markdown(serve['engine'])}:\n\n```bash\n{lines}\n```"
    local = reference if folder else reference.rpartition("/")[2]
    fetch = "" if folder else f"hf download {reference} --local-dir {_quoted(local)}\n"
    if document.get("artifact") == "stack":
        lines = f"{fetch}adaptermix evaluate --base {_quoted(local)} --adapter ADAPTER --task TASK --data FILE"
        return f"A model folder of adaptermix, for --base of its commands:\n\n```bash\n{lines}\n```"
    if is_own_head(document):
        data = f"--task {_task(document).get('name', 'TASK')} --data FILE"
        lines = f"{fetch}adaptermix evaluate --base {_quoted(base)} --adapter {_quoted(local)} {data}"
        return (
            "The head reads hidden states in a way that PEFT does not know, so that PEFT alone does not load this "
            f"adapter:\n\n```bash\n{lines}\n```"
        )
    return None


def _delta(reference: str, *, folder: bool) -> str:
    """Return the lines that read a dense delta."""
    name = "delta.safetensors"
    fetch = "" if folder else "from huggingface_hub import hf_hub_download\n"
    path = _quoted(f"{reference}/{name}") if folder else f"hf_hub_download({_quoted(reference)}, {name!r})"
    return (
        f"{fetch}from safetensors.torch import load_file\n\n"
        f"delta = load_file({path})  # add each to the weight of its name"
    )


def _python(document: Manifest, base: str | None, named: str, reference: str) -> str:
    """Return the lines that load a model with transformers and PEFT, and use it once."""
    is_full = document.get("artifact") == "checkpoint"
    revision = document.get("base", {}).get("revision")
    pinned = f", revision={revision!r}" if revision and base else ""
    head = None if is_full else head_of(document)
    template = None if head or document.get("fusion") else _template_of(document)
    auto = head.auto_class if head and head.auto_class else "AutoModelForCausalLM"
    if not head and document.get("base", {}).get("class") == "encoder":
        auto, template = "AutoModel", None
    example = _generation(template) if template else _HEAD_EXAMPLES.get(head.name, "") if head else ""
    example = "" if head and not _is_single_text(document) else example
    tokenizer = _quoted(reference) if is_full else f"{named!r}{pinned}"
    read = f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n" if example else ""
    imports = f"from transformers import {auto}{', AutoTokenizer' * bool(example)}\n\n"
    labels = _task(document).get("labels")
    outputs = f", num_labels={head.outputs or len(labels)}" if head and isinstance(labels, list) else ""
    if is_full:
        residual = _residual(document, reference)
        with_peft = "from peft import PeftModel\n" if residual else ""
        package = _PACKAGES.get(str((document.get("quantization") or {}).get("format")))
        needs = f"# pip install {package}\n" if package else ""
        return (
            f"{needs}{with_peft}{imports}{read}model = {auto}.from_pretrained({_quoted(reference)}){residual}{example}"
        )
    lines = (
        f"from peft import PeftModel\n{imports}{read}"
        f"base = {auto}.from_pretrained({named!r}{outputs}{pinned})\n"
        f"model = PeftModel.from_pretrained(base, {_quoted(reference)})"
    )
    if head and not head.outputs and isinstance(labels, list):
        lines += f"\nlabels = {list(labels)!r}  # in the order of the logits"
    return _fused(document, lines) if document.get("fusion") else lines + example


def _is_single_text(document: Manifest) -> bool:
    """Return whether the task of an output is about one text a row, called `text` in its prompts."""
    try:
        templates = get_task(str(_task(document).get("name"))).templates.values()
    except UsageError:
        return False
    return all(_fields(template.prompt) == ["text"] for template in templates)


def _residual(document: Manifest, reference: str) -> str:
    """Return the line that loads the LoRA next to a quantised model, if it has one."""
    modules = (document.get("fidelity") or {}).get("modules", {})
    if document.get("kind") != "bake" or not any("rank" in module for module in modules.values()):
        return ""
    return f"\nmodel = PeftModel.from_pretrained(model, {_quoted(reference)}, subfolder='residual')"


def _template_of(document: Manifest) -> Template | None:
    """Return the prompt template that an output was trained with; None if this toolkit has no such template."""
    task = _task(document)
    try:
        return get_template(get_task(str(task["name"])), str(task["template"]))
    except (KeyError, UsageError):
        return None


def _fields(text: str) -> list[str]:
    """Return the placeholders of a template's text."""
    return [name for _, name, _, _ in Formatter().parse(text) if name]


def _generation(template: Template) -> str:
    """Return the lines that fill the prompt of a template, and print what the model answers."""
    fields = dict.fromkeys([*_fields(template.system or ""), *_fields(template.prompt)], "...")
    lines = [f"fields = {fields!r}  # the prompt is the one of training; put your own texts here"]
    if template.chat:
        system = [f"{{'role': 'system', 'content': {template.system!r}.format(**fields)}}"] if template.system else []
        turns = ", ".join([*system, f"{{'role': 'user', 'content': {template.prompt!r}.format(**fields)}}"])
        broken = template.broken_after
        breaks = f"\nprompt = prompt.replace({broken!r}, {broken + chr(10)!r})" if broken else ""
        lines += [
            f"turns = [{turns}]",
            f"prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False){breaks}",
            "inputs = tokenizer(prompt, add_special_tokens=False, return_tensors='pt')",
        ]
    else:
        lines += [
            f"prompt = {template.prompt!r}.format(**fields)",
            "inputs = tokenizer(prompt, return_tensors='pt')",
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        "print(tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))",
    ]
    return "\n" + "\n".join(lines)


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
    alone = "\n# PEFT alone loads a plain LoRA, which does not see the sources"
    if encoder := fusion.get("fusion_encoder"):
        known = hub_id(encoder) or "see the settings"
        return (
            f"{lines}\n# its sources are states of another encoder ({known}): `adaptermix evaluate` reads them{alone}"
        )
    settings = f"norm={fusion.get('fusion_norm', True)!r}, offset={fusion.get('fusion_offset', 0)!r}"
    return (
        f"from adaptermix.fusion import fused, read_sources\n{lines}"
        f"\nsources = read_sources(model, tokenizer(source_texts, padding=True, return_tensors='pt'), {settings})"
        "\nwith fused(model, sources):"
        "\n    output = model(**tokenizer(texts, padding=True, return_tensors='pt'))"
        f"{alone}"
    )
