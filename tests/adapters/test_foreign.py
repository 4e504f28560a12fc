"""Adapters in the formats of other tools are recognised where adapters are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptermix import load_adapter
from adaptermix.options import EvaluateSettings
from adaptermix.options.existing import require_inputs
from tests.factories import write_lora
from tests.refusals import refuses


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    """Write a folder as `mlx_lm.lora` does."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    part = "model.layers.0.self_attn.q_proj"
    tensors = {f"{part}.lora_a": torch.zeros(8, 2), f"{part}.lora_b": torch.zeros(2, 8)}
    save_file(tensors, folder / "adapters.safetensors")
    return folder


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """Write a file as `train_network.py` does."""
    folder = tmp_path / "kohya"
    folder.mkdir()
    part = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{part}.lora_down.weight": torch.zeros(2, 8), f"{part}.lora_up.weight": torch.zeros(8, 2)}
    save_file(tensors | {f"{part}.alpha": torch.tensor(1.0)}, folder / "style.safetensors")
    return folder


def test_an_adapter_of_mlx_is_recognised(mlx: Path) -> None:
    with refuses("config.mlx"):
        load_adapter(mlx)


def test_a_lora_of_kohya_is_recognised_as_folder_and_as_file(kohya: Path) -> None:
    for path in (kohya, kohya / "style.safetensors"):
        with refuses("adapter.kohya: convert it to PEFT"):
            load_adapter(path)


def test_commands_recognise_it_before_they_load_anything(kohya: Path, tmp_path: Path) -> None:
    (tmp_path / "de.csv").write_text("text,label\na,b\n")
    path = kohya / "style.safetensors"
    settings = EvaluateSettings(base="b", adapter=path, task="classify", data=tmp_path / "de.csv")
    with refuses("adapter.kohya"):
        require_inputs(settings)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{bad}"])
def test_other_files_are_not_taken_for_them(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    with refuses("adapter.no-config"):
        load_adapter(folder)


def test_a_peft_adapter_is_loaded(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", {"layers.0.q_proj": (8, 8, 2)}, alpha=2)
    assert load_adapter(tmp_path / "lora")
