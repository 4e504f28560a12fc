"""Batched, left-padded generation equals one prompt at a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptermix import EvaluateSettings, evaluate
from adaptermix.evaluation.answering import Answering
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.generate import Limits, generate_ids, in_words
from adaptermix.options import GenerationSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.slots import SlotRow
from tests.tiny import tiny_causal

from ..refusals import refuses

PROMPTS = ["a", "what a long prompt this is", "mid length", "b c", "what a long prompt this iz"]


def generate(base: BaseModel, prompts: list[list[int]], *, max_new_tokens: int, batch_size: int) -> list[str]:
    return in_words(base, generate_ids(base, prompts, Limits(max_new_tokens=max_new_tokens), batch_size=batch_size))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_ragged_prompts_get_the_answers_they_get_alone(kind: str, tmp_path: Path) -> None:
    base = load_base(str(tiny_causal(tmp_path / kind, kind)), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    together = generate(base, prompts, max_new_tokens=8, batch_size=3)
    alone = [generate(base, [prompt], max_new_tokens=8, batch_size=1)[0] for prompt in prompts]
    assert together == alone
    newline = base.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    for prompt, answer in zip(prompts, alone, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        output = base.model.generate(torch.tensor([prompt]), attention_mask=mask, **settings)
        ids = output[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(ids) if token in (base.tokenizer.eos_token_id, newline)), len(ids))
        assert base.tokenizer.decode(ids[:end], skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("most", [7, 20])
def test_answers_given_in_rounds_are_those_given_at_once(
    kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_causal(tmp_path / kind, kind)), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    free = generate(base, prompts, max_new_tokens=most, batch_size=3)
    # some answers end early, so that a later round has fewer rows
    base.model.generation_config.eos_token_id = base.tokenizer(free[1], add_special_tokens=False)["input_ids"][4]
    monkeypatch.setattr("adaptermix.models.generate._FIRST_ROUND", most)
    at_once = generate(base, prompts, max_new_tokens=most, batch_size=3)
    run = []
    real = base.model.generate
    monkeypatch.setattr(base.model, "generate", lambda **batch: run.append(batch["input_ids"]) or real(**batch))
    monkeypatch.setattr("adaptermix.models.generate._FIRST_ROUND", 2)
    assert generate(base, prompts, max_new_tokens=most, batch_size=3) == at_once
    assert len(set(at_once) - set(free)) >= 1
    rounds = {7: 4, 20: 7}[most]
    assert sum(map(len, run)) < len(prompts) * rounds


def test_an_answer_ends_at_a_line_break(causal: Path) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    newline = base.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    word = base.tokenizer("x", add_special_tokens=False)["input_ids"][0]

    class Scripted:
        """Says x, a line break, x, x, whatever it is asked."""

        generation_config = base.model.generation_config
        device = base.model.device

        def generate(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            tail = torch.tensor([[word, newline, word, word]] * len(input_ids))
            return SimpleNamespace(sequences=torch.cat([input_ids, tail], dim=1), past_key_values=None)

    scripted = type(base)(**{**{f: getattr(base, f) for f in base.__dataclass_fields__}, "model": Scripted()})
    assert generate(scripted, [[5, 6], [7]], max_new_tokens=4, batch_size=2) == ["x", "x"]


@pytest.mark.parametrize("ends", [2, [7, 2], None])
def test_an_answer_ends_at_every_end_token_of_the_model_and_the_tokenizer(
    causal: Path, ends: int | list[int] | None
) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    base.model.generation_config.eos_token_id = ends
    prompt = base.tokenizer("hello")["input_ids"]
    free = base.model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    spoken = free[0, len(prompt) :].tolist()
    assert not {2, 7} & set(spoken)
    for place in (1, 3):
        base.model.generation_config.eos_token_id = [*([ends] if isinstance(ends, int) else ends or []), spoken[place]]
        first = spoken.index(spoken[place])
        expected = base.tokenizer.decode(spoken[:first]).strip()
        assert generate(base, [prompt, prompt[:2]], max_new_tokens=6, batch_size=2)[0] == expected


def test_an_answer_has_at_most_so_many_tokens_and_no_prompt_gives_none(causal: Path) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    longest, shortest = (generate(base, prompts, max_new_tokens=n, batch_size=8) for n in (6, 2))
    assert all(long.startswith(short) for long, short in zip(longest, shortest, strict=True))
    assert generate(base, [], max_new_tokens=2, batch_size=8) == []


def test_evaluate_scores_every_language_and_writes_nothing(causal: Path, tmp_path: Path) -> None:
    for language in ("en", "de"):
        row = {"text": "wake me", "slots": [{"type": "time", "value": "five"}], "language": language}
        (tmp_path / f"{language}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"slots": []}) + "\n")
    before = sorted(tmp_path.iterdir())
    found = evaluate(
        EvaluateSettings(
            base=str(causal),
            task="slots",
            data=[str(tmp_path / "*.jsonl")],
            max_new_tokens=4,
            dtype="float32",
            device="cpu",
        )
    )
    document = found.document()
    assert {"task", "metric", "scores", "groups"} <= set(document)
    assert set(document["scores"]["de"]) == {"value", "low", "high", "n"}
    assert document["scores"]["de"]["n"] == 2
    assert sorted(tmp_path.iterdir()) == before


def test_an_encoder_does_not_generate(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_text('{"text": "a", "slots": []}\n')
    with refuses("model.not-causal"):
        evaluate(EvaluateSettings(base=str(encoder), task="slots", data=[str(tmp_path / "en.jsonl")], device="cpu"))


def test_the_models_own_generation_settings_do_not_interfere(causal: Path) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    plain = generate(base, prompts, max_new_tokens=8, batch_size=8)
    own = base.model.generation_config
    own.repetition_penalty = 5.0
    assert generate(base, prompts, max_new_tokens=8, batch_size=8) == plain
    assert base.model.generation_config is own


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "minimax", "mpt", "mamba"])
def test_drafts_change_nothing_but_the_work(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny_causal(tmp_path / kind, kind)), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    options = {"limits": Limits(max_new_tokens=20), "batch_size": 3}
    free = generate_ids(base, prompts, **options)
    base.model.generation_config.eos_token_id = free[1][4]  # some end early
    plain = generate_ids(base, prompts, **options)
    assert len({len(ids) for ids in plain}) > 1
    draw = torch.Generator().manual_seed(0)
    wrong = [[*ids[:cut], 5, *ids[cut + 1 :]] for cut, ids in enumerate(plain)]
    random = [torch.randint(3, 40, (n,), generator=draw).tolist() for n in (0, 1, 5, 20, 30)]
    run = []
    real = base.model.generate
    monkeypatch.setattr(base.model, "generate", lambda **batch: run.append(batch["input_ids"]) or real(**batch))
    for drafts in (plain, wrong, random, free, [None, [], *plain[2:]], [ids[:3] for ids in plain], [None] * 5):
        run.clear()
        assert generate_ids(base, prompts, drafts=drafts, **options) == plain
        if drafts is plain and kind in (
            "llama",
            "qwen2",
            "gemma3",
        ):  # one pass tells that all of it stands, but for what never came to an end
            assert sum(map(len, run)) <= sum(len(ids) == 20 for ids in plain) * 3


def test_answers_of_one_adapter_are_drafts_for_the_next_and_do_not_stick(
    causal: Path,
) -> None:
    """Rows may be asked in part, and in another order."""
    base = load_base(str(causal), dtype="float32", device="cpu")
    task = get_task("slots")
    rows = [SlotRow(text=text, slots=(), language="en") for text in PROMPTS]
    settings = GenerationSettings(max_new_tokens=12, batch_size=3, dtype="float32", device="cpu")

    def fresh() -> Answering:
        return Answering(base, task, rows, settings, template="plain")

    head = base.model.get_output_embeddings().weight
    before = head.detach().clone()
    asked = fresh()
    first = asked("one")
    with torch.no_grad():
        head.copy_(before.flip(0))
    second = asked("two", indices=[3, 1])
    assert second == [fresh()("alone")[place] for place in (3, 1)]
    with torch.no_grad():
        head.copy_(before)
    assert asked("again") == first
    assert second != [first[place] for place in (3, 1)]


def test_rows_of_models_whose_states_cannot_be_parted_are_read_anew(
    causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DynamicCache

    base = load_base(str(causal), dtype="float32", device="cpu")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    monkeypatch.setattr("adaptermix.models.generate._FIRST_ROUND", 2)
    parted = generate_ids(base, prompts, Limits(max_new_tokens=9), batch_size=3)

    def refuse(*_: object) -> None:
        raise AttributeError("as Mamba's")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", refuse)
    assert generate_ids(base, prompts, Limits(max_new_tokens=9), batch_size=3) == parted


def test_drafts_that_fail_here_and_there_do_not_go_on_in_small_batches(
    causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(causal), dtype="float32", device="cpu")
    prompts = [base.tokenizer(f"{text} {n}")["input_ids"] for n in range(12) for text in PROMPTS[:4]]
    options = {"limits": Limits(max_new_tokens=24), "batch_size": 16}
    plain = generate_ids(base, prompts, **options)
    passes = []
    real = base.model.forward

    def forward(*given: object, **named: object) -> object:
        passes.append(1)
        return real(*given, **named)

    monkeypatch.setattr(base.model, "forward", functools.wraps(real)(forward))
    assert generate_ids(base, prompts, **options) == plain
    without = len(passes)
    passes.clear()
    # one pass holds the drafts of four rows, and one of eight fails
    monkeypatch.setattr("adaptermix.models.generate._MOST_LOGITS", 4 * 24 * base.model.config.vocab_size)
    drafts = [[5] * 23 if row % 8 == 0 else ids[:23] for row, ids in enumerate(plain)]
    assert generate_ids(base, prompts, drafts=drafts, **options) == plain
    assert len(passes) <= without + len(prompts) // 4 + 24
