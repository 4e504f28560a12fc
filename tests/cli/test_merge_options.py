"""`adaptermix merge`: places, forms and limits as options, and the same in recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipes import load_recipe, run_recipe
from tests.factories import adapter_deltas, write_lora

MODULES = {f"model.layers.{n}.{kind}_proj": (8, 6, 2) for n in range(3) for kind in "qv"}
NAMES = ("task", "align")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, streams.out, streams.err


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    for seed, name in enumerate(NAMES):
        write_lora(tmp_path / name, MODULES, seed=seed)
    return [str(tmp_path / name) for name in NAMES]


def merged(capsys: pytest.CaptureFixture[str], pair: list[str], out: Path, *more: object) -> dict[str, Any]:
    code, text, err = run(capsys, "merge", *pair, "--weights", "0.9", "--out", out, "--json", *more)
    assert code == 0, err
    document: dict[str, Any] = json.loads(text)
    return document


def weights(document: dict[str, Any]) -> dict[str, list[float]]:
    return {module: found["weights"] for module, found in document["modules"].items()}


EXPECTED = {
    f"model.layers.{n}.{kind}_proj": [0.25, 0.75]
    if kind == "q" and n == 2
    else [0.5 * n, 1 - 0.5 * n]
    if kind == "v"
    else [0.9, 0.1]
    for n in range(3)
    for kind in "qv"
}


def test_places_are_set_as_key_at_place(capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path) -> None:
    document = merged(
        capsys, pair, tmp_path / "out", "--set", "weights@layers:2,*q_proj=0.25,0.75", "curve@*v_proj=[0, 1]"
    )
    assert weights(document) == EXPECTED
    parts = [adapter_deltas(Path(path)) for path in pair]
    for module, delta in adapter_deltas(tmp_path / "out").items():
        expected = sum(w * part[module] for w, part in zip(EXPECTED[module], parts, strict=True))
        assert (delta - expected).norm() <= 1e-6 * expected.norm()


def test_places_in_a_recipe_are_those_of_the_command_line(pair: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
version: 1
steps:
  - merge:
      adapters: [{pair[0]}, {pair[1]}]
      weights: [0.9]
      out: {tmp_path / "out"}
      places:
        - {{modules: "*q_proj", layers: "2", weights: "0.25,0.75"}}
        - {{modules: "*v_proj", curve: [0, 1]}}
"""
    )
    (step,) = load_recipe(recipe)
    assert step.command == "merge"
    (document,) = run_recipe(recipe)
    assert weights(json.loads(json.dumps(document))) == EXPECTED


def test_the_weights_of_each_place_are_shown(
    capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path
) -> None:
    arguments = ("merge", *pair, "--weights", "0.9", "--out", tmp_path / "out", "--dry-run")
    code, out, err = run(capsys, *arguments, "--set", "weights@*q_proj=0.25")
    assert (code, out) == (0, "")
    assert "0.25 / 0.75" in err
    assert "0.9 / 0.1" in err
    assert err.startswith("would merge 2 adapters")
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, *arguments)
    assert (code, " / " in err) == (0, False)


def test_a_dry_run_tells_what_fill_does(capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path) -> None:
    write_lora(tmp_path / "align", {m: s for m, s in MODULES.items() if "q_proj" in m}, seed=1)
    for fill, alone in (("weight", 0.9), ("one", 1.0)):
        document = merged(capsys, pair, tmp_path / "out", "--dry-run", "--fill", fill)
        assert weights(document) == {m: [0.9, 0.1] if "q_proj" in m else [alone, 0.0] for m in MODULES}
        assert document["plan"]["fill"] == fill
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "ranks"), [(["--rank", "3", "--max-residual", "1"], {3}), (["--rank", "auto", "--keep", "1"], {4})]
)
def test_ranks_are_numbers_or_auto(
    capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path, options: list[str], ranks: set[int]
) -> None:
    document = merged(capsys, pair, tmp_path / "out", *options)
    assert {found["rank"] for found in document["modules"].values()} == ranks


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--set", "weights@*k_proj=0.5"], 1, "no module matches modules '*k_proj'"),
        (["--set", "weights@*q_proj=1,2,3"], 2, "got 3 for 2 adapters"),
        (["--set", "gain@*q_proj=2"], 2, "unknown option of method 'exact' 'gain'"),
        (["--set", "weights@layers:x=1"], 2, "FIRST-LAST"),
        (["--rank", "1"], 1, "truncation may lose at most 10%"),
        (["--form", "concat", "--rank", "4"], 1, "--rank goes with --form lowrank"),
        (["--keep", "0.5"], 1, "--keep goes with --rank auto"),
        (["--rank", "many"], 2, "--rank"),
        (["--keep", "2"], 2, "--keep"),
        (["--max-residual", "-1"], 2, "--max-residual"),
        (["--fill", "half"], 2, "--fill"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], pair: list[str], tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    got, out, err = run(capsys, "merge", *pair, "--weights", "0.9", "--out", tmp_path / "out", *options)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
