"""`merge --method fuse`: gates that are learned, and written as a plain adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from adaptermix import merge, merge_learned, search, train_align
from adaptermix.adapters import AdapterSource, open_adapter
from adaptermix.cli import main
from adaptermix.evaluation import evaluate
from adaptermix.merging.attach import Attachment
from adaptermix.merging.on_model import acting
from adaptermix.methods import Fuse
from adaptermix.models.base import BaseModel, load_base
from adaptermix.options import AlignSettings, EvaluateSettings, MergeSettings, SearchSettings, TaskSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.heads.from_adapters import head_of
from adaptermix.training.task import train_task
from adaptermix.training.trainer import BatchLoss
from adaptermix.weight_search.gates import group_of, learn_gates
from tests.factories import WEIGHTS
from tests.fusion.test_commands import write_rows
from tests.training.data import Notes

from ..refusals import refuses


@pytest.fixture(scope="module")
def folder(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task LoRA with a head, and one that was trained to the contrary."""
    into = tmp_path_factory.mktemp("gates")
    rows = write_rows(into, "en.csv", says=True)
    turned = Path(rows).read_text().replace("positive", "?").replace("negative", "positive").replace("?", "negative")
    (into / "turned.en.csv").write_text(turned)
    common: dict[str, Any] = {"base": str(encoder), "device": "cpu", "dtype": "float32", "rank": 4, "dropout": 0.0}
    more = {"task": "classify", "learning_rate": 1e-2, "batch_size": 8}
    train_task(TaskSettings(**common, **more, train=[rows], steps=40, out=str(into / "task")))
    pairs = into / "de-en.tsv"
    pairs.write_text("".join(f"wort {n}\tword {n}\n" for n in range(20)))
    train_align(AlignSettings(**common, pairs=[str(pairs)], steps=5, batch_size=4, out=str(into / "align")))
    return into


def settings(encoder: Path, folder: Path, out: Path, **more: Any) -> MergeSettings:
    asked: dict[str, Any] = {
        "adapters": [str(folder / "task"), str(folder / "align")],
        "weights": [0.5],
        "method": "fuse",
        "base": str(encoder),
        "task": "classify",
        "train": [str(folder / "en.csv")],
        "device": "cpu",
        "out": str(out),
    }
    return MergeSettings(**asked | more)


def headed(encoder: Path, folder: Path) -> tuple[BaseModel, list[AdapterSource]]:
    sources = [open_adapter(folder / name) for name in ("task", "align")]
    rows = get_task("classify").read([str(folder / "en.csv")], rows=None)[0]
    head = head_of(get_task("classify"), sources, rows)
    return load_base(str(encoder), device="cpu", dtype="float32", head=head), sources


def test_gates_have_the_slope_of_the_loss(encoder: Path, folder: Path) -> None:
    base, sources = headed(encoder, folder)
    ids = torch.arange(5, 25).reshape(2, 10)

    def loss() -> Tensor:
        return base.model(input_ids=ids).logits.double().square().mean()

    with acting(base, sources) as attached:
        gates = attached.learn(lambda module: group_of("layer", module), [0.6, 0.4])
        assert set(gates) == {f"layer {number}" for number in range(4)}
        loss().backward()
        for gate in gates.values():
            slope = gate.grad
            assert slope is not None
            for place in range(2):
                with torch.no_grad():
                    gate[place] += 1e-2
                    above = float(loss())
                    gate[place] -= 2e-2
                    below = float(loss())
                    gate[place] += 1e-2
                assert float(slope[place]) == pytest.approx((above - below) / 2e-2, rel=0.05, abs=1e-5)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("per", ["layer", "module", "adapter"])
def test_what_is_written_is_the_gated_model_as_a_plain_adapter(
    per: str, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    options = {"per": per, "steps": 8, "rate": 0.1}
    report = merge_learned(settings(encoder, folder, tmp_path / "fused", options=options))
    document = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())
    gates = document["fuse"]["gates"]
    assert len(gates) == {"layer": 4, "module": len(report.modules), "adapter": 1}[per]
    assert any(gate != [0.5, 0.5] for gate in gates.values())
    assert document["plan"]["method"] == "fuse"
    assert document["fuse"]["learned_on"][0]["name"] == "en.csv"
    base, sources = headed(encoder, folder)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad(), acting(base, sources) as attached:
        attached.set_weights_by_module(lambda module: gates[group_of(per, module)])
        wanted = base.model(input_ids=ids).logits
        plain = AutoModelForSequenceClassification.from_pretrained(str(encoder), num_labels=2)
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "fused")).eval()
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_cat_is_fuse_with_gates_of_modules(encoder: Path, folder: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"options": {"steps": 3, "rate": 0.1}}
    merge_learned(settings(encoder, folder, tmp_path / "cat", method="cat", **more))
    more["options"]["per"] = "module"
    merge_learned(settings(encoder, folder, tmp_path / "fuse", **more))
    weights, manifests = zip(
        *(
            ((tmp_path / name / WEIGHTS).read_bytes(), json.loads((tmp_path / name / "adaptermix.json").read_text()))
            for name in ("cat", "fuse")
        ),
        strict=True,
    )
    assert weights[0] == weights[1]
    assert [manifest["plan"]["method"] for manifest in manifests] == ["cat", "fuse"]
    assert manifests[0]["fuse"]["gates"] == manifests[1]["fuse"]["gates"]


def _turned(folder: Path) -> dict[str, Any]:
    """Rows whose labels are the other way round, so that the task adapter must be weighed against itself."""
    return {"train": [str(folder / "turned.en.csv")]}


def test_the_loss_falls_and_dev_decides(encoder: Path, folder: Path, tmp_path: Path) -> None:
    options = {"steps": 40, "rate": 0.1}
    merge_learned(settings(encoder, folder, tmp_path / "fused", options=options))
    losses = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())["fuse"]["losses"]
    assert losses["last"] < losses["first"]
    # learned from rows that say the contrary of dev, nothing is better than the start
    dev = {"dev": [str(folder / "en.csv")]}
    notes = Notes()
    asked = settings(encoder, folder, tmp_path / "kept", options=options, **_turned(folder), **dev)
    merge_learned(asked, watch=notes)
    fused = json.loads((tmp_path / "kept" / "adaptermix.json").read_text())["fuse"]
    assert fused["taken_step"] == 0
    assert set(map(tuple, fused["gates"].values())) == {(0.5, 0.5)}
    assert any("gates of step 0" in note for note in notes.said)
    average = merge([folder / "task", folder / "align"], weights=[0.5], out=tmp_path / "average")
    assert average.norm == pytest.approx(
        merge_learned(settings(encoder, folder, tmp_path / "none", options={"steps": 0})).norm
    )


def test_the_same_seed_gives_the_same_adapter_and_a_card(encoder: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        merge_learned(settings(encoder, folder, tmp_path / name, options={"steps": 5}))
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert "a weighted merge" in (tmp_path / "one" / "README.md").read_text()
    asked = EvaluateSettings(
        base=str(encoder),
        adapter=str(tmp_path / "one"),
        task="classify",
        data=[str(folder / "en.csv")],
        device="cpu",
        split="test",
    )
    with refuses("split.known: trained or chosen on"):
        evaluate(asked)


def test_what_does_not_do_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    for more, says in (
        ({"task": None}, "gates.no-rows: --task"),
        ({"base": None, "train": []}, "gates.no-rows: --base and --train"),
        ({"options": {"weights@*": 0.3}}, "gates.places"),
        ({"fill": "one"}, "gates.places"),
        ({"options": {"rate": 0.0}}, "method.steps"),
        ({"options": {"per": "head"}}, "method.option-type: per"),
        ({"method": "exact"}, "gates.option: task"),
    ):
        with refuses(says):
            merge_learned(settings(encoder, folder, tmp_path / "no", **more))  # type: ignore[arg-type]
    with refuses("merge.no-out"):
        merge([folder / "task", folder / "align"], weights=[0.5], method="fuse")
    assert not (tmp_path / "no").exists()


def test_a_loss_that_is_not_finite_ends_it(encoder: Path, folder: Path) -> None:
    base = load_base(str(encoder), device="cpu", dtype="float32")

    class Rows:
        lengths: ClassVar[list[int]] = [1, 1]
        taught: ClassVar[list[int]] = [0, 1]

        def __call__(self, rows: Any) -> BatchLoss:
            return BatchLoss(torch.tensor(float("nan"), requires_grad=True), 1, terms=self.terms(rows))

        def terms(self, rows: Any) -> int:
            return len(rows)

    with (
        Attachment(base.model, [open_adapter(folder / "align").read()]) as attached,
        refuses("gates.not-finite"),
    ):
        learn_gates(attached, Fuse(), [1.0], Rows())


def test_the_command_learns_and_says_so(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(folder / "task"), str(folder / "align"), "--method", "fuse", "--weights", "0.9"]
    words += ["--base", str(encoder), "--task", "classify", "--train", str(folder / "en.csv"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--set", "steps=3", "--out", str(tmp_path / "fused"), "--json"])
    assert ended.value.code in (0, None)
    out = capsys.readouterr()
    assert "gates of step 3" in out.err
    assert json.loads(out.out)["method"] == "fuse"
    with pytest.raises(SystemExit) as ended:
        main([*words[:-6], "--set", "steps=3", "--out", str(tmp_path / "no")])
    assert ended.value.code == 2


def test_a_search_chooses_among_averages_sums_and_gates(encoder: Path, folder: Path, tmp_path: Path) -> None:
    """Rows whose labels are turned round want the task adapter against itself, which gates can learn."""
    turned = _turned(folder)
    options = {"steps": 60, "rate": 0.2, "per": "adapter"}
    merge_learned(settings(encoder, folder, tmp_path / "gated", options=options, **turned))
    asked: dict[str, Any] = {
        "adapters": [str(folder / "task"), str(folder / "align")],
        "base": str(encoder),
        "task": "classify",
        "dev": turned["train"],
        "grid": [0.5, 0.9],
        "space": "both",
        "candidates": [str(tmp_path / "gated")],
        "device": "cpu",
        "dtype": "float32",
    }
    notes = Notes()
    found = search(SearchSettings(**asked, out=str(tmp_path / "best")), watch=notes)
    names = [trial.candidate.name or trial.candidate.weights for trial in found.trials]
    assert names == [(0.5, 0.5), (0.9, 0.1), (1.0, 0.5), (1.0, 0.9), str(tmp_path / "gated")]
    assert found.chosen.candidate.name == str(tmp_path / "gated")
    assert found.chosen_score.value > found.baseline_score.value
    assert any("a candidate's weights were learned on" in note for note in notes.said)
    one, two = (open_adapter(tmp_path / name).read() for name in ("gated", "best"))
    for module, update in one.updates.items():
        torch.testing.assert_close(two.updates[module].dense(), update.dense())
    document = json.loads((tmp_path / "best" / "adaptermix.json").read_text())
    assert "turned.en.csv" in {entry["name"] for entry in document["data"]}
    assert document["fuse"]["start"] == [0.5, 0.5]
    report = search(SearchSettings(**asked, out=str(tmp_path / "told"), report=True))
    assert report.chosen.candidate == found.chosen.candidate
    with refuses("search.learned-method"):
        search(SearchSettings(**asked | {"candidates": [], "method": "fuse"}, out=str(tmp_path / "no")))
    merge([folder / "align", folder / "task"], weights=[0.5], out=tmp_path / "other")
    merge([folder / "task", folder / "align"], weights=[0.5], method="slerp", out=tmp_path / "slerp")
    swap: dict[str, Any] = {"method": "layer-swap", "options": {"bottom": 1, "top": 0}}
    merge([folder / "task", folder / "align"], weights=[1.0, 1.0], **swap, out=tmp_path / "swapped")
    for candidate, says in (
        ("other", "candidates.adapters"),
        ("slerp", "candidates.method: slerp"),
        ("swapped", "candidates.method: layer-swap"),
    ):
        with refuses(says):
            search(SearchSettings(**asked | {"candidates": [str(tmp_path / candidate)]}, out=str(tmp_path / "no")))
    with refuses("search.space"):
        SearchSettings(**asked | {"grid": [], "trials": 3}, out="no")


def test_test_data_that_gates_learned_from_stay_known(encoder: Path, folder: Path, tmp_path: Path) -> None:
    data = [write_rows(tmp_path, "seen.en.csv", says=True, count=8)]
    # rows that the adapters were not trained on
    Path(data[0]).write_text(Path(data[0]).read_text().replace(",", " indeed so,").replace("text indeed so", "text", 1))
    asked = EvaluateSettings(
        base=str(encoder), adapter=str(folder / "task"), task="classify", data=data, device="cpu", split="test"
    )
    evaluate(asked)
    with refuses("split.tested: must not be test data"):
        merge_learned(settings(encoder, folder, tmp_path / "gated", train=data))
    gated = settings(encoder, folder, tmp_path / "gated", train=data, options={"steps": 2}, allow_tested=True)
    merge_learned(gated)
    common: dict[str, Any] = {"base": str(encoder), "task": "classify", "device": "cpu", "dtype": "float32"}
    search(
        SearchSettings(
            **common,
            adapters=gated.adapters,
            dev=[str(folder / "en.csv")],
            grid=[0.9],
            candidates=[str(tmp_path / "gated")],
            out=str(tmp_path / "best"),
        )
    )
    for name in ("gated", "best"):
        tested = json.loads((tmp_path / name / "adaptermix.json").read_text())["tested"]
        assert [entry["name"] for entry in tested] == ["seen.en.csv"]


def test_gates_of_nothing_keep_the_start_and_the_head(encoder: Path, folder: Path, tmp_path: Path) -> None:
    asked = settings(encoder, folder, tmp_path / "gated", weights=[0.0, 1 / 3], options={"steps": 0})
    report = merge_learned(asked)
    # where the alignment adapter has no module its weight counts for nothing
    assert {module.weights for module in report.modules.values()} <= {(0.0, 1 / 3), (0.0, 0.0)}
    assert open_adapter(tmp_path / "gated").saved_headers
    notes = Notes()
    both = settings(encoder, folder, tmp_path / "both", dev=[str(folder / "en.csv")], options={"steps": 1})
    merge_learned(both, watch=notes)
    assert any("dev" in note and "training" in note for note in notes.said)


def test_a_gate_on_the_output_layer_learns(causal: Path, tmp_path: Path) -> None:
    rows = [write_rows(tmp_path, "en.csv", says=True, count=8)]
    common: dict[str, Any] = {"base": str(causal), "device": "cpu", "dtype": "float32", "rank": 4, "dropout": 0.0}
    more = {"task": "classify", "train": rows, "batch_size": 4, "steps": 6, "learning_rate": 1e-2}
    train_task(TaskSettings(**common, **more, out=str(tmp_path / "task")))
    train_task(TaskSettings(**common, **more, seed=1, out=str(tmp_path / "other")))
    for name in ("task", "other"):
        _adapt_output(tmp_path / name)
    gates = settings(causal, tmp_path, tmp_path / "gated", train=rows, options={"steps": 4, "rate": 0.1})
    merge_learned(gates.model_copy(update={"adapters": [str(tmp_path / "task"), str(tmp_path / "other")]}))
    document = json.loads((tmp_path / "gated" / "adaptermix.json").read_text())
    assert document["fuse"]["gates"]["lm_head"] != [0.5, 0.5]


def _adapt_output(folder: Path) -> None:
    """Give an adapter a LoRA on the output layer too."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(len(folder.name))
    a, b = torch.randn(4, 32, generator=generator), torch.randn(259, 4, generator=generator)
    tensors |= {f"base_model.model.lm_head.lora_{name}.weight": value * 0.1 for name, value in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


class _Scripted:
    """Rows whose loss is a function of the one gate."""

    lengths: ClassVar[list[int]] = [1]
    taught: ClassVar[list[int]] = [0]

    def __init__(self, gate: torch.nn.Parameter, loss_of: Callable[[Tensor], Tensor]) -> None:
        self._gate, self._loss_of = gate, loss_of

    def __call__(self, rows: Any) -> BatchLoss:
        return BatchLoss(self._loss_of(self._gate.sum()), 1, terms=self.terms(rows))

    def terms(self, rows: Any) -> int:
        return len(rows)


@pytest.mark.parametrize(
    ("best", "taken", "value"),
    [(None, 10, 0.45), (1.0, 0, 1.0), (0.61, 5, 0.6), (0.73, 3, 0.73), (0.0, 10, 0.45)],
    ids=["no dev", "start", "middle", "third", "last"],
)
def test_the_step_that_is_taken_and_its_gates_by_hand(best: float | None, taken: int, value: float) -> None:
    """A loss of slope 1 lets Adam step by its rate, which falls from .1 by a tenth: 1, .9, .81, .73, .66, .6 ..."""
    gate = torch.nn.Parameter(torch.ones(1))

    class Attached:
        def learn(self, group_of: Any, weights: Any) -> dict[str, torch.nn.Parameter]:
            return {"all": gate}

    dev = None if best is None else _Scripted(gate, lambda now: (now - best).abs())
    method = Fuse(steps=10, rate=0.1, decay=0.0, per="adapter")
    found = learn_gates(Attached(), method, [1.0], _Scripted(gate, lambda now: now), dev)  # type: ignore[arg-type]
    assert (found.taken, found.document()["taken_step"]) == (taken, taken)
    assert found.values == {"all": (pytest.approx(value),)}
    assert found.document()["losses"]["first"] == 1.0
    assert found.document()["losses"]["last"] == pytest.approx(0.46)
