"""Heads of this package on hidden states: what they read, checked against transformers' hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head, Reader
from adaptermix.models.own_heads import FusedStates, Gate, ModelWithHead
from adaptermix.models.pooling import masked_mean

from .refusals import refuses
from .tiny import tiny_causal

TEXTS = ["a red sky", "blue", "green hills and a very long row of words"]


def loaded(base: Path, form: str = "classes", **reader: object) -> BaseModel:
    head = Head(form=HEAD_FORMS[form], labels=("a", "b", "c"), reader=Reader(**reader))  # type: ignore[arg-type]
    return load_base(str(base), device="cpu", dtype="float32", head=head)


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def batch_of(base: BaseModel) -> dict[str, Tensor]:
    return dict(base.tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt"))


def states(base: BaseModel) -> list[Tensor]:
    """Hidden states 0 to n of transformers."""
    with torch.no_grad():
        return list(base.model.base_model(**batch_of(base), output_hidden_states=True).hidden_states)


def logits(base: BaseModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = base.model(**batch_of(base)).logits
    return found


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "auto"])
def test_it_reads_the_pooled_last_state(base: Path, pooling: str) -> None:
    model = loaded(base, pooling=pooling)
    hidden, mask = states(model)[-1], batch_of(model)["attention_mask"]
    kind = {"auto": "first" if model.kind == "encoder" else "last"}.get(pooling, pooling)
    ends = mask.sum(1) - 1
    expected = {
        "mean": masked_mean(hidden, mask),
        "first": hidden[:, 0],
        "last": hidden[torch.arange(len(TEXTS)), ends],
    }[kind]
    torch.testing.assert_close(logits(model), expected @ model.model.head.weight.T)
    assert model.model.head.bias is None
    assert model.head_modules == ("head",)


def test_block_k_alone_is_the_state_of_transformers_and_runs_no_block_above(base: Path) -> None:
    model = loaded(base, "tokens", layers="2")
    hidden = states(model)[2]
    if model.kind == "causal":  # the final norm of the model follows
        hidden = model.model.base_model.norm(hidden)
    runs: list[int] = []
    for number, block in enumerate(loaded_blocks(model)):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    torch.testing.assert_close(logits(model), hidden @ model.model.head.weight.T)
    assert runs == [0, 1]


def loaded_blocks(model: BaseModel) -> Iterator[torch.nn.Module]:
    from adaptermix.models.blocks import blocks

    return iter(blocks(model.model)[1])


@pytest.mark.parametrize("aggregate", ["add", "mean", "concat"])
@pytest.mark.parametrize("lower", [0, 1, 3, 4])
@pytest.mark.parametrize("norm", ["own", "none"])
def test_two_states_without_a_gate(base: Path, aggregate: str, lower: int, norm: str) -> None:
    model = loaded(base, "tokens", layers=f"last+{lower}", aggregate=aggregate, norm=norm)
    every = states(model)
    last, low = (
        torch.nn.functional.layer_norm(each, each.shape[-1:]) if norm == "own" else each
        for each in (every[-1], every[lower])
    )
    fused = {"add": last + low, "mean": (last + low) / 2, "concat": torch.cat([last, low], -1)}[aggregate]
    torch.testing.assert_close(logits(model), fused @ model.model.head.weight.T)


def test_final_norm_is_that_of_the_model(causal: Path) -> None:
    model = loaded(causal, "tokens", layers="last+2", aggregate="add", norm="final")
    every = states(model)
    expected = (every[-1] + model.model.base_model.norm(every[2])) @ model.model.head.weight.T
    torch.testing.assert_close(logits(model), expected)


def test_an_encoder_without_a_final_norm_is_refused(encoder: Path) -> None:
    with refuses("head.final-norm"):
        loaded(encoder, layers="last+2", norm="final")


def test_aff_of_the_last_state_with_itself_is_the_last_state(base: Path) -> None:
    model = loaded(base, "tokens", layers="last+4", norm="none")
    torch.testing.assert_close(logits(model), states(model)[-1] @ model.model.head.weight.T)


def test_a_constant_gate_of_one_half_is_the_mean(base: Path) -> None:
    model = loaded(base, "tokens", layers="last+2", norm="none")
    for parameter in model.model.reader.parameters():
        parameter.data.zero_()
    every = states(model)
    torch.testing.assert_close(logits(model), (every[-1] + every[2]) / 2 @ model.model.head.weight.T)


def test_se_by_hand() -> None:
    reader = FusedStates(Reader(layers="last+1", aggregate="se", norm="none", gate="local"), 2, 2)
    for parameter in reader.parameters():
        parameter.data.zero_()
    last, lower = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -2.0]]])
    assert reader([last, lower], torch.ones(1, 1)).tolist() == [[[2.0, 0.0]]]  # sigmoid(0) (h + l)


def test_the_learned_mean_starts_as_the_mean_of_all_blocks(base: Path) -> None:
    model = loaded(base, "tokens", layers="last+search", norm="none")
    every = states(model)
    expected = torch.stack(every).mean(0) @ model.model.head.weight.T
    torch.testing.assert_close(logits(model), expected)
    assert model.model.reader.mix.shape == (5,)
    assert model.head_modules == ("head", "reader")


@pytest.mark.parametrize("branches", ["both", "local", "global"])
def test_a_gate_lies_between_0_and_1_ignores_padding_and_has_as_many_parameters(branches: str) -> None:
    torch.manual_seed(0)
    gate = Gate(32, 4, branches)
    inside = 32 // 4
    one = 2 * 32 * inside + 2 * inside
    assert sum(parameter.numel() for parameter in gate.parameters()) == one * (2 if branches == "both" else 1)
    hidden, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    weights = gate(hidden, mask)
    assert ((weights > 0) & (weights < 1)).all()
    alone = gate(hidden[1:, :2], mask[1:, :2])
    torch.testing.assert_close(weights[1:, :2], alone)
    changed = gate(torch.where(mask[..., None] == 1, hidden, 9.0), mask)
    torch.testing.assert_close(changed[1, :2], weights[1, :2])
    local = gate(torch.where(torch.arange(5)[None, :, None] == 4, 9.0, hidden), mask)
    unchanged = torch.equal(local[0, :2], weights[0, :2])
    assert unchanged is (branches == "local")  # the mean of the text reaches each token


@pytest.mark.parametrize(
    "reader",
    [{"layers": "last+2"}, {"layers": "last+search"}, {"layers": "3"}, {"layers": "last+0", "aggregate": "se"}],
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(base: Path, reader: dict[str, str]) -> None:
    model = loaded(base, pooling="mean", **reader)
    together = logits(model)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            alone = model.model(**model.tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_the_gradient_reaches_the_lower_block_directly(base: Path) -> None:
    model = loaded(base, "tokens", layers="last+2", aggregate="add")
    inner: ModelWithHead = model.model
    weight = next(list(loaded_blocks(model))[1].parameters()).requires_grad_(True)
    list(loaded_blocks(model))[2].register_forward_pre_hook(lambda _m, args: (args[0].detach(), *args[1:]))
    inner(**batch_of(model)).logits.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layers", ["5", "0", "last+5"])
def test_a_block_that_is_not_there_is_refused(base: Path, layers: str) -> None:
    with refuses("head.layers"):
        loaded(base, layers=layers)


@pytest.mark.parametrize("form", ["classes", "tokens", "span"])
@pytest.mark.parametrize("kind", ["gemma3", "llama", "mpt"])
def test_a_family_without_such_a_head_gets_one_of_this_package(kind: str, form: str, tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base", kind)
    labels = ("a", "b") if form != "span" else ("span",)
    model = load_base(str(base), device="cpu", dtype="float32", head=Head(form=HEAD_FORMS[form], labels=labels))
    own = isinstance(model.model, ModelWithHead)
    assert own == bool(model.head and model.head.reader)
    assert own == ((kind, form) in {("gemma3", "tokens"), ("gemma3", "span"), ("llama", "span")})
    outputs = model.model(**batch_of(model))
    width = batch_of(model)["input_ids"].shape[1]
    found = outputs.start_logits if form == "span" else outputs.logits
    assert found.shape == {"classes": (3, 2), "tokens": (3, width, 2), "span": (3, width)}[form]


def test_the_seed_decides_the_weights(base: Path) -> None:
    heads = [
        load_base(
            str(base),
            device="cpu",
            head=Head(form=HEAD_FORMS["classes"], labels=("a", "b"), reader=Reader(layers="last+1")),
            seed=seed,
        ).model
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0].head.weight, heads[1].head.weight)
    assert not torch.equal(heads[0].head.weight, heads[2].head.weight)
    one, other = (dict(head.reader.named_parameters()) for head in heads[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "entry",
    [[], {"layers": 3}, {"layers": "first"}, {"pooling": "max"}, {"gate_ratio": 0}, {"new": 1}, {"gate_ratio": "4"}],
    ids=str,
)
def test_an_entry_of_a_manifest_that_is_not_a_reader_is_refused(entry: object) -> None:
    with refuses("head.reader"):
        Reader.of(entry)


def test_a_reader_survives_its_entry() -> None:
    reader = Reader(pooling="mean", layers="last+3", aggregate="se", gate="local", gate_ratio=4, norm="none")
    assert Reader.of(reader.document()) == reader
    assert Reader.of(None) is None
