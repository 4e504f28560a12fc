"""The header of a model card, by huggingface_hub's classes, and the scores in the Hub's files for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..provenance.manifest import Manifest
from .private import hub_id
from .usage import head_of, is_own_head

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Relation = Literal["adapter", "merge", "quantized", "finetune"]
"""Values of `base_model_relation` on the Hub."""
_LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "stack": "adaptermix"}
"""The Hub's names of the libraries that read outputs which PEFT and transformers do not."""
_CODE = re.compile(r"(?<![A-Za-z])[a-z]{2,3}(?![A-Za-z])")
_HUB_DATA = re.compile(
    r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?"
)
_NOT_A_NAME = re.compile(r"[^\w.-]+")


def is_full(document: Manifest) -> bool:
    """Return whether an output is a whole checkpoint."""
    return document.get("artifact") == "checkpoint"


def header(document: Manifest, *, name: str, base: str | None) -> str:
    """Return the YAML header of a card, without its `---` lines.

    Args:
        document: The manifest.
        name: Title of the card, the model's name in `model-index`.
        base: Id of the base model on the Hub; None without an id.
    """
    bases = _bases(document, base)
    entries: dict[str, Any] = {
        "base_model": bases[0] if len(bases) == 1 else bases,
        "datasets": _data_sets(document),
        "language": languages(document),
        "library_name": _library(document),
        "pipeline_tag": _pipeline(document),
        "tags": _tags(document),
        "base_model_relation": relation(document) if bases and document.get("artifact") != "stack" else None,
    }
    entries = {key: value for key, value in entries.items() if value}
    if results := list(_results(document)):
        from huggingface_hub import ModelCardData

        metrics = [str(document["scores"]["metric"])]
        return f"{ModelCardData(**entries, eval_results=results, metrics=metrics, model_name=name).to_yaml()}\n"
    # The same text as by that class, without its import of .1 seconds in every merge.
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def relation(document: Manifest) -> Relation:
    """Return how an output was derived from its base model, in the Hub's words."""
    if not is_full(document):
        return "adapter"
    if document.get("quantization"):
        return "quantized"
    acting = [entry for entry in document.get("inputs", ()) if entry.get("weight", 1)]
    return "finetune" if document.get("kind") == "bake" and len(acting) == 1 else "merge"


def languages(document: Manifest) -> list[str]:
    """Return the languages of the adapters that act in an output, as ISO 639 codes; the Hub accepts no others.

    Pairs (de-en) give two codes, and scripts (zh-Hant) are dropped.
    """
    names = {name for names in document.get("languages", {}).values() for name in names}
    return sorted({code for name in names for code in _CODE.findall(name)})


def _library(document: Manifest) -> str:
    if library := _LIBRARIES.get(str(document.get("artifact"))):
        return library
    if is_own_head(document):
        return "adaptermix"
    return "transformers" if is_full(document) else "peft"


def _tags(document: Manifest) -> list[str]:
    kinds = {"checkpoint": "model", "stack": "stack"}
    kind = kinds.get(str(document.get("artifact")), "lora")
    return [kind, "adaptermix", str(document.get("kind"))] if document.get("versions") else [kind]


def _pipeline(document: Manifest) -> str | None:
    """Return the Hub's name of the model's task; None if the manifest does not contain it."""
    if document.get("artifact") == "delta":
        return None
    if head := head_of(document):
        return head.pipeline or None
    if is_own_head(document):
        return None
    classes = {"causal": "text-generation", "encoder": "feature-extraction"}
    return classes.get(str(document.get("base", {}).get("class")))


def _bases(document: Manifest, base: str | None) -> list[str]:
    """Return the ids of the models that an output was made from: of a merge of checkpoints also those merged."""
    ids = [base] if base else []
    if document.get("artifact") == "stack":
        ids.append(hub_id(str(document["stack"]["encoder"]["id"]).partition("@")[0]) or "")
    merged = [entry for entry in document.get("inputs", ()) if entry.get("kind") == "checkpoint"]
    named = [str(entry.get("path")) for entry in merged if entry.get("weight")]
    # A name without an owner may be the last part of a local path.
    ids += [hub_id(name) or "" for name in named if "/" in name]
    return list(dict.fromkeys(name for name in ids if name))


def _data_sets(document: Manifest) -> list[str]:
    """Return the ids of the Hub's data sets that the output was trained on."""
    named = [_HUB_DATA.fullmatch(str(entry.get("name"))) for entry in _files(document, "data")]
    return sorted({match["name"] for match in named if match})


def _files(document: Manifest, name: str) -> list[Mapping[str, object]]:
    return [entry for entry in document.get(name) or () if isinstance(entry, Mapping)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A score with the file that it was measured on.

    Args:
        language: The language.
        value: The score.
        note: Its interval, its rows and the file's hash.
        file: The file's name in the manifest.
        data: Parts of the name, if the file is a data set of the Hub.
        split: `test` or `dev`.
    """

    language: str
    value: float
    note: str
    file: str
    data: re.Match[str] | None
    split: str


def _scored(document: Manifest) -> Iterator[_Scored]:
    """Yield the scores of languages whose data the manifest names: one file of that language."""
    scores = document.get("scores") or {}
    if scores.get("split", "dev") != "dev":  # scores of translation pairs measure no task
        return
    files = _files(document, "dev")
    for language, score in scores.get("scores", {}).items():
        measured = [file for file in files if file.get("languages") == [language]]
        measured = measured or (files if len(files) == 1 else [])
        if len(measured) != 1:
            continue
        name, digest = str(measured[0].get("name")), str(measured[0].get("sha256"))
        note = (
            f"95 % interval {score['low']:.4f} to {score['high']:.4f}, {score['n']} rows, sha256 of the data "
            f"{digest[:12]}; the dev data that settings were chosen on"
        )
        data = _HUB_DATA.fullmatch(name)
        yield _Scored(language=language, value=round(score["value"], 6), note=note, file=name, data=data, split="dev")


def _results(document: Manifest) -> Iterator[EvalResult]:
    """Yield the scores for `model-index`, which older readers of the Hub use."""
    for scored in _scored(document):
        from huggingface_hub import EvalResult

        task, metric = str(document["scores"]["task"]), str(document["scores"]["metric"])
        data = scored.data
        yield EvalResult(
            task_type=_pipeline(document) or "text-generation",
            task_name=task,
            dataset_type=data["name"] if data else _NOT_A_NAME.sub("-", task),
            dataset_name=f"{data['name'] if data else scored.file} ({scored.language})",
            dataset_config=(data["config"] or None) if data else scored.language,
            dataset_split=(data["split"] or "train") if data else scored.split,
            dataset_revision=data["revision"] if data else None,
            metric_type=metric,
            metric_value=scored.value,
            metric_name=f"{metric}, {scored.note}",
        )


def score_files(document: Manifest, repo: str) -> dict[str, bytes]:
    """Return the Hub's files of scores, `.eval_results/TASK.yaml`: one entry per language on data sets of the Hub.

    Scores on other files have no entry, since an entry must name a data set of the Hub. Entries have no date, since
    manifests contain none; the Hub shows the commit's.

    Args:
        document: The manifest.
        repo: The repository, as owner/name.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=scored.data["name"],
            task_id=scored.language,
            value=scored.value,
            dataset_revision=scored.data["revision"],
            source_url=f"https://huggingface.co/{repo}",
            source_name="Model card",
            notes=f"{document['scores']['metric']}, {scored.note}",
        )
        for scored in _scored(document)
        if scored.data
    ]
    if not entries:
        return {}
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    name = _NOT_A_NAME.sub("-", str(document["scores"]["task"])).strip(".-") or "scores"
    return {f".eval_results/{name}.yaml": text.encode()}
