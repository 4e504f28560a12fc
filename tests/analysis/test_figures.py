"""The heatmaps: a PNG that is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.analysis import figures, inspect

from ..factories import contents, write_lora
from ..refusals import refuses

SHAPES = {f"model.layers.{n}.{m}": (8, 6, 2) for n in range(3) for m in ("q_proj", "v_proj")}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    write_lora(tmp_path / "task", SHAPES, alpha=4, seed=0)
    write_lora(tmp_path / "align", dict(list(SHAPES.items())[:3]), alpha=0, seed=1)
    return [tmp_path / "task", tmp_path / "align"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_png_is_written_with_cells_missing_or_zero(folders: list[Path], tmp_path: Path, count: int) -> None:
    path = tmp_path / "plot.png"
    inspect(folders, plot=path)  # an older picture is replaced
    inspect([*folders, folders[0]][:count], plot=path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["align", "plot.png", "task"]


def test_it_is_whole_or_not_there(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(tmp_path)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        inspect(folders, plot=tmp_path / "plot.png")
    assert contents(tmp_path) == before


def test_without_matplotlib_it_says_how_to_get_it_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    with refuses("plot.no-matplotlib"):
        inspect([tmp_path / "no adapter at all"], plot=tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.pdf", "plot.not-png"),
        ("none/plot.png", "output.no-parent"),
        ("task.png", "output.is-folder"),
    ],
)
def test_a_plot_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "task.png").mkdir()
    with refuses(message):
        inspect([tmp_path / "no adapter at all"], plot=tmp_path / name)


def test_more_adapters_than_a_picture_holds_are_refused(folders: list[Path], tmp_path: Path) -> None:
    with refuses("plot.too-many: 8.*9"):
        inspect([folders[0]] * 9, plot=tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_matplotlibs_settings_are_left_alone(folders: list[Path], tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    inspect(folders, plot=tmp_path / "plot.png")
    assert dict(mpl.rcParams) == before
