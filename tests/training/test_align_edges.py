"""Alignment training where architectures, tokenizers and data differ from the plain case."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from adaptermix import AlignSettings, train_align
from adaptermix.errors import AdapterMixError, ModelError, PlanError
from adaptermix.models.base import BaseModel, backbone, load_base
from adaptermix.models.blocks import keep_blocks
from adaptermix.models.pooling import masked_mean
from adaptermix.tasks.data import Pair
from adaptermix.training.align import AlignLoss
from adaptermix.training.layer_states import MiddleStates

from ..factories import contents, load_with_peft
from ..refusals import refuses
from .data import write_pairs
from .test_align import settings_for

TEXTS = ["a", "a longer sentence than that", "of middle length", "bb", "ccc ccc", "dddd", "e" * 40, "ff", "g g"]


def loaded(folder: Path) -> BaseModel:
    return load_base(str(folder), dtype="float32", device="cpu")


def whole_states(base: BaseModel, texts: list[str], layer: int) -> torch.Tensor:
    batch = base.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    states = backbone(base)(**batch, output_hidden_states=True).hidden_states[layer]
    return masked_mean(states, batch["attention_mask"])


@pytest.mark.parametrize("layer", [1, 3])
def test_a_cut_model_gives_the_states_of_the_whole_one(any_causal: Path, layer: int) -> None:
    cut = loaded(any_causal)
    keep_blocks(cut.model, layer)
    encoded = cut.tokenizer(TEXTS)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            MiddleStates(cut).pooled(encoded), whole_states(loaded(any_causal), TEXTS, layer), rtol=1e-4, atol=1e-5
        )


def test_an_adapter_on_the_lower_blocks_changes_the_whole_model_when_peft_loads_it(
    any_causal: Path, tmp_path: Path
) -> None:
    train_align(settings_for(any_causal, tmp_path, layer=1))
    keys = set(load_file(tmp_path / "align" / "adapter_model.safetensors"))
    assert keys
    assert all(".layers.0." in key for key in keys)
    model = load_with_peft(any_causal, tmp_path / "align")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        changed = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert (changed - plain).abs().max() > 1e-4


@pytest.mark.parametrize(("chunks", "sizes"), [(1, [9]), (2, [5, 4]), (5, [2, 2, 2, 2, 1]), (50, [1] * 9)])
def test_vectors_do_not_depend_on_which_rows_run_together(causal: Path, chunks: int, sizes: list[int]) -> None:
    base = loaded(causal)
    states, encoded = MiddleStates(base, chunks=chunks), base.tokenizer(TEXTS)["input_ids"]
    with torch.no_grad():
        expected = torch.cat([states.pooled([ids]) for ids in encoded])
        run: list[int] = []
        backbone(base).register_forward_pre_hook(
            lambda _module, _args, given: run.append(len(given["input_ids"])), with_kwargs=True
        )
        torch.testing.assert_close(states.pooled(encoded), expected, rtol=1e-4, atol=1e-5)
    assert run == sizes


class TestFirstToken:
    """`exclude_bos` leaves out a special first token, whatever its number, and nothing else."""

    def vector(self, base: BaseModel, ids: list[int], *, exclude_bos: bool) -> torch.Tensor:
        with torch.no_grad():
            found = MiddleStates(base, exclude_bos=exclude_bos).pooled([ids])
        return found[0]

    def test_a_word_is_kept_where_the_tokenizer_knows_a_start_token_and_does_not_put_it(self, causal: Path) -> None:
        base = loaded(causal)
        ids = base.tokenizer("abc")["input_ids"]
        assert base.tokenizer.bos_token_id is not None
        assert ids[0] != base.tokenizer.bos_token_id
        torch.testing.assert_close(
            self.vector(base, ids, exclude_bos=True), self.vector(base, ids, exclude_bos=False), rtol=0, atol=0
        )

    @pytest.mark.parametrize("start", ["<pad>", "<s>"], ids=["number 0", "number 1"])
    def test_the_number_of_the_start_token_does_not_matter(self, causal: Path, start: str) -> None:
        """XLM-R's and Pythia's start token has the number 0."""
        base = loaded(causal)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(causal, bos_token=start, pad_token="</s>")
        number = tokenizer.bos_token_id
        assert number == int(start == "<s>")
        own = BaseModel(**{**{name: getattr(base, name) for name in base.__dataclass_fields__}, "tokenizer": tokenizer})
        ids = [number, *tokenizer("abc", add_special_tokens=False)["input_ids"]]
        base.model.model.norm = torch.nn.Identity()  # the last state of transformers comes after the norm
        states = backbone(base)(torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(self.vector(own, ids, exclude_bos=True), states[-1][0, 1:].mean(0))


class TestBatches:
    def loss(self, causal: Path, folder: Path, pairs: list[tuple[str, str]], **more: Any) -> float:
        settings = settings_for(causal, folder, dropout=0.0, batch_size=len(pairs), balance="rows", **more)
        base = loaded(causal)
        objective = AlignLoss(
            base, [Pair(languages=("de", "en"), source=one, target=other) for one, other in pairs], settings
        )
        with torch.no_grad():
            return float(objective(0)[0])

    def test_equal_targets_count_as_negatives_unless_masked(self, causal: Path, tmp_path: Path) -> None:
        """For two of three anchors the sum of two terms gains a third, the largest: at least a factor 3/2."""
        twins = [("same", "same"), ("same", "same"), ("other", "other")]
        masked, plain = (self.loss(causal, tmp_path, twins, mask_duplicates=flag) for flag in (True, False))
        assert plain - masked >= 2 / 3 * math.log(1.5) - 1e-6
        alone = [("eins", "same"), ("zwei", "odd"), ("drei", "other")]
        assert self.loss(causal, tmp_path, alone, mask_duplicates=True) == pytest.approx(
            self.loss(causal, tmp_path, alone)
        )

    def test_a_batch_of_targets_that_are_all_equal_has_no_negatives(self, causal: Path, tmp_path: Path) -> None:
        assert self.loss(causal, tmp_path, [("a", "x"), ("b", "x")], mask_duplicates=True) == pytest.approx(0.0)

    def test_long_sentences_are_cut(self, causal: Path, tmp_path: Path) -> None:
        pairs = [("abcd" + "x" * 50, "efgh"), ("ij", "kl")]
        cut = [("abcd", "efgh"), ("ij", "kl")]
        assert self.loss(causal, tmp_path, pairs, max_length=4) == pytest.approx(
            self.loss(causal, tmp_path, cut, max_length=4)
        )


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"layer": 5}, ModelError, "model.block-index: --layer.*4.*5"),
        ({"layer": 0}, ModelError, "model.block-index: --layer.*4"),
        ({"layer": -1}, ModelError, "model.block-index: --layer.*4"),
        ({"targets": ["q_proj", "query"]}, PlanError, "train.targets: query"),
        ({"device": "cuda:63"}, ModelError, "device.not-there: cuda:63"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_nothing_is_written(
    causal: Path, tmp_path: Path, more: dict[str, Any], kind: type[AdapterMixError], words: str
) -> None:
    settings = settings_for(causal, tmp_path, **more)
    before = contents(tmp_path)
    with refuses(words):
        train_align(settings)
    assert contents(tmp_path) == before


def test_a_refused_setting_does_not_cost_an_interrupted_run(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, targets=["query"], overwrite=True)
    (tmp_path / ".align.partial").mkdir()
    (tmp_path / ".align.partial" / "checkpoint.safetensors").write_bytes(b"work of hours")
    before = contents(tmp_path)
    with pytest.raises(PlanError):
        train_align(settings)
    assert contents(tmp_path) == before


def test_the_manifest_names_base_data_and_settings_and_no_place(causal: Path, tmp_path: Path) -> None:
    from adaptermix.io.files import sha256
    from adaptermix.io.fingerprints import fingerprint

    report = train_align(settings_for(causal, tmp_path, rows=":6"))
    from adaptermix import load_adapter

    found = load_adapter(report.out).meta.manifest
    assert found["kind"] == "train-align"
    assert found["base"]["fingerprint"] == fingerprint(causal)
    assert [entry["name"] for entry in found["data"]] == ["de-en.tsv", "fr-en.tsv"]
    assert [entry["sha256"] for entry in found["data"]] == [sha256(Path(path)) for path in write_pairs(tmp_path)]
    assert found["objective"]["pairs"] == 9
    assert "out" not in found["plan"]
    assert AlignSettings(out="x", **found["plan"]).rank == 4
