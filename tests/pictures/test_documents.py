"""Pictures of JSON documents: which values they show, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import adaptermix
from adaptermix.errors import OutputError
from adaptermix.pictures import Picture, picture_of, pictures_of
from adaptermix.pictures.charts import Point, bars, curve, heatmap
from adaptermix.pictures.documents import loss_picture
from adaptermix.pictures.svg import SERIES
from tests.factories import write_lora

EVIL = "<script>alert(1)</script>&\x1b[31m"
SVG = "{http://www.w3.org/2000/svg}"


def score(value: float) -> dict[str, float | int]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}


def searched(weights: list[list[float]]) -> dict[str, Any]:
    return {
        "best": {"weights": weights[0], **score(0.7)},
        "trials": [{"weights": each, **score(0.7 - 0.1 * index)} for index, each in enumerate(weights)],
        "task_alone": {**score(0.5), "scores": {"de": score(0.5)}},
        "scores": {"de": score(0.7)},
        "metric": "f1",
    }


def elements(picture: Picture, tag: str) -> Iterator[ElementTree.Element]:
    return ElementTree.fromstring(picture.svg).iter(f"{SVG}{tag}")  # noqa: S314  (our own picture)


def texts(picture: Picture) -> list[str]:
    return [element.text or "" for element in elements(picture, "text")]


def labels(picture: Picture) -> list[str]:
    return [element.text or "" for element in elements(picture, "title")]


def test_bars_are_as_long_as_their_scores() -> None:
    points = {"base": {"de": Point(value=0.25), "tr": Point(value=1.0)}, "merged": {"de": Point(value=0.5)}}
    picture = Picture(title="x", charts=[bars("scores", points)])
    widths = {label: float(box.get("width", "")) for box in elements(picture, "rect") for label in [*box.itertext()]}
    assert widths["base, de: 0.250"] / widths["base, tr: 1.000"] == pytest.approx(0.25, abs=0.01)
    assert widths["merged, de: 0.500"] / widths["base, tr: 1.000"] == pytest.approx(0.5, abs=0.01)
    assert "merged, tr" not in picture.svg


def test_intervals_reach_from_their_low_end_to_their_high_end() -> None:
    chart = bars("scores", {"a": {"de": Point(value=0.5, low=0.25, high=1.0)}})
    bar = next(box for box in elements(Picture(title="x", charts=[chart]), "rect") if [*box.itertext()])
    (interval,) = re.findall(r'class="am-line" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', chart.content)
    left, width = float(bar.get("x", "")), float(bar.get("width", ""))
    assert [float(end) - left for end in interval] == pytest.approx([width / 2, width * 2], abs=0.2)


def test_negative_scores_start_at_zero() -> None:
    chart = bars("difference", {"a": {"de": Point(value=-0.5), "tr": Point(value=0.5)}})
    down, up = (box for box in elements(Picture(title="x", charts=[chart]), "rect") if [*box.itertext()])
    assert float(down.get("x", "")) + float(down.get("width", "")) == pytest.approx(float(up.get("x", "")), abs=0.2)


@pytest.mark.parametrize(
    ("weights", "axis"),
    [
        ([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], "weight of adapter 2"),
        ([[1.0, 0.1], [1.0, 0.5]], "weight of adapter 2"),
        ([[0.2, 1.0, 0.0], [0.4, 1.0, 0.0]], "weight of adapter 1"),
    ],
)
def test_a_search_of_one_free_weight_has_a_curve(weights: list[list[float]], axis: str) -> None:
    picture = picture_of(searched(weights))
    assert axis in texts(picture)
    assert len(list(elements(picture, "circle"))) == len(weights)
    (chosen,) = [circle for circle in elements(picture, "circle") if circle.get("fill") == SERIES[2]]
    assert "0.700 (0.600 to 0.800)" in "".join(chosen.itertext())
    assert {"task adapter alone", "chosen", "de"} <= {*texts(picture)}


def test_a_search_of_two_free_weights_has_bars_only() -> None:
    titles = [picture.title for picture in pictures_of(searched([[1.0, 0.1], [0.5, 0.3]]))]
    assert titles == ["f1 per language"]


def test_points_of_a_curve_are_in_the_order_of_the_axis() -> None:
    chart = curve("loss", [(3.0, Point(value=1.0)), (1.0, Point(value=2.0)), (2.0, Point(value=3.0))], across="step")
    (points,) = re.findall(r'polyline points="([^"]+)"', chart.content)
    across, up = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert list(across) == sorted(across)
    assert up[1] < up[0] < up[2]  # 3, 2, 1: a large value is near the top


def test_alignment_is_the_mean_over_the_directions_of_a_language() -> None:
    layers = {"0": {"directions": {"de-en": 0.2, "en-de": 0.4, "tr-en": 0.9}}, "1": {"directions": {"de-en": 1.0}}}
    picture = picture_of({"layers": layers, "headline": 0.5})
    assert {"de, 0: 0.300", "tr, 0: 0.900", "en, 0: 0.500", "de, 1: 1.000"} <= {*labels(picture)}


def test_cells_without_a_value_are_empty() -> None:
    chart = heatmap("x", {"0": {"q": 0.0, "v": None}, "1": {"q": 1.0}}, across="layers")
    assert re.findall(r"<title>([^<]+)", chart.content) == [
        "0, q: 0.000",
        "0, v: no value",
        "1, q: 1.000",
        "1, v: no value",
    ]
    assert chart.content.count('class="am-empty"') == 2
    assert 'fill="#440154"' in chart.content
    assert 'fill="#fde725"' in chart.content


@pytest.mark.parametrize("count", [2, 4])
def test_an_inspection_shows_the_numbers_of_its_document(count: int, tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.self_attn.{kind}_proj": (6, 5, 2) for layer in range(3) for kind in "qv"}
    for seed in range(count):
        write_lora(tmp_path / f"a{seed}", modules, seed=seed)
    result = adaptermix.inspect([tmp_path / f"a{seed}" for seed in range(count)])
    shown = labels(result.plot())
    pair = next(pair for pair in result.pairs if (pair.a.name, pair.b.name) == ("a0", "a1"))
    if count == 2:
        cosine = pair.modules["model.layers.2.self_attn.v_proj"].cosine
        assert f"2, v_proj: {cosine:.3f}" in shown
    else:
        assert f"a0, a1: {pair.cosine(modules):.3f}" in shown


def test_the_loss_of_many_steps_is_averaged() -> None:
    picture = loss_picture([{"step": step, "loss": float(step % 2)} for step in range(1, 601)])
    assert picture is not None
    points = re.findall(r'polyline points="([^"]+)"', picture.svg)[0].split()
    assert len(points) == 150
    assert {point.split(",")[1] for point in points} == {points[0].split(",")[1]}  # each mean is 0.5
    assert loss_picture([{"step": 1, "loss": 2.0}]) is None
    assert loss_picture([{"step": 2, "loss": 2.0}, {"step": 1, "loss": 2.0}]) is None


DAMAGED = [
    {},
    {"task": EVIL, "metric": EVIL, "scores": {EVIL: score(0.5), "de": None, "x": {"value": "high"}}},
    {"task": "t", "metric": "m", "scores": {"de": {"value": 10**400}, "tr": {"value": 0.5, "low": float("-inf")}}},
    {"task": 1, "metric": [], "scores": [1, 2]},
    {"task": "t", "metric": "m", "scores": {"de": {"value": float("nan"), "low": 0, "high": 1}}},
    {"best": 0, "trials": [{"weights": ["a"]}, 3, {"weights": [1], "value": True}], "task_alone": None},
    {"layers": {"0": {"directions": {EVIL: 0.5, "a-b": None}}, "1": 3}, "headline": 0},
    {"adapters": {EVIL: {}}, "pairs": {EVIL: {"a": EVIL, "b": 3, "modules": {EVIL: {"cosine": 0.5}, "x": None}}}},
]


@pytest.mark.parametrize("document", DAMAGED)
def test_any_document_gives_a_picture_that_is_safe_or_none(document: dict[str, Any]) -> None:
    picture = picture_of(document)
    assert list(elements(picture, "style"))  # it can be parsed
    assert "<script" not in picture.svg
    assert "\x1b" not in picture.svg


def test_a_picture_is_shown_by_notebooks_and_saved_as_svg(tmp_path: Path) -> None:
    picture = picture_of({"task": "nli", "metric": "accuracy", "scores": {"de": score(0.5)}})
    assert picture._repr_svg_() == picture._repr_html_() == picture.svg
    picture.save(tmp_path / "scores.svg")
    assert (tmp_path / "scores.svg").read_text() == picture.svg
    assert "prefers-color-scheme:dark" in picture.svg
    for name, code in (("scores.png", "plot.not-svg"), ("none/x.svg", "output.no-parent")):
        with pytest.raises(OutputError) as caught:
            picture.save(tmp_path / name)
        assert caught.value.code == code
