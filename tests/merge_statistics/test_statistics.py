"""Statistics against loops in float64, and merges by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import merge, statistics
from adaptermix.adapters import open_adapter
from adaptermix.cli import main
from adaptermix.errors import DataError, UsageError
from adaptermix.merge_statistics import run
from adaptermix.merging.on_model import acting
from adaptermix.models.base import load_base
from adaptermix.options import BakeSettings, StatisticsSettings
from tests.factories import adapter_deltas, peft_lora
from tests.training.data import write_slots

from ..refusals import refuses
from .conftest import COMMON, TEXTS, write_texts


def settings(base: Path, folder: Path, out: Path, **more: Any) -> StatisticsSettings:
    asked: dict[str, Any] = {"adapter": str(folder / "one"), "base": str(base), "data": [str(folder / "one.txt")]}
    return StatisticsSettings(**{**COMMON, **asked, "out": str(out), "batch_size": 2} | more)


def summed_loss(base: Any, ids: list[int], taught: int) -> Tensor:
    """Minus the log-likelihood of the last `taught` tokens."""
    logits = base.model(input_ids=torch.tensor([ids])).logits[0]
    gold = torch.tensor(ids[-taught:])
    return -logits[-taught - 1 : -1].log_softmax(-1).gather(1, gold[:, None]).sum()


def test_regmean_is_the_mean_product_of_the_inputs(causal: Path, folder: Path, tmp_path: Path) -> None:
    report = statistics(settings(causal, folder, tmp_path / "one.safetensors"))
    found = load_file(tmp_path / "one.safetensors")
    assert set(found) == set(report.modules) == set(open_adapter(folder / "one").modules)
    base = load_base(str(causal), **COMMON)
    base.model.double()
    source = open_adapter(folder / "one")
    read: dict[str, list[Tensor]] = {name: [] for name in found}
    with torch.no_grad(), acting(base, [source]):
        for name, rows in read.items():
            base.model.get_submodule(name).register_forward_pre_hook(lambda _m, z, rows=rows: rows.append(z[0][0]))
        for text in TEXTS:
            base.model(**base.tokenizer([text], return_tensors="pt"))
    for name, rows in read.items():
        z = torch.cat(rows)
        torch.testing.assert_close(found[name].double(), z.T @ z / len(z), rtol=1e-4, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_fisher_is_the_mean_of_squared_gradients_of_single_rows(causal: Path, folder: Path, tmp_path: Path) -> None:
    """By autograd through the delta of each module, one row at a time."""
    asked = settings(
        causal, folder, tmp_path / "f.safetensors", method="fisher", task="slots", data=[str(folder / "train.en.jsonl")]
    )
    statistics(asked)
    found = load_file(tmp_path / "f.safetensors")
    base = load_base(str(causal), **COMMON)
    loss = run._passes(asked, run._read(asked, run.SILENT), base, run.SILENT).loss  # type: ignore[attr-defined]
    base.model.double()
    deltas = {}
    for name, delta in adapter_deltas(folder / "one").items():
        deltas[name] = delta.double().requires_grad_()
        base.model.get_submodule(name).register_forward_hook(
            lambda _m, z, out, delta=deltas[name]: out + z[0].double() @ delta.T
        )
    wanted = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    examples = loss._examples
    assert len({len(prompt) + len(answer) for prompt, answer in examples}) > 1  # so that batches are padded
    for prompt, answer in examples:
        gradients = torch.autograd.grad(summed_loss(base, [*prompt, *answer], len(answer)), list(deltas.values()))
        for name, gradient in zip(deltas, gradients, strict=True):
            wanted[name] += gradient.square() / len(examples)
    for name, fisher in wanted.items():
        scale = float(fisher.max())
        torch.testing.assert_close(found[name].double() / scale, fisher.detach() / scale, rtol=1e-4, atol=1e-6)


def test_fisher_through_a_head(encoder: Path, folder: Path, tmp_path: Path) -> None:
    more = {"adapter": str(folder / "headed"), "data": [str(folder / "en.csv")], "task": "classify", "method": "fisher"}
    for size in (1, 5):
        statistics(settings(encoder, folder, tmp_path / f"{size}.safetensors", **more, batch_size=size))
    one, five = (load_file(tmp_path / f"{size}.safetensors") for size in (1, 5))
    for name, alone in one.items():
        assert float(alone.max()) > 0
        torch.testing.assert_close(five[name], alone, rtol=2e-3, atol=1e-4 * float(alone.max()))


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_experts_are_measured_row_by_row(method: str, tmp_path: Path) -> None:
    """Tokens are sent to experts, so what one reads is no batch; padding must not count."""
    from tests.tiny import tiny_causal

    base = tiny_causal(tmp_path / "moe", "qwen2_moe", layers=2)
    peft_lora(base, tmp_path / "one", r=2, target_modules=["shared_expert_gate", "q_proj"])
    data = write_slots(tmp_path)
    for size in (1, 4):
        statistics(
            settings(base, tmp_path, tmp_path / f"{size}.st", data=[data], task="slots", method=method, batch_size=size)
        )
    one, four = (load_file(tmp_path / f"{size}.st") for size in (1, 4))
    for name, alone in one.items():
        torch.testing.assert_close(four[name], alone, rtol=5e-3, atol=1e-4 * float(alone.abs().max()))


def zero_lora(base: Path, out: Path, **more: Any) -> str:
    """Save a LoRA that does nothing."""
    peft_lora(base, out, r=1, **more)
    file = out / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    return str(out)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_an_adapter_that_acts_through_peft_is_measured_as_its_merged_model(
    method: str, causal: Path, tmp_path: Path
) -> None:
    from adaptermix import bake

    targets = ["q_proj", "down_proj"]
    dora = peft_lora(causal, tmp_path / "dora", r=2, target_modules=targets, use_dora=True)
    file = dora / "adapter_model.safetensors"  # lengths of rows are above 0
    save_file({name: x.abs() + 0.1 if "magnitude" in name else x for name, x in load_file(file).items()}, file)
    merged = str(tmp_path / "merged")
    bake(BakeSettings(base=str(causal), adapter=[str(dora)], dtype="float32", out=merged))
    more = {"data": [write_slots(tmp_path)], "task": "slots", "method": method, "batch_size": 3}
    statistics(settings(causal, tmp_path, tmp_path / "dora.st", **more, adapter=str(dora)))
    nothing = zero_lora(causal, tmp_path / "nothing", target_modules=targets)
    asked = {**more, "adapter": nothing, "allow_base_mismatch": True}
    statistics(settings(Path(merged), tmp_path, tmp_path / "merged.st", **asked))
    found, wanted = load_file(tmp_path / "dora.st"), load_file(tmp_path / "merged.st")
    assert len(found) == len(wanted) == 8
    for name, tensor in wanted.items():
        assert float(tensor.abs().max()) > 0
        torch.testing.assert_close(found[name], tensor, rtol=0.01, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_bases_in_four_bits(method: str, wide: Path, tmp_path: Path) -> None:
    """By the weights that the codes stand for, in a model that is whole."""
    pytest.importorskip("bitsandbytes")
    from adaptermix import bake

    peft_lora(wide, tmp_path / "one", r=2, target_modules=["q_proj", "down_proj"])
    data = write_slots(tmp_path)
    more = {"data": [data], "task": "slots", "method": method, "batch_size": 3}
    statistics(settings(wide, tmp_path, tmp_path / "codes.st", **more, quantize="nf4"))
    nothing = zero_lora(wide, tmp_path / "nothing", target_modules=["q_proj"])
    out = str(tmp_path / "dequantised")
    bake(
        BakeSettings(
            base=str(wide),
            adapter=[nothing],
            quantize="nf4",
            strategy="dequant-16",
            dtype="float32",
            keep_at_least=0,
            out=out,
        )
    )
    statistics(settings(Path(out), tmp_path, tmp_path / "whole.st", **more, allow_base_mismatch=True))
    codes, whole = load_file(tmp_path / "codes.st"), load_file(tmp_path / "whole.st")
    for name, tensor in whole.items():
        torch.testing.assert_close(codes[name], tensor, rtol=1e-3, atol=1e-5 * float(tensor.abs().max()))


def test_regmean_by_statistics_is_nearest_in_its_outputs(causal: Path, folder: Path, tmp_path: Path) -> None:
    """Its delta is the least-squares solution over the inputs that both adapters have."""
    files = []
    generator = torch.Generator().manual_seed(0)
    for name, first in (("one", 97), ("two", 110)):
        files.append(tmp_path / f"{name}.safetensors")
        letters = [torch.randint(first, first + 13, (24,), generator=generator).tolist() for _ in range(30)]
        data = write_texts(tmp_path, f"{name}.txt", ["".join(map(chr, text)) for text in letters])
        more = {"adapter": str(folder / name), "data": [data]}
        statistics(settings(causal, folder, files[-1], **more))
    merge(
        [folder / "one", folder / "two"],
        weights=[0.5, 0.5],
        method="regmean",
        options={"off_diagonal": 1.0},
        statistics=files,
        out=tmp_path / "merged",
    )
    found = adapter_deltas(tmp_path / "merged")
    deltas = [adapter_deltas(folder / name) for name in ("one", "two")]
    for module, merged in found.items():
        # any Z with Z^T Z = G has the same squared distances
        roots = []
        for file in files:
            values, vectors = torch.linalg.eigh(load_file(file)[module].double())
            roots.append((vectors * values.clamp(min=0).sqrt()).T)
        inputs = torch.cat(roots)
        wanted = torch.cat([root @ delta[module].T for root, delta in zip(roots, deltas, strict=True)])

        def distance(delta: Tensor, inputs: Tensor = inputs, wanted: Tensor = wanted) -> float:
            return float((inputs @ delta.T - wanted).square().sum())

        best = torch.linalg.lstsq(inputs, wanted, rcond=1e-6, driver="gelsd").solution.T
        average = (deltas[0][module] + deltas[1][module]) / 2
        assert distance(merged) - distance(best) <= 1e-3 * distance(average)
        assert distance(merged) < 0.98 * distance(average)


def test_fisher_merges_by_statistics(causal: Path, folder: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.safetensors")
        more = {"adapter": str(folder / name), "data": [str(folder / "train.en.jsonl")], "task": "slots"}
        statistics(settings(causal, folder, files[-1], method="fisher", **more))
    adapters = [folder / "one", folder / "two"]
    merge(
        adapters,
        weights=[0.5, 0.5],
        method="fisher",
        statistics=files,
        out=tmp_path / "merged",
        max_residual=1,
        rank=32,
    )
    found = adapter_deltas(tmp_path / "merged")
    first, second = (load_file(file) for file in files)
    one, two = (adapter_deltas(path) for path in adapters)
    for module, merged in found.items():
        f, g = first[module].double(), second[module].double()
        torch.testing.assert_close(merged, (f * one[module] + g * two[module]) / (f + g), rtol=1e-3, atol=1e-4)


def test_the_command_line_and_the_manifest(causal: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The data are calibration data of the merge: rows that are tested later are known from its manifest."""
    for name in ("one", "two"):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *("statistics", str(folder / name), "--base", str(causal), "--data", str(folder / f"{name}.txt")),
                    *("--out", str(tmp_path / f"{name}.st"), "--device", "cpu", "--json"),
                ]
            )
        assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["method"] == "regmean"
    assert document["rows"] == len(TEXTS)
    with safe_open(tmp_path / "one.st", framework="pt") as file:
        header = json.loads(file.metadata()["adaptermix"])
    assert header["base"]["fingerprint"]
    assert header["calibration"][0]["name"] == "one.txt"
    call = ["merge", str(folder / "one"), str(folder / "two"), "--weights", "0.5", "--method", "regmean"]
    call += ["--statistics", str(tmp_path / "one.st"), str(tmp_path / "two.st"), "--out", str(tmp_path / "merged")]
    with pytest.raises(SystemExit) as ended:
        main(call)
    assert ended.value.code == 0
    manifest = json.loads((tmp_path / "merged" / "adaptermix.json").read_text())
    assert sorted(entry["name"] for entry in manifest["calibration"]) == ["one.txt", "two.txt"]
    assert (tmp_path / "merged" / "adaptermix.rows").is_file()


def test_rows_of_statistics_are_not_tested_and_tested_rows_are_not_measured(
    causal: Path, folder: Path, tmp_path: Path
) -> None:
    from adaptermix import EvaluateSettings, evaluate

    rows = [str(folder / "train.en.jsonl")]
    more = {"data": rows, "task": "slots"}
    statistics(settings(causal, folder, tmp_path / "one.st", **more))
    statistics(settings(causal, folder, tmp_path / "two.st", **more, adapter=str(folder / "two")))
    merge(
        [folder / "one", folder / "two"],
        weights=[0.5],
        method="regmean",
        statistics=[tmp_path / "one.st", tmp_path / "two.st"],
        out=tmp_path / "merged",
    )
    asked = {"base": str(causal), "task": "slots", "data": rows, "split": "test", "max_new_tokens": 1, **COMMON}
    with refuses("split.known"):
        evaluate(EvaluateSettings(**asked, adapter=str(tmp_path / "merged")))
    evaluate(EvaluateSettings(**asked))
    with refuses("split.tested: calibration data must not be test data"):
        statistics(settings(causal, folder, tmp_path / "three.st", **more))
    statistics(settings(causal, folder, tmp_path / "three.st", **more, allow_tested=True))
    with safe_open(tmp_path / "three.st", framework="pt") as file:
        assert json.loads(file.metadata()["adaptermix"])["tested"][0]["name"] == "train.en.jsonl"


def test_statistics_that_do_not_belong_to_the_merge_are_refused(causal: Path, folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.st", tmp_path / "two.st"]
    for name, file in zip(("one", "two"), files, strict=True):
        statistics(settings(causal, folder, file, adapter=str(folder / name)))
    common: dict[str, Any] = {"weights": [0.5], "out": tmp_path / "merged"}
    adapters = [folder / "one", folder / "two"]
    with refuses("statistics.order: one"):
        merge(adapters, method="regmean", statistics=files[::-1], **common)
    with refuses("statistics.method: fisher.*regmean"):
        merge(adapters, method="fisher", statistics=files, **common)
    part = {"modules": ["*q_proj"]}
    statistics(settings(causal, folder, files[0], **part, overwrite=True))
    with refuses("statistics.shape: nothing"):
        merge(adapters, method="regmean", statistics=files, **common)
    assert not (tmp_path / "merged").exists()


def test_other_base_models_are_refused(causal: Path, folder: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_causal

    other = tiny_causal(tmp_path / "other", seed=5)
    with refuses("base.mismatch: one"):
        statistics(settings(other, folder, tmp_path / "x.st"))
    asked = settings(other, folder, tmp_path / "x.st", allow_base_mismatch=True)
    statistics(asked)
    assert (tmp_path / "x.st").is_file()
    for name in ("one", "two"):
        document = {"kind": "train-task", "base": {"fingerprint": "0" * 64}}
        adapter = tmp_path / name
        adapter.mkdir()
        for file in (folder / name).iterdir():
            (adapter / file.name).write_bytes(file.read_bytes())
        (adapter / "adaptermix.json").write_text(json.dumps(document))
    with refuses("statistics.base"):
        merge(
            [tmp_path / "one", tmp_path / "two"],
            weights=[0.5],
            method="regmean",
            statistics=[tmp_path / "x.st"] * 2,
            out=tmp_path / "merged",
        )


def test_bad_input_leaves_nothing_and_says_why(causal: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.st"
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises((DataError, UsageError), match=r"empty|at least one text"):
        statistics(settings(causal, folder, out, data=[str(tmp_path / "empty.txt")]))
    with refuses("statistics.modules: 'nothing'"):
        statistics(settings(causal, folder, out, modules=["nothing"]))
    with refuses("output.is-folder"):
        statistics(settings(causal, folder, tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "empty.txt"]
    save_file({"a": torch.zeros(1)}, out)
    with refuses("output.file-exists"):
        statistics(settings(causal, folder, out))
    with refuses("statistics.overwrite"):
        statistics(settings(causal, folder, out, overwrite=True))
    with refuses("statistics.no-task"):
        settings(causal, folder, out, method="fisher")


def test_a_dry_run_tells_the_size_and_writes_nothing(causal: Path, folder: Path, tmp_path: Path) -> None:
    dry = statistics(settings(causal, folder, tmp_path / "x.st", dry_run=True))
    assert dry.out is None
    assert not list(tmp_path.iterdir())
    real = statistics(settings(causal, folder, tmp_path / "x.st"))
    assert dict(dry.modules) == dict(real.modules)


def test_modules_beyond_those_of_the_adapter_and_little_memory(
    causal: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics(settings(causal, folder, tmp_path / "whole.st", modules=["*_proj"]))
    monkeypatch.setattr(run, "memory_for_moments", lambda _device: 1)
    statistics(settings(causal, folder, tmp_path / "bit.st", modules=["*_proj"]))
    whole, bit = load_file(tmp_path / "whole.st"), load_file(tmp_path / "bit.st")
    assert len(whole) == 4 * 7
    assert all(torch.equal(whole[name], bit[name]) for name in whole)
    q, k = (whole[f"model.layers.1.self_attn.{kind}_proj"] for kind in "qk")
    assert torch.equal(q, k)  # they read the same
