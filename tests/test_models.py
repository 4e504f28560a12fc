"""Base models as stacks of blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
)

from adaptermix.errors import ModelError
from adaptermix.io.fingerprints import fingerprint
from adaptermix.models.base import backbone, load_base
from adaptermix.models.blocks import block_index, blocks, keep_blocks, linear_names
from adaptermix.models.devices import pick_device, pick_dtype
from adaptermix.models.pretrained import split_revision
from adaptermix.options import TrainingSettings
from adaptermix.training.layer_states import MiddleStates
from adaptermix.training.lora import count_trainable, inject
from tests.tiny import tiny_causal, tiny_encoder

from .refusals import refuses


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


@pytest.mark.parametrize(("kind", "norm"), [("llama", "norm"), ("qwen2", "norm"), ("gemma3", "norm"), ("bert", None)])
def test_at_the_last_block_it_is_the_state_before_the_final_norm(kind: str, norm: str | None, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / kind) if kind == "bert" else tiny_causal(tmp_path / kind, kind)
    whole, cut = (load_base(str(folder), dtype="float32", device="cpu") for _ in range(2))
    keep_blocks(cut.model, cut.layers)
    ids = whole.tokenizer("some words")["input_ids"]
    raw: list[torch.Tensor] = []
    stack = blocks(whole.model)[1]
    stack[-1].register_forward_hook(lambda _m, _i, out: raw.append(out if isinstance(out, torch.Tensor) else out[0]))
    last = backbone(whole)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(MiddleStates(cut).pooled([ids])[0], raw[0][0].mean(0), rtol=1e-5, atol=1e-5)
    if norm:
        torch.testing.assert_close(backbone(whole).get_submodule(norm)(raw[0]), last)
        assert not torch.allclose(raw[0], last, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "path", "names"),
    [
        ("llama", "model.layers", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("qwen2", "model.layers", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("gemma3", "model.layers", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("bert", "encoder.layer", "dense key query value"),
    ],
)
def test_blocks_and_their_linear_layers_are_found_and_cut(kind: str, path: str, names: str, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / kind) if kind == "bert" else tiny_causal(tmp_path / kind, kind)
    base = load_base(str(folder), dtype="float32", device="cpu")
    kept = list(blocks(base.model)[1])[:2]
    assert (blocks(base.model)[0], base.layers) == (path, 4)
    assert linear_names(base.model) == names.split()
    keep_blocks(base.model, 2)
    assert (blocks(base.model)[0], base.layers, list(blocks(base.model)[1])) == (path, 2, kept)
    assert base.model.config.num_hidden_layers == 2


def test_a_model_without_blocks_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = LlamaConfig(num_hidden_layers=3)  # type: ignore[assignment]
    with refuses("model.no-blocks: Linear.*3"):
        blocks(model)


def test_a_loaded_model_is_frozen_in_eval_mode_and_can_pad(causal: Path, encoder: Path) -> None:
    for folder, kind in ((causal, "causal"), (encoder, "encoder")):
        base = load_base(str(folder), dtype="bfloat16", device="cpu")
        assert (base.kind, base.model.training, base.model.dtype) == (kind, False, torch.bfloat16)
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert base.tokenizer.pad_token is not None
        assert base.entry() == {
            "id": str(folder),
            "revision": None,
            "fingerprint": fingerprint(folder),
            "class": kind,
            "dtype": "bfloat16",
        }


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_and_auto_is_one_that_the_hardware_has(name: str) -> None:
    assert pick_dtype(name, torch.device("cpu")) == getattr(torch, name)
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_devices_are_picked_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("meta", "mps", "cuda:-1", "", "cuda:x"):
        with refuses("device.unknown"):
            pick_device(name)
    with refuses("device.not-there"):
        pick_device("cuda:99")


def test_the_fingerprint_follows_content_names_and_sizes_of_weights_alone(tmp_path: Path) -> None:
    same, other = tiny_causal(tmp_path / "one"), tiny_causal(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert (same / weights).stat().st_size == (other / weights).stat().st_size
    marks = {fingerprint(same), fingerprint(other)}
    assert len(marks) == 2
    before = fingerprint(same)
    (same / "notes.txt").write_text("not weights")
    assert fingerprint(same) == before
    (same / weights).rename(same / "renamed.safetensors")
    assert fingerprint(same) not in marks
    assert fingerprint(tmp_path) is None


def _damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "garbage":
        weights.write_bytes(b"garbage" * 100)
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "kind", ["garbage", "cut short", "no weights", "other shapes", "no tokenizer", "broken config"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_model_folder_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = tiny_causal(tmp_path / "model")
    _damage(folder, kind)
    with pytest.raises(ModelError, match=r"cannot be loaded from this folder: \S|config.json must be JSON") as caught:
        load_base(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_pad_or_end_is_refused(tmp_path: Path) -> None:
    folder = tiny_causal(tmp_path / "model")
    bare = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    for special in ({}, {"pad_token": "<pad>"}):
        PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(folder)
        with refuses("model.special-tokens"):
            load_base(str(folder), device="cpu")
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(folder)
    tokenizer = load_base(str(folder), device="cpu").tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("layer", "count", "expected"), [("middle", 30, 15), ("middle", 1, 1), ("middle", 7, 3), ("last", 7, 7), (7, 7, 7)]
)
def test_layers_by_number_and_name(layer: int | str, count: int, expected: int) -> None:
    assert block_index(layer, count) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [0, 8, -1])
def test_layers_out_of_range_are_refused(layer: int) -> None:
    with refuses("model.block-index: 7"):
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
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    for reference, message in [
        (str(tmp_path / "none"), "base.not-found"),
        (str(tmp_path / "whisper"), "model.encoder-decoder"),
    ]:
        with refuses(message) as caught:
            load_base(reference)
        assert "\n" not in str(caught.value)


def test_devices_that_are_not_there_are_refused() -> None:
    with refuses("device.unknown"):
        pick_device("gpu9")
    if not torch.cuda.is_available():
        with refuses("device.not-there: 0"):
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
