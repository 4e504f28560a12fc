"""The table of `spectrum` over several models: columns by projection, means over layers, all forms of output."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptermix import spectrum
from adaptermix.analysis.spectrum_table import PROJECTIONS, projection_of

from ..factories import write_lora
from .models import decoder, write_model

# Diagonal weights, whose singular values a person sees: 3 and 4 have norm 5.
BASE = {"k_proj": [3.0, 4.0], "q_proj": [6.0, 8.0], "gate_proj": [1.0, 0.0]}


def diagonal(scales: list[float]) -> dict[str, Tensor]:
    """A model with one block for each scale, whose weights are those of BASE times the scale."""
    path = {"k_proj": "self_attn.k_proj", "q_proj": "self_attn.q_proj", "gate_proj": "mlp.gate_proj"}
    return {
        f"model.layers.{n}.{path[name]}.weight": scale * torch.diag(torch.tensor(values))
        for n, scale in enumerate(scales)
        for name, values in BASE.items()
    }


def test_a_table_worked_out_by_hand(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", diagonal([1.0, 2.0]))
    double = write_model(tmp_path / "double", diagonal([2.0, 4.0]))
    moved = diagonal([1.0, 2.0]) | {"model.layers.0.self_attn.k_proj.weight": torch.diag(torch.tensor([-12.0, 5.0]))}
    table = spectrum(base, [double, write_model(tmp_path / "moved", moved)], table=tmp_path / "t.csv").table()
    assert table.models == ("base", "double", "moved")
    assert table.columns == {"K": ("k_proj",), "Q": ("q_proj",), "gate_proj": ("gate_proj",)}
    rows = {(layer, model): columns for layer, model, columns in table.rows()}
    assert list(rows) == [(layer, model) for layer in ("0", "1", "mean") for model in table.models]
    # (4, 3) against (12, 5): d is the root of 8 squared and 2 squared.
    assert rows["0", "moved"]["K"] == pytest.approx({"norm": 13.0, "distance": 68**0.5, "ratio": 2.6})
    assert rows["1", "moved"]["K"] == pytest.approx({"norm": 10.0, "distance": 0.0, "ratio": 1.0})
    assert rows["mean", "moved"]["K"] == pytest.approx({"norm": 11.5, "distance": 68**0.5 / 2, "ratio": 1.8})
    assert rows["mean", "double"]["Q"] == pytest.approx({"norm": 30.0, "distance": 15.0, "ratio": 2.0})
    assert rows["1", "base"]["gate_proj"] == pytest.approx({"norm": 2.0, "distance": 0.0, "ratio": 1.0})
    with (tmp_path / "t.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["layer"], row["model"]) for row in written] == list(rows)
    for row in written:
        for column, cell in rows[row["layer"], row["model"]].items():
            found = {
                key: float(row[f"{column} {name}"]) for key, name in zip(cell, ("norm", "d", "ratio"), strict=True)
            }
            assert found == pytest.approx(cell)


def test_markdown_has_the_numbers_of_the_table(tmp_path: Path) -> None:
    models = [write_model(tmp_path / str(seed), decoder(seed=seed)) for seed in range(3)]
    report = spectrum(models[0], models[1:], table=tmp_path / "t.md")
    by_layer, ratios = (part.splitlines() for part in (tmp_path / "t.md").read_text().split("\n\n"))
    titles = [cell.strip() for cell in by_layer[0].split("|")[1:-1]]
    assert titles[2:] == [
        f"{title} {number}" for title in ("K (k_proj)", "Q (q_proj)", "FC2 (down_proj)") for number in ("norm", "d")
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in by_layer[2:]]
    for line, (layer, model, columns) in zip(cells, report.table().rows(), strict=True):
        assert line[:2] == [layer, model]
        numbers = [columns[column][key] for column in ("K", "Q", "FC2") for key in ("norm", "distance")]
        assert [float(cell) for cell in line[2:]] == pytest.approx(numbers, rel=1e-3)
    means = report.table().means("2")
    assert [float(cell) for cell in ratios[-1].split("|")[2:-1]] == pytest.approx(
        [means[column]["ratio"] for column in ("K", "Q", "FC2")], rel=1e-3
    )


def test_every_model_has_the_numbers_that_it_has_alone(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", decoder())
    write_lora(tmp_path / "lora", {"model.layers.1.self_attn.q_proj": (12, 8, 2)}, alpha=3)
    models = [
        write_model(tmp_path / "one", decoder(seed=1)),
        tmp_path / "lora",
        write_model(tmp_path / "two", decoder(seed=2)),
    ]
    together = spectrum(base, models, csv=tmp_path / "t.csv")
    for found, model in zip([together, *together.others], models, strict=True):
        alone = spectrum(base, model)
        assert found.modules == alone.modules
        assert (found.b, found.compared, found.notes) == (alone.b, alone.compared, alone.notes)
    table = together.table()
    assert ("0", "Q") not in table.cells["lora"]
    weights = [decoder(seed=seed)["model.layers.1.self_attn.q_proj.weight"].double() for seed in range(3)]
    for name, weight in zip(("base", "one", "two"), weights, strict=True):
        cell = table.cells[name]["1", "Q"]
        assert cell.norm == pytest.approx(float(weight.norm()))  # of the singular values, and of all entries
        assert cell.base_norm == pytest.approx(float(weights[0].norm()))
        assert abs(cell.norm - cell.base_norm) <= cell.distance <= float((weight - weights[0]).norm()) + 1e-9
    models_of_rows = [row["model"] for row in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())]
    assert models_of_rows == [str(models[0])] * 6 + [str(models[1])] + [str(models[2])] * 6


NAMES = {
    "bart": {
        "K": "self_attn.k_proj", "Q": "self_attn.q_proj", "V": "self_attn.v_proj", "Out": "self_attn.out_proj",
        "FC1": "fc1", "FC2": "fc2",
    },
    "bert": {
        "K": "attention.self.key", "Q": "attention.self.query", "V": "attention.self.value",
        "Out": "attention.output.dense", "FC1": "intermediate.dense", "FC2": "output.dense",
    },
    "llama": {
        "K": "self_attn.k_proj", "Q": "self_attn.q_proj", "V": "self_attn.v_proj", "Out": "self_attn.o_proj",
        "FC1": "mlp.up_proj", "FC2": "mlp.down_proj",
    },
    "t5": {
        "K": "layer.0.SelfAttention.k", "Q": "layer.0.SelfAttention.q", "V": "layer.0.SelfAttention.v",
        "Out": "layer.0.SelfAttention.o", "FC1": "layer.1.DenseReluDense.wi_1", "FC2": "layer.1.DenseReluDense.wo",
    },
    "distilbert": {
        "K": "attention.k_lin", "Q": "attention.q_lin", "V": "attention.v_lin", "Out": "attention.out_lin",
        "FC1": "ffn.lin1", "FC2": "ffn.lin2",
    },
    "gpt2": {"Out": "attn.c_proj", "FC1": "mlp.c_fc", "FC2": "mlp.c_proj"},
    "gpt-neox": {"Out": "attention.dense", "FC1": "mlp.dense_h_to_4h", "FC2": "mlp.dense_4h_to_h"},
}  # fmt: skip


@pytest.mark.parametrize("architecture", NAMES)
def test_the_names_of_architectures(architecture: str) -> None:
    for column, path in NAMES[architecture].items():
        assert projection_of(f"model.layers.3.{path}") == column
    assert list(NAMES["bart"]) == list(PROJECTIONS)


@pytest.mark.parametrize(
    "path",
    ["encoder_attn.k_proj", "layer.1.EncDecAttention.q", "mlp.gate_proj", "attn.c_attn", "layer.1.DenseReluDense.wi_0",
     "attention.query_key_value", "moe.gate"],
)  # fmt: skip
def test_other_weights_stay_under_their_own_names(path: str) -> None:
    assert projection_of(f"decoder.block.0.{path}") is None


def test_the_names_are_those_of_transformers() -> None:
    """A block of each architecture as transformers makes it, on the meta device, has every column once."""
    from transformers import AutoConfig, AutoModel

    small = {"num_hidden_layers": 1, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    for kind in ("bert", "xlm-roberta", "m2m_100", "mbart", "distilbert", "llama", "qwen2", "mt5"):
        config = AutoConfig.for_model(kind, **small)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        body = model.get_encoder() if config.is_encoder_decoder else model
        found = [projection_of(name) for name, module in body.named_modules() if isinstance(module, torch.nn.Linear)]
        assert sorted(column for column in found if column) == sorted(PROJECTIONS), kind
