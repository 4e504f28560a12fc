"""Help texts of commands with many options, and second names of options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adaptermix.cli import COMMANDS
from adaptermix.options import TaskSettings
from adaptermix.options.roles import Argument, Flag, marks_of

from .test_commands import run

LONG = [name for name, command in COMMANDS.items() if command.schema().is_long]
PEFT = {
    "--lora-r": "rank",
    "--lora-alpha": "alpha",
    "--lora-dropout": "dropout",
    "--target-modules": "targets",
    "--use-dora": "dora",
    "--use-rslora": "rslora",
    "--init-lora-weights": "init",
}


MOST_LINES = 40


def options_in(text: str) -> list[str]:
    """Return the options that are listed, without those of the examples above them."""
    listed = re.split(r"\n[A-Z][a-z ]+:\n", text, maxsplit=1)[1]
    return re.findall(r"^  (?:-h, )?(--[\w-]+)", listed, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_is_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, name, "--help")
    assert len(text.splitlines()) <= MOST_LINES
    assert max(map(len, text.splitlines())) <= 80


def test_the_training_commands_are_among_those_with_rare_options() -> None:
    assert {name for name in COMMANDS if name.startswith("train-")} < set(LONG)


@pytest.mark.parametrize("name", LONG)
def test_help_shows_the_common_options_and_help_all_the_others(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = run(capsys, name, "--help")
    _, whole, _ = run(capsys, name, "--help-all")
    assert set(options_in(short)) < set(options_in(whole))
    left_out = len(options_in(whole)) - len(options_in(short)) - len(("--json", "--quiet", "--help"))
    assert f"{left_out} more options: adaptermix {name} --help-all" in re.sub(r"\s+", " ", short)
    schema = COMMANDS[name].schema()
    flags = {name: flag.name for name, flag in marks_of(schema, Flag).items() if flag.name}
    names = set(schema.model_fields) - set(marks_of(schema, Argument)) - set(COMMANDS[name].hidden)
    fields = {flags.get(field, "--" + field.replace("_", "-")) for field in names}
    assert set(options_in(whole)) == fields | {"--json", "--quiet", "--help"}
    titles = re.findall(r"^([A-Z][a-z ]+):$", whole, re.MULTILINE)
    assert "Options" not in titles
    assert titles[-1] == "Output"


def test_required_options_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "train-task", "--help")
    assert options_in(text)[:4] == ["--task", "--train", "--base", "--out"]


def test_help_of_a_command_without_rare_options_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "push", "--help")
    assert "\nOptions:\n" in text
    assert "--create-pr" in text
    assert "--help-all" not in text
    assert run(capsys, "push", "--help-all")[1] == text


def test_options_have_the_names_that_peft_gives_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {flag.alias: name for name, flag in marks_of(COMMANDS["train-task"].schema(), Flag).items() if flag.alias}
    assert flags == PEFT
    train = ["train-task", "--base", "b", "--task", "slots", "--train", tmp_path / "x", "--out", tmp_path / "out"]
    # both names are one option, and an error has the name that was typed
    _, _, by_alias = run(capsys, *train, "--target-modules", "q_proj", "v_proj", "--lora-r", "0")
    assert "--lora-r: " in by_alias
    by_name = run(capsys, *train, "--targets", "q_proj", "v_proj", "--rank", "0")[2]
    assert by_alias == by_name.replace("--rank", "--lora-r")


@pytest.mark.parametrize("name", [name for name in LONG if name.startswith("train-")])
def test_all_training_commands_take_these_names(name: str) -> None:
    schema = COMMANDS[name].schema()
    flags = {flag.alias: field for field, flag in marks_of(schema, Flag).items() if flag.alias}
    assert flags == {alias: field for alias, field in PEFT.items() if field in schema.model_fields}


@pytest.mark.parametrize("name", COMMANDS)
def test_descriptions_have_no_indentation_of_the_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    description = run(capsys, name, "--help")[1].partition("\n\n")[2].partition("  Example")[0]
    lines = description.partition("Options:")[0].partition("Data:")[0].splitlines()
    assert not [line for line in lines if "   " in line.strip()]


def test_peft_writes_its_default_init_as_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"base": "b", "task": "slots", "train": ["x"], "out": str(tmp_path / "out")}
    assert [TaskSettings(**data, init=value).init for value in (True, "true", "pissa")] == ["kaiming"] * 2 + ["pissa"]
    train = ["train-task", "--base", "b", "--task", "slots", "--train", tmp_path / "x", "--out", tmp_path / "out"]
    _, _, said = run(capsys, *train, "--init-lora-weights", "true", "--lora-r", "0")
    assert "--lora-r: " in said  # the flag that was typed
    assert "init" not in said
    _, _, said = run(capsys, *train, "--rank", "0")
    assert "--rank: " in said
    _, _, said = run(capsys, *train, "--init-lora-weights", "false")
    assert "'false' is not one of 'kaiming'" in said
    assert "'true'" in said


def test_errors_of_a_run_name_the_flag_that_was_typed(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "en.tsv").write_text("go now\tO B-time\tx\n")
    train = ["train-task", "--base", causal, "--task", "slots", "--train", tmp_path / "en.tsv", "--out", tmp_path / "o"]
    for flag, other in (("--target-modules", "--targets"), ("--targets", "--target-modules")):
        _, _, said = run(capsys, *train, flag, "q_proj", "absent", "--device", "cpu")
        assert f"{flag} must be all-linear or among" in said
        assert other not in said


def test_a_search_over_a_recipe_has_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "none.yaml"
    arguments = [recipe, "--vary", "a.b=1,2", "--out", tmp_path / "out"]
    code, _, message = run(capsys, "tune", *arguments)
    assert code == 1
    assert "must exist" in message
    assert (code, "", message) == run(capsys, "search", *arguments)
