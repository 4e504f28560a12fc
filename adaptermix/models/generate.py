"""Greedy, batched, left-padded generation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ..progress import SILENT, Watcher
from .base import BaseModel

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel

_FIRST_ROUND = 8
"""Tokens of the first round; each further round makes answers at least half as long again."""
_WORTH = 4
"""Continue with a partial batch if at least 1/4 of its rows are unfinished."""
_MOST_LOGITS = 2**27
"""Largest number of logits when drafts are checked: half a gigabyte in float32."""


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` [rows longest] of prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _replaced_settings(base: BaseModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation settings; otherwise its repetition penalty, for example, would still apply."""
    saved = base.model.generation_config
    base.model.generation_config = settings
    try:
        yield
    finally:
        base.model.generation_config = saved


class _Reused(TypedDict, total=False):
    """Arguments of `generate` for a further round."""

    past_key_values: Cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where answers end.

    Args:
        max_new_tokens: Most tokens to generate per row.
        one_line: End at a line break as well.
        ends: Further tokens that end an answer, such as the end of a chat turn.
    """

    max_new_tokens: int
    one_line: bool = True
    ends: Sequence[int] = ()

    def stops(self, base: BaseModel) -> set[int]:
        """Return the token ids that end an answer: the model's, `ends`, and a line break for one-line answers."""
        config = base.model.generation_config.eos_token_id
        configured = [] if config is None else [config] if isinstance(config, int) else list(config)
        texts = ("\n", "\n\n") if self.one_line else ()
        breaks = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return {*configured, *self.ends, base.tokenizer.eos_token_id, *(ids[0] for ids in breaks if len(ids) == 1)}


@torch.inference_mode()
def generate_ids(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    batch_size: int,
    drafts: Sequence[Sequence[int] | None] | None = None,
    before: Callable[[Sequence[int]], None] = lambda _rows: None,
    watch: Watcher = SILENT,
    label: str = "generate",
) -> list[list[int]]:
    """Return one greedy continuation per prompt, up to an end token and without it.

    Generation runs in rounds. Unfinished answers of a batch continue to 8, 16, 24, 36, ... tokens, and finished ones
    leave it, so that one long answer does not make the whole batch expensive.

    Drafts, such as another adapter's answers, work as in speculative decoding: one forward pass of prompt and draft
    determines how far greedy choice agrees, and only the rest is generated. Drafts of `max_new_tokens` or more are
    ignored. Results equal those without drafts, except for rounding when two tokens have the same score.

    Args:
        base: A causal language model.
        prompts: Token ids. Rows of similar length are batched together; results are in the order of the prompts.
        limits: Where answers end.
        batch_size: Rows per batch.
        drafts: Per prompt a guess of the result, without its end token, or None.
        before: Called before each run of passes with the indices of the prompts in them, in batch order.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    work = _Work(
        base=base,
        prompts=prompts,
        stops=limits.stops(base),
        most=limits.max_new_tokens,
        batch_size=batch_size,
        before=before,
        tokens_of=[[] for _ in prompts],
    )
    with watch.track(label, len(prompts)) as work.advance:
        guesses: dict[int, list[int]] = {}
        if drafts is not None and batch_size > 1:
            # A draft without an end is usually degenerate text, which the next adapter will not repeat.
            guesses = {
                row: list(draft)
                for row, draft in enumerate(drafts)
                if draft is not None and len(draft) < limits.max_new_tokens
            }
        left = work.follow(guesses) if guesses else []
        work.go_on([row for row in range(len(prompts)) if row not in guesses] + left)
    return work.tokens_of


@dataclass(slots=True, kw_only=True)
class _Work:
    """Answers in progress: `tokens_of` has the tokens of each so far."""

    base: BaseModel
    prompts: Sequence[Sequence[int]]
    stops: set[int]
    most: int
    batch_size: int
    before: Callable[[Sequence[int]], None]
    tokens_of: list[list[int]] = field(default_factory=list)
    advance: Callable[[int, str], None] = lambda _count, _text: None

    def _batches(
        self, rows: Iterable[int], more: Mapping[int, list[int]], size: int | None = None
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield rows of similar length with ids and mask of their prompts and further tokens, padded on the left."""
        order = sorted(rows, key=lambda row: len(self.prompts[row]) + len(more[row]))
        size = size or self.batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            texts = [[*self.prompts[row], *more[row]] for row in chosen]
            batch = pad_left(texts, self.base.tokenizer.pad_token_id, self.base.device)
            yield chosen, batch["input_ids"], batch["attention_mask"]

    def _take(self, row: int, ids: Sequence[int]) -> bool:
        """Append tokens to an answer up to an end token; return whether it has ended."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), None)
        self.tokens_of[row] = [*self.tokens_of[row], *ids[:end]][: self.most]
        has_ended = end is not None or len(self.tokens_of[row]) >= self.most
        if has_ended:
            self.advance(1, "")
        return has_ended

    def follow(self, drafts: Mapping[int, list[int]]) -> list[int]:
        """Accept the part of each draft that greedy choice agrees with, plus one token; return the unfinished rows."""
        left = []
        # This pass needs the logits of all draft positions, while generation needs only the last one's.
        longest = 1 + max(map(len, drafts.values()), default=0)
        vocabulary = self.base.model.get_output_embeddings().weight.shape[0]
        size = max(1, min(self.batch_size, _MOST_LOGITS // (longest * vocabulary)))
        for rows, ids, mask in self._batches(drafts, drafts, size):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            keep = 1 + max(len(drafts[row]) for row in rows)
            self.before(rows)
            output = self.base.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=True
            )
            going_on, following = [], []
            for index, (row, tokens) in enumerate(zip(rows, output.logits.argmax(-1).tolist(), strict=True)):
                draft = drafts[row]
                greedy = tokens[len(tokens) - len(draft) - 1 :]
                agreed = next((i for i, token in enumerate(draft) if greedy[i] != token), len(draft))
                mask[index, ids.shape[1] - len(draft) + agreed :] = 0
                if not self._take(row, [*draft[:agreed], greedy[agreed]]):
                    going_on.append(index)
                    following.append(greedy[agreed])
            cache = getattr(output, "past_key_values", None)
            left += self._after(rows, (ids, mask), cache, going_on, following)
        return left

    def _after(
        self, batch: list[int], inputs: tuple[Tensor, Tensor], cache: Cache, indices: list[int], following: list[int]
    ) -> list[int]:
        """Continue after rejected drafts with the cache of prompts and drafts, masking rejected tokens.

        Args:
            batch: The rows of the batch.
            inputs: Its ids and mask.
            cache: The model's cache for it.
            indices: Indices in the batch of the rows to continue.
            following: The next token of each of these rows.

        Returns:
            The rows that must be read again: the cache cannot be masked, or the rows are too few for a batch.
        """
        ids, mask = inputs
        rows = [batch[index] for index in indices]
        if len(rows) * _WORTH < self.batch_size or not _can_mask(self.base.model, cache, ids.shape[1] + self.most):
            return rows
        chosen = torch.tensor(indices, dtype=torch.long, device=ids.device)
        cache.batch_select_indices(chosen)
        ids = torch.cat([ids[chosen], ids.new_tensor(following).unsqueeze(1)], dim=1)
        mask = torch.cat([mask[chosen], mask.new_ones(len(rows), 1)], dim=1)
        self._rounds(rows, ids, mask, {"past_key_values": cache})
        return []

    def go_on(self, waiting: list[int]) -> None:
        """Generate the missing tokens in rounds; unfinished rows keep their cache."""
        for rows, ids, mask in self._batches(waiting, dict(enumerate(self.tokens_of))):
            self._rounds(rows, ids, mask, {})

    def _rounds(self, rows: list[int], ids: Tensor, mask: Tensor, kept: _Reused) -> None:
        from transformers import GenerationConfig

        length = 0
        while rows:
            more = max(_FIRST_ROUND, length // 2) if self.batch_size > 1 else self.most
            more = min(more, self.most - min(len(self.tokens_of[row]) for row in rows))
            length += more
            self.before(rows)
            settings = GenerationConfig(
                max_new_tokens=more,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(self.stops),
                pad_token_id=self.base.tokenizer.pad_token_id,
            )
            with _replaced_settings(self.base, settings):
                output = self.base.model.generate(
                    input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **kept
                )
            answers = output.sequences[:, ids.shape[1] :].tolist()
            left = [index for index, row in enumerate(rows) if not self._take(row, answers[index])]
            rows = [rows[index] for index in left]
            chosen = torch.tensor(left, dtype=torch.long, device=ids.device)
            ids = output.sequences[chosen]
            mask = torch.cat([mask[chosen], mask.new_ones(len(left), ids.shape[1] - mask.shape[1])], dim=1)
            kept = _of_rows(output.past_key_values, chosen) if left else {}


def _can_mask(model: PreTrainedModel, cache: Cache, length: int) -> bool:
    """Return whether a mask can hide cache entries.

    It can if the cache has only keys and values, the model takes positions, and no window is shorter than `length`.
    """
    from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    def reaches(layer: CacheLayerMixin) -> bool:
        return type(layer) is DynamicLayer or (
            type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window
        )

    # Models with other positions (ALiBi) count masked cache entries too.
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    return has_positions and type(cache) is DynamicCache and all(map(reaches, cache.layers))


def _of_rows(cache: Cache, rows: Tensor) -> _Reused:
    """Return the arguments of `generate` that reuse the cache for the unfinished rows.

    The result is empty, so that the rows are read again, if a model's states cannot be split by row (Mamba).
    """
    try:
        cache.batch_select_indices(rows)
    except (AttributeError, NotImplementedError):
        return {}
    return {"past_key_values": cache}


def in_words(base: BaseModel, answers: Sequence[Sequence[int]]) -> list[str]:
    """Return answers as text, without special tokens and blanks at their ends."""
    return [base.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in answers]
