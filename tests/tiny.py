"""Tiny random models with tokenizers, made on disk without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)

_CAUSAL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    ),
    # states that a mask does not undo: of linear attention, of positions in the cache, of a state space
    "minimax": (MiniMaxConfig, MiniMaxForCausalLM, {"num_local_experts": 2, "block_size": 8, "head_dim": 8}),
    "mpt": (MptConfig, MptForCausalLM, {"max_seq_len": 512}),
    "mamba": (MambaConfig, MambaForCausalLM, {"state_size": 4}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 64}),
}


def _bytes(special: list[str]) -> Tokenizer:
    """One token per byte, so that any text works."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny_causal(
    folder: Path,
    kind: str = "llama",
    *,
    layers: int = 4,
    chat: bool = False,
    single: str | None = None,
    seed: int = 0,
    hidden: int = 32,
) -> Path:
    """Write a random causal language model with a byte tokenizer.

    Args:
        folder: Where.
        kind: `llama`, `qwen2`, `qwen2_moe`, `minimax`, `mpt`, `mamba`, `qwen3` or `gemma3`.
        layers: Number of blocks.
        chat: Give the tokenizer a chat template.
        single: What the tokenizer puts around a text, such as `<s> $A` or `$A </s>`; nothing if not given.
        seed: Seed of the weights.
        hidden: Width; the inner one is twice as much.
    """
    inner = _bytes(["<pad>", "<s>", "</s>"])
    if single:
        inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT
    config_class, model_class, more = _CAUSAL[kind]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    _save(model_class, config, tokenizer, folder, seed)
    return folder


def tiny_encoder(folder: Path, *, layers: int = 4, hidden: int = 32) -> Path:
    """Write a random BERT with a byte tokenizer."""
    inner = _bytes(["[PAD]", "[CLS]", "[SEP]"])
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=0,
        architectures=["BertModel"],
    )
    _save(BertModel, config, tokenizer, folder, 0)
    return folder


def _save(model_class: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
