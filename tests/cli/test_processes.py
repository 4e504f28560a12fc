"""The installed command in a process of its own: streams, exit codes, and what it loads."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptermix import __version__
from adaptermix.cli import COMMANDS

from ..factories import contents, write_lora
from ..training.data import write_pairs

HEAVY = ["torch", "pydantic", "transformers", "peft", "optuna", "mergekit", "huggingface_hub", "numpy", "yaml", "rich"]
PLACE = ["--device", "cpu", "--dtype", "float32"]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TQDM", "HF_HUB_DISABLE_P"))}
    return subprocess.run(
        [str(Path(sys.executable).parent / "adaptermix"), *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_help_lists_every_command_and_says_what_each_does(record_property: Callable[[str, object], None]) -> None:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    done = run("--help")
    seconds = used() - before
    record_property("help_cpu_seconds", round(seconds, 3))
    print(f"adaptermix --help: {seconds:.2f} s of CPU time")  # noqa: T201  (the report)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    for name, command in COMMANDS.items():
        assert f" {name} {command.summary}" in words


def test_help_of_the_group_and_of_a_usage_fault_load_nothing_heavy() -> None:
    for arguments in (["--help"], ["--version"], ["nonsense"]):
        code = (
            "import sys\nfrom adaptermix.cli import main\ntry:\n    main(" + repr(arguments) + ")\nexcept SystemExit:\n"
            f"    print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
        assert done.stdout.splitlines()[-1] == "LOADED []", arguments


def test_help_of_a_command_needs_no_torch() -> None:
    code = (
        "import sys\nfrom adaptermix.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n    try:\n        main([name, '--help'])\n    except SystemExit as error:\n"
        "        assert error.code == 0, name\n"
        "print('LOADED', [n for n in ('torch', 'transformers', 'peft', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_version_is_printed_on_stdout() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"adaptermix {__version__}\n", "")


def test_no_argument_shows_the_help_and_is_wrong_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Commands:" in done.stderr


def test_a_merge_loads_neither_transformers_nor_peft_and_works_from_any_folder(tmp_path: Path) -> None:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {"layers.0.q_proj": (6, 4, 2)}, seed=seed)
    code = (
        "import sys\nfrom adaptermix.cli import main\ntry:\n"
        "    main(['merge', 'task', 'align', '--weights', '-0.5,1', '--out', 'm', '--json'])\nexcept SystemExit as e:\n"
        "    print([e.code, [n for n in ('transformers', 'peft', 'huggingface_hub') if n in sys.modules]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True, cwd=tmp_path
    )
    document, last = done.stdout.splitlines()
    assert last == "[0, []]"
    assert json.loads(document)["weights"] == [-0.5, 1.0]
    assert done.stderr.startswith("merged 2 adapters, weights -0.5, 1, method exact")


def test_a_quiet_training_run_with_json_prints_one_document_and_nothing_else(causal: Path, tmp_path: Path) -> None:
    """No bar and no warning of a library either."""
    pairs = write_pairs(tmp_path)
    few = ["--steps", "2", "--batch-size", "4"]
    done = run(
        "train-align", "--base", causal, "--pairs", *pairs, "--out", tmp_path / "a", *few, *PLACE, "--quiet", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    document = json.loads(line)
    assert document["out"] == str(tmp_path / "a")
    assert document["steps"] == 2
    assert set(document["loss"]) == {"first", "last"}


def test_a_training_run_speaks_on_stderr_alone_and_draws_no_bars_there(causal: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path)
    few = ["--steps", "2", "--batch-size", "4"]
    done = run("train-align", "--base", causal, "--pairs", *pairs, "--out", tmp_path / "a", *few, *PLACE)
    assert (done.returncode, done.stdout) == (0, "")
    said = done.stderr.splitlines()
    assert [line.split()[0] for line in said] == ["trained", "wrote"], done.stderr
    assert " in 2 steps (distil), " in said[0]


def test_a_failure_deep_in_a_library_is_one_line(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    before = contents(tmp_path)
    done = run("train-align", "--base", "model", "--pairs", *pairs, "--out", "a", *PLACE, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: base model 'model' cannot be loaded from this folder: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_options_that_the_contract_promises(name: str) -> None:
    from click.testing import CliRunner

    from adaptermix.cli import adaptermix

    text = CliRunner().invoke(adaptermix, [name, "--help-all"]).output
    promised = {"--json", "--quiet", "--help"}
    if name.startswith("train") or name in ("search", "evaluate", "retrieve", "demo"):
        promised |= {"--seed", "--device", "--dtype"}
    if name.startswith("train") or name in ("search", "merge", "push", "run"):
        promised |= {"--dry-run"}
    if name.startswith("train"):
        promised |= {"--resume", "--overwrite"}
    assert {option for option in promised if option not in text} == set()
