"""Layers and kinds from paths; choosing and pairing modules by name."""

from __future__ import annotations

import pytest

from adaptermix.analysis.selection import match_names, select
from adaptermix.errors import PlanError
from adaptermix.models.location import OUTSIDE, kinds_of, layers_of, locations, unique_names

LLAMA = [
    *(f"model.layers.{n}.{m}" for n in (0, 10, 2) for m in ("self_attn.q_proj", "mlp.up_proj")),
    "lm_head",
    "model.embed_tokens",
]
BERT = [
    f"encoder.layer.{n}.{m}"
    for n in range(2)
    for m in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]
MBART = [
    *(f"model.encoder.layers.{n}.self_attn.k_proj" for n in range(2)),
    *(f"model.decoder.layers.{n}.{m}.k_proj" for n in range(2) for m in ("self_attn", "encoder_attn")),
    "model.shared",
]


def pairs(paths: list[str]) -> list[tuple[str, str]]:
    found = locations(paths)
    return [(found[path].layer, found[path].kind) for path in paths]


@pytest.mark.parametrize(
    ("path", "layer", "kind"),
    [
        ("model.layers.7.self_attn.q_proj", "7", "q_proj"),
        ("transformer.h.11.attn.c_attn", "11", "c_attn"),
        ("encoder.block.3.layer.0.SelfAttention.q", "3", "q"),
        ("model.layers.1.mlp.experts.14.w1", "1", "w1"),
        ("lm_head", OUTSIDE, "lm_head"),
        ("model.embed_tokens", OUTSIDE, "embed_tokens"),
        ("classifier.0", "0", "classifier"),
        ("0", "0", "0"),
    ],
)
def test_the_layer_is_the_first_number_and_the_kind_the_last_part(path: str, layer: str, kind: str) -> None:
    assert pairs([path]) == [(layer, kind)]


def test_layers_come_in_the_order_of_the_model() -> None:
    found = locations(LLAMA)
    assert list(layers_of(found)) == ["0", "2", "10", OUTSIDE]
    assert kinds_of(found)["q_proj"] == tuple(f"model.layers.{n}.self_attn.q_proj" for n in (0, 2, 10))


def test_kinds_of_one_last_part_are_told_apart_by_more_of_the_path() -> None:
    assert [kind for _, kind in pairs(BERT[:4])] == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]


def test_stacks_are_told_apart_by_their_name() -> None:
    assert pairs(MBART) == [
        ("encoder.0", "self_attn.k_proj"),
        ("encoder.1", "self_attn.k_proj"),
        ("decoder.0", "self_attn.k_proj"),
        ("decoder.0", "encoder_attn.k_proj"),
        ("decoder.1", "self_attn.k_proj"),
        ("decoder.1", "encoder_attn.k_proj"),
        (OUTSIDE, "shared"),
    ]
    assert pairs(["layers.0.q", "model.layers.0.q"]) == [("layers.0", "q"), ("model.layers.0", "q")]


def test_experts_of_a_block_are_one_kind() -> None:
    found = locations([f"layers.0.experts.{n}.{m}" for n in range(3) for m in ("w1", "w2")])
    assert {kind: len(paths) for kind, paths in kinds_of(found).items()} == {"w1": 3, "w2": 3}


def test_names_are_made_unique() -> None:
    assert unique_names(["a", "a", "b"]) == ["a", "a#2", "b"]
    assert unique_names(["a", "a", "a#2"]) == ["a", "a#3", "a#2"]
    assert unique_names([]) == []


class TestSelection:
    def chosen(self, paths: list[str], **options: list[str]) -> list[str]:
        return [path.removeprefix("model.") for path in select(locations(paths), **options)]

    def test_the_default_is_everything_inside_the_blocks(self) -> None:
        assert self.chosen(LLAMA) == [
            f"layers.{n}.{m}" for n in (0, 2, 10) for m in ("self_attn.q_proj", "mlp.up_proj")
        ]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"layers": ["0-2"], "modules": ["q_proj"]}, ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]),
            ({"layers": ["10"], "exclude": ["*.mlp.*"]}, ["layers.10.self_attn.q_proj"]),
            ({"layers": ["1?"], "modules": ["up_*"]}, ["layers.10.mlp.up_proj"]),
            (
                {"layers": ["0"], "modules": ["q_proj"], "include": ["lm_head"]},
                ["layers.0.self_attn.q_proj", "lm_head"],
            ),
            ({"layers": ["outside"]}, ["lm_head", "embed_tokens"]),
            ({"modules": ["q_proj"], "exclude": ["*.0.*", "*.10.*"]}, ["layers.2.self_attn.q_proj"]),
        ],
    )
    def test_layers_modules_include_and_exclude(self, options: dict[str, list[str]], expected: list[str]) -> None:
        assert self.chosen(LLAMA, **options) == expected

    def test_a_number_means_that_block_of_every_stack_and_a_glob_one_of_them(self) -> None:
        assert len(self.chosen(MBART, layers=["1"])) == 3
        assert self.chosen(MBART, layers=["encoder.*"]) == [f"encoder.layers.{n}.self_attn.k_proj" for n in range(2)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": ["11-12"]}, "--layers '11-12' must match a layer. Layers here: 0, 2, 10, outside."),
            ({"modules": ["q_prj"]}, "--modules 'q_prj' must match a module. Did you mean 'q_proj'?"),
            ({"include": ["head"]}, "--include 'head' must match a module"),
            ({"exclude": ["none"]}, "--exclude 'none' must match a module"),
        ],
    )
    def test_a_pattern_that_meets_nothing_is_refused(self, options: dict[str, list[str]], message: str) -> None:
        with pytest.raises(PlanError) as caught:
            self.chosen(LLAMA, **options)
        assert str(caught.value).startswith(message)


class TestMatching:
    def test_equal_paths_are_one(self) -> None:
        assert match_names(["a.0.q", "b"], ["b", "a.0.q", "c"]) == {"a.0.q": "a.0.q", "b": "b"}

    def test_a_prefix_on_either_side_is_seen_through(self) -> None:
        assert match_names(["layers.0.q", "head"], ["model.layers.0.q", "head"]) == {
            "layers.0.q": "model.layers.0.q",
            "head": "head",
        }
        assert match_names(["bert.layer.0.q"], ["layer.0.q", "layer.1.q"]) == {"bert.layer.0.q": "layer.0.q"}

    def test_what_could_be_two_is_none(self) -> None:
        assert match_names(["layers.0.q"], ["encoder.layers.0.q", "decoder.layers.0.q"]) == {}
        assert match_names(["encoder.layers.0.q", "decoder.layers.0.q"], ["layers.0.q"]) == {}
