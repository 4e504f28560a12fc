"""What a merge says of itself in words, where numbers would mislead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptermix import merge
from adaptermix.cli import main

from ..factories import write_lora
from ..refusals import refuses

MODULES = {"layers.0.q": (12, 10, 3)}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, MODULES, seed=seed)
    return [tmp_path / "task", tmp_path / "align"]


@pytest.mark.parametrize(("dtype", "warns"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_statistics_in_16_bits_are_warned_of(tmp_path: Path, pair: list[Path], dtype: torch.dtype, warns: bool) -> None:
    files = []
    for number in range(2):
        x = torch.randn(40, 10, generator=torch.Generator().manual_seed(number))
        files.append(tmp_path / f"inputs{number}.safetensors")
        save_file({"layers.0.q": (x.T @ x / 40).to(dtype)}, files[-1])
    notes = merge(pair, weights=[0.5, 0.5], method="regmean", statistics=files).notes
    assert bool(notes) is warns
    if warns:
        named = "inputs0.safetensors, inputs1.safetensors"
        assert notes[0].startswith(f"warning: the statistics in {named} are stored in 16 bits.")


@pytest.mark.parametrize(
    ("method", "options", "forms"),
    [
        ("ties", {"density": 0.5}, "residual.truncation: dense.*or accept"),
        ("svd", {}, "residual.truncation: concat or dense.*or accept"),
        ("tsv", {"share": 0.3}, "residual.truncation: concat or dense"),
    ],
)
def test_a_truncation_that_is_refused_names_forms_that_the_method_has(
    pair: list[Path], method: str, options: dict[str, float], forms: str
) -> None:
    with refuses(forms):
        merge(pair, weights=[0.5, 0.5], method=method, options=options, rank=1 if method != "tsv" else None)


def test_what_tsv_cuts_is_residual(pair: list[Path]) -> None:
    kept = merge(pair, weights=[0.5, 0.5], method="tsv")
    assert kept.residual == 0.0
    cut = merge(pair, weights=[0.5, 0.5], method="tsv", options={"share": 0.3}, max_residual=1.0)
    assert 0.2 < cut.residual < 1.0


@pytest.mark.parametrize("command", ["merge", "search"])
def test_weights_without_commas_are_named_as_such(
    pair: list[Path], command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = {
        "merge": ["--weights", "0.5", "0.5", "--out", str(tmp_path / "out")],
        "search": [
            "--grid",
            "0.5",
            "0.9",
            "--base",
            "x",
            "--task",
            "nli",
            "--dev",
            "y",
            "--out",
            str(tmp_path / "out"),
        ],
    }
    with pytest.raises(SystemExit) as caught:
        main([command, *map(str, pair), *more[command]])
    assert caught.value.code == 2
    assert (
        "is neither a file nor a folder; the numbers of one option are separated by commas" in capsys.readouterr().err
    )


def test_the_description_of_a_method_tells_what_zeros_and_weights_of_zero_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, wanted in (("ties", True), ("tsv", True), ("mergekit:sce", True), ("exact", False)):
        if ":" in name:
            pytest.importorskip("mergekit")
        with pytest.raises(SystemExit):
            main(["methods", name])
        said = " ".join(capsys.readouterr().err.split())
        assert ("An adapter of weight 0 is left out and has no say" in said) is wanted
        assert ("It takes no weights: each of k adapters counts 1/k" in said) is (name == "mergekit:sce")


HEAD = "base_model.model.score.weight"


def with_head(folder: Path, languages: list[str]) -> None:
    """Add a trained head, and a manifest that names the languages it was trained on."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), HEAD: torch.full((2, 10), float(len(folder.name)))}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    (folder / "adaptermix.json").write_text(json.dumps({"kind": "train-task", "languages": {"supervised": languages}}))


def test_a_head_that_a_weight_of_zero_leaves_out_is_named(tmp_path: Path, pair: list[Path]) -> None:
    with_head(pair[0], ["en"])
    left = merge(pair, weights=[0.0, 1.0], out=tmp_path / "left")
    assert "the fully trained tensors of 'task' are left out, since its weight is 0." in left.notes
    assert HEAD not in load_tensors(tmp_path / "left")
    assert "languages" not in json.loads((tmp_path / "left" / "adaptermix.json").read_text())
    # of two adapters without a weight both heads stay, and with them what they learned
    merge(pair, weights=[0.0, 0.0], out=tmp_path / "none")
    assert HEAD in load_tensors(tmp_path / "none")
    assert json.loads((tmp_path / "none" / "adaptermix.json").read_text())["languages"] == {"supervised": ["en"]}


def test_only_the_head_that_is_chosen_is_said_to_replace_that_of_the_base(tmp_path: Path, pair: list[Path]) -> None:
    for folder, language in zip(pair, ("en", "de"), strict=True):
        with_head(folder, [language])
    notes = merge(pair, weights=[0.5, 0.5], saved="align", out=tmp_path / "out").notes
    replaced = [note for note in notes if "replace those of the base" in note]
    assert len(replaced) == 1
    assert "1 fully trained tensors of 'align'" in replaced[0]
    # align has five letters, see `with_head`
    assert load_tensors(tmp_path / "out")[HEAD].unique().tolist() == [5.0]


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
