"""`adaptermix inspect` and `adaptermix spectrum` as a person or a script meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipes import run_recipe

from ..factories import contents, write_lora
from .models import decoder, write_model

MODULES = {f"model.layers.{n}.self_attn.q_proj": (12, 8, 2) for n in range(2)}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, streams.out, streams.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with adapters `task`, `align` and `far`, and checkpoints `base` and `tuned`."""
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "task", MODULES, alpha=4, seed=0)
    write_lora(tmp_path / "align", MODULES, alpha=4, seed=1)
    write_lora(tmp_path / "far", {"model.layers.0.x": (3, 2, 1)}, alpha=4)
    write_model(tmp_path / "base", decoder())
    write_model(tmp_path / "tuned", decoder(seed=1))
    return tmp_path


@pytest.mark.usefixtures("folder")
class TestInspect:
    def test_the_documents_contract(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "inspect", "task", "align", "--json", "--quiet")
        document = json.loads(out)
        assert (code, err) == (0, "")
        assert set(document) == {"adapters", "pairs"}
        assert list(document["adapters"]) == ["task", "align"]
        for adapter in document["adapters"].values():
            assert {"rank", "norm", "layers"} <= set(adapter)
            assert set(adapter["layers"]) == {"0", "1"}
        assert {"cosine", "sign_conflict", "overlap"} <= set(document["pairs"]["task|align"])

    def test_text_is_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "inspect", "task", "align", "far")
        assert (code, out) == (0, "")
        assert err.splitlines()[0].split() == ["adapter", "modules", "rank", "numerical", "rank", "norm"]
        for piece in ("task|align", "q_proj", "note: 'task' and 'far' have no module in common", "by chance"):
            assert piece in err
        for arguments in (["far"], ["task", "far"], ["task", "align", "task", "align"]):
            code, out, err = run(capsys, "inspect", *arguments)
            assert (code, out) == (0, "")
        assert "--json or --plot" in err

    def test_a_plot(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(capsys, "inspect", "task", "align", "--plot", "new.png")
        assert (code, "wrote new.png" in err) == (0, True)
        assert Path("new.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("folder")
class TestSpectrum:
    def test_the_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "spectrum", "base", "tuned", "--json", "--quiet")
        document = json.loads(out)
        assert (code, err) == (0, "")
        assert {"a", "b", "modules", "layers", "kinds"} <= set(document)
        for module in document["modules"].values():
            assert {
                "norm_a", "norm_b", "ratio", "distance", "relative_distance", "difference_norm", "stable_rank",
            } <= set(module)  # fmt: skip

    def test_the_table_has_the_form_of_the_appendix(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "spectrum", "base", "tuned", "--modules", "q_proj", "--json")
        q = json.loads(out)["modules"]["model.layers.0.self_attn.q_proj"]
        lines = err.splitlines()
        assert code == 0
        assert lines[1].split() == ["layer", "q_proj"]
        cell = f"{q['norm_a']:.4g} -> {q['norm_b']:.4g} ({q['distance']:.3g})"
        assert lines[2].split() == ["0", *cell.split()]
        assert "ratio B/A" in err

    def test_adapters_and_tables(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        code, _, err = run(
            capsys, "spectrum", "base", "task", "--layers", "0", "1", "--csv", "t.csv", "--device", "cpu"
        )
        assert (code, "wrote t.csv" in err) == (0, True)
        assert len((folder / "t.csv").read_text().splitlines()) == 3
        assert run(capsys, "spectrum", "align", "task")[0] == 0

    def test_several_models_make_one_table(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        code, out, err = run(capsys, "spectrum", "base", "tuned", "task", "--table", "t.md", "--json")
        document = json.loads(out)
        assert (code, document["table"]["models"]) == (0, ["base", "tuned", "task"])
        assert [other["b"] for other in document["others"]] == ["task"]
        assert all(line in err for line in ("wrote t.md", "norm / base's, mean over layers"))
        first = (folder / "t.md").read_text()
        assert first.startswith("| layer | model | K (k_proj) norm | K (k_proj) d | Q (q_proj) norm |")
        assert run(capsys, "spectrum", "base", "tuned", "task", "--table", "t.md")[0] == 0
        (folder / "t.md").write_text("my notes")
        assert run(capsys, "spectrum", "base", "tuned", "task", "--table", "t.md")[0] == 1
        assert (folder / "t.md").read_text() == "my notes"


REFUSED = [
    ("inspect", 2, "ADAPTER..."),
    ("inspect none", 1, "is not a folder"),
    ("inspect base", 1, "must hold adapter_config.json"),
    ("inspect task --plot x.jpg", 1, "must be a PNG file"),
    ("inspect task --plot none/x.png", 1, "must lie in a folder"),
    ("inspect task --wieghts 1", 2, "No such option"),
    ("spectrum base", 2, "MODEL..."),
    ("spectrum base tuned more", 1, "model 'more' must be a model folder"),
    ("spectrum task base", 1, "Put base first"),
    ("spectrum base far", 1, "It was trained on another base model"),
    ("spectrum base tuned --layers 9", 1, "--layers '9' must match a layer"),
    ("spectrum base tuned --modules q_prj", 1, "Did you mean 'q_proj'?"),
    ("spectrum base tuned --exclude *", 1, "share no such matrix"),
    ("spectrum base tuned --table t.txt", 1, "--table must be a file of Markdown or CSV"),
    ("spectrum base tuned --csv none/t.csv", 1, "--csv must lie in a folder"),
    ("spectrum base task --csv task/adapter_model.safetensors", 1, "must not be part of an input, and task/"),
    ("spectrum base tuned --csv base/model.safetensors", 1, "must not be part of an input, and base/"),
    ("spectrum base tuned --device tpu", 2, "--device: auto, cpu, cuda or cuda:N is needed, got 'tpu'"),
    ("spectrum base tuned --modules --csv t.csv", 2, "needs at least one value"),
]


@pytest.mark.parametrize(("line", "expected", "words"), REFUSED, ids=[line for line, _, _ in REFUSED])
def test_bad_input_is_one_line_with_an_exit_code_and_leaves_no_trace(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, expected: int, words: str
) -> None:
    before = contents(folder)
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (expected, "")
    if line != "inspect":  # without arguments the help is shown
        assert err.count("\n") == 1
        assert err.startswith("error: ")
    assert words in err
    code, out, _ = run(capsys, *line.split(), "--json")
    assert code == expected
    assert {"kind", "code", "message"} <= set(json.loads(out)["error"])
    assert contents(folder) == before


def test_both_are_steps_of_recipes(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "version: 1\nsteps:\n  - inspect: {adapters: [task, align]}\n"
        "  - spectrum: {model_a: base, model_b: task, layers: ['0']}\n"
    )
    first, second = run_recipe(folder / "recipe.yaml")
    assert first["command"] == "inspect"
    assert "task|align" in first["pairs"]
    assert list(second["layers"]) == ["0"]
