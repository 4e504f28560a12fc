"""More bad input: every one gets one line and an exit code, and nothing is written, not even a hidden folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from adaptermix.cli import main
from adaptermix.cli.console import Bars, Console, Lines, fail
from adaptermix.cli.parse import VariadicCommand
from adaptermix.errors import AdapterMixError
from adaptermix.training.trainer import Interrupted

from ..factories import contents, write_lora, write_raw
from ..training.data import write_pairs, write_slots

PATH = "model.layers.0.self_attn.q_proj"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line, split at blanks, in a folder with two adapters and small data."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (8, 6, 2)}, alpha=4, seed=seed)
    write_pairs(tmp_path)
    write_slots(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    write_raw(
        tmp_path / "dora",
        json.loads((tmp_path / "task/adapter_config.json").read_text()) | {"target_parameters": ["x"]},
        {},
    )

    def work(line: str, **names: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(line.format(**names).split())
        streams = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, streams.out, streams.err

    return work


MERGE = "merge task align --weights 0.9 --out new"
SEARCH = "search task align --base {base} --task slots --dev train.en.jsonl --out new --device cpu"
ALIGN = "train-align --base {base} --pairs de-en.tsv --out new --device cpu --steps 2"
TASK = "train-task --base {base} --task slots --train train.en.jsonl --out new --device cpu --steps 2"
EVALUATE = "evaluate --base {base} --task slots --data train.en.jsonl --device cpu"

REFUSED = [
    (MERGE.replace("0.9", "nan,1"), 2, "weights must be finite numbers, got nan for adapter 'task'"),
    (MERGE.replace("0.9", "inf"), 2, "weights must be finite"),
    (MERGE.replace("0.9", "1,"), 2, "numbers separated by commas are needed"),
    (MERGE.replace("0.9", "1e39,1e39"), 1, "must be finite"),
    (MERGE.replace("task", "empty"), 1, "must hold adapter_config.json"),
    (MERGE.replace("task", "dora"), 1, "target_parameters"),
    (MERGE.replace("new", "notes.txt"), 1, "exists"),
    (MERGE.replace("new", "notes.txt --overwrite"), 1, "an output must be a folder"),
    (MERGE.replace("new", "empty --overwrite --rank 0"), 2, "--rank"),
    (MERGE.replace("new", "notes.txt/deeper"), 1, "cannot be made"),
    (MERGE + " --dtype float8", 2, "--dtype"),
    (MERGE + " --set scale", 2, "KEY=VALUE is needed, got 'scale'"),
    (MERGE + " --set {{", 2, "KEY=VALUE is needed"),
    (MERGE + " surplus", 1, "surplus is not a folder"),
    (MERGE.replace("--out new", ""), 2, "--out"),
    ("merge --weights 1 --out new", 2, "Missing argument 'ADAPTER...'"),
    ("merge task align --out new --weights", 2, "--weights"),
    (SEARCH + " --grid 0.5,,1", 2, "numbers separated by commas"),
    (SEARCH + " --grid nan", 2, "grid must hold finite numbers"),
    (SEARCH + " --grid 0.5,inf", 2, "grid must hold finite numbers"),
    (SEARCH + " --grid 0.5 --task ner", 2, "--task must be one of choice, classify, ner-json, "),
    (SEARCH + " --grid 0.5 --template odd", 2, "--template must be one of"),
    (
        SEARCH + " --grid 0.5 --rows 2",
        2,
        "--rows: START:STOP is needed, or with :STEP, in whole numbers, such as 0:300, 500: or ::10, got '2'",
    ),
    (SEARCH.replace("align", "dora") + " --grid 0.5", 1, "target_parameters"),
    (SEARCH + " --grid 0.5 --rows 99:", 1, "must have rows in the requested range"),
    (ALIGN + " --layer 9", 1, "--layer must be from 1 to 4 for this base model, got 9"),
    (ALIGN + " --layer 1.5", 2, "--layer"),
    (ALIGN + " --layer top", 2, "--layer"),
    (ALIGN + " --targets up down", 1, "--targets must be all-linear or among"),
    (ALIGN + " --device cuda:63", 1, "--device cuda:63 needs a CUDA device"),
    (ALIGN + " --device tpu", 2, "--device"),
    (ALIGN.replace("de-en.tsv", "hf:a:b:c:d"), 1, "must be hf:owner/name[@REVISION][:config[:split]]"),
    (ALIGN.replace("de-en.tsv", "notes.txt"), 1, "must show in its name"),
    (ALIGN.replace("de-en.tsv", "empty"), 1, "is a folder"),
    (ALIGN + " --overwrite --out notes.txt", 1, "an output must be a folder"),
    (ALIGN.replace("--pairs de-en.tsv", "--pairs"), 2, "Option '--pairs' needs at least one value."),
    (TASK + " --template mid-aligned", 2, "--template must be one of"),
    (TASK.replace("train.en.jsonl", "de-en.tsv"), 1, "must show in the file's name"),
    (TASK.replace("{base}", "{encoder}"), 1, "needs rows with tokens, found one with text only"),
    (TASK + " --dev none.en.jsonl", 1, "must exist"),
    (EVALUATE + " --adapter empty", 1, "must hold adapter_config.json"),
    (EVALUATE + " --adapter task", 1, "trained on another base model"),
    ("retrieve --base {base} --device cpu --data train.en.jsonl", 1, "the languages of a pair file"),
    ("push task me/x --folder y", 2, "No such option"),
    ("push none me/x --dry-run", 1, "is not a folder"),
    ("run none.yaml", 1, "must exist"),
    ("tain-align", 2, "Did you mean 'train-align'?"),
    ("frobnicate", 2, "No such command 'frobnicate'"),
    ("--jsn", 2, "No such option"),
]


@pytest.mark.parametrize(("line", "expected", "words"), REFUSED, ids=[line for line, _, _ in REFUSED])
def test_it_is_one_line_with_an_exit_code_and_leaves_no_trace(
    run: Run, causal: Path, encoder: Path, tmp_path: Path, line: str, expected: int, words: str
) -> None:
    before = contents(tmp_path)
    code, out, err = run(line, base=causal, encoder=encoder)
    own = [text for text in err.splitlines() if "Loading weights" not in text and text]
    assert (code, out) == (expected, "")
    assert len(own) == 1, err
    assert own[0].startswith("error: ")
    assert words in own[0]
    assert "Traceback" not in err
    assert contents(tmp_path) == before
    code, out, err = run(f"{line} --json", base=causal, encoder=encoder)
    [document] = out.splitlines()
    error = json.loads(document)["error"]
    assert {"kind", "code", "message"} <= set(error)
    assert (error["kind"] == "Usage") == (code == 2)
    if not line.endswith(("--weights", "--set {{")):  # there --json becomes part of the fault
        assert code == expected
        assert words in error["message"]
    assert contents(tmp_path) == before


DRY = [
    (MERGE, "would merge 2 adapters", "modules"),
    (ALIGN, "would train 2 steps and write new", "steps"),
    (TASK, "would train 2 steps and write new", "steps"),
    (SEARCH + " --grid 0.5,0.7,0.9", "would try 3 candidates on 6 dev rows", "plan"),
]


@pytest.mark.parametrize(("line", "words", "key"), DRY, ids=[line.split()[0] for line, _, _ in DRY])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run: Run, causal: Path, tmp_path: Path, line: str, words: str, key: str
) -> None:
    before = contents(tmp_path)
    code, out, err = run(f"{line} --dry-run", base=causal)
    assert (code, out) == (0, "")
    assert words in err
    code, out, err = run(f"{line} --dry-run --json --quiet", base=causal)
    assert (code, err) == (0, "")
    assert key in json.loads(out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("line", [MERGE, ALIGN, TASK, SEARCH + " --grid 0.5"], ids=lambda line: line.split()[0])
def test_a_dry_run_refuses_what_the_run_would_refuse_beforehand(
    run: Run, causal: Path, tmp_path: Path, line: str
) -> None:
    (tmp_path / "new").mkdir()
    code, _, err = run(f"{line} --dry-run", base=causal)
    assert code == 1
    assert "Pass --overwrite" in err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--pairs", "a", "b", "c", "--out", "d"], (("a", "b", "c"), None, "d", ())),
        (["--out", "d", "--pairs", "a", "b"], (("a", "b"), None, "d", ())),
        (["--pairs", "a", "--pairs", "b", "c"], (("a", "b", "c"), None, None, ())),
        (["x", "y", "--pairs", "a", "b"], (("a", "b"), None, None, ("x", "y"))),
        (["--pairs", "a", "--flag", "x"], (("a",), None, None, ("x",))),
        (["--pairs", "a", "b", "--", "x", "-y"], (("a", "b"), None, None, ("x", "-y"))),
        (["--pairs=a", "--weights=0.9"], (("a",), "0.9", None, ())),
        (["--weights", "-0.5,1", "x"], ((), "-0.5,1", None, ("x",))),
        (["--weights", "-1", "x"], ((), "-1", None, ("x",))),
        (["--pairs", "-3", "-4.5", "--out", "d"], (("-3", "-4.5"), None, "d", ())),
    ],
)
def test_an_option_of_many_values_takes_all_up_to_the_next_option(given: list[str], expected: Any) -> None:
    found = []
    command = VariadicCommand(
        "x",
        callback=lambda pairs, weights, out, flag, rest: found.append((pairs, weights, out, rest)),
        params=[
            click.Option(["--pairs"], multiple=True),
            click.Option(["--weights"]),
            click.Option(["--out"]),
            click.Option(["--flag"], is_flag=True),
            click.Argument(["rest"], nargs=-1),
        ],
    )
    command.main(given, standalone_mode=False)
    assert found == [expected]


class TestExitCodes:
    def test_an_interrupt_inside_a_command_keeps_what_it_says(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, causal: Path
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise Interrupted("stopped at step 3 of 9")

        monkeypatch.setattr("adaptermix.training.least_squares.train_align", stop)
        code, out, err = run(ALIGN, base=causal)
        assert (code, out) == (130, "")
        assert err.strip() == (
            "error: interrupted: stopped at step 3 of 9. Continue with the same command and --resume."
        )
        code, out, _ = run(f"{ALIGN} --json", base=causal)
        assert code == 130
        assert json.loads(out)["error"]["kind"] == "Interrupted"

    @pytest.mark.parametrize(
        ("error", "expected", "kind"),
        [
            (KeyboardInterrupt(), 130, "Interrupted"),
            (AdapterMixError("no"), 1, "AdapterMixError"),
            (OSError(28, "No space left on device"), 1, "OSError"),
            (click.UsageError("no"), 2, "Usage"),
        ],
    )
    def test_each_kind_of_failure_has_its_code(
        self, error: BaseException, expected: int, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert fail(error, as_json=True) == expected
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == kind

    def test_a_fault_of_the_program_is_raised_again(self) -> None:
        with pytest.raises(ZeroDivisionError):
            fail(ZeroDivisionError(), as_json=True)

    def test_a_full_disk_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        before = contents(tmp_path)
        monkeypatch.setattr("adaptermix.merging.sinks.adapter_writer", full)
        code, out, err = run(MERGE)
        assert (code, out) == (1, "")
        assert err.startswith("error: the disk or the network failed:")
        assert contents(tmp_path) == before

    def test_a_hub_that_refuses_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        class Refusing:
            def repo_info(self, *_: object, **__: object) -> None:
                raise ValueError("403 Forbidden")

        monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
        code, out, err = run("push task me/x")
        assert (code, out) == (1, "")
        assert err.startswith("error: pushing to me/x failed while looking for the repository: 403 Forbidden.")
        code, out, _ = run("push task me/x --json")
        assert json.loads(out)["error"]["kind"] == "PublishError"


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp\x00\x9b31m\nerror: no\ud800"


def test_characters_that_act_on_a_terminal_are_escaped_wherever_text_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(as_json=True)
    console.say(HOSTILE)
    console.note(HOSTILE)
    console.table([HOSTILE, "n"], [[HOSTILE, "1"], ["y" * 10_000, "2"]])
    console.document({HOSTILE: [HOSTILE]})
    for watch in (Lines(), Bars()):
        watch.note(HOSTILE)
        with watch.track(HOSTILE, 2) as advance:
            advance(2, HOSTILE)
    fail(AdapterMixError(HOSTILE + "x" * 100_000 + " Do this."), as_json=False)
    fail(AdapterMixError(HOSTILE), as_json=True)
    streams = capsys.readouterr()
    for text in (streams.out, streams.err):
        assert not set(text) & set("\x1b\x07\x00\x9b\u202e\ud800")
        text.encode()
    assert r"\x1b]0;owned\x07\x1b[2J\u202egnp\x00\x9b31m\nerror: no\ud800" in streams.err
    assert max(map(len, streams.err.splitlines())) < 3_200
    assert " Do this." in streams.err
    assert json.loads(streams.out.splitlines()[0]) == {HOSTILE: [HOSTILE]}


@pytest.mark.parametrize(
    ("note", "shown"), [("warning: a", "warning: a"), ("note: a", "note: a"), ("a", "note: a"), ("a\nb", r"note: a\nb")]
)
def test_a_note_has_one_mark(note: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().note(note)
    assert capsys.readouterr().err == f"{shown}\n"


def test_persian_and_emoji_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0939\u093f\u0928\u094d\u200d\u0926\u0940 \U0001f600 \u00e9"
    )
    Console().say(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_numbers_in_a_table_stand_under_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(["language", "n"], [["de", "5"], ["en", "1000"]])
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.splitlines() == ["  language     n", "  de           5", "  en        1000"]
    Console(quiet=True).table(["language"], [["de"]])
    assert capsys.readouterr().err == ""
