"""`adaptermix report`: one page on outputs and documents, safe and readable everywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import adaptermix
from adaptermix.cli import main
from adaptermix.commands.recipe_file import Recipe, Step
from adaptermix.commands.recipes import run_recipe
from adaptermix.commands.run_files import write_run
from adaptermix.errors import ConfigError, OutputError
from adaptermix.options import EvaluateSettings
from tests.factories import write_lora

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATHS = {f"model.layers.{layer}.self_attn.{kind}_proj": (6, 5, 2) for layer in range(3) for kind in "qv"}
EVIL = "<img src=x onerror=alert(1)>&\"'"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """The tags, links and text of a page; every tag that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def score(value: float) -> dict[str, float | int]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 100}


def evaluated(path: Path, de: float, tr: float, **more: object) -> None:
    document = {
        "task": "nli",
        "metric": "accuracy",
        "scores": {"de": score(de), "tr": score(tr)},
        "overall": score((de + tr) / 2),
        "split": "test",
    }
    path.write_text(json.dumps(document | more))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a merge of two adapters, one of which has a hostile name, and with scores of two systems."""
    folder = tmp_path / "run"
    folder.mkdir()
    for seed, name in enumerate(("task", EVIL.replace("/", ""))):
        write_lora(tmp_path / name, PATHS, seed=seed)
    adaptermix.merge([tmp_path / "task", tmp_path / EVIL.replace("/", "")], weights=[0.9], out=folder / "merged")
    evaluated(folder / "base.json", 0.4, 0.3)
    evaluated(folder / "scored.json", 0.8, 0.7)
    return folder


def test_a_page_shows_adapters_weights_command_base_date_and_scores(run: Path, tmp_path: Path) -> None:
    result = adaptermix.report([run], out=tmp_path / "page.html")
    assert list(result.entries) == ["base", "merged", "scored"]
    assert result.document()["scores"] == {
        "nli, accuracy on test rows": {"base": {"de": 0.4, "tr": 0.3}, "scored": {"de": 0.8, "tr": 0.7}}
    }
    text = Page((tmp_path / "page.html").read_text()).text
    for expected in ("task", EVIL, "0.9", "0.1", "org/base", "0.800 (0.750 to 0.850)", "0.750 (0.700 to 0.800)"):
        assert expected in text
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", text)
    assert "share of sign conflicts" in text


def test_a_page_needs_no_network_and_no_script_and_fits_phones_and_dark_screens(run: Path, tmp_path: Path) -> None:
    adaptermix.report([run], out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.links == []
    assert {"script", "iframe", "link", "object", "img"} & {*page.tags} == set()
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", text)
    assert {*re.findall(r"\w+://[^\"' <]+", text)} == {"http://www.w3.org/2000/svg"}
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    widths = [int(width) for width in re.findall(r'<svg [^>]*?width="(\d+)"', text)]
    assert widths
    assert max(widths) <= 360


def test_the_command_of_an_output_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("task", "other one")):
        write_lora(tmp_path / name, PATHS, seed=seed)
    command = ["merge", "task", "other one", "--weights", "0.9", "--out", "merged"]
    for arguments in (command, ["report", "merged"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    first = Page((tmp_path / "report.html").read_text()).text
    assert "adaptermix merge task 'other one' --weights 0.9" in first
    assert first.count("--out merged") == 1


def test_several_folders_are_side_by_side_under_names_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        evaluated(tmp_path / name / "test.json", 0.5, 0.6)
    for name in ("x", "y"):
        (tmp_path / name / "same").mkdir(parents=True)
        evaluated(tmp_path / name / "same" / "test.json", 0.5, 0.6)
    result = adaptermix.report([tmp_path / "one", tmp_path / "two"], out=tmp_path / "page.html")
    assert list(result.entries) == ["one/test", "two/test"]
    result = adaptermix.report([tmp_path / "x" / "same", tmp_path / "y" / "same"], out=tmp_path / "same.html")
    assert list(result.scores["nli, accuracy on test rows"]) == ["same/test", "same/test#2"]


def test_systems_of_another_metric_or_split_have_another_table(tmp_path: Path) -> None:
    evaluated(tmp_path / "a.json", 0.5, 0.6)
    evaluated(tmp_path / "b.json", 0.5, 0.6, metric="macro_f1")
    evaluated(tmp_path / "c.json", 0.5, 0.6, split="dev", against={"name": "task", "scores": {"de": score(0.1)}})
    result = adaptermix.report([tmp_path / f"{name}.json" for name in "abc"], out=tmp_path / "page.html")
    assert {measure: [*systems] for measure, systems in result.scores.items()} == {
        "nli, accuracy on test rows": ["a"],
        "nli, macro_f1 on test rows": ["b"],
        "nli, accuracy on dev rows": ["task", "c"],
    }


def test_a_page_is_replaced_only_on_request_and_other_files_never(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    adaptermix.report([run], out=out)
    with pytest.raises(OutputError) as caught:
        adaptermix.report([run], out=out)
    assert caught.value.code == "output.file-exists"
    adaptermix.report([run], out=out, overwrite=True)
    out.write_text("<p>mine</p>")
    with pytest.raises(OutputError) as caught:
        adaptermix.report([run], out=out, overwrite=True)
    assert caught.value.code == "replace.other-content"
    assert out.read_text() == "<p>mine</p>"


def test_folders_without_an_output_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"task": ')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, code in (
        ("none", "report.no-folder"),
        ("empty", "report.no-output"),
        ("broken.json", "report.no-output"),
        ("deep.json", "report.no-output"),
    ):
        with pytest.raises(ConfigError) as caught:
            adaptermix.report([tmp_path / name], out=tmp_path / "page.html")
        assert caught.value.code == code
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_manifest_gives_a_short_entry(tmp_path: Path) -> None:
    for number, text in enumerate(
        ("[1]", '{"kind": 3, "base": [], "inputs": {}, "data": [3], "request": {"command": []}}')
    ):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "adaptermix.json").write_text(text)
        (folder / "history.jsonl").write_text('{"step": "x"}\n3\n')
        adaptermix.report([folder], out=tmp_path / f"{number}.html")
        Page((tmp_path / f"{number}.html").read_text())


RECIPE = """
version: 1
variables: {out: RUN}
steps:
  - merge: {adapters: [TASK, ALIGN], weights: [0.9], out: "${out}/merged"}
  - name: interference
    inspect: {adapters: [TASK, ALIGN]}
"""


def test_a_recipe_ends_with_a_page_on_all_steps(tmp_path: Path) -> None:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, PATHS, seed=seed)
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    text = RECIPE.replace("RUN", str(out)).replace("TASK", str(tmp_path / "task"))
    recipe.write_text(text.replace("ALIGN", str(tmp_path / "align")))
    run_recipe(recipe)
    page = (out / "run.html").read_text()
    assert "cosine: task|align" in Page(page).text
    assert re.findall(r"<h2>([^<]+)", page) == ["merged", "interference"]
    run_recipe(recipe, resume=True)
    assert "cosine: task|align" in (out / "run.html").read_text()
    result = adaptermix.report([out], out=tmp_path / "again.html")
    assert list(result.entries) == ["merged", "interference"]
    (out / "run.json").write_text("mine")
    with pytest.raises(OutputError) as caught:
        run_recipe(recipe, resume=True)
    assert caught.value.code == "recipe.run-file"


def test_a_step_without_a_name_is_named_after_its_adapters(tmp_path: Path) -> None:
    settings = EvaluateSettings(base="b", task="nli", data=["de.tsv"], adapter="runs/merged")
    steps = [Step(command="evaluate", settings=settings, loop={"layer": 8})]
    document = {"task": "nli", "metric": "accuracy", "scores": {"de": score(0.5)}}
    write_run(Recipe(path=Path("r.yaml"), steps=steps), [document], tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["steps"][0]["step"] == "evaluate, layer 8, merged"
    text = Page((tmp_path / "run.html").read_text()).text
    for expected in ("evaluate, layer 8, merged", "runs/merged", "0.500 (0.450 to 0.550)"):
        assert expected in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_finds_no_overflow(width: int, run: Path, tmp_path: Path) -> None:
    """The frame has the width of a screen; the page inside must not be wider, with tables that scroll."""
    adaptermix.report([run], out=tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:600px;border:0"></iframe><p id="w"></p>'
        "<script>f.onload = () => { const d = f.contentDocument.documentElement;"
        "w.textContent = 'widths ' + d.scrollWidth + ' ' + d.clientWidth; }</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, timeout=600, text=True).stdout
    match = re.search(r"widths (\d+) (\d+)", shown)
    assert match
    assert int(match[1]) <= int(match[2]) <= width
