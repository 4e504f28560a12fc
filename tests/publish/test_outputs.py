"""Everything that the toolkit writes can be pushed, and its card says how it was derived and how to run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries

from adaptermix import BakeSettings, bake, merge, push
from adaptermix.publish.card import card
from adaptermix.publish.folder import prepare
from adaptermix.publish.header import score_files
from adaptermix.tasks import get_task, get_template

from ..factories import peft_lora, peft_noise, tiny_llama
from ..tiny import tiny_causal
from .test_card import SCORES, document
from .test_push import settings


def data_of(text: str) -> dict[str, Any]:
    """Return the header, read by huggingface_hub."""
    return ModelCard(text).data.to_dict()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    base = tiny_llama(home / "base")
    for seed, name in enumerate(("a", "b")):
        peft_lora(base, home / name, seed=seed, r=2, target_modules=["q_proj", "down_proj"])
    return home


@pytest.mark.parametrize(
    ("name", "options", "relation"),
    [
        ("16 bits", {"shard_size": "20KB"}, "finetune"),
        ("two adapters", {"adapter": ["a", "b"]}, "merge"),
        ("8 bits", {"quantize": "int8", "strategy": "requantize"}, "quantized"),
        ("4 bits", {"quantize": "nf4", "strategy": "requantize"}, "quantized"),
        ("4 bits of compressed-tensors", {"quantize": "int4", "strategy": "requantize"}, "quantized"),
        ("apart", {"strategy": "keep"}, "adapter"),
    ],
)
def test_baked_models_are_published_as_what_they_are(
    name: str, options: dict[str, Any], relation: str, home: Path, tmp_path: Path
) -> None:
    adapters = [str(home / one) for one in options.pop("adapter", ["a"])]
    out = tmp_path / "baked"
    bake(BakeSettings(base=str(home / "base"), adapter=adapters, out=str(out), keep_at_least=0, **options))
    report = push(settings(out, base_id="org/base", dry_run=True))
    written = {path.name for path in out.iterdir() if path.suffix in (".safetensors", ".json")}
    assert written <= {file for file, _ in report.files}
    data = data_of(report.card)
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", relation)
    assert data["library_name"] == ("peft" if relation == "adapter" else "transformers")
    assert (data["license"], data["pipeline_tag"]) == ("mit", "text-generation")
    assert str(home) not in report.card
    packages = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int4": "compressed-tensors"}
    package = packages.get(options.get("quantize", ""))
    assert re.findall(r"# pip install (\S+)", report.card) == ([package] if package else [])


def test_a_merge_of_checkpoints_names_those_on_the_hub_and_no_folder() -> None:
    inputs = [
        {"name": "one", "path": "org/one", "revision": "v1", "kind": "checkpoint", "weight": 0.5},
        {"name": "two", "path": "two", "kind": "checkpoint", "weight": 0.5},
        {"name": "none", "path": "org/none", "kind": "checkpoint", "weight": 0},
    ]
    inputs = [{**entry, "weights_sha256": "ab"} for entry in inputs]
    text = card(document(kind="merge", artifact="checkpoint", inputs=inputs), name="x")
    data = data_of(text)
    assert data["base_model"] == ["org/base-1.5", "org/one"]
    assert data["base_model_relation"] == "merge"
    assert "| org/one@v1 | 0.5 |" in text


def test_an_adapter_from_the_cache_of_the_hub_is_named_by_its_id(home: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--task" / "snapshots" / "0a1b2c"
    cached.parent.mkdir(parents=True)
    peft_lora(home / "base", cached, r=2, target_modules=["q_proj"])
    merge([cached, home / "b"], weights=[0.5], out=tmp_path / "merged")
    published = prepare(tmp_path / "merged", "me/x", base_id="org/base", licence="mit")
    assert "| org/task@0a1b2c | 0.5 |" in published.card
    assert str(tmp_path) not in published.card + str(published.files["adaptermix.json"])


DEV = [
    {"name": "hf:org/slots@v2:de:validation", "languages": ["de"], "sha256": "d" * 64},
    {"name": "dev.en.tsv", "languages": ["en"], "sha256": "e" * 64},
]


def test_scores_are_in_the_header_and_in_the_files_of_the_hub() -> None:
    made = document(scores=SCORES, dev=DEV, data=[{"name": "hf:org/slots:de:train", "sha256": "f"}])
    data = ModelCard(card(made, name="merged")).data
    assert data.datasets == ["org/slots"]
    results: list[EvalResult] = data.eval_results
    of = {result.dataset_name: result for result in results}
    german = of["org/slots (de)"]
    assert (german.dataset_type, german.dataset_config, german.dataset_split) == ("org/slots", "de", "validation")
    assert (german.dataset_revision, german.metric_type, german.metric_value) == ("v2", "pair_f1", 0.5)
    assert (of["dev.en.tsv (en)"].metric_value, of["dev.en.tsv (en)"].dataset_type) == (0.8125, "slots")
    files = score_files(made, "me/x")
    assert list(files) == [".eval_results/slots.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(files[".eval_results/slots.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.dataset_revision) == ("org/slots", "de", 0.5, "v2")
    assert entry.source_url == "https://huggingface.co/me/x"
    assert "0.2500 to 0.7500, 40 rows" in str(entry.notes)
    assert "d" * 12 in str(entry.notes)


def test_scores_of_pairs_or_of_unnamed_files_are_no_results() -> None:
    for made in (document(scores=SCORES | {"split": "pairs"}, dev=DEV), document(scores=SCORES)):
        assert "model-index" not in data_of(card(made, name="x"))
        assert score_files(made, "me/x") == {}


@pytest.mark.parametrize(("task", "template"), [("slots", "plain"), ("slots", "mid-align"), ("nli", "chat")])
def test_a_visitor_runs_the_lines_of_the_card_with_the_prompt_of_training(
    task: str, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_causal(tmp_path / "base", layers=1, chat=True)
    adapter = peft_lora(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    made = document(task={"name": task, "template": template}, base={"id": "org/x", "class": "causal"})
    text = card(made, name="x", reference=str(adapter), base=str(base))
    scope: dict[str, Any] = {}
    with peft_noise():
        exec(text.split("```python\n")[1].split("\n```")[0], scope)  # noqa: S102  (the lines of our own card)
    expected = get_template(get_task(task), template).encode(scope["fields"], scope["tokenizer"])
    assert scope["inputs"]["input_ids"].tolist() == [expected]
    answer = scope["tokenizer"].decode(scope["output"][0, len(expected) :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_head_of_our_own_names_the_lines_that_fetch_and_run_it() -> None:
    made = document(task={"name": "classify", "reader": {"layers": [1]}, "labels": ["a", "b"]})
    text = card(made, name="x", reference="me/x")
    assert 'hf download me/x --local-dir "x"' in text
    assert 'adaptermix evaluate --base "org/base-1.5" --adapter "x" --task classify' in text
    assert data_of(text)["library_name"] == "adaptermix"


def test_pictures_that_are_sent_are_shown(merged: Path) -> None:
    manifest = json.loads((merged / "adaptermix.json").read_text())
    (merged / "adaptermix.json").write_text(json.dumps(manifest | {"files": [*manifest["files"], "weights.png"]}))
    for name in ("weights.png", "layers.png"):
        (merged / name).write_bytes(b"picture")
    text = push(settings(merged, dry_run=True)).card
    assert "![weights](weights.png)" in text
    assert "layers.png" not in text
