"""The page on a search: whole, self-contained, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adaptermix import SearchSettings, search
from adaptermix.weight_search.figures import coordinates
from adaptermix.weight_search.space import Candidate, Space, depth_groups
from tests.factories import peft_lora

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def searched(causal: Path, folder: Path, **more: object) -> Path:
    pytest.importorskip("matplotlib")
    one = peft_lora(causal, folder / "one", seed=1, r=4, lora_alpha=64)
    two = peft_lora(causal, folder / "t<w>o", seed=2, r=2, lora_alpha=32)
    for language in ("en", "de"):
        rows = [{"text": f"wake me {n}", "label": "x"} for n in range(12)]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "base": str(causal),
        "adapters": [str(one), str(two)],
        "task": "classify",
        "dev": [str(folder / "en.jsonl"), str(folder / "de.jsonl")],
        "out": str(folder / "out"),
        "max_new_tokens": 2,
        "dtype": "float32",
        "device": "cpu",
        "report": True,
    }
    search(SearchSettings(**(given | more)))  # type: ignore[arg-type]
    return folder / "out"


class Tags(HTMLParser):
    """Every tag that is opened must be closed, and nothing may be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"grid": [0.2, 0.9]}, {"weights", "languages", "cost"}),
        ({"trials": 4, "groups": ["2"]}, {"weights", "languages", "cost", "parameters"}),
        ({"trials": 4, "groups": ["3"], "space": "free"}, {"languages", "cost", "parameters"}),
    ],
)
def test_the_page_holds_its_pictures_and_every_trial(
    more: dict[str, object], names: set[str], causal: Path, tmp_path: Path
) -> None:
    out = searched(causal, tmp_path, **more)
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn - {"layers"} == names
    page = (out / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.links) == len(drawn)
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)
    trials = json.loads((out / "results.json").read_text())["trials"]
    assert page.count("<tr") == len(trials) + 2
    assert "task adapter alone" in page
    assert re.search(r"No weight is (clearly )?better than the task adapter alone", page)


def test_axes_are_named_by_place_and_adapter():
    places = depth_groups(range(10), 2)
    found = Space(count=2, overrides=places).candidate({"place0.0.w0": 0.9, "place1.0.w0": 0.4})
    assert coordinates(found, pairs=True) == {"0-4: weight 1": 0.9, "5-9: weight 1": 0.4}
    free = Candidate(weights=(1.0, 0.5), options={"density": 0.3})
    assert coordinates(free) == {"weight 1": 1.0, "weight 2": 0.5, "density": 0.3}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it(causal: Path, tmp_path: Path) -> None:
    out = searched(causal, tmp_path, grid=[0.2, 0.9])
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={tmp_path / 'page.png'}"]
    command += ["--window-size=1000,1600", (out / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert (tmp_path / "page.png").stat().st_size > 20_000
