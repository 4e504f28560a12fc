"""Retrieval by groups of languages, to chosen languages, with candidates of another system, and as a picture."""

from __future__ import annotations

import itertools
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import RetrieveSettings, retrieve
from adaptermix.adapters import open_adapter
from adaptermix.cli import main
from adaptermix.evaluation import Retrieval
from adaptermix.evaluation.retrieval import embed
from adaptermix.evaluation.retrieval_figures import MOST_DIRECTIONS, draw
from adaptermix.merging.on_model import acting
from adaptermix.models.base import load_base

from ..factories import write_lora
from ..refusals import refuses
from ..tiny import tiny_causal
from .test_retrieval import brute_force

TEXTS = {
    "de": ["eins", "zwei", "drei", "vier", "fünf"],
    "en": ["one", "two", "three", "four", "five"],
    "fr": ["un", "deux", "trois", "quatre", "cinq"],
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for language, rows in TEXTS.items():
        (tmp_path / f"{language}.txt").write_text("".join(f"{row}\n" for row in rows))
    return [str(tmp_path / f"{language}.txt") for language in TEXTS]


def settings(base: Path, files: list[str], **more: Any) -> RetrieveSettings:
    return RetrieveSettings(base=str(base), data=files, dtype="float32", device="cpu", **more)


# Two sentences per direction and five layers, of which 2 and 4 count.
HITS = {"de-en": (1.0, 0.0), "en-de": (1.0, 1.0), "fr-en": (0.0, 0.0), "en-fr": (0.0, 1.0)}
BY_HAND = Retrieval(
    hits=tuple({name: right if layer % 2 == 0 else (0.0, 0.0) for name, right in HITS.items()} for layer in range(5)),
    n=dict.fromkeys(HITS, 2),
    groups={"near": ["de"], "far": ["fr"], "both": ["de", "fr"]},
)


def test_groups_and_the_table_of_languages_by_hand() -> None:
    found = {name: score.value for name, score in BY_HAND.group_scores().items()}
    assert found == {"near": 0.75, "far": 0.25, "both": 0.5}
    assert BY_HAND.document()["groups"]["near"]["n"] == 4  # type: ignore[index]
    assert BY_HAND.table() == (["de", "en", "fr"], [[None, 0.5, None], [1.0, None, 0.5], [None, 0.0, None]])


def test_groups_of_a_run_are_means_over_its_directions(
    causal: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = retrieve(settings(causal, files, groups=["near=deu,en", "far=fr"]))
    assert found.groups == {"near": ["de", "en"], "far": ["fr"]}
    even = [found.layers[2], found.layers[4]]
    expected = {
        name: [layer[key] for layer in even for key in layer if set(key.split("-")) & set(languages)]
        for name, languages in found.groups.items()
    }
    for name, score in found.group_scores().items():
        assert score.value == pytest.approx(sum(expected[name]) / len(expected[name]))
    with pytest.raises(SystemExit, match="0"):
        main(["retrieve", "--base", str(causal), "--data", *files, "--groups", "far=fr", "--device", "cpu"])
    assert "  group far: 0." in capsys.readouterr().err


def test_only_the_directions_to_chosen_languages_are_measured(causal: Path, files: list[str]) -> None:
    whole, some = retrieve(settings(causal, files)), retrieve(settings(causal, files, to=["eng"]))
    assert list(some.n) == ["de-en", "fr-en"]
    for layer, expected in zip(some.layers, whole.layers, strict=True):
        assert layer == {name: expected[name] for name in some.n}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"groups": ["near"]}, "retrieve.group: 'near'"),
        ({"groups": ["a=de", "a=fr"]}, "retrieve.group: 'a=fr'"),
        ({"groups": ["a=es"]}, "data.languages: 'es'"),
        ({"to": ["es"]}, "data.languages: --to.*'es'"),
        ({"to": ["en"], "groups": ["a=xx"]}, "data.languages"),
    ],
)
def test_languages_that_the_data_lack_are_refused(
    causal: Path, files: list[str], more: dict[str, list[str]], code: str
) -> None:
    with refuses(code):
        retrieve(settings(causal, files, **more))


def test_a_group_without_a_direction_is_refused(causal: Path, tmp_path: Path) -> None:
    for pair in ("de-en", "fr-es"):
        (tmp_path / f"{pair}.tsv").write_text("a\tb\nc\td\n")
    data = [str(tmp_path / f"{pair}.tsv") for pair in ("de-en", "fr-es")]
    with refuses("retrieve.empty-group: fr"):
        retrieve(settings(causal, data, to=["en"], groups=["far=fr"]))


def test_candidates_of_another_adapter_against_a_double_loop(causal: Path, files: list[str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for seed, folder in enumerate((ours, theirs)):
        write_lora(folder, {f"model.layers.{n}.self_attn.o_proj": (32, 32, 4) for n in range(4)}, seed=seed)
    found = retrieve(settings(causal, files, adapter=str(ours), candidates_from=str(theirs), compare=True))
    base = load_base(str(causal), dtype="float32", device="cpu")
    vectors: dict[str, dict[str, torch.Tensor]] = {}
    for name, folders in (("ours", [ours]), ("theirs", [theirs]), ("none", [])):
        with acting(base, [open_adapter(folder) for folder in folders]):
            vectors[name] = {key: embed(base, rows, batch_size=5, max_length=64) for key, rows in TEXTS.items()}
    assert found.base
    for result, queries in ((found, "ours"), (found.base, "none")):
        for layer, (one, two) in itertools.product(range(5), itertools.permutations(TEXTS, 2)):
            neighbours = brute_force(vectors[queries][one][layer], vectors["theirs"][two][layer], 4)
            expected = sum(i == n for n, i in enumerate(neighbours)) / len(neighbours)
            assert result.layers[layer][f"{one}-{two}"] == expected
    assert found.document()["candidates_from"] == str(theirs)
    assert found.layers != retrieve(settings(causal, files, adapter=str(ours))).layers


def test_candidates_of_another_model(causal: Path, files: list[str], tmp_path: Path) -> None:
    plain = retrieve(settings(causal, files))
    assert retrieve(settings(causal, files, candidates_from=str(causal))).layers == plain.layers
    copied = tmp_path / "copy"
    shutil.copytree(causal, copied)
    assert retrieve(settings(causal, files, candidates_from=str(copied))).layers == plain.layers
    other = tiny_causal(tmp_path / "other", layers=2)
    with refuses("retrieve.candidates-shape: 2 layers"):
        retrieve(settings(causal, files, candidates_from=str(other)))


def size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def test_many_directions_become_a_heatmap_of_languages(tmp_path: Path) -> None:
    """With a row for each direction, the picture would be more than 2,000 dots high."""
    names = [f"{one}-{two}" for one, two in itertools.permutations([f"l{n}" for n in range(12)], 2)]
    assert len(names) > MOST_DIRECTIONS
    draw(Retrieval(hits=(dict.fromkeys(names, (1.0, 0.0)),) * 3, n=dict.fromkeys(names, 2)), tmp_path / "p.png")
    assert max(size(tmp_path / "p.png")) < 1000
