"""Each alignment and each fusion once in figures that a person can check; the laws hold for an offset of one too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptermix.fusion import ALIGNMENTS, FUSIONS, Sources
from adaptermix.fusion.extra_modules import MIXING, add_parts
from adaptermix.fusion.functions import SoftAlignment
from adaptermix.fusion.lora import FusionConfig, align
from adaptermix.fusion.mixup import Mixer, Mixup
from adaptermix.models.base import load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.tasks import get_task
from adaptermix.tasks.classify import ClassifyRow
from adaptermix.tasks.nli import NliRow
from adaptermix.tasks.qa import QaRow

PAD = "_"


def stands_beside(alignment: str, source: str, target: str, prompt: int, past: int = 0) -> str:
    """Return the letter of the source beside each letter of the target, `-` where there is none.

    Args:
        alignment: Name of an alignment.
        source: One letter a token, `_` for padding.
        target: The same.
        prompt: How many tokens of the target are counted as its prompt.
        past: How many tokens of the target were read before.
    """
    letters = torch.tensor([[ord(letter) for letter in source]]).float()[..., None]
    counts, reads = (torch.tensor([[letter != PAD for letter in text]]) for text in (source, target))
    found = Sources(states={"b": letters}, mask=counts, lead=torch.zeros(1).long()).align(alignment, [prompt])
    places = found.indices(len(target) - past, past, reads)
    given = align(torch.zeros(1, len(target) - past, 1), found.states["b"], found.mask, places)
    pairs = zip(given.aligned[0, :, 0].tolist(), given.present[0].tolist(), strict=True)
    return "".join(chr(int(code)) if there else "-" for code, there in pairs)


# a prompt wxyz with an answer 12 behind it; with row-end all six tokens are counted
@pytest.mark.parametrize(
    ("alignment", "source", "target", "prompt", "expected"),
    [
        ("position", "abc", "wxyz12", 4, "abc---"),
        ("position", "abc__", "wxyz12", 4, "abc---"),
        ("position", "__abc", "wxyz12", 4, "abc---"),
        ("position", "abcdefg", "wxyz12", 4, "abcdef"),
        ("position", "abc", "__wxyz12", 4, "--abc---"),
        ("end", "abc", "wxyz12", 4, "-abc--"),
        ("end", "abc__", "wxyz12", 4, "-abc--"),
        ("end", "__abc", "wxyz12", 4, "-abc--"),
        ("end", "abcdefg", "wxyz12", 4, "defg--"),
        ("end", "abc", "__wxyz12", 4, "---abc--"),
        ("end", "a", "wxyz12", 4, "---a--"),
        ("row-end", "abc", "wxyz12", 6, "---abc"),
        ("row-end", "__abc", "wxyz12", 6, "---abc"),
        ("row-end", "abcdefg", "wxyz12", 6, "bcdefg"),
        ("row-end", "abc", "__wxyz12", 6, "-----abc"),
        ("last", "abc", "wxyz12", 4, "cccc--"),
        ("last", "abc__", "wxyz12", 4, "cccc--"),
        ("last", "__abc", "wxyz12", 4, "cccc--"),
        ("last", "abc", "__wxyz12", 4, "--cccc--"),
        ("index", "abc", "wxyz12", 4, "abc---"),
        ("index", "abc__", "wxyz12", 4, "abc---"),
        ("index", "__abc", "wxyz12", 4, "--abc-"),
        ("index", "abc", "__wxyz12", 4, "abc-----"),
    ],
)
def test_what_stands_beside_each_token(alignment: str, source: str, target: str, prompt: int, expected: str) -> None:
    assert stands_beside(alignment, source, target, prompt) == expected
    # a pass over the tokens from the fifth on, the ones before it in a cache
    assert stands_beside(alignment, source, target, prompt, past=4) == expected[4:]


def test_every_alignment_is_in_the_table_above() -> None:
    (marked,) = (mark for mark in test_what_stands_beside_each_token.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in marked.args[1]} == {*ALIGNMENTS, "last"}


def test_rows_of_a_batch_are_aligned_each_by_its_own_length() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = Sources(states={}, mask=mask, lead=torch.zeros(2).long())
    assert found.align("position", [5, 2]).lead.tolist() == [0, 0]
    assert found.align("end", [5, 2]).lead.tolist() == [2, 1]


def as_identity(*layers: nn.Linear) -> None:
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            if layer.bias is not None:
                layer.bias.zero_()


HALF_LN3 = math.log(3) / 2
"""A query that weighs the keys 1 and 3 as 1 to 3."""


@pytest.mark.parametrize(
    ("fusion", "target", "source", "places", "expected"),
    [
        # tokens: target 3 and 5, source -2 and 4; the third target token has no source beside it
        ("add", [3, 5, 7], [-2, 4], [0, 1, 2], [1, 9, 7]),
        ("mul", [3, 5, 7], [-2, 4], [0, 1, 2], [-6, 20, 7]),
        ("add-relu", [3, -5, -7], [-2, 4], [0, 1, 2], [3, 4, -7]),
        ("mul-relu", [3, 5, -7], [-2, 4], [0, 1, 2], [0, 20, -7]),
        ("gated", [3, 5, 7], [-2, 4], [0, 1, 2], [2, 7, 7]),  # with a gate of a half
        ("add", [3, 5, 7], [-2, 4], [-1, 0, 1], [3, 3, 11]),
        # the query 0 sees all alike: (1 + 3) / 2; the other weighs 1/4 and 3/4; a source of 9 is padding
        ("cross-attention", [0, HALF_LN3], [1, 3, 9], [0, 1], [2, HALF_LN3 + 2.5]),
        # here the source asks, and nothing is added: weights 1/4 and 3/4 on the values 0 and 1; padding asks with 0
        ("cross-attention-paper", [0, 1], [2 * HALF_LN3], [0, 1], [0.75, 0.5]),
        ("cross-attention-paper", [1], [2 * HALF_LN3, 0], [0], [0.75]),
    ],
)
def test_fusions_of_one_number_a_token(
    fusion: str, target: list[float], source: list[float], places: list[int], expected: list[float]
) -> None:
    made = FUSIONS[fusion](1)
    if fusion == "gated":
        assert float(made.gate.detach()) == 1.0  # at the start it is `add`
        made.gate.data.fill_(0.5)
    elif fusion.startswith("cross"):
        as_identity(made.query, made.key, made.value)
    given = align(
        torch.tensor(target).float()[None, :, None],
        torch.tensor(source).float()[None, :, None],
        torch.tensor([[number != 9 for number in source]]),
        torch.tensor([places]),
    )
    assert made(given)[0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_fusion_of_the_bottleneck_is_in_the_table_above() -> None:
    (marked,) = (mark for mark in test_fusions_of_one_number_a_token.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in marked.args[1]} == set(FUSIONS)


def test_soft_alignment_finds_a_mean_of_the_source() -> None:
    """Of the sources 1 and 3 the mean for a query of 0, and 1/4 + 3 * 3/4 for the other; padding (9) has no part."""
    soft = SoftAlignment(1)
    as_identity(soft.query, soft.key)
    target = torch.tensor([[0.0, HALF_LN3]])[..., None]
    source, mask = torch.tensor([[1.0, 3.0, 9.0]])[..., None], torch.tensor([[True, True, False]])
    found = soft(align(target, source, mask, torch.tensor([[-1, -1]])))
    assert found.aligned[0, :, 0].tolist() == pytest.approx([2.0, 2.5])
    assert found.present.tolist() == [[True, True]]
    torch.testing.assert_close(FUSIONS["add"](1)(found), target + found.aligned)


def test_x_mixup_of_one_number_a_token() -> None:
    """One source token leaves nothing to doubt on one side, and two target tokens that are alike a coin on the other.

    The entropies are 0 and ln 2, so the share of the target is .5 * sigmoid(ln 2) = .5 * 2/3 = 1/3.
    """
    target, source = torch.tensor([[[3.0], [3.0], [8.0]]]), torch.tensor([[[6.0], [5.0]]])
    reads, mask = torch.tensor([[True, True, False]]), torch.tensor([[True, False]])
    found = Mixup(1)(target, source, reads, mask)
    assert found[0, :2, 0].tolist() == pytest.approx([3 / 3 + 6 * 2 / 3] * 2)
    # without a source the target stays
    assert Mixup(1)(target, source, reads, torch.zeros(1, 2).bool()).tolist() == target.tolist()


@pytest.mark.parametrize("layer", [1, 3, 4])
@torch.no_grad()
def test_x_mixup_mixes_what_comes_out_of_its_block(layer: int, encoder: Path) -> None:
    """Blocks are counted from 1; hidden states begin with the embeddings."""
    head = Head(form=HEAD_FORMS["classes"], labels=("a", "b"))
    base = load_base(str(encoder), device="cpu", dtype="float32", head=head)
    add_parts(base.model, {"fusion": "x-mixup"})
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    states = base.model(**given, output_hidden_states=True).hidden_states
    mixer = Mixer(base, layer, MIXING)
    mixer.use(None)
    base.model(**given)
    source = mixer.passed()
    torch.testing.assert_close(source.states, states[layer])
    mixer.use(source)
    base.model(**given)
    mixed = base.model.get_submodule(MIXING)(states[layer], states[layer], *[torch.ones(1, 3).bool()] * 2)
    torch.testing.assert_close(mixer.passed().states, mixed)
    mixer.close()


def test_sources_in_the_text_come_first() -> None:
    row, source = (ClassifyRow(text=text, label="x", language="jv") for text in ("target", "source"))
    assert get_task("classify").with_source(row, source) == ClassifyRow(text="source target", label="x", language="jv")  # type: ignore[attr-defined]
    pair, other = (NliRow(premise=f"{n}p", hypothesis=f"{n}h", label="neutral", language="jv") for n in "ts")
    both = get_task("nli").with_source(pair, other)  # type: ignore[attr-defined]
    assert (both.premise, both.hypothesis) == ("sp tp", "sh th")
    asked, other_asked = (
        QaRow(question=f"{n}?", context=f"{n} abc", answers=("abc",), language="jv", spans=((2, 5),)) for n in "ts"
    )
    both = get_task("qa").with_source(asked, other_asked)  # type: ignore[attr-defined]
    assert (both.question, both.context, both.spans) == ("s? t?", "s abc\nt abc", ((8, 11),))


def test_what_the_paper_and_the_release_stand_for() -> None:
    names = ("fusion", "fusion_alignment", "fusion_norm", "fusion_offset", "fusion_pads", "fusion_dropout")
    found = {way: tuple(getattr(made(), name) for name in names) for way, made in WAYS.items()}
    assert found == {
        "default": ("add", "position", True, 0, False, False),
        "release": ("add", "index", False, 0, True, True),
        "paper": ("add", "index", False, 1, True, True),
    }


WAYS = {"default": FusionConfig, "release": FusionConfig.release, "paper": FusionConfig.paper}
