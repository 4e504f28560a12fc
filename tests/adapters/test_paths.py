"""One path per module: adapters of one base in several classes and wrappers, with PEFT as the judge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import merge
from adaptermix.adapters import AdapterMeta, AdapterState, TargetSpec, open_adapter, open_adapters, write_adapter
from adaptermix.adapters.paths import fitted, two_roots
from adaptermix.algebra import LowRank

from ..factories import CONFIG, WEIGHTS, peft_noise, write_lora
from ..refusals import refuses

SIZE: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
WIDE = SIZE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

# Config, class with a head, attribute of the model inside, modules of a small and of another set.
CLASSES: dict[str, tuple[Any, Any, str, list[str], list[str]]] = {
    "bert": (
        tf.BertConfig(**WIDE),
        tf.BertForSequenceClassification,
        "bert",
        ["query", "value"],
        ["output.dense", "value"],
    ),
    "roberta": (
        tf.XLMRobertaConfig(**WIDE),
        tf.XLMRobertaForTokenClassification,
        "roberta",
        ["query"],
        ["intermediate.dense"],
    ),
    "distilbert": (
        tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, **SIZE),
        tf.DistilBertForSequenceClassification,
        "distilbert",
        ["q_lin"],
        ["lin1", "q_lin"],
    ),
    "deberta": (
        tf.DebertaV2Config(**WIDE),
        tf.DebertaV2ForSequenceClassification,
        "deberta",
        ["query_proj"],
        ["key_proj"],
    ),
    "electra": (
        tf.ElectraConfig(embedding_size=32, **WIDE),
        tf.ElectraForQuestionAnswering,
        "electra",
        ["query"],
        ["query", "key"],
    ),
    "gpt2": (
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZE),
        tf.GPT2ForSequenceClassification,
        "transformer",
        ["c_attn"],
        ["mlp.c_proj"],
    ),
    "llama": (
        tf.LlamaConfig(num_key_value_heads=2, **WIDE),
        tf.LlamaForSequenceClassification,
        "model",
        ["q_proj", "v_proj"],
        ["k_proj"],
    ),
}


def head_model(name: str) -> Any:
    config, made, *_ = CLASSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made(config).eval()


def inner_model(name: str) -> Any:
    return getattr(head_model(name), CLASSES[name][2])


def save(model: Any, folder: Path, *, seed: int, **settings: Any) -> Path:
    """Save a random LoRA made by PEFT; trained biases, tokens and whole modules get noise too."""
    from peft import LoraConfig, get_peft_model

    with peft_noise(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        live.save_pretrained(folder)
    for path in folder.glob(CONFIG):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}))
    return folder


def tensors(model: Any) -> dict[str, Tensor]:
    """Return a model's float tensors in float64."""
    return {name: value.double().clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def loaded(model: Any, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Load with PEFT alone; return what it adds to each tensor of the model, and what it says of keys."""
    from peft import PeftModel

    before = tensors(model)
    with peft_noise(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        live = PeftModel.from_pretrained(model, folder).double().merge_and_unload()
    after = tensors(live)
    return {name: after[name] - before[name] for name in before}, [
        str(warning.message) for warning in said if "adapter keys" in str(warning.message)
    ]


def assert_sums(model: Any, out: Path, parts: Sequence[tuple[float, dict[str, Tensor]]]) -> None:
    """Check a merged folder, loaded by PEFT alone, against the weighted sum of what its inputs add."""
    found, complaints = loaded(model, out)
    assert complaints == []
    added = [part for _, part in parts]
    assert any(value.abs().max() > 0.01 for value in found.values())
    assert set().union(*added) <= found.keys()
    for name, value in found.items():
        expected = sum((weight * part[name] for weight, part in parts if name in part), torch.zeros_like(value))
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def under(prefix: str, added: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in added.items()}


@pytest.mark.parametrize("swapped", [False, True], ids=["head-first", "encoder-first"])
@pytest.mark.parametrize("name", CLASSES)
def test_an_encoder_and_a_model_with_a_head_merge_whatever_they_adapt(tmp_path: Path, name: str, swapped: bool) -> None:
    _, _, inside, some, others = CLASSES[name]
    inner = save(inner_model(name), tmp_path / "inner", seed=1, target_modules=others)
    outer = save(head_model(name), tmp_path / "outer", seed=2, target_modules=some)
    pair = [(0.3, inner), (0.7, outer)] if swapped else [(0.7, outer), (0.3, inner)]
    merge([path for _, path in pair], weights=[weight for weight, _ in pair], out=tmp_path / "out")
    parts = [(0.3, under(inside, loaded(inner_model(name), inner)[0])), (0.7, loaded(head_model(name), outer)[0])]
    assert_sums(head_model(name), tmp_path / "out", parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query"], "bias": "lora_only"},
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["query"], "modules_to_save": ["intermediate.dense"]},
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
        {"target_modules": ["word_embeddings"]},
        {"target_modules": r"encoder\.layer\.\d+\.attention\.self\.(query|value)"},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
        {"target_modules": ["query", "value"], "exclude_modules": ["encoder.layer.0.attention.self.query"]},
        {"target_modules": ["query", "value"], "rank_pattern": {"^encoder.layer.0.attention.self.query": 2}},
    ],
    ids=["lora-biases", "all-biases", "whole", "tokens", "embeddings", "regex", "layers", "exclude", "ranks"],
)
def test_all_that_an_encoder_has_moves_under_the_head(tmp_path: Path, settings: dict[str, Any]) -> None:
    inner = save(inner_model("bert"), tmp_path / "inner", seed=1, **settings)
    outer = save(
        head_model("bert"), tmp_path / "outer", seed=2, target_modules=["value", "key"], modules_to_save=["classifier"]
    )
    merge([outer, inner], weights=[0.5, 0.5], out=tmp_path / "out")
    by_inner = under("bert", loaded(inner_model("bert"), inner)[0])
    by_outer = loaded(head_model("bert"), outer)[0]
    # Whole tensors replace those of the base, so weights do not apply to them.
    parts = [
        (0.5, {name: value for name, value in by_outer.items() if "classifier" not in name}),
        (1.0, {name: value for name, value in by_outer.items() if "classifier" in name}),
        (1.0, {name: value for name, value in by_inner.items() if replaced(name, settings)}),
        (0.5, {name: value for name, value in by_inner.items() if not replaced(name, settings)}),
    ]
    assert_sums(head_model("bert"), tmp_path / "out", parts)


def replaced(name: str, settings: dict[str, Any]) -> bool:
    """Whether an adapter with these settings stores a tensor whole."""
    saved = settings.get("modules_to_save", [""])[0] or "\0"
    tokens = "trainable_token_indices" in settings and "word_embeddings" in name
    return name.endswith("bias") or f"{saved}." in name or tokens


def test_an_adapter_whose_head_is_left_out_is_loaded_by_peft(tmp_path: Path) -> None:
    inner = save(inner_model("bert"), tmp_path / "inner", seed=1, target_modules=["query"])
    outer = save(head_model("bert"), tmp_path / "outer", seed=2, target_modules=["query"], task_type="SEQ_CLS")
    merge([outer, inner], weights=[0.0, 0.5], out=tmp_path / "out")
    assert_sums(head_model("bert"), tmp_path / "out", [(0.5, under("bert", loaded(inner_model("bert"), inner)[0]))])


def test_a_task_type_without_its_head_is_not_written(tmp_path: Path) -> None:
    save(head_model("bert"), tmp_path / "one", seed=1, target_modules=["query"])
    state = open_adapter(tmp_path / "one").read()
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", replace(state, meta=replace(state.meta, task_type="SEQ_CLS")))
    added, _ = loaded(head_model("bert"), tmp_path / "one")
    assert_sums(head_model("bert"), tmp_path / "out", [(1.0, added)])


def test_three_adapters_with_three_prefixes(tmp_path: Path) -> None:
    names = ["encoder.layer.0.a", "bert.encoder.layer.0.b", "model.bert.encoder.layer.1.c"]
    for number, path in enumerate(names):
        write_lora(tmp_path / str(number), {path: (4, 4, 2)}, seed=number)
    found = open_adapters([tmp_path / str(number) for number in range(3)])
    roots = [next(iter(source.modules)) for source in found]
    assert roots == ["model.bert.encoder.layer.0.a", "model.bert.encoder.layer.0.b", "model.bert.encoder.layer.1.c"]


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled-peft": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "parallel-peft": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "compiled-blocks": lambda key: key.replace(".layers.0.", ".layers.0._orig_mod."),
    "sharded-blocks": lambda key: key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "parallel-inside": lambda key: key.replace("model.model.layers", "model.model.module.layers"),
    "twice": lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
    "named": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_in_the_names_change_nothing(tmp_path: Path, kind: str) -> None:
    one = save(head_model("llama"), tmp_path / "one", seed=1, target_modules=["q_proj", "v_proj"])
    two = save(head_model("llama"), tmp_path / "two", seed=2, target_modules=["q_proj", "v_proj"])
    (tmp_path / "wrapped").mkdir()
    stored = {WRAPPED[kind](key): value for key, value in load_file(one / WEIGHTS).items()}
    save_file(stored, tmp_path / "wrapped" / WEIGHTS)
    (tmp_path / "wrapped" / CONFIG).write_text((one / CONFIG).read_text())
    merge([tmp_path / "wrapped", two], weights=[0.7, 0.3], out=tmp_path / "out")
    parts = [(0.7, loaded(head_model("llama"), one)[0]), (0.3, loaded(head_model("llama"), two)[0])]
    assert_sums(head_model("llama"), tmp_path / "out", parts)


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path, {"layers.0.q": (4, 4, 2)})
    stored = load_file(tmp_path / WEIGHTS)
    save_file(stored | {f"_orig_mod.{key}": value.clone() for key, value in stored.items()}, tmp_path / WEIGHTS)
    with refuses("adapter-file.tensor-twice"):
        open_adapter(tmp_path)


TEXT = tf.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, **{k: v for k, v in WIDE.items() if k != "num_labels"})
SEEN = tf.SiglipVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
)


def seeing() -> Any:
    config = tf.Gemma3Config(
        text_config=TEXT,
        vision_config=SEEN,
        mm_tokens_per_image=4,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.Gemma3ForConditionalGeneration(config).eval()


def reading() -> Any:
    model = tf.Gemma3ForCausalLM(TEXT).eval()
    model.model.load_state_dict(seeing().model.language_model.state_dict())
    model.tie_weights()
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"]], ids=["common", "disjoint"])
def test_a_text_class_and_a_vision_language_class(tmp_path: Path, targets: list[str]) -> None:
    both = save(seeing(), tmp_path / "both", seed=1, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    text = save(reading(), tmp_path / "text", seed=2, target_modules=targets)
    merge([both, text], weights=[0.5, 0.25], out=tmp_path / "out")
    by_text = {
        f"model.language_model.{name.removeprefix('model.')}": value
        for name, value in loaded(reading(), text)[0].items()
        if name.startswith("model.")
    }
    assert_sums(seeing(), tmp_path / "out", [(0.5, loaded(seeing(), both)[0]), (0.25, by_text)])


@pytest.mark.parametrize(
    ("paths", "clash"),
    [
        (["bert.encoder.layer.0.q", "encoder.layer.0.k"], True),
        (["0.auto_model.encoder.layer.0.q", "bert.encoder.layer.0.k"], True),
        (["bert.encoder.layer.0.q", "embeddings.word_embeddings"], True),
        (["model.layers.0.q", "model.language_model.layers.0.q"], True),
        (["transformer.h.0.q", "h.1.q"], True),
        (["encoder.block.0.q", "decoder.block.0.q", "lm_head"], False),
        (["model.layers.0.q", "model.vision_tower.encoder.layers.0.q", "lm_head"], False),
        (["embeddings.word_embeddings", "transformer.layer.0.q"], False),
        (["deberta.encoder.layer.0.q", "pooler.dense", "classifier"], False),
        (["model.layers.0.q", "head.dense", "decoder"], False),
        (["bert.encoder.layer.0.q", "bert.pooler.dense", "cls.predictions.decoder"], False),
        (["text_model.encoder.layers.0.q", "vision_model.encoder.layers.0.q"], False),
    ],
)
def test_paths_of_two_classes_are_seen(tmp_path: Path, paths: list[str], clash: bool) -> None:
    assert (two_roots(paths) is not None) == clash
    meta = AdapterMeta(base="org/base", targets=TargetSpec(modules=tuple(paths)))
    update = LowRank(b=torch.ones(4, 1), a=torch.ones(1, 4))
    state = AdapterState.of_updates(meta, dict.fromkeys(paths, update))
    if not clash:
        write_adapter(tmp_path, state)
        return
    with refuses("write.model-classes"):
        write_adapter(tmp_path, state)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_cannot_be_matched_are_refused_before_any_work(tmp_path: Path) -> None:
    write_lora(tmp_path / "one", {"bert.encoder.layer.0.q": (4, 4, 2)})
    write_lora(tmp_path / "two", {"0.auto_model.encoder.layer.0.q": (4, 4, 2)})
    with refuses("adapters.model-classes"):
        merge([tmp_path / "one", tmp_path / "two"], weights=[1, 1], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXT_Q = "model.language_model.layers.0.q"


@pytest.mark.parametrize(
    ("path", "model", "expected"),
    [
        ("layers.0.q", ["model", "model.layers.0.q", "model.layers.1.k"], "model.layers.0.q"),
        ("bert.encoder.layer.0.q", ["encoder", "encoder.layer.0.q"], "encoder.layer.0.q"),
        ("language_model.model.layers.0.q", [TEXT_Q, "model.vision.layers.0.q"], TEXT_Q),
        ("model.layers.0.q", ["model.vision.layers.0.q", TEXT_Q], TEXT_Q),
        ("model.module.layers.0.q", ["model.layers.0.q"], "model.layers.0.q"),
        ("encoder.block.0.q", ["decoder.block.0.q"], "encoder.block.0.q"),
        ("0.auto_model.encoder.layer.0.q", ["bert.encoder.layer.0.q"], "bert.encoder.layer.0.q"),
    ],
)
def test_an_adapter_gets_the_paths_of_a_model(tmp_path: Path, path: str, model: list[str], expected: str) -> None:
    write_lora(tmp_path, {path: (4, 4, 2)})
    assert list(fitted(open_adapter(tmp_path), model).modules) == [expected]
