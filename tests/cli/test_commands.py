"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix.cli import COMMANDS, main
from tests.factories import write_lora
from tests.training.data import write_pairs, write_slots

PATH = "model.layers.0.self_attn.q_proj"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, streams.out, streams.err


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of one base."""
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (8, 6, 2)}, alpha=4, seed=seed)
    return tmp_path / "task", tmp_path / "align"


class TestHelp:
    def test_every_command_is_listed_and_has_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(capsys, "--help")
        assert code == 0
        for command in COMMANDS:
            assert f"  {command} " in out
            code, own, _ = run(capsys, command, "--help")
            assert code == 0
            assert "--json" in own

    def test_help_and_import_load_nothing_heavy(self) -> None:
        heavy = {"torch", "transformers", "peft", "optuna", "mergekit", "pydantic", "numpy"}
        for code in (
            "import adaptermix",
            "from adaptermix.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        ):
            script = f"{code}\nimport sys; print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            assert done.stderr.strip() == "[]"

    def test_near_misses_are_suggested(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(capsys, "serch")
        assert (code, "Did you mean 'search'?" in err) == (2, True)
        code, _, err = run(capsys, "merge", "a", "--wieghts", "1", "--out", "x")
        assert (code, "--weights" in err) == (2, True)


class TestMerge:
    def test_json_is_alone_on_stdout_and_text_on_stderr(
        self, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(capsys, "merge", *pair, "--weights", "0.9", "--out", tmp_path / "m", "--json")
        document = json.loads(out)
        assert code == 0
        assert document["weights"] == [0.9, 0.1]
        assert {"out", "method", "weights", "residual", "modules"} <= set(document)
        assert set(document["modules"][PATH]) == {
            "rank",
            "norm",
            "residual",
            "sign_conflict",
            "weights",
            "excess",
            "rounding",
        }
        assert "merged 2 adapters" in err
        assert (tmp_path / "m" / "adaptermix.json").exists()

    def test_quiet_says_nothing(
        self, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(capsys, "merge", *pair, "--weights=-0.5,1", "--out", tmp_path / "m", "--quiet") == (0, "", "")

    def test_a_dry_run_writes_nothing(
        self, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = run(capsys, "merge", *pair, "--weights", "-1,1", "--out", tmp_path / "m", "--dry-run")
        assert (code, "would merge" in err) == (0, True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["align", "task"]


def _nan_adapter(folder: Path) -> Path:
    write_lora(folder / "nan", {PATH: (8, 6, 2)}, alpha=4, seed=3)
    from safetensors.torch import load_file, save_file

    path = folder / "nan" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    return folder / "nan"


def _cases(folder: Path) -> dict[str, tuple[list[Any], str]]:
    """Bad input by name: arguments, and a piece of the message."""
    task, align = folder / "task", folder / "align"
    write_lora(folder / "other", {PATH: (8, 6, 2)}, alpha=4, seed=4, base="org/other")
    (folder / "empty.de-en.tsv").touch()
    (folder / "one.de-en.tsv").write_text("only one column\n")
    out = ["--out", folder / "new"]
    train = ["train-align", "--base", folder / "no-model", *out, "--pairs"]
    slots = ["train-task", "--base", folder / "no-model", "--train", folder / "train.en.jsonl", *out]
    return {
        "missing adapter": (["merge", task, folder / "none", "--weights", "0.9", *out], "is not a folder"),
        "wrong weight count": (["merge", task, align, "--weights", "1,2,3", *out], "got 3 for 2 adapters"),
        "weights that are no numbers": (["merge", task, align, "--weights", "a,b", *out], "separated by commas"),
        "other bases": (["merge", task, folder / "other", "--weights", "0.9", *out], "'org/base' and 'org/other'"),
        "NaN": (["merge", task, _nan_adapter(folder), "--weights", "0.9", *out], "NaN or infinity"),
        "existing output": (["merge", task, align, "--weights", "0.9", "--out", align], "exists. Pass --overwrite"),
        "unknown method": (["merge", task, align, "--weights", "1", "--method", "exat", *out], "Did you mean 'exact'?"),
        "bad rank": (["merge", task, align, "--weights", "1", "--rank", "0", *out], "--rank"),
        "unknown option of a method": (["merge", task, align, "--weights", "1", "--set", "a=1", *out], "'a'"),
        "missing pairs": ([*train, folder / "none.tsv"], "must exist"),
        "empty pairs": ([*train, folder / "empty.de-en.tsv"], "is empty"),
        "one column": ([*train, folder / "one.de-en.tsv"], "one.de-en.tsv:1: a pair must have two columns"),
        "missing model": ([*train, folder / "de-en.tsv"], "must be a model folder or a Hub id"),
        "no such option": ([*train, folder / "de-en.tsv", "--temprature", "1"], "--temperature"),
        "temperature of zero": ([*train, folder / "de-en.tsv", "--temperature", "0"], "greater than 0"),
        "unknown task": ([*slots, "--task", "slot"], "--task must be one of choice, classify, ner-json, "),
        "unknown template": ([*slots, "--task", "slots", "--template", "x"], "--template must be one of plain"),
        "missing option": (["merge", task, align, *out], "--weights"),
        "bad grid": (
            ["search", task, align, "--base", "x", "--task", "slots", "--dev", folder / "train.en.jsonl",
             "--grid", "0.5,0.5", *out],
            "each weight once",
        ),
        "one adapter to search": (
            ["search", task, "--base", "x", "--task", "slots", "--dev", folder / "train.en.jsonl", "--grid", "1", *out],
            "--space free",
        ),
        "bad repository": (["push", task, "no slash", "--dry-run"], "owner/name"),
        "missing recipe": (["run", folder / "none.yaml"], "must exist"),
        "negative seed": ([*train, folder / "de-en.tsv", "--seed", "-1"], "--seed"),
    }  # fmt: skip


CASES = [
    "missing adapter", "wrong weight count", "weights that are no numbers", "other bases", "NaN", "existing output",
    "unknown method", "bad rank", "unknown option of a method", "missing pairs", "empty pairs", "one column",
    "missing model", "no such option", "temperature of zero", "unknown task", "unknown template", "missing option",
    "bad grid", "one adapter to search", "bad repository", "missing recipe", "negative seed",
]  # fmt: skip


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_sentence_and_an_exit_code_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path)
    write_slots(tmp_path)
    cases = _cases(tmp_path)
    assert sorted(cases) == sorted(CASES)
    arguments, message = cases[name]
    before = listing(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code in (1, 2)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    code_again, out, err = run(capsys, *arguments, "--json")
    failure = json.loads(out)["error"]
    assert (code_again, err) == (code, "")
    assert {"kind", "code", "message"} <= set(failure) <= {"kind", "code", "codes", "message"}
    assert message in failure["message"]
    assert listing(tmp_path) == before


class TestWholeLine:
    def test_from_training_to_push(self, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Every command once on a tiny model, each reading what the one before wrote."""
        pairs, slots = write_pairs(tmp_path), write_slots(tmp_path)
        place = ["--dtype", "float32", "--device", "cpu", "--json"]
        model = ["--base", causal]
        few = ["--steps", "2", "--batch-size", "4"]

        def done(*arguments: object) -> dict[str, Any]:
            code, out, err = run(capsys, *arguments)
            assert code == 0, err
            document: dict[str, Any] = json.loads(out)
            return document

        task, align, merged = (tmp_path / name for name in ("task", "align", "merged"))
        # several values after one option
        trained = done("train-align", *model, "--pairs", *pairs, "--out", align, *few, *place)
        assert {"out", "steps", "parameters", "loss"} <= set(trained)
        done("train-task", *model, "--task", "slots", "--train", slots, "--dev", slots, "--out", task, *few, *place)
        found = done(
            "search", task, align, *model, "--task", "slots", "--dev", slots, "--grid", "0.5,0.9", "--out", merged,
            "--max-new-tokens", "4", *place,
        )  # fmt: skip
        assert set(found["best"]) == {"weights", "value", "low", "high"}
        assert [trial["weights"] for trial in found["trials"]] == [[0.5, 0.5], [0.9, 0.1]]
        assert found["trials"][0]["rows"] == 6
        scores = done(
            "evaluate", *model, "--adapter", merged, "--task", "slots", "--data", slots, "--max-new-tokens", "4",
            "--predictions", tmp_path / "answers.jsonl", *place,
        )  # fmt: skip
        assert scores["task"] == "slots"
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
        layers = done("retrieve", *model, "--adapter", align, "--data", pairs[0], *place)["layers"]
        assert set(layers["0"]) == {"mean", "directions", "score", "scores"}
        pushed = done("push", merged, "me/merged", "--base-id", "org/tiny", "--dry-run", "--json")
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "adaptermix.json"} <= {
            file["name"] for file in pushed["files"]
        }
        card = (merged / "README.md").read_text()
        assert "| en |" in card
        assert "train-align" not in card.splitlines()[0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_commands_run_on_cuda_in_bfloat16(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, slots = write_pairs(tmp_path), write_slots(tmp_path)
    few = ["--steps", "3", "--batch-size", "4", "--base", causal, "--json"]
    align, task = tmp_path / "align", tmp_path / "task"
    assert run(capsys, "train-align", "--pairs", *pairs, "--out", align, *few)[0] == 0
    assert run(capsys, "train-task", "--task", "slots", "--train", slots, "--out", task, *few)[0] == 0
    manifest = json.loads((task / "adaptermix.json").read_text())
    assert manifest["base"]["dtype"] == "bfloat16"
    grid = ["--grid", "0.9", "--out", tmp_path / "merged", "--max-new-tokens", "4", "--json"]
    assert run(capsys, "search", task, align, "--base", causal, "--task", "slots", "--dev", slots, *grid)[0] == 0
    assert run(capsys, "retrieve", "--base", causal, "--data", pairs[0], "--json")[0] == 0
