"""What fusion in the bottleneck is compared with: mixing in one block, sources in the text, other encoders' states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import merge
from adaptermix.adapters import open_adapter
from adaptermix.evaluation import evaluate
from adaptermix.fusion.latents import Latents, _tagged
from adaptermix.fusion.mixup import Mixup, Passed, consistency
from adaptermix.tasks import get_task
from adaptermix.training.fusion import train_fusion
from tests.fusion.test_commands import asked, score, settings, write_rows
from tests.tiny import tiny_encoder
from tests.training.data import Notes

from ..refusals import refuses

# PEFT uses the older name
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(("fusion", "steps"), [("x-mixup", 200), ("input", 80)])
def test_what_only_the_source_tells_is_learned(fusion: str, steps: int, encoder: Path, tmp_path: Path) -> None:
    targets = ["all-linear"]
    train_fusion(settings(encoder, tmp_path, fusion=fusion, steps=steps, targets=targets, learning_rate=1e-2))
    source = [str(tmp_path / "en.csv")]
    assert score(encoder, tmp_path, source=source) > 0.95
    assert score(encoder, tmp_path, source=source, batch_size=5) > 0.95
    notes = Notes()
    assert evaluate(asked(encoder, tmp_path), watch=notes).overall.value < 0.8
    assert any("without sources" in note for note in notes.said)
    document = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())
    assert document["fusion"]["fusion"] == fusion
    assert len(document["data"]) == 2  # rows and sources


def test_sources_in_the_text_give_a_plain_adapter(encoder: Path, tmp_path: Path) -> None:
    train_fusion(settings(encoder, tmp_path, fusion="input", steps=2))
    assert not open_adapter(tmp_path / "fused").meta.fusion
    merge([tmp_path / "fused", tmp_path / "fused"], weights=[0.5, 0.5], out=tmp_path / "merged")
    source = [str(tmp_path / "en.csv")]
    assert score(encoder, tmp_path, name="merged", source=source) == score(encoder, tmp_path, source=source)
    task = get_task("qa")
    row = task.read([_qa(tmp_path, "q.jv.jsonl", "cat")], rows=None)[0][0]
    other = replace(row, context="a dog sat", answers=("dog",), spans=((2, 5),))
    both = task.with_source(row, other)  # type: ignore[attr-defined]
    assert [both.context[slice(*place)] for place in both.spans] == ["cat"]


def _qa(folder: Path, name: str, answer: str) -> str:
    entry = {"question": "who?", "context": f"the {answer} sat", "answers": [answer]}
    (folder / name).write_text(json.dumps(entry) + "\n")
    return str(folder / name)


def test_mixing_begins_between_the_target_and_what_it_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(2, tokens, 8, generator=generator) for tokens in (5, 4))
    reads, mask = torch.ones(2, 5).bool(), torch.ones(2, 4).bool()
    reads[0, 3:], mask[0, 2:] = False, False
    mix = Mixup(8)
    found = mix(target, source, reads, mask)
    # the first row, as the paper writes it
    scores = target[0] @ source[0, :2].T / 8**0.5
    looking = scores.softmax(-1)
    back = (source[0] @ target[0, :3].T / 8**0.5).softmax(-1)

    def entropy(weights: torch.Tensor, count: int) -> torch.Tensor:
        return -(weights[:count] * weights[:count].log()).sum(-1).mean()

    share = 0.5 * torch.sigmoid(entropy(looking, 3) + entropy(back, 2))
    wanted = share * target[0] + (1 - share) * (looking @ source[0, :2])
    torch.testing.assert_close(found[0], wanted)
    # padding of the source, and what stands there, change nothing
    changed = source.clone()
    changed[0, 2:] = 7.0
    torch.testing.assert_close(mix(target, changed, reads, mask), found)


def test_sides_that_agree_disagree_by_nothing() -> None:
    logits, first = torch.randn(3, 2), torch.randn(3, 8)
    one = Passed(states=torch.zeros(3, 1, 8), mask=torch.ones(3, 1).bool(), logits=logits, first=first)
    assert float(consistency(one, one).detach()) == pytest.approx(0, abs=1e-6)
    other = replace(one, logits=logits + torch.tensor([1.0, 0.0]), first=first + 1)
    source, target = logits.softmax(-1), other.logits.softmax(-1)
    wanted = (source * (source / target).log()).sum(-1).mean() + 1
    torch.testing.assert_close(consistency(one, other), wanted)


@pytest.mark.parametrize("fusion", ["add", "cross-attention"])
def test_states_of_another_encoder_are_sources(fusion: str, encoder: Path, tmp_path: Path) -> None:
    other = tiny_encoder(tmp_path / "mt", layers=2, hidden=24)
    more: dict[str, Any] = {"source_encoder": str(other), "steps": 60}
    train_fusion(settings(encoder, tmp_path, fusion=fusion, **more))
    source = [str(tmp_path / "en.csv")]
    found = score(encoder, tmp_path, source=source)
    assert found > 0.95
    moved = tmp_path / "moved"
    (tmp_path / "mt").rename(moved)
    with refuses("base.not-found: source"):
        score(encoder, tmp_path, source=source)
    assert score(encoder, tmp_path, source=source, source_encoder=str(moved)) == found
    # the encoder reads the rows themselves, which here tell nothing
    assert score(encoder, tmp_path, source_encoder=str(moved)) < 0.8
    entry = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())["fusion"]
    assert entry["encoder_fingerprint"]
    assert entry["fusion_encoder"] == str(other)


def test_the_projection_learns_and_travels(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    other = tiny_encoder(tmp_path / "mt", layers=2, hidden=24)
    found = []
    for steps in (1, 6):
        train_fusion(settings(encoder, tmp_path, source=[], source_encoder=str(other), steps=steps, overwrite=True))
        tensors = load_file(tmp_path / "fused" / "adapter_model.safetensors")
        found.append(tensors["base_model.model.fusion_projection.weight"])
    assert found[0].shape == (32, 24)
    assert float((found[1] - found[0]).abs().max()) > 1e-4


def test_a_decoder_takes_latents_beside_its_prompt(causal: Path, tmp_path: Path) -> None:
    other = tiny_encoder(tmp_path / "mt", layers=2, hidden=24)
    train_fusion(settings(causal, tmp_path, source_encoder=str(other), steps=2))
    assert 0 <= score(causal, tmp_path, source=[str(tmp_path / "en.csv")], max_new_tokens=4) <= 1


def test_an_encoder_decoder_gives_its_encoder_and_reads_language_tags(tmp_path: Path) -> None:
    from transformers import M2M100Config, M2M100Model

    class Tokenizer:
        src_lang = "eng_Latn"
        model_max_length = 64
        all_special_tokens = ("<s>", "__jv__", "eng_Latn", "ace_Arab", "ace_Latn")

        def __call__(self, *text: str, **_: Any) -> dict[str, list[int]]:
            tags = [token.strip("_") for token in self.all_special_tokens]
            return {"input_ids": [tags.index(self.src_lang), *map(len, text)]}

        def pad(self, batch: Any, **_: Any) -> Any:
            from transformers import BatchEncoding

            rows = [text["input_ids"] for text in batch]
            longest = max(map(len, rows))
            ids = [row + [1] * (longest - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 40, "max_position_embeddings": 64}
    config = M2M100Config(**sizes, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16)
    M2M100Model(config).save_pretrained(tmp_path / "mt")
    _tokenizer_of(tiny_encoder(tmp_path / "other"), tmp_path / "mt")
    latents = Latents(str(tmp_path / "mt"), device="cpu", dtype="float32")
    assert latents.width == 16
    tokenizer: Any = Tokenizer()
    latents._tagged = _tagged(tokenizer, "mt", None)
    with refuses("fusion.language: 'min'"):
        latents.encode([("a",)], ["min"])
    found = latents.encode([("abc",), ("abc", "de")], ["jv", "ace"])
    assert [text["input_ids"] for text in found] == [[1, 3], [4, 3, 2]]  # Acehnese in its usual script
    states = latents.read([{"input_ids": [2, 5, 6]}, {"input_ids": [2, 5]}])
    assert states.shape == (2, 3, 16)
    torch.testing.assert_close(latents.read([{"input_ids": [2, 5]}])[0], states[1, :2])
    latents._tagged = _tagged(tokenizer, "mt", "eng_Latn")  # as the release reads every text
    assert latents.encode([("abc",)], ["ace"]) == [{"input_ids": [2, 3]}]
    with refuses("fusion.source-tag"):
        _tagged(tokenizer, "mt", "xx")


def _tokenizer_of(folder: Path, into: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (into / name).write_bytes((folder / name).read_bytes())


def test_what_does_not_go_together_is_refused(encoder: Path, causal: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"source": []}, "fusion.no-source"),
        ({"fusion": "x-mixup", "alignment": "end"}, "fusion.option: alignment"),
        ({"fusion": "input", "source_encoder": "x"}, "fusion.option: source-encoder"),
        ({"mixup_layer": 2}, "fusion.mixup-layer"),
        ({"fusion": "x-mixup", "gradient_checkpointing": True}, "fusion.checkpointing"),
        ({"source_tag": "eng_Latn"}, "fusion.tag-without-encoder"),
        ({"source_encoder": "x", "source_offset": 1}, "fusion.encoder-options"),
        ({"fusion": "cross-attention", "alignment": "end"}, "fusion.alignment"),
        ({"shard_base": True}, "fusion.shard-base"),
    ):
        with refuses(said):
            settings(encoder, tmp_path, **more)  # type: ignore[arg-type]
    with refuses("model.block-index: 4"):
        train_fusion(settings(encoder, tmp_path, fusion="x-mixup", mixup_layer=9))
    for dry_run in (False, True):
        with refuses("fusion.no-classes"):
            train_fusion(settings(causal, tmp_path, fusion="x-mixup", dry_run=dry_run))
    with refuses("fusion.encoder-only"):
        train_fusion(settings(causal, tmp_path, fusion="cross-attention-paper"))
    with refuses("fusion.targets"):
        train_fusion(settings(encoder, tmp_path, targets=["dense"]))
    with refuses("fusion.no-source-tag"):
        train_fusion(settings(encoder, tmp_path, source_encoder=str(encoder), source_tag="eng_Latn"))
    train_fusion(settings(encoder, tmp_path, steps=1))
    with refuses("fusion.not-for: trained with one"):
        score(encoder, tmp_path, source_encoder=str(encoder))
    train_fusion(settings(encoder, tmp_path, steps=1, fusion="cross-attention", overwrite=True, alignment="position"))
    train_fusion(settings(encoder, tmp_path, steps=1, fusion="input", overwrite=True))
    with refuses("fusion.not-for: token by token"):
        score(encoder, tmp_path, source=[str(tmp_path / "en.csv")], source_alignment="last")


def test_a_base_with_a_stage_before_in_it(encoder: Path, tmp_path: Path) -> None:
    from adaptermix.baking import bake
    from adaptermix.options import BakeSettings, TaskSettings
    from adaptermix.training.task import train_task

    english = write_rows(tmp_path, "en.csv", says=True)
    common = {"base": str(encoder), "task": "classify", "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(**common, train=[english], steps=2, out=str(tmp_path / "stage")))
    more: dict[str, Any] = {"base": str(encoder), "adapter": [str(tmp_path / "stage")], "out": str(tmp_path / "baked")}
    with refuses("bake.not-deltas"):
        bake(BakeSettings(**more))
    bake(BakeSettings(**more, without_heads=True))
    train_fusion(settings(tmp_path / "baked", tmp_path, steps=2))
    assert 0 <= score(tmp_path / "baked", tmp_path, source=[english]) <= 1


def test_the_last_source_token_is_beside_all_of_the_prompt(tmp_path: Path) -> None:
    from tests.fusion.test_laws import IDS, SOURCE, batch, fuse, model_of, out, sources_of

    with torch.no_grad():
        model = fuse(model_of("llama", tmp_path / "m"))
        target = batch(IDS)
        sources = sources_of(model, batch(SOURCE), target, "last")
        found = out(model, target, sources)
        states = {path: values[:, -1:].expand(-1, 12, -1) for path, values in _states(model).items()}
        wanted = replace(sources, states=states, mask=torch.ones(2, 12).bool(), lead=torch.zeros(2).long())
        torch.testing.assert_close(found, out(model, target, wanted))


def _states(model: Any) -> Any:
    from adaptermix.fusion import read_sources
    from tests.fusion.test_laws import SOURCE, batch

    return read_sources(model, batch(SOURCE)).states


def test_sources_can_be_read_with_dropout_as_in_the_release(tmp_path: Path) -> None:
    from transformers import AutoModel

    from adaptermix.fusion import read_sources
    from tests.fusion.test_laws import SOURCE, batch, fuse

    folder = tiny_encoder(tmp_path / "m")
    model = fuse(AutoModel.from_pretrained(folder, hidden_dropout_prob=0.5)).train()
    one, two = (read_sources(model, batch(SOURCE), dropout=True).states for _ in range(2))
    assert any(float((one[path] - two[path]).abs().max()) > 0 for path in one)
    one, two = (read_sources(model, batch(SOURCE)).states for _ in range(2))
    assert all(torch.equal(one[path], two[path]) for path in one)
    assert model.training
