"""Tiny random encoder-decoders with real tokenizers of their families, made on disk without a network."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from .tiny import _bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TAGS = ["jav_Latn", "eng_Latn", "deu_Latn", "ace_Arab", "ace_Latn", "zho_Hans", "zho_Hant"]
LETTERS = [*string.ascii_letters, *"▁.,?!'-0123456789"]

_TRANSLATION = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 96} | {
    f"{half}_{name}": size
    for half in ("encoder", "decoder")
    for name, size in (("attention_heads", 2), ("ffn_dim", 32))
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, int]]] = {
    "nllb": (M2M100Config, M2M100ForConditionalGeneration, _TRANSLATION),
    "mbart": (MBartConfig, MBartForConditionalGeneration, _TRANSLATION),
    "bart": (BartConfig, BartForConditionalGeneration, _TRANSLATION),
    "marian": (MarianConfig, MarianMTModel, _TRANSLATION | {"decoder_start_token_id": 1}),
    "t5": (T5Config, T5ForConditionalGeneration, _T5),
    "t5-encoder": (T5Config, T5EncoderModel, _T5),
    "mt5": (MT5Config, MT5ForConditionalGeneration, _T5),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of single letters: with language tags for NLLB and mBART."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "nllb":
        vocab = {token: number for number, token in enumerate([*first, *LETTERS, *TAGS, "<mask>"])}
        return NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=TAGS)
    if family == "mbart":
        return MBartTokenizer(vocab=[*((token, 0.0) for token in first), *((letter, -2.0) for letter in LETTERS)])
    inner = _bytes(first)
    inner.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", first.index("</s>"))]
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **special)


def tiny_encoder_decoder(folder: Path, family: str) -> Path:
    """Write a random encoder-decoder of three and two blocks; "t5-encoder" holds the encoder alone."""
    config_class, model_class, sizes = FAMILIES[family]
    tokenizer = tokenizer_of(family)
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config_class(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
