"""Alignment in closed form: what it finds, measures, writes and refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from adaptermix import AlignSettings, load_adapter, train_align
from adaptermix.__main__ import main
from adaptermix.errors import OutputError
from adaptermix.models.base import load_base
from adaptermix.progress import SILENT
from adaptermix.tasks.data import Pair
from adaptermix.training.closed_form import common_spread, fit_closed_form
from adaptermix.training.displacement import Reader, Rows, Sentence, groups_of, pair_weights
from adaptermix.training.layer_states import MiddleStates
from adaptermix.training.least_squares import ClosedForm, hold_out
from adaptermix.training.pairs import PairData
from adaptermix.training.parallel import Processes
from adaptermix.training.residual_writer import Norm, Writer, find_writer
from adaptermix.training.runner import Run

from ..factories import peft_noise, write_lora
from ..refusals import refuses
from ..tiny import _bytes, _save, tiny_causal, tiny_encoder

LETTERS = "abcdefghijklmnop"


def write_pairs(folder: Path, name: str, count: int, seed: int) -> str:
    """Sentences of random words, and a "language" in which every letter is another one."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        text = " ".join("".join(draw.choices(LETTERS, k=draw.randint(2, 5))) for _ in range(draw.randint(2, 5)))
        lines.append(text.translate(str.maketrans(LETTERS, LETTERS[5:] + LETTERS[:5])).upper() + f"\t{text}\n")
    (folder / name).write_text("".join(lines))
    return str(folder / name)


def tiny(folder: Path, kind: str) -> Path:
    if kind == "bert":
        return tiny_encoder(folder / kind)
    if kind in ("gpt2", "granite"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_bytes(["<pad>", "<s>", "</s>"]), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
        if kind == "gpt2":
            config: Any = GPT2Config(n_embd=32, n_layer=4, n_head=4, n_inner=64, n_positions=512, **ids)
            _save(GPT2LMHeadModel, config, tokenizer, folder / kind, 0)
        else:
            config = GraniteConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                residual_multiplier=0.25,
                **ids,
            )
            _save(GraniteForCausalLM, config, tokenizer, folder / kind, 0)
        return folder / kind
    return tiny_causal(folder / kind, kind)


def settings_for(base: Path, folder: Path, **more: Any) -> AlignSettings:
    values = {"base": str(base), "out": str(folder / "out"), "dtype": "float32", "device": "cpu", "rank": 16}
    values |= {"fit": "least-squares"} | more
    own: dict[str, Any] = {"pairs": [write_pairs(folder, "jv-en.tsv", 60, 0)]} if "pairs" not in more else {}
    return AlignSettings(**own | values)


def pooled(model: Any, tokenizer: Any, texts: list[str], layer: int, *, last: bool) -> Tensor:
    """The oracle: states of each sentence alone, through transformers only; mean and first or last token."""
    rows = []
    for text in texts:
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        rows.append(torch.stack([states.mean(0), states[-1 if last else 0]]))
    return torch.stack(rows).detach().double()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "gemma3", "granite"])
def test_the_adapter_that_peft_loads_explains_the_reported_share(kind: str, tmp_path: Path) -> None:
    base, dev = tiny(tmp_path, kind), write_pairs(tmp_path, "dev.jv-en.tsv", 20, 1)
    settings = settings_for(base, tmp_path, dev_pairs=[f"jv-en={dev}"], balance="rows")
    report: Any = train_align(settings)
    held_out = report.objective["held_out"]
    tokenizer, last = AutoTokenizer.from_pretrained(base), kind != "bert"
    model = (AutoModelForCausalLM if last else AutoModel).from_pretrained(base).eval()

    def states(file: str, side: int) -> Tensor:
        texts = [line.split("\t")[side].strip() for line in Path(file).read_text().splitlines()]
        return pooled(model, tokenizer, texts, 2, last=last)

    sources, targets = (states(dev, side) for side in (0, 1))
    spread = torch.cat([states(settings.pairs[0], side) for side in (0, 1)]).var(0, correction=0).mean(0).sqrt()
    with peft_noise():
        PeftModel.from_pretrained(model, tmp_path / "out").eval()  # changes the model in place
    moved = [states(dev, side) for side in (0, 1)]
    missed = ((targets - moved[0]) / spread).square(), ((targets - moved[1]) / spread).square()
    whole = ((targets - sources) / spread).square()
    share = 1 - float((missed[0].sum() + missed[1].sum()) / whole.sum())
    assert held_out["adapter"] == pytest.approx(share, abs=1e-3)
    assert held_out["targets_moved"] == pytest.approx(float(missed[1].sum() / whole.sum()), abs=1e-3)
    role = "last" if last else "first"
    head = 1 - float((missed[0][:, 1].sum() + missed[1][:, 1].sum()) / whole[:, 1].sum())
    assert held_out["adapter_by_role"][role] == pytest.approx(head, abs=1e-3)
    assert share > 0.1


def test_nothing_is_drawn_and_a_frozen_adapter_below_acts(tmp_path: Path) -> None:
    """On top of an adapter it is the fit to the model that has this adapter merged in; and it is a plain LoRA."""
    base = tiny(tmp_path, "bert")
    modules = {f"encoder.layer.{block}.attention.self.query": (32, 32, 4) for block in range(4)}
    write_lora(tmp_path / "below", modules, alpha=400, task_type="FEATURE_EXTRACTION")
    with peft_noise():
        merged = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "below").merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
    outs = {}
    for name, model, more in (
        ("plain", base, {}),
        ("again", base, {}),
        ("on", base, {"on_top_of": str(tmp_path / "below")}),
        ("merged", tmp_path / "model", {}),
    ):
        train_align(settings_for(model, tmp_path, out=str(tmp_path / name), **more))
        outs[name] = load_adapter(tmp_path / name)
    (module,) = outs["plain"].updates
    assert module == "encoder.layer.1.output.dense"
    assert not outs["plain"].beyond_linear
    deltas = {name: state.updates[module].dense() for name, state in outs.items()}
    assert torch.equal(deltas["plain"], deltas["again"])
    torch.testing.assert_close(deltas["on"], deltas["merged"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(deltas["plain"], deltas["on"], atol=1e-2)
    assert outs["on"].meta.manifest["inputs"][0]["name"] == "below"


def test_the_manifest_says_what_an_alignment_adapter_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny(tmp_path, "llama")
    pairs, out = write_pairs(tmp_path, "jv-en.tsv", 40, 0), tmp_path / "out"
    arguments = ["train-align", "--base", str(base), "--pairs", pairs, "--out", str(out), "--fit", "least-squares"]
    assert run(*arguments, "--dry-run") == 0
    assert not out.exists()
    assert "would fit a LoRA of one layer (least-squares, block 2)" in capsys.readouterr().err
    assert run(*arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((out / "adaptermix.json").read_text())
    assert manifest["kind"] == "train-align"
    assert manifest["languages"] == {"aligned": ["en", "jv"]}
    assert manifest["data"][0]["rows"] == 40
    objective = manifest["objective"]
    assert (objective["name"], objective["layer"], objective["layers"]) == ("least-squares", 2, 4)
    assert (objective["pairs"], objective["held_out"]["pairs"]) == (36, 4)
    assert manifest["plan"]["rank"] == 64
    assert document["held_out"] == objective["held_out"]
    assert run(*arguments) == 1
    assert run(*arguments, "--overwrite") == 0
    assert "held-out pairs: the map explains" in capsys.readouterr().err


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "more",
    [{"steps": 5}, {"learning_rate": 1e-3}, {"temperature": 0.2}, {"dora": True}, {"keeper": 1.0}, {"blocks": "0-1"}],
    ids=lambda more: next(iter(more)),
)
def test_options_of_gradients_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(more)).replace("_", "-")
    with pytest.raises(
        ValidationError, match=f"--{name} is an option of training, and --fit least-squares does not train"
    ):
        settings_for(tmp_path, tmp_path, **more)


def test_each_form_has_a_rank_of_its_own(tmp_path: Path) -> None:
    ranks = {fit: AlignSettings(base="b", out="o", pairs=["de-en.tsv"], fit=fit).rank for fit in FITS}
    assert ranks == {"gradient": 8, "least-squares": 64, "mean-shift": 1}
    with refuses("align.fit-rank"):
        settings_for(tmp_path, tmp_path, fit="mean-shift", rank=2)


FITS = ("gradient", "least-squares", "mean-shift")


def test_pairs_that_share_a_sentence_are_one_group_and_never_measure_each_other(tmp_path: Path) -> None:
    """Two languages have the same translations; dev pairs that repeat a sentence of the pairs do not count."""
    base = tiny(tmp_path, "bert")
    one = Path(write_pairs(tmp_path, "jv-en.tsv", 20, 0))
    (tmp_path / "su-en.tsv").write_text("".join(f"y {line}" for line in one.read_text().splitlines(keepends=True)))
    files = [str(one), str(tmp_path / "su-en.tsv")]
    report: Any = train_align(settings_for(base, tmp_path, pairs=files))
    assert (report.objective["pairs"], report.objective["held_out"]["pairs"]) == (36, 4)
    dev = tmp_path / "dev.tsv"
    dev.write_text("".join(one.read_text().splitlines(keepends=True)[:3]) + "a b\tc d\ne f\tg h\n")
    more = {"pairs": files, "dev_pairs": [f"jv-en={dev}"], "overwrite": True}
    report = train_align(settings_for(base, tmp_path, **more))
    assert (report.objective["pairs"], report.objective["held_out"]["pairs"]) == (40, 2)


def test_the_languages_or_the_rows_weigh_the_same() -> None:
    pairs = [Pair(languages=(code, "en"), source=str(row), target=str(row)) for row, code in enumerate("aaab")]
    assert pair_weights(pairs, "rows") == [1.0] * 4
    assert pair_weights(pairs, "languages") == pytest.approx([2 / 3] * 3 + [2])
    assert groups_of(pairs) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("norm", "centred"),
    [(nn.LayerNorm(8), True), (LlamaRMSNorm(8), False), (Gemma3RMSNorm(8), False)],
    ids=["LayerNorm", "RMSNorm", "1 + gain"],
)
def test_a_norm_is_known_by_what_it_does(norm: nn.Module, centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    found = Norm.of(norm)
    assert found.centred == centred
    vectors = torch.randn(2, 3, 8, generator=generator)
    step = 1e-3 * torch.randn(2, 3, 8, generator=generator).double()
    step -= step.mean(-1, keepdim=True) if centred else 0
    flat = vectors.double() - (vectors.double().mean(-1, keepdim=True) if centred else 0)
    step -= flat * (step * flat).sum(-1, keepdim=True) / flat.square().sum(-1, keepdim=True)  # its length is fixed
    moved = norm.double()(vectors.double() + step) - norm(vectors.double())
    torch.testing.assert_close(moved, found.gain * step / found.scale(vectors), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_moe", "minimax", "mamba"])
def test_blocks_that_no_linear_layer_writes_are_refused(kind: str, tmp_path: Path) -> None:
    with refuses("align.fit-writer"):
        train_align(settings_for(tiny(tmp_path, kind), tmp_path))


def test_models_that_scale_what_they_add_are_seen(tmp_path: Path) -> None:
    base = load_base(str(tiny(tmp_path, "granite")), device="cpu", dtype="float32")
    states = MiddleStates(base, 2)
    writer = find_writer(base, 2, lambda: states.states([[3, 4, 5, 6], [7, 8, 9]]))
    assert writer.path == "model.layers.1.mlp.down_proj"
    assert writer.factor == pytest.approx(0.25, rel=1e-3)


class _Tap:
    """Random tokens of 6 dimensions, the layer's inputs among them; the first of each sentence may be a sink."""

    def __init__(self, *, sink: float) -> None:
        self.sink = sink

    def __call__(self, encoded: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        states = torch.stack([table[ids] for ids in encoded])
        states[:, 0] = self.sink * table[0]
        inputs = torch.cat([states @ table[:6], table[6] * states[:, :, :1]], dim=-1)
        return states, torch.ones(states.shape[:2]), torch.nn.functional.pad(inputs, (0, 1), value=1.0)


def _sentences() -> list[Sentence]:
    draw = random.Random(0)
    rows = [[0, *draw.choices(range(1, 50), k=7)] for _ in range(60)]
    targets = [Sentence(ids=ids, weight=1.0, group=own) for own, ids in enumerate(rows[:30])]
    return targets + [Sentence(ids=ids, weight=1.0, group=own, target=own) for own, ids in enumerate(rows[30:])]


def _fitted(sink: float, *, shift_only: bool = False) -> Any:
    reader = Reader(_Tap(sink=sink), batch_size=7, pooling="mean", last=True)  # type: ignore[arg-type]
    writer = Writer("layer", None, None)
    return fit_closed_form(reader, writer, _sentences(), rank=6, shift_only=shift_only, watch=SILENT)


def test_attention_sinks_stay_and_decide_nothing() -> None:
    """Whether the sink is 1000 or 3000 times as long as other tokens changes nothing, and it is not moved."""
    one, other = _fitted(1000), _fitted(3000)
    torch.testing.assert_close(one.map.weight, other.map.weight)
    state = _Tap(sink=1000)([[0, 1]])[2][0, :, :-1].float()
    moved = state @ one.update.dense().T
    assert moved[0].norm() < 0.05 * moved[1].norm()
    assert _fitted(1.0).map.weight.norm() > 0


def test_a_dimension_that_only_rounding_moves_does_not_count_as_much_as_others() -> None:
    """One dimension of all-MiniLM-L6-v2 has a deviation of 1e-32."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] *= 1e-32
    one = torch.ones(60, dtype=torch.long)
    rows = Rows(x=x, y=x, weights=one.double(), groups=one, roles=torch.arange(60) % 2, moving=one > 0)
    spread = common_spread(rows)
    within = torch.stack([x[role::2].var(0, correction=0) for role in (0, 1)]).mean(0).sqrt()
    torch.testing.assert_close(spread[[0, 1, 3, 4]], within[[0, 1, 3, 4]])
    assert float(spread[2]) == pytest.approx(0.01 * float(within.square().mean().sqrt()), rel=1e-6)


def test_the_mean_shift_moves_every_token_by_the_mean_displacement() -> None:
    found = _fitted(1.0, shift_only=True)
    reader = Reader(_Tap(sink=1.0), batch_size=60, pooling="mean", last=True)  # type: ignore[arg-type]
    sentences = _sentences()
    tokens = reader.read(sentences, list(range(60)))
    vectors = tokens.pooled(tokens.states, reader.roles)
    expected = (vectors[:30] - vectors[30:]).mean((0, 1))
    torch.testing.assert_close(found.displacement(torch.randn(4, 6)), expected.expand(4, 6))


def test_an_output_is_not_replaced_unasked(tmp_path: Path) -> None:
    base = tiny(tmp_path, "bert")
    train_align(settings_for(base, tmp_path))
    for more in ({}, {"resume": True}):
        with pytest.raises(OutputError):
            train_align(settings_for(base, tmp_path, **more))


def test_a_base_in_4_bits_is_fitted_as_it_acts(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    report: Any = train_align(settings_for(wide, tmp_path, quantize="nf4"))
    assert report.objective["held_out"]["adapter"] > 0.1
    assert load_adapter(tmp_path / "out").meta.manifest["base"]["quantization"]


def test_several_processes_are_refused(tmp_path: Path) -> None:
    crew = Processes(SimpleNamespace(num_processes=2, process_index=0))
    run = Run(settings=settings_for(tmp_path, tmp_path), processes=crew)
    with refuses("align.fit-processes: least-squares"):
        ClosedForm(run).read()


def test_sources_with_several_translations_neither_join_groups_nor_measure(tmp_path: Path) -> None:
    """Half of the sources repeat, each with another translation: what is kept aside shares no sentence with the fit."""
    lines = Path(write_pairs(tmp_path, "jv-en.tsv", 40, 0)).read_text().splitlines()
    again = [f"{line.split(chr(9))[0]}\tnot {line.split(chr(9))[1]}" for line in lines[:20]]
    (tmp_path / "jv-en.tsv").write_text("\n".join([*lines, *again]) + "\n")
    settings = settings_for(tmp_path, tmp_path, pairs=[str(tmp_path / "jv-en.tsv")])
    data, held_out = hold_out(PairData.read(settings, SILENT), settings.seed)
    texts = [{text for pair in pairs for text in (pair.source, pair.target)} for pairs in (data.pairs, held_out)]
    assert len(data.pairs) == 54
    assert 0 < len(held_out) <= 6
    assert not texts[0] & texts[1]


def test_a_map_that_does_not_carry_over_to_other_pairs_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three unlike pairs: no pair is kept aside, and the others bring none of them nearer to its translation."""
    base, pairs = tiny(tmp_path, "bert"), tmp_path / "jv-en.tsv"
    pairs.write_text("a b\tc d\ne f\tg h\ni j k\tl m\n")
    arguments = ["train-align", "--base", str(base), "--pairs", str(pairs), "--fit", "least-squares"]
    assert run(*arguments, "--dev-pairs", str(pairs), "--out", str(tmp_path / "out")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "out" / "adaptermix.json").read_text())["objective"]["map"]["explained_left_out"] < 0
    assert "warning: the map of 3 pairs takes pairs that it has not seen no nearer to their translations (-" in said
    assert "no pairs to measure on: how much the LoRA explains is unknown" in said


def test_the_first_token_of_a_language_model_is_refused(tmp_path: Path) -> None:
    with refuses("pooling.bos"):
        train_align(settings_for(tiny(tmp_path, "llama"), tmp_path, pooling="bos"))
    assert not (tmp_path / "out").exists()


def test_pairs_of_one_translation_are_groups_of_their_own() -> None:
    assert groups_of([Pair(languages=("jv", "en"), source=source, target="yes") for source in "ab"]) == [0, 1]
