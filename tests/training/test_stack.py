"""Stacks: an encoder under a model, stage 1, and the folder of a stack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptermix import load_adapter, train_stack
from adaptermix.models.base import backbone, load_base
from adaptermix.models.both_sides import see_both_sides
from adaptermix.models.pooling import pool
from adaptermix.models.stack import Projected, embedding_of, mount
from adaptermix.training.losses.stacking import state_loss, unexplained
from adaptermix.training.stack_texts import TwoReadings, common_prefix

from ..refusals import refuses
from ..tiny import tiny_causal, tiny_encoder
from .data import COLOURS
from .stacks import TEXTS, batch_of, loaded, stack_settings, write_texts


class OwnRows(nn.Module):
    """An encoder that returns the rows of a table of embeddings."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(d_model=table.shape[1]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_an_encoder_that_returns_own_embeddings_changes_nothing(
    top: Path, dtype: torch.dtype, tolerance: float
) -> None:
    base = loaded(top)
    body: Any = backbone(base).to(dtype)
    batch = batch_of(base.tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = body(**inputs).last_hidden_state
        embedding = mount(body, OwnRows(body.get_input_embeddings().weight.detach().clone()), base.tokenizer)  # type: ignore[arg-type]
        embedding.projection.weight.copy_(torch.eye(len(embedding.projection.weight)))
        embedding.projection.bias.zero_()
        after = body(**inputs).last_hidden_state
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)


def test_the_swap_is_that_of_inputs_embeds(top: Path, below: Path) -> None:
    base, encoder = loaded(top), loaded(below)
    body: Any = backbone(base)
    batch = batch_of(encoder.tokenizer)
    embedding = mount(body, encoder.model, encoder.tokenizer)
    with torch.no_grad():
        swapped = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        given = embedding(batch["input_ids"])
        by_embeds = body(inputs_embeds=given, attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.equal(swapped, by_embeds)


def test_only_projection_and_lora_change_in_stage_1(top: Path, below: Path, tmp_path: Path) -> None:
    grads: dict[str, bool] = {}

    class Look:
        def on_step_end(self, _args: Any, _state: Any, _control: Any, *, model: nn.Module, **_: Any) -> None:
            grads.update({name: parameter.requires_grad for name, parameter in model.named_parameters()})
            embedding = embedding_of(model)
            encoder = embedding._frozen[0]
            assert not encoder.training
            ids = torch.tensor([[1, 5, 6]])
            assert torch.equal(embedding.encoder_states(ids), embedding.encoder_states(ids))

    train_stack(stack_settings(top, below, tmp_path, steps=2), callbacks=[Look()])
    trained = {name for name, needs in grads.items() if needs}
    assert any("lora_A" in name for name in trained)
    assert all("lora_" in name or ".projection.modules_to_save" in name for name in trained)
    encoder = load_base(str(below), device="cpu", dtype="float32").model.state_dict()
    inside = embedding_of(loaded(tmp_path / "stack").model)._frozen[0].state_dict()
    assert all(torch.equal(inside[name], tensor) for name, tensor in encoder.items())


def test_the_teacher_is_the_model_on_top_bit_for_bit(top: Path, below: Path, tmp_path: Path) -> None:
    from adaptermix.training.stack import StackObjective

    plain = loaded(top)
    ids = plain.tokenizer(TEXTS[:4])["input_ids"]
    seen: list[Tensor] = []

    class Look:
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(objective[0].states.teacher(ids))

    objective: list[Any] = []
    init = StackObjective.__init__

    def remember(self: Any, run: Any) -> None:
        init(self, run)
        objective.append(self)

    StackObjective.__init__ = remember  # type: ignore[method-assign]
    try:
        train_stack(stack_settings(top, below, tmp_path, steps=3), callbacks=[Look()])
    finally:
        StackObjective.__init__ = init  # type: ignore[method-assign]
    batch = plain.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        states = backbone(plain)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = pool(states, batch["attention_mask"], "mean")
    assert len(seen) == 3
    assert all(torch.equal(found, expected) for found in seen)


def test_the_unexplained_fraction() -> None:
    torch.manual_seed(0)
    targets = torch.randn(40, 8)
    assert unexplained(targets, targets) == 0
    assert unexplained(targets.mean(0).expand_as(targets), targets) == pytest.approx(1, abs=1e-6)
    by_hand = (torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
    assert unexplained(*by_hand) == pytest.approx(1.0)  # squared errors 1 + 1, around the mean 1 + 1
    assert float(state_loss(*by_hand)) == pytest.approx(1.0)


def test_dev_values_do_not_depend_on_batches(
    top: Path, below: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = write_texts(tmp_path, "dev.txt", ["one red hill", "two", "a very long sentence about a green sea"])
    history = []
    for size in (1, 3):
        settings = stack_settings(
            top,
            below,
            tmp_path,
            dev_texts=[dev],
            evaluate_every=1,
            steps=1,
            batch_size=4,
            out=str(tmp_path / str(size)),
        )
        monkeypatch.setattr("adaptermix.training.by_length._ROWS", size)
        report = train_stack(settings)
        history.append(next(entry for entry in report.history if "dev_unexplained" in entry))
    assert history[0]["dev_unexplained"] == pytest.approx(history[1]["dev_unexplained"], rel=1e-6)


@pytest.mark.parametrize("attention", ["causal", "both"])
def test_a_row_alone_is_the_row_in_a_batch(causal: Path, below: Path, tmp_path: Path, attention: str) -> None:
    train_stack(stack_settings(causal, below, tmp_path, steps=2, attention=attention))
    base = loaded(tmp_path / "stack")
    together = batch_of(base.tokenizer, [TEXTS[0], "red"])
    with torch.no_grad():
        both = base.model(**{n: together[n] for n in ("input_ids", "attention_mask")}).last_hidden_state
        alone = batch_of(base.tokenizer, ["red"])
        one = base.model(**{n: alone[n] for n in ("input_ids", "attention_mask")}).last_hidden_state
    torch.testing.assert_close(both[1, : one.shape[1]], one[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_a_decoder_sees_both_sides(kind: str, tmp_path: Path) -> None:
    states = {}
    path = tiny_causal(tmp_path / kind, kind)
    for way in ("eager", "sdpa"):
        base = loaded(path)
        body: Any = backbone(base)
        body.set_attn_implementation(way)
        ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
        other = ids.clone()
        other[0, 5] = 40
        mask = torch.ones_like(ids)
        with torch.no_grad():
            causal = [body(input_ids=each, attention_mask=mask).last_hidden_state[0, 1] for each in (ids, other)]
            assert torch.equal(*causal)
            see_both_sides(body)
            seen = [body(input_ids=each, attention_mask=mask).last_hidden_state[0, 1] for each in (ids, other)]
            padded = body(
                input_ids=torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1),
                attention_mask=torch.tensor([[1] * 6 + [0] * 3]),
            ).last_hidden_state[0, 1]
        assert (seen[0] - seen[1]).abs().max() > 1e-3
        torch.testing.assert_close(padded, seen[0], atol=1e-4, rtol=1e-3)
        states[way] = seen[0]
    torch.testing.assert_close(states["eager"], states["sdpa"], atol=1e-5, rtol=1e-4)


def test_a_stack_folder_gives_equal_states_wherever_it_is_loaded(stack: Path) -> None:
    one, other = loaded(stack), loaded(stack)
    batch = batch_of(one.tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(one.model(**inputs).last_hidden_state, other.model(**inputs).last_hidden_state)
    form = json.loads((stack / "stack.json").read_text())
    assert form["version"] == 1
    assert {"stack.json", "projection.safetensors", "config.json", "README.md", "adaptermix.json"} <= {
        path.name for path in stack.iterdir()
    }
    assert load_adapter(stack / "adapter").updates


def test_a_stack_whose_encoder_changed_is_refused(causal: Path, tmp_path: Path) -> None:
    below = tiny_encoder(tmp_path / "below", layers=2, hidden=16)
    train_stack(stack_settings(causal, below, tmp_path, steps=1))
    shutil.rmtree(below)
    torch.manual_seed(7)
    tiny_encoder(below, layers=3, hidden=16)
    with refuses("stack.changed"):
        loaded(tmp_path / "stack")


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("stack.json", lambda text: text.replace('"version": 1', '"version": 9'), "stack.form"),
        ("stack.json", lambda _: "[]", "stack.form"),
        ("projection.safetensors", lambda _: "no tensors", "stack.projection"),
    ],
)
def test_a_damaged_folder_is_refused(
    stack: Path, tmp_path: Path, file: str, change: Callable[[str], str], code: str
) -> None:
    copy = shutil.copytree(stack, tmp_path / "copy")
    text = (copy / file).read_text(errors="replace") if file.endswith("json") else ""
    (copy / file).write_text(change(text))
    with refuses(code):
        loaded(copy)


def test_long_texts_are_cut_to_the_same_characters(causal: Path, below: Path, tmp_path: Path) -> None:
    one, two = loaded(below).tokenizer, loaded(causal).tokenizer
    texts = ["abc " * 200, "ä" * 300]
    read = TwoReadings(texts, (one, two), language="en", most=30, span="characters")
    for text, student, teacher in zip(texts, read.student, read.teacher, strict=True):
        decoded = [
            tokenizer.decode(ids, skip_special_tokens=True) for tokenizer, ids in ((one, student), (two, teacher))
        ]
        assert decoded[0] == decoded[1]
        assert text.startswith(decoded[0].rstrip("\ufffd"))
        assert max(len(student), len(teacher)) <= 30
    assert read.cut == 2


def test_each_model_reads_its_own_first_tokens(causal: Path, below: Path) -> None:
    one, two = loaded(below).tokenizer, loaded(causal).tokenizer
    read = TwoReadings(["abc " * 200], (one, two), language="en", most=30, span="tokens")
    (student,), (teacher,) = read.student, read.teacher
    assert len(student) == len(teacher) == 30
    assert one.decode(student, skip_special_tokens=True) == "abc " * 7  # [CLS] and [SEP] take two of the tokens
    assert two.decode(teacher, skip_special_tokens=True) == "abc " * 7 + "ab"


def test_the_edge_token_of_a_text() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert pool(hidden, mask, "first").tolist() == [[0, 1], [6, 7]]
    assert pool(hidden, mask, "last").tolist() == [[4, 5], [8, 9]]


def test_a_projection_of_z_scores_folds_into_one_of_states(below: Path) -> None:
    torch.manual_seed(0)
    embedding = Projected(loaded(below).model, nn.Embedding(5, 4), width=16, pad_id=0)
    ids = torch.tensor([[1, 5, 6]])
    embedding.standardize(torch.randn(16), torch.rand(16) + 0.5)
    scored = embedding(ids)
    weight, bias = embedding.folded(embedding.projection.weight, embedding.projection.bias)
    torch.testing.assert_close(embedding.encoder_states(ids) @ weight.T + bias, scored, atol=1e-5, rtol=1e-4)


def test_the_common_prefix_is_the_longest() -> None:
    assert common_prefix("abcdef", [len, lambda text: 2 * len(text)], 7) == "abc"
    assert common_prefix("abc", [len], 3) == "abc"


def test_least_squares_starts_nearer_than_random(top: Path, below: Path, tmp_path: Path) -> None:
    shares = {}
    dev = write_texts(tmp_path, "dev.txt", [f"my {colour} house" for colour in COLOURS])
    for way in ("random", "least-squares"):
        settings = stack_settings(
            top,
            below,
            tmp_path,
            projection_init=way,
            dev_texts=[dev],
            evaluate_every=1,
            steps=1,
            learning_rate=1e-9,
            out=str(tmp_path / way),
        )
        history = train_stack(settings).history
        shares[way] = next(entry["dev_unexplained"] for entry in history if "dev_unexplained" in entry)
    assert shares["least-squares"] < shares["random"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"encoder": None}, "stack.stage"),
        ({"teacher": "x"}, "stack.stage"),
        ({"texts": []}, "stack.texts"),
        ({"task": "classify"}, "stack.stage-1"),
        ({"shard_base": True}, "stack.shard"),
        ({"start_from": "x"}, "stack.start"),
        ({"on_top_of": "x"}, "stack.on-top-of"),
        ({"dora": True}, "stack.dora"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    causal: Path, below: Path, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with refuses(code):
        stack_settings(causal, below, tmp_path, **options)


def test_projected_says_its_weight(below: Path) -> None:
    own = nn.Embedding(5, 4)
    encoder = loaded(below).model
    embedding = Projected(encoder, own, width=16, pad_id=0)
    assert embedding.weight is own.weight
    assert [name for name, _ in embedding.named_parameters()] == ["projection.weight", "projection.bias"]


def test_the_teacher_of_an_open_decoder_is_the_model_as_it_was(causal: Path, below: Path) -> None:
    base, encoder = loaded(causal), loaded(below)
    body: Any = backbone(base)
    batch = batch_of(base.tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = body(**inputs).last_hidden_state
        embedding = mount(body, encoder.model, encoder.tokenizer)
        see_both_sides(body)
        with embedding.bypassed():
            after = body(**inputs).last_hidden_state
    assert torch.equal(before, after)


def test_a_trained_stack_is_the_loaded_one(top: Path, below: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Look:
        def on_train_end(self, _a: Any, _s: Any, _c: Any, *, model: nn.Module, **_: Any) -> None:
            model.eval()
            with torch.no_grad():
                seen.append(model(**inputs).last_hidden_state)

    batch = batch_of(loaded(below).tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    train_stack(stack_settings(top, below, tmp_path, learning_rate=0.01), callbacks=[Look()])
    with torch.no_grad():
        found = loaded(tmp_path / "stack").model(**inputs).last_hidden_state
    torch.testing.assert_close(found, seen[0], atol=1e-4, rtol=1e-3)


def test_a_language_model_or_a_stack_cannot_be_the_encoder(
    top: Path, causal: Path, stack: Path, tmp_path: Path
) -> None:
    for encoder in (causal, stack):
        with refuses("stack.encoder-kind"):
            train_stack(stack_settings(top, encoder, tmp_path, steps=1))
    assert not (tmp_path / "stack").exists()
