"""The model card comes from the manifest, and its header is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from adaptermix.publish.card import card, hub_id
from adaptermix.publish.header import header as header_text

SCORES = {
    "task": "slots",
    "metric": "pair_f1",
    "split": "dev",
    "scores": {
        "de": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 40},
        "en": {"value": 0.8125, "low": 0.7, "high": 0.9, "n": 41},
    },
}


def document(**more: Any) -> dict[str, Any]:
    return {
        "kind": "search",
        "plan": {"weights": [0.9, 0.1]},
        "base": {"id": "org/base-1.5", "revision": None, "fingerprint": "ab", "class": "causal"},
        "versions": {"adaptermix": "0.1.0", "torch": "2.9"},
        "languages": {"supervised": ["en"], "aligned": ["de", "en", "no"]},
    } | more


def header(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_a_header_without_scores_is_that_of_the_hubs_class() -> None:
    document = {"kind": "merge", "languages": {"supervised": ["de", "zh-Hant"]}, "versions": {"adaptermix": "1"}}
    for base in ("org/name", None):
        text = header_text(document, name="m", base=base)
        assert text == f"{ModelCardData(**yaml.safe_load(text)).to_yaml()}\n"
        assert yaml.safe_load(text).get("base_model") == base


def test_the_header_is_yaml_that_the_hub_reads() -> None:
    found = header(card(document(), name="merged"))
    assert found["library_name"] == "peft"
    assert found["base_model"] == "org/base-1.5"
    assert found["base_model_relation"] == "adapter"
    assert found["tags"] == ["lora", "adaptermix", "search"]
    assert ModelCardData(**found).to_dict()["base_model"] == "org/base-1.5"


def test_languages_stay_strings_also_where_yaml_would_read_a_truth_value() -> None:
    assert header(card(document(), name="merged"))["language"] == ["de", "en", "no"]


def test_languages_of_the_header_are_codes_that_the_hub_takes() -> None:
    languages = {"supervised": ["en-de", "zh-Hant-en"], "aligned": ["gsw", "zh-Hant"]}
    text = card(document(languages=languages), name="merged")
    assert header(text)["language"] == ["de", "en", "gsw", "zh"]
    assert "zh-Hant" in text


def test_a_local_base_is_not_named_in_the_header_for_the_hub_would_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in (str(tmp_path / "model"), "/nowhere/model", "../model", "a/b/c"):
        text = card(document(base={"id": name}), name="merged")
        assert "base_model" not in header(text)
        assert name not in text  # it may hold a user's name, and nobody else has it
        assert f"a base model in the local folder `{name.rsplit('/', 1)[1]}`" in text


def test_a_relative_folder_that_looks_like_an_id_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/base") is None
    assert hub_id("org/other") == "org/other"
    assert hub_id(None) is None


def test_a_card_without_a_base_or_languages_is_still_valid() -> None:
    text = card({"kind": "adapter", "plan": {}}, name="x")
    assert set(header(text)) == {"library_name", "tags"}
    assert "BASE MODEL" in text


def test_scores_stand_in_a_table_one_row_per_language() -> None:
    text = card(document(scores=SCORES), name="merged")
    assert "slots, pair_f1 on dev" in text
    assert "| de | 0.500 | 0.250 to 0.750 | 40 |" in text
    assert "| en | 0.812 | 0.700 to 0.900 | 41 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_inputs_and_fidelity_are_shown_where_there_are_any() -> None:
    text = card(
        document(
            inputs=[{"name": "task", "weight": 0.9, "weights_sha256": "f" * 64}],
            fidelity={"norm": 12.3456, "residual": 0.0312, "sign_conflict": 0.25},
        ),
        name="merged",
    )
    assert f"| task | 0.9 | `{'f' * 12}` |" in text
    assert "12.35" in text
    assert "3.12%" in text
    assert "25.0%" in text
    assert "## Made from" not in card(document(), name="merged")


def test_the_lines_of_use_name_the_right_class_and_are_python() -> None:
    for kind, expected in (("causal", "AutoModelForCausalLM"), ("encoder", "AutoModel")):
        text = card(document(base={"id": "org/base", "class": kind}), name="merged")
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert f"{expected}.from_pretrained('org/base')" in code


def test_equal_manifests_give_equal_cards() -> None:
    assert card(document(scores=SCORES), name="x") == card(document(scores=SCORES), name="x")


def test_english_is_named_as_a_side_only_where_it_was_one() -> None:
    def text_of(names: list[str], *pairs: list[str]) -> str:
        files = [{"name": "x", "languages": pair, "sha256": str(number)} for number, pair in enumerate(pairs)]
        return card(document(languages={"aligned": names}, data=files), name="x")

    assert "Languages: aligned with English in de, jv." in text_of(["de", "en", "jv"], ["de", "en"], ["en", "jv"])
    assert "Languages: aligned in the pairs de-fr." in text_of(["de", "fr"], ["de", "fr"])
    assert "aligned in the pairs de-en, fr-it." in text_of(["de", "en", "fr", "it"], ["de", "en"], ["fr", "it"])
    assert "Languages: aligned in de, en." in text_of(["de", "en"])  # files of another tool: the sides are not known


@pytest.mark.parametrize(("weights", "chance"), [([0.5, 0.5], "50%"), ([1, 1, 1], "75%"), ([1, 0, 1], "50%")])
def test_sign_conflicts_stand_beside_their_chance(weights: list[float], chance: str) -> None:
    inputs = [{"name": "a", "weight": weight, "weights_sha256": "f" * 64} for weight in weights]
    text = card(document(inputs=inputs, fidelity={"norm": 1.0, "residual": 0.0, "sign_conflict": 0.5}), name="x")
    assert f"mean share of sign conflicts 50.0% ({chance} is chance)" in text


HOSTILE = "x\n# Owned\n<script>alert(1)</script> [a](http://b) `c` | d \u202e\x1b[31m"


def test_foreign_text_has_no_effect_in_the_body() -> None:
    text = card(
        document(
            languages={"supervised": [HOSTILE], HOSTILE: ["de"]},
            inputs=[{"name": HOSTILE, "weight": 1, "weights_sha256": HOSTILE}],
            tested=[{"name": HOSTILE}],
            scores={"task": HOSTILE, "metric": HOSTILE, "split": HOSTILE, "scores": {HOSTILE: SCORES["scores"]["de"]}},
            base={"id": HOSTILE},
            plan={"template": f"```\n{HOSTILE}"},
            task={"name": "classify", "labels": [HOSTILE, "```"]},
        ),
        name=HOSTILE,
        reference=f'me/x")\n```\n{HOSTILE}',
    )
    body = text.split("---\n", 2)[2]
    prose = "".join(part for number, part in enumerate(body.split("\n```")) if number % 2 == 0)
    assert "<script>" not in prose
    assert "](http" not in prose
    headings = [line for line in prose.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# x &#35; Owned &#60;script&#62;")
    assert set(headings[1:]) <= {"## Use", "## Made from", "## Scores", "## Settings"}
    assert not set(text) & set("\x1b\u202e")
    assert body.count("\n```") % 2 == 0
    code = body.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("more", "library", "tag", "relation"),
    [
        ({}, "peft", "lora", "adapter"),
        ({"kind": "train-task"}, "peft", "lora", "adapter"),
        ({"kind": "merge", "artifact": "checkpoint"}, "transformers", "model", "merge"),
        ({"kind": "bake", "artifact": "checkpoint"}, "transformers", "model", "merge"),
    ],
)
def test_the_header_tells_an_adapter_from_a_full_model(
    more: dict[str, str], library: str, tag: str, relation: str
) -> None:
    found = header(card(document(**more), name="x"))
    assert (found["library_name"], found["tags"][0], found["base_model_relation"]) == (library, tag, relation)
