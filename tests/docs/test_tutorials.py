"""README and tutorials run as they are written, on tiny random models and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.cli import main

from ..tiny import tiny_causal, tiny_encoder
from .pages import PAGES, ROOT, blocks, command_lines

# Random models learn nothing at the rate for real ones.
_MORE = {"train-task": ("--learning-rate", "0.02", "--epochs", "20")}
_KINDS = {"plain", "rslora", "dora", "bias"}
_WORDS = {"alarm": ("wake", "clock", "morning"), "weather": ("rain", "cold", "sun")}


def write_rows(folder: Path) -> None:
    """Write the files that the pages name."""
    rows = [(f"{word} {number}", label) for number in range(6) for label, words in _WORDS.items() for word in words]
    for part, start in (("train", 0), ("dev", 100), ("test", 200)):
        for language in ("en", "de", "tr"):
            lines = [f"{text} {language} {start},{label}" for text, label in rows]
            (folder / f"{part}.{language}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
            inferences = [
                f"{language} {start} {text}\tabout {label}\t{('entailment', 'neutral')[number % 2]}"
                for number, (text, label) in enumerate(rows)
            ]
            (folder / f"{language}.{part}.tsv").write_text("\n".join(inferences) + "\n")
    for name, start in (("de-en", 300), ("tr-en", 400), ("more.de-en", 500)):
        lines = [f"{text} {name[:2]} {start}\t{text} en {start}" for text, _ in rows]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    texts = [json.dumps({"text": f"Text: {text}\nLabel: {label}"}) for text, label in rows]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")


def call(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, *_MORE.get(words[0], ())])
    assert stopped.value.code in (0, None), words


def run_page(page: Path, kinds: tuple[str, ...] = ("console", "python")) -> None:
    """Run the command lines and the Python code of a page in order; names stay between code blocks."""
    names: dict[str, object] = {}
    for kind, text in blocks(page):
        if kind == "python" and kind in kinds:
            exec(compile(text, str(page), "exec"), names)  # noqa: S102 - the page's own code
        elif kind == "console" and kind in kinds:
            for words in command_lines(text):
                call(*words)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with the files that the pages name."""
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The code is that of users, who see these warnings of peft and transformers too.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["console", "python"])
def test_the_readme_runs(kind: str, folder: Path) -> None:
    tiny_encoder(folder / "MODEL")
    run_page(ROOT / "README.md", (kind,))


def test_a_new_language(folder: Path) -> None:
    tiny_encoder(folder / "MODEL")
    run_page(ROOT / "docs/tutorials/new_language.md")


def test_two_loras_and_their_publication(folder: Path) -> None:
    tiny_causal(folder / "MODEL")
    run_page(ROOT / "docs/tutorials/two_loras.md")
    run_page(ROOT / "docs/tutorials/publish.md")


def test_the_python_page(folder: Path) -> None:
    tiny_causal(folder / "MODEL")
    run_page(ROOT / "docs/python.md")
    assert (folder / "merged").is_dir()


def test_four_bits(folder: Path) -> None:
    tiny_causal(folder / "MODEL", hidden=64)
    call("train-task", "--base", "MODEL", "--task", "classify", "--train", "train.en.csv", "--out", "task")
    run_page(ROOT / "docs/tutorials/four_bits.md")


def test_the_comparison_with_peft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT merges a plain LoRA right, and the other three wrong, as the page says; ours are right."""
    tiny_causal(folder / "MODEL")
    run_page(ROOT / "docs/comparison.md")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 3]
    differences = {name: (float(peft), float(ours)) for name, peft, ours in rows if name in _KINDS}
    assert set(differences) == _KINDS
    assert {name for name, (peft, _) in differences.items() if peft > 1e-2} == _KINDS - {"plain"}
    assert max(ours for _, ours in differences.values()) < 1e-5


def test_all_tutorials_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "tutorials" and page.name not in text] == []
