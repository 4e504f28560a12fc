"""Alignment training: what it computes, what it leaves out, what it writes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from adaptermix import AlignSettings, load_adapter, train_align
from adaptermix.models.base import BaseModel, backbone, load_base
from adaptermix.models.blocks import keep_blocks
from adaptermix.models.eval_mode import evaluating
from adaptermix.models.pooling import masked_mean
from adaptermix.tasks.data import Pair, read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.lora import inject
from adaptermix.training.losses import contrastive_loss
from adaptermix.training.parallel import Processes
from adaptermix.training.sampler import Sampler

from ..refusals import refuses
from .data import Notes, write_pairs
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def settings_for(base: Path, folder: Path, **more: object) -> AlignSettings:
    values = {
        "base": str(base),
        "pairs": write_pairs(folder),
        "out": str(folder / "align"),
        "objective": "contrastive",
        "dtype": "float32",
        "device": "cpu",
        "steps": 8,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "rank": 4,
    }
    return AlignSettings(**(values | more))


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_loss_falls_and_only_blocks_below_the_layer_are_adapted(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    report = train_align(settings_for(base, tmp_path, steps=40))
    losses = [entry["loss"] for entry in report.history]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    adapter = load_adapter(tmp_path / "align")
    blocks = {part for module in adapter.updates for part in module.split(".") if part.isdigit()}
    assert blocks == {"0", "1"}
    manifest = adapter.meta.manifest
    assert manifest["languages"] == {"aligned": ["de", "en", "fr"]}
    assert manifest["objective"] == {"name": "contrastive", "layer": 2, "layers": 4, "pairs": 15}
    assert len(manifest["data"][0]["sha256"]) == 64


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@pytest.mark.parametrize("layer", ["middle", 4])
def test_the_adapter_loads_onto_the_whole_model_with_peft_alone(
    kind: str, layer: str | int, tmp_path: Path, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    base = request.getfixturevalue(kind)
    train_align(settings_for(base, tmp_path, layer=layer))
    auto = AutoModelForCausalLM if kind == "causal" else AutoModel
    model = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "align")
    loaded = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(loaded) == len(load_adapter(tmp_path / "align").updates)
    assert not [w for w in recwarn if "key" in str(w.message)]


def test_neither_later_blocks_nor_the_output_layer_are_computed(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path)
    base = load_base(str(causal), dtype="float32", device="cpu")
    later, head = list(base.model.model.layers[2:]), base.model.lm_head
    called = []
    for module in (*later, head):
        module.register_forward_hook(lambda *_: called.append(1))
    keep_blocks(base.model, 2)
    inject(base.model, settings, seed=0)
    loss, *_ = AlignLoss(base, read_pairs(settings.pairs)[0], settings)(0)
    loss.backward()
    assert called == []
    assert len(base.model.model.layers) == 2


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_loss_equals_that_of_a_full_forward(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = settings_for(request.getfixturevalue(kind), tmp_path, dropout=0.0, balance="rows")
    pairs, _ = read_pairs(settings.pairs)
    whole, cut = (load_base(settings.base, dtype="float32", device="cpu") for _ in range(2))
    keep_blocks(cut.model, 2)
    objective = AlignLoss(cut, pairs, settings)
    cut.model.eval()
    found, *_ = objective(0)
    rows = Sampler(groups=[range(len(pairs))], batch_size=6, seed=0).batch(0)
    sides = []
    for texts in ([pairs[row].source for row in rows], [pairs[row].target for row in rows]):
        batch = whole.tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
        states = backbone(whole)(**batch, output_hidden_states=True).hidden_states[2]
        sides.append(masked_mean(states, batch["attention_mask"]))
    assert float(found) == pytest.approx(float(contrastive_loss(*sides)), rel=1e-5)


def rogue_base(folder: Path) -> BaseModel:
    """A base model with one dimension that is long and alike in all tokens, as language models have them."""
    base = load_base(str(folder), dtype="float32", device="cpu")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[:, 3] = 50.0
    return base


@pytest.mark.parametrize("way", ["all", "languages"])
def test_standardised_vectors_are_z_scores_of_the_frozen_base(way: str, causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, dropout=0.0, balance="rows", standardize=way)
    fr = [f"le {number} chat\tthe {number} cat\n" for number in range(16)]
    Path(settings.pairs[1]).write_text("".join(fr))
    de = Path(settings.pairs[0]).read_text() + "".join(f"{number} rot\t{number} red\n" for number in range(4))
    Path(settings.pairs[0]).write_text(de)
    pairs, _ = read_pairs(settings.pairs)
    base, frozen = rogue_base(causal), rogue_base(causal)

    def vectors(model: BaseModel, text: str) -> torch.Tensor:
        batch = model.tokenizer(text, return_tensors="pt")
        states = backbone(model)(**batch, output_hidden_states=True).hidden_states[2][0].double()
        return (states / states.norm(dim=-1, keepdim=True)).mean(0)

    every: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for pair in pairs:
            for language, text in zip(pair.languages, (pair.source, pair.target), strict=True):
                every.setdefault(language if way == "languages" else "", []).append(vectors(frozen, text))

    def score(row: int, side: int) -> torch.Tensor:
        pair = pairs[row]
        own = torch.stack(every[pair.languages[side] if way == "languages" else ""])
        return (vectors(base, (pair.source, pair.target)[side]) - own.mean(0)) / own.std(0, correction=0)

    inject(base.model, settings, seed=0)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    objective = AlignLoss(base, pairs, settings, layer=2)  # a resumed run's factors are not at their start
    rows = Sampler(groups=[range(len(pairs))], batch_size=6, seed=0).batch(0)
    with torch.no_grad(), evaluating(base.model):
        found, *_ = objective(0)
        source, target = (torch.stack([score(row, side) for row in rows]) for side in (0, 1))
    assert float(found) == pytest.approx(float(contrastive_loss(source, target)), rel=1e-4)


class Mixed(Processes):
    """A process whose losses are computed in bfloat16."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("way", ["all", "languages"])
def test_what_is_standardised_is_measured_in_the_precision_of_training(way: str, causal: Path, tmp_path: Path) -> None:
    """Z-scores of what was measured have mean 0 and variance 1, if they are of the same states."""
    settings = settings_for(causal, tmp_path, standardize=way, dropout=0.0)
    base = load_base(str(causal), dtype="float32", device="cpu")
    pairs = [Pair(languages=("de", "en"), source=f"{n} da", target=f"{n} there") for n in range(16)]
    objective = AlignLoss(base, pairs, settings, layer=2, processes=Mixed())
    with torch.no_grad(), evaluating(base.model), Mixed().autocast():
        source, target, _ = objective._sides(range(16))
        scores = torch.cat([objective._scored(side, range(16), n) for n, side in enumerate((source, target))])
    torch.testing.assert_close(scores.mean(0), torch.zeros(scores.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(scores.shape[1]), rtol=0, atol=1e-4)


def test_what_was_not_measured_is_refused_and_rare_languages_are_measured(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, standardize="languages")
    base = load_base(str(causal), dtype="float32", device="cpu")

    def made(language: str, count: int) -> list[Pair]:
        sides = ((f"{language} {n}", f"en {n}") for n in range(count))
        return [Pair(languages=(language, "en"), source=one, target=two) for one, two in sides]

    many = made("de", 700) + made("fr", 16)
    measured = AlignLoss(base, many, settings, layer=2)
    assert measured._standards["fr"] is not measured._standards["de"]
    everyone = settings.model_copy(update={"standardize": "all"})
    AlignLoss(base, made("sv", 2), everyone, layer=2, like=many)
    with refuses("standardize.language: sv"):
        AlignLoss(base, made("sv", 2), settings, layer=2, like=many)
    with refuses("standardize.too-few: 16.*4.*sv"):
        AlignLoss(base, made("de", 20) + made("sv", 4), settings, layer=2)


def test_a_base_whose_sentences_all_look_alike_is_told(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path)
    pairs, _ = read_pairs(settings.pairs)
    for base, more, warned in (
        (load_base(str(causal), dtype="float32", device="cpu"), {}, False),
        (rogue_base(causal), {}, True),
        (rogue_base(causal), {"standardize": "all"}, False),
    ):
        notes = Notes()
        AlignLoss(base, pairs, settings.model_copy(update=more), layer=2, watch=notes)
        assert any("--standardize removes their common component" in note for note in notes.said) == warned


def test_languages_are_drawn_equally_often(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path)
    base = load_base(str(causal), dtype="float32", device="cpu")
    pairs, _ = read_pairs(settings.pairs)
    objective = AlignLoss(base, pairs, settings)
    drawn = [pairs[row].languages[0] for number in range(5) for row in objective._sampler.batch(number)]
    assert drawn.count("de") == drawn.count("fr") == 15


def test_the_start_token_can_be_left_out_of_the_mean(encoder: Path) -> None:
    from adaptermix.training.layer_states import MiddleStates

    with_start, without = (load_base(str(encoder), dtype="float32", device="cpu") for _ in range(2))
    ids = with_start.tokenizer("ab")["input_ids"]
    states = backbone(with_start)(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0]
    torch.testing.assert_close(MiddleStates(with_start).pooled([ids])[0], states.mean(0))
    torch.testing.assert_close(MiddleStates(without, exclude_bos=True).pooled([ids])[0], states[1:].mean(0))


def test_switches_change_the_result_and_stand_in_the_manifest(causal: Path, tmp_path: Path) -> None:
    found = {}
    twins = tmp_path / "de-en.tsv"
    twins.write_text("rot\tred\ndunkelrot\tred\nhellrot\tred\nblau\tblue\n")
    for name, more in [("plain", {}), ("symmetric", {"symmetric": True}), ("masked", {"mask_duplicates": True})]:
        own = values(causal, tmp_path, pairs=[str(twins)], out=str(tmp_path / name), batch_size=4)
        train_align(AlignSettings(**own, **more))
        found[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        assert json.loads((tmp_path / name / "adaptermix.json").read_text())["plan"]["symmetric"] == (
            name == "symmetric"
        )
        assert json.loads((tmp_path / name / "adaptermix.json").read_text())["plan"]["mask_duplicates"] == (
            name == "masked"
        )
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("keeper", [0.0, 0.5])
def test_the_log_counts_the_pairs_that_were_used(keeper: float, causal: Path, tmp_path: Path) -> None:
    """Half of each batch are three pairs, so it draws some of them twice, and those are left out."""
    settings = settings_for(causal, tmp_path, batch_size=10, accumulate=2, steps=3, keeper=keeper)
    base = load_base(str(causal), dtype="float32", device="cpu")
    sampler = AlignLoss(base, read_pairs(settings.pairs)[0], settings)._sampler
    used = [len(set(sampler.batch(number))) for number in range(6)]
    assert max(used) < 10
    report = train_align(settings)
    assert [entry["rows"] for entry in report.history] == [sum(used[n : n + 2]) for n in (0, 2, 4)]


def test_a_dry_run_writes_nothing(causal: Path, tmp_path: Path) -> None:
    report = train_align(settings_for(causal, tmp_path, dry_run=True))
    assert report.document()["dry_run"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de-en.tsv", "fr-en.tsv"]
