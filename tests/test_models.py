"""Base models as stacks of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config

from adaptermix.errors import ModelError
from adaptermix.models import backbone, block_index, keep_blocks, load_base, pick_device, split_revision
from adaptermix.settings import TrainingSettings
from adaptermix.train.align import MiddleStates
from adaptermix.train.lora import count_trainable, inject
from tests.tiny import tiny_causal, tiny_encoder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "bert"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_cut_model_gives_the_hidden_state_of_the_whole(kind: str, layer: int, tmp_path: Path) -> None:
    make = tiny_encoder if kind == "bert" else tiny_causal
    folder = make(tmp_path / kind) if kind == "bert" else tiny_causal(tmp_path / kind, kind)
    whole, cut = (load_base(str(folder), dtype="float32", device="cpu") for _ in range(2))
    keep_blocks(cut.model, layer)
    texts = ["some words", "x"]
    encoded = whole.tokenizer(texts)["input_ids"]
    found = MiddleStates(cut).pooled(encoded)
    for row, ids in enumerate(encoded):
        states = backbone(whole)(torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[row], states[layer][0].mean(0), rtol=1e-5, atol=1e-5)


def test_at_the_last_block_it_is_the_state_before_the_final_norm(causal: Path) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    with torch.no_grad():
        base.model.model.norm.weight.fill_(3.0)
    ids = base.tokenizer("some words")["input_ids"]
    after = backbone(base)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    keep_blocks(base.model, base.layers)
    before = MiddleStates(base).pooled([ids])[0]
    caught = base.model.model.norm(before[None])
    assert not torch.allclose(before, after[0].mean(0), atol=1e-3)
    assert caught.shape == (1, 32)


@pytest.mark.parametrize(
    ("layer", "count", "expected"), [("middle", 30, 15), ("middle", 1, 1), ("middle", 7, 3), (7, 7, 7)]
)
def test_layers_by_number_and_name(layer: int | str, count: int, expected: int) -> None:
    assert block_index(layer, count) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [0, 8, -1])
def test_layers_out_of_range_are_refused(layer: int) -> None:
    with pytest.raises(ModelError, match="from 1 to 7"):
        block_index(layer, 7)


def test_revisions_are_split_off_unless_it_is_a_folder(tmp_path: Path) -> None:
    assert split_revision("org/model@v1") == ("org/model", "v1")
    assert split_revision("org/model") == ("org/model", None)
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), None)


def test_the_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    one, other = tiny_causal(tmp_path / "one"), tiny_causal(tmp_path / "other", layers=3)
    marks = [load_base(str(folder), device="cpu").fingerprint for folder in (one, one, other)]
    assert marks[0] == marks[1] != marks[2]


def test_missing_and_foreign_models_are_refused_in_one_line(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    for reference, message in [
        (str(tmp_path / "none"), "must be a model folder"),
        (str(tmp_path / "t5"), "encoder-decoder"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            load_base(reference)
        assert "\n" not in str(caught.value)


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match="must be auto, cpu"):
        pick_device("gpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="0 CUDA devices"):
            pick_device("cuda")


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        (
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            ),
            LlamaForCausalLM,
            20_971_520,
        ),
        (
            Qwen2Config(
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                vocab_size=152064,
            ),
            Qwen2ForCausalLM,
            20_185_088,
        ),
    ],
    ids=["Llama-3-8B", "Qwen2.5-7B"],
)
def test_parameter_counts_are_those_of_the_paper(config: object, model: type, expected: int) -> None:
    """Rank 8 on all linear layers; Liu and Niehues report these counts."""
    with torch.device("meta"):
        network = model(config)
    inject(network, TrainingSettings(base="x", out="y", rank=8), seed=0)
    assert count_trainable(network) == expected
