"""Target modules: what PEFT would load is what counts."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from adaptermix import merge
from adaptermix.adapters import AdapterMeta, AdapterState, TargetSpec, open_adapter, write_adapter
from adaptermix.adapters.targets import Selection
from adaptermix.algebra import LowRank
from adaptermix.errors import AdapterFormatError

from ..factories import CONFIG, peft_noise, write_lora
from ..refusals import refuses

MODULES = [
    f"{root}layers.{layer}.{module}"
    for root, layer, module in itertools.product(
        ("model.", "model.vision.", ""), (0, 1, 11), ("q_proj", "mlp.up_proj", "experts.1.up_proj", "x_q_proj")
    )
]
MODULES += ["lm_head", "model.embed_tokens", "h.0.q_proj", "score.q_proj", "model.score"]
TARGETS: list[Any] = [
    ["q_proj"],
    ["layers.1.q_proj", "up_proj"],
    ["mlp.up_proj", "lm_head"],
    r".*\.layers\.(0|1)\..*",
    r"^(?!.*vision).*_proj$",
    r".*\bq_proj",
    r"model\.layers\.\d{1,}\.(?:q_proj|mlp\.(?:up_proj))",
    "q_proj",
]


def by_peft(module: str, targets: TargetSpec, saved: tuple[str, ...]) -> bool:
    config = LoraConfig(
        target_modules=targets.modules if isinstance(targets.modules, str) else list(targets.modules),
        exclude_modules=targets.exclude if isinstance(targets.exclude, str) else list(targets.exclude or ()) or None,
        layers_to_transform=list(targets.layers) if targets.layers else None,
        layers_pattern=list(targets.layers_pattern) if targets.layers_pattern else None,
        modules_to_save=list(saved) or None,
    )
    found = check_target_module_exists(config, module)
    return bool(found) and "Excluded" not in type(found).__name__


@pytest.mark.parametrize("seed", range(4))
def test_settings_select_what_peft_selects(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        modules = rng.choice(TARGETS)
        is_list = isinstance(modules, list)
        layers = rng.choice([None, (0,), (1, 11)]) if is_list else None
        spec = TargetSpec(
            modules=tuple(modules) if is_list else modules,
            layers=layers,
            layers_pattern=rng.choice([None, ("layers",), ("h", "layers"), ("blocks",)]) if layers else None,
            exclude=rng.choice([None, ("lm_head", "mlp.up_proj"), r".*vision.*", r"model\.layers\.1\..*"]),
        )
        saved = rng.choice([(), ("score",), ("experts",)])
        selection = Selection(spec, saved)
        assert selection.is_known
        for module in MODULES:
            assert selection.reaches(module) == by_peft(module, spec, saved), (module, spec, saved)


Q = [f"model.layers.{layer}.q_proj" for layer in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "blocks"},
        {"target_modules": ["layers.0.q_proj"]},
        {"target_modules": r"model\.layers\.0\..*"},
        {"exclude_modules": ["layers.1.q_proj"]},
        {"exclude_modules": r".*\.1\..*"},
    ],
    ids=["one-block", "blocks", "other-list", "paths", "regex", "excluded", "excluded-by-regex"],
)
def test_settings_that_select_less_than_the_file_holds_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_lora(tmp_path / "a", dict.fromkeys(Q, (4, 4, 2)), **settings)
    with pytest.raises(
        AdapterFormatError, match=r"leave out \d of 3, such as 'model.layers.*peft would load only the others"
    ):
        merge([tmp_path / "a"], weights=[1], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"(?i).*Q_PROJ"},  # not decided here, so taken as it is
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["layers"]},
        {"layers_to_transform": []},
    ],
)
def test_settings_that_select_all_are_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_lora(tmp_path / "a", dict.fromkeys(Q, (4, 4, 2)), **settings)
    merge([tmp_path / "a"], weights=[1], out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    targets = written["target_modules"]
    if isinstance(targets, str):
        assert targets == "all-linear"
    else:
        for module in Q:
            assert any(re.fullmatch(rf"(.*\.)?{re.escape(name)}", module) for name in targets)


def test_settings_that_peft_cannot_read_back_are_written_as_paths(tmp_path: Path) -> None:
    update = LowRank(b=torch.ones(4, 1), a=torch.ones(1, 4))
    for number, spec in enumerate(
        [
            TargetSpec(modules=r".*q_proj", layers=(0, 1, 2)),  # PEFT refuses block numbers beside an expression
            TargetSpec(modules=("k_proj",)),
            TargetSpec(modules=("q_proj",), tied=True),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        state = AdapterState.of_updates(AdapterMeta(base=None, targets=spec), dict.fromkeys(Q, update))
        write_adapter(folder, state)
        assert open_adapter(folder).meta.targets == TargetSpec(modules=tuple(Q))


def test_a_module_that_is_adapted_and_fully_trained_is_not_written(tmp_path: Path) -> None:
    update = LowRank(b=torch.ones(4, 1), a=torch.ones(1, 4))
    meta = AdapterMeta(base=None, targets=TargetSpec(modules=("q_proj", "score")), saved_modules=("score",))
    with refuses("write.saved-and-adapted: score"):
        write_adapter(tmp_path, AdapterState.of_updates(meta, {"score": update, Q[0]: update}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied weights
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_tied_weights_stays_what_it_is(tmp_path: Path, target: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}

    def base() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(
                LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
            ).eval()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=torch.arange(2, 12)[None]).logits.double()
            return found

    with peft_noise():
        live = get_peft_model(base(), LoraConfig(target_modules=["q_proj", target], ensure_weight_tying=True, r=4))
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    live.eval().save_pretrained(tmp_path / "a")
    merge([tmp_path / "a"], weights=[1], out=tmp_path / "out")
    with peft_noise():
        again = PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    assert float((logits(live) - logits(base())).abs().max()) > 0.1
    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-5)


def test_a_missing_alpha_is_the_one_that_peft_takes(tmp_path: Path) -> None:
    write_lora(tmp_path, {Q[0]: (4, 4, 2)})
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["lora_alpha"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert open_adapter(tmp_path).modules[Q[0]].scale == LoraConfig().lora_alpha / 2 == 4


@pytest.mark.parametrize(
    "files",
    [
        {"train/adapter_config.json": "{}", "checkpoint-500/adapter_config.json": "{}"},
        {"adapter_config.json": '{"fine_tune_type": "lora"}', "adapters.safetensors": ""},
        {"adapter_config.json": None, "adapter_model.safetensors.index.json": "{}"},
    ],
    ids=["below", "mlx", "shards"],
)
def test_folders_of_other_forms_are_named(tmp_path: Path, files: dict[str, str | None], request: Any) -> None:
    write_lora(tmp_path / "a", {Q[0]: (4, 4, 2)})
    for name, text in files.items():
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text() if text is None else text)
    words = {"below": "adapter.no-config: checkpoint-500, train", "mlx": "config.mlx", "shards": "adapter-file.index"}
    with refuses(words[request.node.callspec.id]):
        open_adapter(tmp_path / "b")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Qwen/Qwen2-7B", "qwen/qwen2-7b/", True),
        ("Qwen/Qwen2-7B", "/x/hub/models--Qwen--Qwen2-7B/snapshots/0123abc", True),
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-8B", False),
        ("Qwen/Qwen2-7B", None, False),
        (None, None, True),
    ],
)
def test_spellings_of_one_base_model(tmp_path: Path, one: str | None, other: str | None, same: bool) -> None:
    write_lora(tmp_path / "a", {Q[0]: (4, 4, 2)}, base=one)
    write_lora(tmp_path / "b", {Q[0]: (4, 4, 2)}, base=other)
    if same:
        assert merge([tmp_path / "a", tmp_path / "b"], weights=[1, 1]).residual == 0
        return
    found = f"'{other}'" if other else "no base model"
    with refuses(rf"adapters.bases: '{one}' and {found}"):
        merge([tmp_path / "a", tmp_path / "b"], weights=[1, 1])
