"""Encoder halves of encoder-decoders: loaded, trained, merged, measured, and read by plain PEFT."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, T5ForConditionalGeneration, WhisperConfig

from adaptermix import AlignSettings, RetrieveSettings, load_adapter, merge, retrieve, train_align
from adaptermix.adapters import open_adapter
from adaptermix.adapters.paths import fitted
from adaptermix.evaluation.retrieval import embed
from adaptermix.merging.on_model import acting
from adaptermix.models import headed
from adaptermix.models.base import load_base, model_kind
from adaptermix.models.blocks import blocks, keep_blocks
from adaptermix.models.pretrained import load_config
from adaptermix.training.dry_run import outline

from .factories import peft_chatter
from .halves import FAMILIES, tiny_encoder_decoder
from .refusals import refuses
from .training.data import write_pairs

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
MASK = (IDS != 1).long()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_encoder_decoder(tmp_path_factory.mktemp("halves") / name, name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_computes_what_the_encoder_of_the_whole_model_does(family: str, folders: dict[str, Path]) -> None:
    whole = FAMILIES[family][1].from_pretrained(folders[family]).eval()
    base = load_base(str(folders[family]), device="cpu", dtype="float32")
    assert (base.kind, model_kind(str(folders[family])), base.layers) == ("encoder", "encoder", 3)
    assert base.fingerprint
    with torch.no_grad():
        found = base.model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
        expected = whole.get_encoder()(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert len(found.hidden_states) == 4
    names = {name.removeprefix("model.") for name, _ in whole.named_modules()}
    paths = {name for name, _ in base.model.named_modules()}
    assert paths <= names
    assert not [path for path in paths if "decoder" in path]
    assert blocks(base.model)[0] in ("encoder.layers", "encoder.block")
    assert paths == {name for name, _ in outline(str(folders[family])).named_modules()}


def test_training_skips_no_block(folders: dict[str, Path]) -> None:
    assert FAMILIES["nllb"][1].from_pretrained(folders["nllb"]).get_encoder().layerdrop > 0
    assert load_base(str(folders["nllb"]), device="cpu").model.encoder.layerdrop == 0


@pytest.mark.parametrize("family", ["nllb", "t5"])
def test_blocks_can_be_left_out(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu", dtype="float32")
    with torch.no_grad():
        states = base.model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        keep_blocks(base.model, 2)
        caught: list[Tensor] = []
        last = blocks(base.model)[1][1]
        last.register_forward_hook(lambda _m, _i, out: caught.append(out if isinstance(out, Tensor) else out[0]))
        base.model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(caught[0], states[2])


def test_encoders_of_sound_are_refused(tmp_path: Path) -> None:
    WhisperConfig().save_pretrained(tmp_path)
    with refuses("model.encoder-decoder: 'whisper'"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("family", ["mbart", "t5", "bart"])
def test_heads_that_read_the_decoder_are_not_used(family: str, folders: dict[str, Path]) -> None:
    config = load_config(str(folders[family]))
    assert type(config) in AutoModelForSequenceClassification._model_mapping
    assert headed._prefix(AutoModelForSequenceClassification, config) is None


def aligned(base: Path, folder: Path, out: str, seed: int = 0) -> Path:
    own = {"dtype": "float32", "device": "cpu", "rank": 2, "seed": seed, "learning_rate": 1e-2}
    pairs = write_pairs(folder)[:1]
    settings = AlignSettings(
        base=str(base), pairs=pairs, out=str(folder / out), objective="contrastive", steps=6, batch_size=6, **own
    )
    train_align(settings)
    return folder / out


@pytest.mark.parametrize("family", ["nllb", "mbart", "t5", "mt5"])
def test_alignment_is_trained_merged_measured_and_read_by_peft(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = folders[family]
    one, other = (aligned(base, tmp_path, f"align{seed}", seed) for seed in (0, 1))
    modules = load_adapter(one).updates
    assert modules
    assert all(re.match(r"encoder\.(layers|block)\.0\.", path) for path in modules)
    merge([one, other], weights=[0.5, 0.5], out=tmp_path / "both")
    place = {"dtype": "float32", "device": "cpu"}
    pairs = str(tmp_path / "de-en.tsv")
    found = retrieve(RetrieveSettings(base=str(base), adapter=str(tmp_path / "both"), data=[pairs], **place))
    assert len(found.layers) == 4
    assert set(found.layers[3]) == {"de-en", "en-de"}

    loaded = load_base(str(base), device="cpu", dtype="float32")
    sentences, languages = ["das rot", "ein blau"], ["de", "de"]
    rows = loaded.encode(sentences, languages, padding="max_length", max_length=12)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with peft_chatter():  # peft writes a warning for each key that the model lacks
        whole = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "both").eval()
    adapted = {name for name, _ in whole.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == len(modules)
    with torch.no_grad(), acting(loaded, [open_adapter(tmp_path / "both")]):
        ours = loaded.model(**batch).last_hidden_state
    with torch.no_grad():
        theirs = whole.get_base_model().get_encoder()(**batch).last_hidden_state
        plain = loaded.model(**batch).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert float((plain - ours).abs().max()) > 1e-3


def test_an_adapter_that_peft_trained_on_the_whole_model_fits(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = FAMILIES["nllb"][1].from_pretrained(folders["nllb"])
    config = LoraConfig(r=2, target_modules=r".*\.encoder\..*\.(q_proj|fc1)", init_lora_weights=False)
    with peft_chatter():
        get_peft_model(whole, config).save_pretrained(tmp_path / "adapter")
    base = load_base(str(folders["nllb"]), device="cpu", dtype="float32")
    source = fitted(open_adapter(tmp_path / "adapter"), [name for name, _ in base.model.named_modules()])
    assert set(source.modules) == {f"encoder.layers.{n}.{m}" for n in range(3) for m in ("self_attn.q_proj", "fc1")}


@pytest.mark.parametrize("family", ["nllb", "mbart", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_row_alone_equals_the_row_in_a_padded_batch(family: str, side: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu", dtype="float32")
    rows = base.encode(["das", "ein langer Satz mit vielen Worten"], ["de", "de"])
    batch = base.tokenizer.pad(rows, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        together = base.model(**batch).last_hidden_state[0]
        alone = base.model(input_ids=torch.tensor([rows[0]["input_ids"]])).last_hidden_state[0]
    kept = together[batch["attention_mask"][0] == 1]
    if side == "left" and family == "mbart":  # its positions count padding
        assert kept.shape == alone.shape
    else:
        torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-4)


def test_a_model_of_t5_is_saved_for_the_whole_class_too(folders: dict[str, Path]) -> None:
    whole = T5ForConditionalGeneration.from_pretrained(folders["t5"])
    base = load_base(str(folders["t5"]), device="cpu", dtype="float32")
    stored = whole.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in base.model.state_dict().items())


def test_vectors_are_those_of_the_tagged_text(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["nllb"]), device="cpu", dtype="float32")
    vector = embed(base, ["das rot"], batch_size=1, max_length=64, name="test:de")[-1, 0]
    base.tokenizer.src_lang = "deu_Latn"
    with torch.no_grad():
        states = base.model(**base.tokenizer("das rot", return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(vector, states.mean(0))
    english = embed(base, ["das rot"], batch_size=1, max_length=64, name="test:en")[-1, 0]
    assert float((english - vector).abs().max()) > 1e-3
