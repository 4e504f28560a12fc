"""RegMean++ against an explicit loop over the blocks in float64."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix import EvaluateSettings, MergeSettings, evaluate, merge, merge_learned, statistics
from adaptermix.cli import main
from adaptermix.models.base import load_base
from adaptermix.options import AlignSettings, StatisticsSettings, TaskSettings
from adaptermix.training.least_squares import train_align
from adaptermix.training.task import train_task
from tests.factories import adapter_deltas, peft_lora
from tests.fusion.test_commands import write_rows
from tests.tiny import tiny_causal
from tests.training.data import write_slots

from ..refusals import refuses

LAYERS = 3
COMMON: dict[str, Any] = {"device": "cpu"}


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge computes in what the machine is fast in, which may be bfloat16."""
    monkeypatch.setattr("adaptermix.models.base.pick_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("blocks")
    base = tiny_causal(into / "base", layers=LAYERS, seed=3)
    generator = torch.Generator().manual_seed(0)
    targets = {"one": ["q_proj", "o_proj", "up_proj", "down_proj"], "two": ["q_proj", "v_proj", "o_proj", "up_proj"]}
    for seed, (name, own) in enumerate(targets.items()):
        peft_lora(base, into / name, seed=seed, r=3, lora_alpha=9, target_modules=own)
        first = 97 + 13 * seed
        letters = [torch.randint(first, first + 13, (30,), generator=generator).tolist() for _ in range(24)]
        texts = ["".join(map(chr, text[: 20 + number % 7])) for number, text in enumerate(letters)]
        (into / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
    return into


def settings(folder: Path, out: Path, **more: Any) -> MergeSettings:
    asked: dict[str, Any] = {
        "adapters": [str(folder / "one"), str(folder / "two")],
        "weights": [0.6],
        "method": "regmean-plus",
        "base": str(folder / "base"),
        "texts": [str(folder / "one.txt"), str(folder / "two.txt")],
        "out": str(out),
    }
    return MergeSettings(**{**COMMON, **asked} | more)


def loop(folder: Path, off_diagonal: float, weights: tuple[float, float]) -> dict[str, Tensor]:
    """Merge block by block with full matrices, float64 and one text at a time."""
    base = load_base(str(folder / "base"), device="cpu", dtype="float32")
    model = base.model.double()
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    deltas = [adapter_deltas(folder / name) for name in ("one", "two")]
    texts = [(folder / f"{name}.txt").read_text().splitlines() for name in ("one", "two")]
    merged: dict[str, Tensor] = {}
    for block in range(LAYERS):
        modules = sorted({m for own in deltas for m in own if f"layers.{block}." in m})
        grams: list[dict[str, Tensor]] = []
        for own, lines in zip(deltas, texts, strict=True):
            acting = merged | {m: own[m].double() for m in modules if m in own}
            with torch.no_grad():
                for name, weight in model.state_dict().items():
                    weight.copy_(original[name] + acting.get(name.removesuffix(".weight"), 0))
            read: dict[str, list[Tensor]] = {m: [] for m in modules}
            handles = [
                model.get_submodule(m).register_forward_pre_hook(lambda _m, z, rows=rows: rows.append(z[0][0]))
                for m, rows in read.items()
            ]
            with torch.no_grad():
                for line in lines:
                    model(**base.tokenizer([line], return_tensors="pt"))
            for handle in handles:
                handle.remove()
            rows = {m: torch.cat(found) for m, found in read.items()}
            grams.append({m: z.T @ z / len(z) for m, z in rows.items()})
        for m in modules:
            left, total = torch.zeros(()), torch.zeros(())
            for weight, own, gram in zip(weights, deltas, grams, strict=True):
                g = gram[m] * (off_diagonal + (1 - off_diagonal) * torch.eye(len(gram[m])))
                left = left + weight * (own[m].double() @ g if m in own else 0)
                total = total + weight * g
            merged[m] = left @ torch.linalg.inv(total)
    return merged


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert set(found) == set(wanted)
    return all(float((found[m].double() - delta).norm()) <= 1e-4 * float(delta.norm()) for m, delta in wanted.items())


def test_each_block_is_measured_behind_the_merged_blocks_before_it(folder: Path, tmp_path: Path) -> None:
    merge_learned(settings(folder, tmp_path / "merged"))
    found = adapter_deltas(tmp_path / "merged")
    assert close(found, loop(folder, 0.9, (0.6, 0.4)))
    # the first block is that of regmean, which looks at each adapter's own model; later ones are not
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.st")
        more = {"data": [str(folder / f"{name}.txt")], "modules": ["*_proj"], "out": str(files[-1])}
        statistics(StatisticsSettings(adapter=str(folder / name), base=str(folder / "base"), **more, **COMMON))
    merge([folder / "one", folder / "two"], weights=[0.6], method="regmean", statistics=files, out=tmp_path / "regmean")
    plain = adapter_deltas(tmp_path / "regmean")
    for block in range(LAYERS):
        pair = [{m: d for m, d in own.items() if f"layers.{block}." in m} for own in (found, plain)]
        assert close(*pair) == (block == 0)


def test_one_adapter_alone_is_returned(folder: Path, tmp_path: Path) -> None:
    alone = {"adapters": [str(folder / "one")], "weights": [1.0], "texts": [str(folder / "one.txt")]}
    merge_learned(settings(folder, tmp_path / "merged", **alone))
    assert close(adapter_deltas(tmp_path / "merged"), adapter_deltas(folder / "one"))


def test_the_command_line_rows_of_a_task_and_the_manifest(folder: Path, tmp_path: Path) -> None:
    rows = [write_slots(tmp_path), write_slots(tmp_path, "other.de.jsonl")]
    Path(rows[1]).write_text(Path(rows[1]).read_text().replace("go ", "geh "))
    call = ["merge", str(folder / "one"), str(folder / "two"), "--weights", "0.5", "--method", "regmean-plus"]
    call += ["--base", str(folder / "base"), "--task", "slots", "--train", *rows, "--rank", "4", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*call, "--max-residual", "1", "--out", str(tmp_path / "merged")])
    assert ended.value.code == 0
    manifest = json.loads((tmp_path / "merged" / "adaptermix.json").read_text())
    assert [entry["name"] for entry in manifest["calibration"]] == ["train.en.jsonl", "other.de.jsonl"]
    assert manifest["plan"]["method"] == "regmean-plus"
    assert "statistics" not in manifest["plan"]
    assert manifest["measured"]["rows"] == [6, 6]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_an_adapter_with_a_head_keeps_its_paths_where_texts_are_read_without_the_head(
    encoder: Path, tmp_path: Path
) -> None:
    """As where rows of the task are read with the head, of which the inputs of the blocks know nothing."""
    rows = write_rows(tmp_path, "en.csv", says=True)
    common = {"base": str(encoder), "task": "classify", "steps": 3, "rank": 2, "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(**common, train=[rows], out=str(tmp_path / "task")))
    pairs = tmp_path / "de-en.tsv"
    pairs.write_text("".join(f"wort {n}\tword {n}\n" for n in range(8)))
    more = {"base": str(encoder), "steps": 3, "batch_size": 4, "device": "cpu", "dtype": "float32"}
    train_align(AlignSettings(**more, pairs=[str(pairs)], out=str(tmp_path / "align")))
    texts = [row["text"] for row in csv.DictReader(Path(rows).read_text().splitlines())]
    (tmp_path / "en.txt").write_text("".join(f"{text}\n" for text in texts))
    asked = {"adapters": [str(tmp_path / "task"), str(tmp_path / "align")], "base": str(encoder)}
    merge_learned(settings(tmp_path, tmp_path / "texts", **asked, texts=[str(tmp_path / "en.txt")] * 2))
    by_rows = {"texts": [], "task": "classify", "train": [rows] * 2}
    merge_learned(settings(tmp_path, tmp_path / "rows", **asked, **by_rows))
    assert close(adapter_deltas(tmp_path / "texts"), adapter_deltas(tmp_path / "rows"))
    for name in ("texts", "rows"):
        evaluate(
            EvaluateSettings(
                base=str(encoder), adapter=str(tmp_path / name), task="classify", data=[rows], device="cpu"
            )
        )


def test_what_is_lacking_or_unused_is_said(folder: Path, tmp_path: Path) -> None:
    with refuses("measured.data: 2.*1"):
        merge_learned(settings(folder, tmp_path / "x", texts=[str(folder / "one.txt")]))
    with refuses("measured.no-base"):
        merge_learned(settings(folder, tmp_path / "x", base=None))
    with refuses("measured.task"):
        merge_learned(settings(folder, tmp_path / "x", task="slots"))
    with refuses("measured.inputs-only: statistics"):
        merge_learned(settings(folder, tmp_path / "x", statistics=[str(folder / "one.txt")] * 2))
    with refuses("measured.no-base"):
        merge([folder / "one", folder / "two"], weights=[0.5], method="regmean-plus", out=tmp_path / "x")
    merge_learned(settings(folder, tmp_path / "x", dry_run=True))
    assert not list(tmp_path.iterdir())
