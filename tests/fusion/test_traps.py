"""What went wrong once: drafts that fail, padding that counts, several adapters, gaps between blocks, slipping rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix.fusion import fused, read_sources
from adaptermix.fusion.bank import SourceBank
from adaptermix.fusion.source_rows import encode_sources, is_missing, read_beside
from adaptermix.models.base import load_base
from adaptermix.tasks import get_task
from adaptermix.training.fusion import train_fusion

from ..refusals import refuses
from .test_commands import score, settings, write_rows
from .test_laws import DECODERS, IDS, SOURCE, batch, fuse, model_of, out, sources_of

# PEFT uses the older name
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("alignment", ["position", "end"])
@torch.no_grad()
def test_tokens_of_a_cache_that_a_mask_leaves_out_move_nothing(kind: str, alignment: str, tmp_path: Path) -> None:
    """A draft of which a part was refused stays in the cache, masked; the source is long enough to reach behind it."""
    model = fuse(model_of(kind, tmp_path / "m"))
    prompt, rest = IDS[:, :5], IDS[:, 5:8]
    whole = batch(IDS[:, :8])
    sources = sources_of(model, batch(SOURCE), batch(prompt), alignment)
    wanted = out(model, whole, sources)[:, 5:]
    junk = torch.full((2, 2), 40)
    with fused(model, sources):
        first = model(**batch(torch.cat([prompt, junk], 1)), use_cache=True)
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[:, 5:7] = 0
        places = torch.arange(5, 8).expand(2, -1)
        found = model(
            input_ids=rest,
            attention_mask=mask,
            position_ids=places,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(found.logits, wanted, rtol=1e-3, atol=1e-4)


def test_drafts_change_no_answer_of_a_fused_decoder(causal: Path, tmp_path: Path) -> None:
    from adaptermix.adapters import open_adapter
    from adaptermix.fusion.sources import Fuser
    from adaptermix.merging.on_model import acting
    from adaptermix.models.generate import Limits, generate_ids

    train_fusion(settings(causal, tmp_path, steps=10, rank=16, learning_rate=2e-2))
    base = load_base(str(causal), device="cpu", dtype="float32")
    adapter = open_adapter(tmp_path / "fused")
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]] * 2
    texts = [[{"input_ids": list(range(20, 20 + 9 + n % 3))}] for n in range(len(prompts))]
    with acting(base, [adapter]):
        bank = SourceBank(base, texts, [[len(prompt)] for prompt in prompts], adapter.meta.fusion)
        fuser = Fuser(base.model)

        def before(rows: Any) -> None:
            fuser.use(bank.of(rows))

        common: dict[str, Any] = {
            "limits": Limits(max_new_tokens=10, one_line=False),
            "batch_size": 8,
            "before": before,
        }
        wanted = generate_ids(base, prompts, **common)
        wrong = [[*answer[:2], 50, 51, 52] for answer in wanted]
        assert generate_ids(base, prompts, drafts=wrong, **common) == wanted


def test_padding_that_counts_has_the_states_of_padding(encoder: Path, tmp_path: Path) -> None:
    train_fusion(settings(encoder, tmp_path, steps=3, alignment="index", source_norm=False))
    plain = (tmp_path / "fused" / "adapter_model.safetensors").read_bytes()
    more: dict[str, Any] = {"alignment": "index", "source_norm": False, "source_pads": True, "overwrite": True}
    texts = ["it is good", "it is bad and long", "bad"] * 8
    labels = ["positive", "negative", "negative"] * 8
    rows = "\n".join(f"{text},{label}" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "uneven.en.csv").write_text(f"text,label\n{rows}\n")
    source = [str(tmp_path / "uneven.en.csv")]
    train_fusion(settings(encoder, tmp_path, steps=3, source=source, **more))
    assert (tmp_path / "fused" / "adapter_model.safetensors").read_bytes() != plain
    base = load_base(str(encoder), device="cpu", dtype="float32")
    model = fuse(base.model)
    base = type(base)(**{**vars(base), "model": model.base_model.model})
    given = {"fusion_alignment": "index", "fusion_norm": False, "fusion_offset": 0, "fusion_pads": True}
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = SourceBank(base, [[{"input_ids": row}] for row in ids], [[5], [5]], given).of([0])
    assert found is not None
    padded = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    wanted = read_sources(model, {"input_ids": padded, "attention_mask": mask}, norm=False)
    for block, states in wanted.states.items():
        torch.testing.assert_close(found.states[block.removeprefix("base_model.model.")], states)
    assert found.mask.all()


def test_several_fused_adapters_are_loaded_beside_each_other(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from adaptermix.fusion.lora import FusionConfig, load_fusion

    logits: dict[str, Tensor] = {}
    target = batch(IDS)
    for number, fusion in enumerate(("gated", "cross-attention")):
        model = fuse(model_of("llama", tmp_path / "m"), fusion, seed=number)
        with torch.no_grad():
            logits[fusion] = out(model, target, sources_of(model, batch(SOURCE), target))
        model.save_pretrained(tmp_path / fusion)
    model = load_fusion(model_of("llama", tmp_path / "m"), str(tmp_path / "gated"), name="gated")
    load_fusion(model, str(tmp_path / "cross-attention"), name="cross-attention")
    for name, wanted in logits.items():
        model.set_adapter(name)
        with torch.no_grad():
            found = out(model.eval(), target, sources_of(model, batch(SOURCE), target))
        torch.testing.assert_close(found, wanted)
    plain = get_peft_model(model_of("llama", tmp_path / "m"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with refuses("fusion.load-order"):
        load_fusion(plain, str(tmp_path / "gated"), name="gated")
    with pytest.raises(ValueError, match="must not have magnitudes"):
        FusionConfig(use_dora=True)


@torch.no_grad()
def test_what_comes_out_of_a_block_goes_into_the_next_one_fused_or_not(tmp_path: Path) -> None:
    model = fuse(model_of("llama", tmp_path / "m"), layers_to_transform=[0, 2], layers_pattern="layers")
    inner, given = model.base_model.model.model, batch(SOURCE)
    found = read_sources(model, given, norm=True, offset=1).states
    with model.disable_adapter():
        states = model(**given, output_hidden_states=True).hidden_states
    assert len(found) == 2
    for block in (0, 2):
        path = next(path for path in found if path.endswith(f".{block}"))
        torch.testing.assert_close(found[path], inner.layers[block + 1].input_layernorm(states[block + 1]))


def test_rows_do_not_slip_past_their_sources(tmp_path: Path) -> None:
    from tests.training.data import Notes

    def write(name: str, unlabelled: int) -> str:
        lines = [f"p{n}\th{n}\t{'-' if n == unlabelled else 'neutral'}" for n in range(4)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    nli = get_task("nli")
    data = [write("a.jv.tsv", 0)]
    rows, _ = nli.read(data, rows=None)
    with refuses("fusion.unlabelled-rows"):
        read_beside(nli, [write("a.en.tsv", 3)], rows, data=data, chosen=None, watch=Notes())
    task = get_task("classify")
    few, many = (write_rows(tmp_path, f"{n}.jv.csv", says=False, count=n) for n in (4, 12))
    rows, _ = task.read([few, many], rows=None)
    source = write_rows(tmp_path, "8.en.csv", says=True, count=8)
    with refuses("fusion.source-rows"):
        read_beside(task, [source], rows, data=[few, many], chosen=None, watch=Notes())


def test_what_a_row_is_about_is_its_text_alone(causal: Path) -> None:
    from adaptermix.tasks.classify import ClassifyRow
    from adaptermix.tasks.sft import SftRow
    from adaptermix.tasks.translate import TranslateRow

    row = TranslateRow(source="-", target="hallo", source_language="en", target_language="de")
    assert is_missing(get_task("translate"), row)
    sft = get_task("sft")
    turn = ("user", "hi")
    assert sft.texts(SftRow(turns=(turn,), answer="ho", language="en"))[0].count("hi") == 1
    # prompts are cut as those of training rows are: the opening special tokens stay
    base = load_base(str(causal), device="cpu", dtype="float32")
    task = get_task("classify")
    rows = [ClassifyRow(text="a long text " * 20, label="x", language="en")]
    cut = encode_sources(base, task, "plain", rows, 20)[0][0]["input_ids"]
    whole = encode_sources(base, task, "plain", rows, 20, cut_prompts=False)[0][0]["input_ids"]
    assert (len(cut), len(whole) > 200, cut[-5:]) == (20, True, whole[-5:])


def test_an_encoder_that_reads_the_rows_goes_on_to_read_them(encoder: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_encoder

    other = tiny_encoder(tmp_path / "mt", layers=2, hidden=24)
    train_fusion(settings(encoder, tmp_path, source=[], source_encoder=str(other), steps=30))
    rows = [write_rows(tmp_path, "en.csv", says=True)]
    with refuses("fusion.not-for"):
        score(encoder, tmp_path, source=rows)
    changed = tiny_encoder(tmp_path / "changed", layers=3, hidden=24)
    with refuses("fusion.source-encoder"):
        score(encoder, tmp_path, source_encoder=str(changed))
    assert score(encoder, tmp_path) > 0.4


def test_a_base_that_an_adapter_was_written_into_is_another(tmp_path: Path) -> None:
    """Few of its tensors differ, none of which evenly spaced samples need meet."""
    from safetensors.torch import save_file

    from adaptermix.io.fingerprints import fingerprint

    found = []
    for value in (0.0, 1.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        large = {f"embedding.{n}": torch.zeros(2**20) for n in range(20)}
        save_file({**large, "layer.q": torch.full((64, 64), value)}, folder / "model.safetensors")
        found.append(fingerprint(folder))
    assert found[0] != found[1]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert fingerprint(tmp_path / "damaged")


def test_sources_that_are_all_missing_are_refused_and_offsets_are_numbers(encoder: Path, tmp_path: Path) -> None:
    from adaptermix.cli import main

    (tmp_path / "none.en.csv").write_text("text,label\n" + "-,positive\n-,negative\n" * 12)
    with refuses("fusion.no-sources"):
        train_fusion(settings(encoder, tmp_path, source=[str(tmp_path / "none.en.csv")]))
    rows, source = write_rows(tmp_path, "jv.csv", says=False), write_rows(tmp_path, "en.csv", says=True)
    words = ["train-fusion", "--base", str(encoder), "--task", "classify", "--train", rows, "--source", source]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *words,
                "--source-offset",
                "1",
                "--steps",
                "1",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "fused"),
                "--quiet",
            ]
        )
    assert ended.value.code in (0, None)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--source-encoder", "/nope", "--dry-run", "--out", str(tmp_path / "no"), "--quiet"])
    assert ended.value.code == 1
