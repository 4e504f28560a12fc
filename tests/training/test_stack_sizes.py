"""Sizes of stacks: positions of the encoder, narrow word embeddings, and files that are fetched on loading."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BloomConfig,
    ElectraConfig,
    ElectraModel,
    GPTNeoXConfig,
    OPTConfig,
)

from adaptermix import evaluate, train_stack, train_task
from adaptermix.models.base import fingerprint_of
from adaptermix.models.both_sides import see_both_sides
from adaptermix.models.positions import positions_of
from adaptermix.models.stack import StackForm
from adaptermix.models.stack_parts import load_encoder

from ..halves import tiny_encoder_decoder
from ..refusals import refuses
from ..tiny import tiny_encoder
from .stacks import TEXTS, batch_of, loaded, stack_settings, write_texts
from .test_heads import evaluated, settings_for, write_labels
from .test_mixed_stack import mixed_settings

POSITIONS = 24
LONG = [f"{text} and much more than fits" for text in TEXTS]


@pytest.fixture(scope="module")
def short(below: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with few positions, which its tokenizer does not mention."""
    folder = tmp_path_factory.mktemp("short")
    config = AutoConfig.from_pretrained(below, max_position_embeddings=POSITIONS)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(below).save_pretrained(folder)
    return folder


def test_the_encoder_limits_the_texts_of_a_stack(causal: Path, short: Path, tmp_path: Path) -> None:
    train_stack(stack_settings(causal, short, tmp_path, steps=1, texts=[write_texts(tmp_path, "x.txt", LONG)]))
    stack = tmp_path / "stack"
    base = loaded(stack)
    assert positions_of(base.model) == POSITIONS
    assert base.tokenizer.model_max_length > POSITIONS  # so that the limit is that of the model
    data = write_labels(tmp_path, "long.en.tsv", [(text, text[:3]) for text in LONG])
    train_task(settings_for(stack, tmp_path, head="auto", train=[data], steps=1, max_length=100))
    found = evaluate(evaluated(stack, tmp_path / "out", data))
    assert found.scores["en"].n == len(LONG)


def test_the_encoder_does_not_limit_the_rows_of_a_stack_that_generates(
    causal: Path, short: Path, tmp_path: Path
) -> None:
    train_stack(mixed_settings(causal, short, tmp_path, mode="augment", steps=1))
    base = loaded(tmp_path / "out")
    assert positions_of(base.model) == positions_of(loaded(causal).model)
    assert base.mixed
    assert base.mixed.longest == POSITIONS


def test_an_encoder_without_a_limit_reads_longer_texts_than_in_stage_1(causal: Path, tmp_path: Path) -> None:
    below = tiny_encoder_decoder(tmp_path / "below", "mt5")
    train_stack(stack_settings(causal, below, tmp_path, steps=1, max_length=16))
    stack = loaded(tmp_path / "stack")
    assert positions_of(stack.model) == positions_of(loaded(causal).model)
    assert stack.tokenizer.model_max_length == loaded(below).tokenizer.model_max_length


def test_word_embeddings_may_be_narrower_than_the_states(below: Path, tmp_path: Path) -> None:
    top = tiny_encoder(tmp_path / "top")
    sizes = json.loads((top / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = ElectraConfig(**{name: sizes[name] for name in names}, embedding_size=8, architectures=["ElectraModel"])
    ElectraModel(config).save_pretrained(top)
    planned = train_stack(stack_settings(top, below, tmp_path, dry_run=True)).parameters
    assert train_stack(stack_settings(top, below, tmp_path, steps=1)).parameters == planned
    assert load_file(tmp_path / "stack" / "projection.safetensors")["weight"].shape == (8, 16)
    base = loaded(tmp_path / "stack")
    batch = batch_of(base.tokenizer)
    with torch.no_grad():
        found = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert found.last_hidden_state.shape[-1] == 32


def test_an_encoder_that_loading_fetches_is_checked(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is loaded, there are no files whose hash could be computed."""
    fetched: set[str] = set()

    def fetch(reference: str, **options: Any) -> Any:
        fetched.add(reference)
        return load_encoder(reference, **options)

    def hashed(reference: str) -> str | None:
        return fingerprint_of(reference) if reference != encoder else "others" if encoder in fetched else None

    encoder = StackForm.read(stack).encoder.id
    monkeypatch.setattr("adaptermix.models.base.load_encoder", fetch)
    monkeypatch.setattr("adaptermix.models.base.fingerprint_of", hashed)
    with refuses("stack.changed"):
        loaded(stack)


@pytest.mark.parametrize(("kind", "pads_alike"), [("nllb", True), ("mt5", True), ("nllb", False)])
def test_an_encoder_half_may_be_on_top(kind: str, pads_alike: bool, below: Path, tmp_path: Path) -> None:
    """NLLB numbers positions from its own padding token, T5 has no positions."""
    top = tiny_encoder_decoder(tmp_path / "top", kind)
    encoder = tiny_encoder_decoder(tmp_path / "below", kind) if pads_alike else below
    settings = stack_settings(top, encoder, tmp_path, steps=1)
    if not pads_alike:
        with refuses("stack.positions"):
            train_stack(settings)
        return
    train_stack(settings)
    base = loaded(tmp_path / "stack")
    rows = base.encode(["red", "the red sky"], ["en", "en"])
    states = []
    for texts in ([0], [0, 1]):
        batch = base.tokenizer.pad([{"input_ids": rows[text]["input_ids"]} for text in texts], return_tensors="pt")
        with torch.no_grad():
            found = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        states.append(found.last_hidden_state[0][batch["attention_mask"][0].bool()])
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (OPTConfig(ffn_dim=64, word_embed_proj_dim=32), "stack.attention: OPTModel"),
        (BloomConfig(), "stack.attention: BloomModel"),
        (GPTNeoXConfig(intermediate_size=64), None),
    ],
    ids=["opt", "bloom", "neox"],
)
def test_a_decoder_that_needs_a_mask_of_tokens_is_refused_by_name(config: Any, code: str | None) -> None:
    config.update({"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4})
    body = AutoModel.from_config(config).eval()
    with refuses(code) if code else nullcontext():
        see_both_sides(body)
