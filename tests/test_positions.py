"""No model reads more tokens than it has positions: texts are cut, with a note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    RetrieveSettings,
    TaskSettings,
    evaluate,
    retrieve,
    train_align,
    train_task,
)
from adaptermix.models.positions import positions_of
from tests.tiny import _bytes, _save
from tests.training.data import Notes

SMALL: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
WIDE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONFIGS = {
    "gpt2": (GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64), 64),
    "xlm-r": (XLMRobertaConfig(**SMALL, **WIDE, max_position_embeddings=66), 64),
    "opt": (
        OPTConfig(
            **SMALL,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        ),
        64,
    ),
    "bert": (BertConfig(**SMALL, **WIDE, max_position_embeddings=64), 64),
    "llama": (LlamaConfig(**SMALL, **WIDE, max_position_embeddings=64), 64),
    "mamba": (MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=2, state_size=4), None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_runs_at_its_limit_and_tables_fail_beyond(name: str) -> None:
    config, limit = CONFIGS[name]
    model = AutoModel.from_config(config).eval()
    assert positions_of(model) == limit
    with torch.no_grad():
        model(torch.full((1, 64), 7))
        if name in ("gpt2", "xlm-r", "opt", "bert"):
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, 65), 7))


def made(name: str, folder: Path) -> Path:
    kind = {"gpt2": GPT2LMHeadModel, "opt": OPTForCausalLM, "xlm-r": XLMRobertaModel}[name]
    inner = _bytes(["<s>", "<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>"
    )
    config = CONFIGS[name][0]
    config.architectures = [kind.__name__]
    _save(kind, config, tokenizer, folder, 0)
    return folder


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "opt", "xlm-r"])
def test_texts_beyond_the_positions_are_cut_in_every_command(name: str, tmp_path: Path) -> None:
    place: dict[str, Any] = {"base": str(made(name, tmp_path / "base")), "device": "cpu", "dtype": "float32"}
    (tmp_path / "en.tsv").write_text(f"text\tlabel\n{'film ' * 60}\tpos\nbad\tneg\n")
    (tmp_path / "de-en.tsv").write_text("".join(f"{'wort ' * 40}{n}\t{n}\n" for n in range(4)))
    data, pairs = [str(tmp_path / "en.tsv")], [str(tmp_path / "de-en.tsv")]
    training: dict[str, Any] = {**place, "steps": 1, "batch_size": 4, "targets": ["all-linear"]}
    notes = Notes()
    report = train_task(TaskSettings(**training, task="classify", train=data, out=str(tmp_path / "t")), watch=notes)
    assert "this base model has 64 positions, so --max-length 256 becomes 64." in notes.said
    assert any(note.startswith("1 of 2 (en 1) rows are longer than 64 tokens") for note in notes.said)
    assert report.history[0]["tokens"] <= 2 * 2 * 64
    asked: dict[str, Any] = {**place, "task": "classify", "data": data, "adapter": str(tmp_path / "t")}
    notes = Notes()
    assert evaluate(EvaluateSettings(**asked), watch=notes).overall.n == 2
    assert any("1 of 2 (en 1)" in note for note in notes.said)
    notes = Notes()
    retrieve(RetrieveSettings(**place, data=pairs), watch=notes)
    assert [note for note in notes.said if "longer" in note] == [
        "4 of 4 (de 4) sentences are longer than 64 tokens (--max-length) and lose their ends."
    ]
    notes = Notes()
    train_align(AlignSettings(**training, pairs=pairs, out=str(tmp_path / "a")), watch=notes)
    assert "4 of 4 (de 4) source sentences are longer than 64 tokens (--max-length) and lose their ends." in notes.said


def test_prompts_leave_positions_for_their_answers(tmp_path: Path) -> None:
    place: dict[str, Any] = {"base": str(made("gpt2", tmp_path / "base")), "device": "cpu", "dtype": "float32"}
    (tmp_path / "en.jsonl").write_text(
        f'{{"prompt": "{"a" * 100}", "answer": "b"}}\n{{"prompt": "a", "answer": "c"}}\n'
    )
    asked: dict[str, Any] = {**place, "task": "sft", "data": [str(tmp_path / "en.jsonl")]}
    for most, room in ((4, 60), (30, 34), (500, 32)):
        notes = Notes()
        found = evaluate(EvaluateSettings(**asked, max_new_tokens=most), watch=notes)
        assert all(len(answer) <= 2 * (64 - room) for answer in found.answers)
        assert notes.said == [
            f"1 of 2 (en 1) prompts are longer than {room} tokens and lose their beginning: this base model has 64 "
            "positions, also for the answer (--max-new-tokens)."
        ]
