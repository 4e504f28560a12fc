"""Stacks: a multilingual encoder E under a model M, which reads E's states instead of word embeddings.

`M.set_input_embeddings(Projected(E, U))` is the whole construction: M's blocks and their names do not change, and
E's tokenizer becomes that of the stack. A stack is a folder with `stack.json`, M's `config.json`, E's tokenizer,
`projection.safetensors` (U) and `adapter/`, a LoRA of M that belongs to the stack.

Reference: Schmidt et al., Self-Distillation for Model Stacking Unlocks Cross-Lingual NLU in 200+ Languages, Findings of
EMNLP 2024, arXiv 2406.12739, section 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .encoders import width_of
from .stack_paths import found_id, stored_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STACK, PROJECTION, ADAPTER = "stack.json", "projection.safetensors", "adapter"
PARTS = {"encoder": "encoder", "base": "model on top"}
"""Entries of the two models in a stack's file, and how messages call them."""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the two models of a stack.

    Args:
        id: Hub id, optionally with `@REVISION`, or folder. In the file a folder that shares a parent with the stack's
            is relative to the stack's, so that both can be moved together.
        fingerprint: Hash of its weight files; None if they are not on disk.
    """

    id: str
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StackForm:
    """The contents of `stack.json`.

    Args:
        encoder: E, the multilingual encoder.
        base: M, the model on top.
        mode: "states" if M reads E's states instead of the text and its states are used; "replace" or "augment" if M
            generates, see `mixed_rows`.
        offset: First id of E's tokens in the rows of a stack that generates.
        attention: "causal" for an unchanged decoder M, "both" if its tokens see those to come.
        pooling: Pooling of the states that the stack was trained on: "mean", "first" or "last".
        lora: Whether the stack has a LoRA; if not, it is in the weights of `base`.
        version: Version of the form.
    """

    encoder: Part
    base: Part
    mode: str = "states"
    offset: int = 0
    attention: str = "causal"
    pooling: str = "mean"
    lora: bool = True
    version: int = _VERSION

    @property
    def generates(self) -> bool:
        """Whether the stack generates answers, rather than giving states to a head."""
        return self.mode != "states"

    def document(self) -> dict[str, object]:
        """Return the form as plain data."""
        return asdict(self)

    def stored(self, folder: Path) -> dict[str, object]:
        """Return the contents of the file in a stack's folder."""
        parts = {name: replace(getattr(self, name), id=stored_id(getattr(self, name).id, folder)) for name in PARTS}
        return asdict(replace(self, **parts))

    @classmethod
    def read(cls, folder: Path) -> StackForm:
        """Read the form of a stack's folder; paths of the two models are absolute.

        Raises:
            ModelError: the file is damaged, or of a later version.
        """
        path = folder / STACK
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            parts = {name: Part(**document.pop(name)) for name in PARTS}
            placed = {
                name: replace(part, id=found_id(part.id, part.fingerprint, folder)) for name, part in parts.items()
            }
            form = cls(encoder=placed["encoder"], base=placed["base"], **document)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ModelError(
                f"{path} must hold encoder, base, attention, pooling and version of a stack, and does not: "
                f"{' '.join(str(error).split())[:120]}. Make the stack again.",
                code="stack.form",
            ) from error
        if form.version != _VERSION or any(getattr(form, name) not in known for name, known in _KNOWN.items()):
            expected = ", ".join(f"{name} {' or '.join(known)}" for name, known in _KNOWN.items())
            values = ", ".join(repr(getattr(form, name)) for name in _KNOWN)
            raise ModelError(
                f"{path} must have version {_VERSION}, {expected}, found {form.version}, {values}.",
                code="stack.form",
            )
        return form


POOLINGS = ("mean", "first", "last")
MODES = ("states", "replace", "augment")
_KNOWN = {"mode": MODES, "attention": ("causal", "both"), "pooling": POOLINGS}
"""The values that a stack's file may have."""


def stack_folder(reference: str) -> Path | None:
    """Return the folder of a stack; None for other models."""
    folder = Path(reference)
    return folder if (folder / STACK).is_file() else None


class Projected(nn.Module):
    """The embeddings of a stack: the states of a frozen encoder, projected to the width of the model on top.

    The encoder and the model's embeddings are not submodules: they are frozen, and PEFT and changes of mode must not
    reach them.

    Args:
        encoder: E, a transformers model that returns `last_hidden_state`.
        embeddings: The model's own embeddings; of some models (ELECTRA, ALBERT) narrower than its states.
        width: Width of E's states.
        pad_id: Id of E's padding token; these positions are masked.

    Attributes:
        projection: U, a linear layer with bias, in float32; its output has the dtype of the model's embeddings.
        reads_rows: Whether the encoder reads whole rows, which then must fit its positions.

    Shapes: ids [rows tokens]; returns [rows tokens own_width], with own_width the width of the model's embeddings.
    """

    reads_rows = True

    def __init__(self, encoder: nn.Module, embeddings: nn.Module, *, width: int, pad_id: int) -> None:
        super().__init__()
        self._frozen = (encoder.eval().requires_grad_(False), embeddings)
        self.projection = nn.Linear(width, self.weight.shape[1])
        self.pad_id = pad_id
        self.reads_own = False
        self._scale: tuple[Tensor, Tensor] | None = None

    @property
    def encoder(self) -> nn.Module:
        """The frozen encoder."""
        return self._frozen[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the model's own embeddings, which transformers asks for."""
        return cast(Tensor, self._frozen[1].weight)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Read ids of the model's own tokenizer while the context is open."""
        self.reads_own = True
        try:
            yield
        finally:
            self.reads_own = False

    def standardize(self, center: Tensor, spread: Tensor, *, keep: bool = False) -> None:
        """Let the projection read z-scores of the encoder's states until `folded`, for training.

        The states of an encoder may lie in a narrow cone, and a projection of raw states then learns little but the
        common direction.

        Args:
            center: Mean of the states, [width].
            spread: Their standard deviation, positive, [width].
            keep: Change weight and bias so that the projection of each state stays the same.
        """
        like = self.projection.weight
        self._scale = center, spread = center.to(like), spread.to(like)
        if keep:
            with torch.no_grad():
                self.projection.bias.add_(self.projection.weight @ center)
                self.projection.weight.mul_(spread)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the projection of raw states that equals one of z-scores.

        Args:
            weight: Weight of the projection of z-scores, [own_width width].
            bias: Its bias, [own_width].
        """
        if self._scale is None:
            return weight, bias
        center, spread = (each.to(weight) for each in self._scale)
        scaled = weight / spread
        return scaled, bias - scaled @ center

    def encoder_states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the states of the frozen encoder.

        Args:
            ids: Ids of the encoder's tokenizer, [rows tokens].
            mask: 1 for tokens, 0 for padding; default from the padding token.
        """
        encoder = self._frozen[0]
        if next(encoder.parameters()).device != ids.device:
            encoder.to(ids.device)
        mask = (ids != self.pad_id).long() if mask is None else mask
        with torch.no_grad():
            states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.detach()

    def read_own(self, ids: Tensor) -> Tensor:
        """Return the model's own embeddings of ids of its tokenizer."""
        embeddings = self._frozen[1]
        if next(embeddings.parameters()).device != ids.device:
            embeddings.to(ids.device)
        return cast(Tensor, embeddings(ids))

    def project(self, states: Tensor) -> Tensor:
        """Return states of the encoder in the width of the model, [... width] to [... own_width]."""
        linear = self.projection
        states = states.to(next(linear.parameters()).dtype)
        # Autocast would compute in half precision, which loses 3 % of the spread of the projected states.
        with torch.autocast(states.device.type, enabled=False):
            if self._scale:
                center, spread = self._scale
                states = (states - center) / spread
            return cast(Tensor, linear(states)).to(self.weight.dtype)

    def stored(self) -> dict[str, nn.Parameter]:
        """Return the parameters of U by their names in the file of a stack."""
        return dict(self.projection.named_parameters())

    def forward(self, ids: Tensor) -> Tensor:
        return self.read_own(ids) if self.reads_own else self.project(self.encoder_states(ids))


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token of an encoder's tokenizer.

    Raises:
        ModelError: there is no such token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer of a stack's encoder must have a padding token, and lacks one. Set pad_token in "
            "tokenizer_config.json.",
            code="model.special-tokens",
        )
    return int(cast(int, tokenizer.pad_token_id))


def mount(body: PreTrainedModel, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Projected:
    """Put an encoder under a model, in place, and return the new embeddings of the model.

    Args:
        body: The model without a head.
        encoder: The encoder.
        tokenizer: The encoder's tokenizer.

    Raises:
        ModelError: positions of the model depend on the padding token, and it differs from the encoder's; or the
            encoder's tokenizer has no padding token.
    """
    pad_id = padding_of(tokenizer)
    # Types of tokens are not those of the model on top.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    # Embeddings of the RoBERTa family, and positions of M2M100's, number the tokens of a text from the padding token.
    names = ("embeddings", "embed_positions")
    numbering = [module for name, module in body.named_modules() if name.rpartition(".")[2] in names]
    offsets = {getattr(module, "padding_idx", None) for module in numbering}
    if shifted := offsets - {None, pad_id}:
        raise ModelError(
            f"{type(body).__name__} numbers positions from its padding token {shifted.pop()}, and the padding token of "
            f"the encoder is {pad_id}. Use another model on top, such as a BERT or a language model.",
            code="stack.positions",
        )
    embeddings = cast(nn.Module, body.get_input_embeddings())
    embedding = Projected(encoder, embeddings, width=width_of(encoder.config), pad_id=pad_id)
    replace_embeddings(body, embedding)
    body.config.pad_token_id = pad_id
    return embedding


def replace_embeddings(model: PreTrainedModel, embedding: Projected) -> None:
    """Make projected embeddings those of a model, behind its other parts, with U in float32.

    PEFT keeps modules that are trained whole in float32 too. The dtype of a transformers model is that of its first
    parameter.
    """
    wide = torch.promote_types(embedding.weight.dtype, torch.float32)
    embedding.to(next(model.parameters()).device, wide)
    model.set_input_embeddings(embedding)
    path = next(name for name, module in model.named_modules() if module is embedding)
    parent: nn.Module = model
    for name in path.split("."):
        parent._modules[name] = parent._modules.pop(name)
        parent = cast(nn.Module, parent._modules[name])


def embedding_of(model: nn.Module) -> Projected:
    """Return the projected embeddings of a stack's model."""
    return next(module for module in model.modules() if isinstance(module, Projected))
