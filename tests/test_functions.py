"""The commands as Python functions: one shape for all, and types that are those of the table of commands."""

from __future__ import annotations

import ast
import inspect
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

import adaptermix
from adaptermix.commands import table
from adaptermix.commands.functions import function_of
from adaptermix.commands.record import Command, load
from adaptermix.commands.table import COMMANDS
from adaptermix.errors import UsageError

from .factories import WEIGHTS, write_lora
from .refusals import refuses
from .training.data import write_slots

PATH = "model.layers.0.self_attn.q_proj"
FUNCTIONS = {command.function: command for command in COMMANDS.values() if command.function}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {PATH: (6, 4, 2)}, seed=seed)
    return [tmp_path / "task", tmp_path / "align"]


def test_types_and_table_name_the_same_classes() -> None:
    """The types next to the records say to type checkers what the records say at run time."""
    tree = ast.parse(Path(table.__file__).read_text(encoding="utf-8"))
    typed = {
        node.targets[0].id: tuple(ast.unparse(argument).rpartition(".")[2] for argument in node.value.args)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "typed"
        if isinstance(node.targets[0], ast.Name)
    }
    reports = {name: inspect.signature(load(str(command.run))).return_annotation for name, command in FUNCTIONS.items()}
    assert typed == {name: (command.options, reports[name]) for name, command in FUNCTIONS.items()}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_what_a_record_names_is_there(command: Command) -> None:
    assert command.schema().__name__ == command.options
    for name in (command.run, command.plan, command.show and f"cli.{command.show}"):
        assert name is None or inspect.isfunction(load(name)), name
    assert set(command.hidden) <= set(command.schema().model_fields)
    assert command.run or command.show


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_described_and_can_be_pickled(name: str) -> None:
    function = getattr(adaptermix, name)
    assert function.__doc__
    assert pickle.loads(pickle.dumps(function)) is function  # noqa: S301


def a_command(**more: Any) -> Any:
    record = Command(name="push", summary="", options="PushSettings", run="publish.hub:push", show=None, **more)
    seen: list[Any] = []

    class Seen(Command):
        def report(self, settings: Any, *, watch: Any, **more: Any) -> Any:
            seen.append(settings)
            return watch

    return function_of(Seen(**{name: getattr(record, name) for name in Command.__dataclass_fields__})), seen


def test_settings_fields_and_positional_values_are_the_same(tmp_path: Path) -> None:
    function, seen = a_command()
    assert function(adaptermix.PushSettings(folder=str(tmp_path), repo="me/x"), watch="watcher") == "watcher"
    function(folder=tmp_path, repo="me/x")
    function(tmp_path, "me/x")
    assert seen[0] == seen[1] == seen[2]
    assert seen[0].folder == str(tmp_path)


def test_what_a_function_does_not_take_is_refused(tmp_path: Path) -> None:
    function, _ = a_command()
    with refuses("call.options-and-fields: PushSettings"):
        function(adaptermix.PushSettings(folder="a", repo="me/x"), private=True)
    with refuses(r"call.too-many-arguments: 2 .*\(folder, repo\), got 3"):
        function("a", "me/x", "b")
    with refuses("option.extra-forbidden: privat"):
        function("a", "me/x", privat=True)
    with refuses("call.other-options: PushSettings, got InspectSettings"):
        function(adaptermix.InspectSettings(adapters=["a"]))
    with pytest.raises(UsageError) as faults:
        adaptermix.evaluate(base="x", task="slots", data=["t"], batch_size=0, rows="x")
    assert faults.value.codes == ["option.greater-than-equal", "option.rows"]
    assert "batch_size: " in str(faults.value)
    assert "rows: " in str(faults.value)


def test_a_wrong_call_names_the_argument(adapters: list[Path], tmp_path: Path) -> None:
    with refuses(r"call.unknown-argument: unknown argument 'weight'. Did you mean 'weights'\?"):
        adaptermix.merge(adapters, weight=[0.9])  # type: ignore[call-overload]
    with refuses("merge.no-weights"):
        adaptermix.merge(adapters)  # type: ignore[call-overload]
    with refuses(r"merge.one-folder: write \['task'\]"):
        adaptermix.merge("task", weights=[1.0])
    with refuses(r"call.unknown-argument: 'adaptors'. Did you mean 'adapters'\?"):
        adaptermix.inspect(adaptors=adapters)
    with refuses("call.arguments: inspect: missing a required argument: 'adapters'"):
        adaptermix.inspect()


def test_a_stack_does_not_merge_with_adapters(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "stack.json").write_text("{}")
    for method, code in (("exact", "merge.mixed-inputs"), ("fuse", "merge.stack: stack")):
        with refuses(code):
            adaptermix.merge(
                [*adapters, tmp_path / "stack"], weights=[1.0, 1.0, 1.0], method=method, out=str(tmp_path / "out")
            )


def test_callbacks_are_passed_on_with_settings_and_with_fields(causal: Path, tmp_path: Path) -> None:
    class Stopping:
        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    options = {"base": str(causal), "task": "slots", "train": [write_slots(tmp_path)], "steps": 3, "rank": 2}
    settings = adaptermix.TaskSettings(**options, out=str(tmp_path / "one"))
    assert adaptermix.train_task(settings, callbacks=[Stopping()]).document()["steps"] == 1
    assert adaptermix.train_task(**options, out=tmp_path / "two", callbacks=[Stopping()]).document()["steps"] == 1  # type: ignore[arg-type]


def test_a_dry_run_of_a_search_has_a_plan_and_no_result() -> None:
    with refuses("search.dry-run"):
        adaptermix.search(adapters=["a", "b"], base="c", task="slots", dev=["d"], grid=[0.5], out="e", dry_run=True)


def test_functions_with_fields_of_their_own_take_settings_too(adapters: list[Path]) -> None:
    found = adaptermix.inspect(adaptermix.InspectSettings(adapters=list(map(str, adapters))))
    assert found.document() == adaptermix.inspect(adapters).document()


def test_merge_is_one_function_for_settings_and_folders(adapters: list[Path], tmp_path: Path) -> None:
    report = adaptermix.merge(adapters, weights=[0.9], out=tmp_path / "one")
    settings = adaptermix.MergeSettings(adapters=list(map(str, adapters)), weights=[0.9], out=str(tmp_path / "two"))
    assert adaptermix.merge(settings).norm == report.norm == adaptermix.merge(adapters, weights=[0.9]).norm
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_merge_learns_weights_where_the_method_or_an_option_asks_for_it(adapters: list[Path], tmp_path: Path) -> None:
    more: dict[str, Any] = {"weights": [0.5, 0.5], "out": tmp_path / "out"}
    with refuses("gates.option: task"):
        adaptermix.merge(adapters, **more, task="slots")
    with refuses("gates.no-rows"):
        adaptermix.merge(adapters, **more, method="fuse")


def test_merge_takes_full_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").touch()
    with refuses("checkpoint.needs-base"):
        adaptermix.merge([tmp_path / "one"], weights=[1.0], out=tmp_path / "out")


def test_merge_of_checkpoints_takes_what_merge_checkpoints_takes(causal: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(causal, tuned)
    report = adaptermix.merge(adapters=[tuned, tuned], weights=0.5, base=causal, shard_size="1MB", method="exact")
    assert report.norm == 0
    assert (
        adaptermix.merge([tuned, tuned], weights=[1.0, 1.0], base=causal, out=tmp_path / "out", dry_run=True).norm == 0
    )
    assert not (tmp_path / "out").exists()
    with refuses("checkpoint.adapter-option"):
        adaptermix.merge([tuned, tuned], weights=[1.0, 1.0], base=causal, out=tmp_path / "out", rank=8)


def test_a_merge_that_learns_needs_a_folder(adapters: list[Path]) -> None:
    with refuses("merge.no-out"):
        adaptermix.merge(adapters, weights=[1.0, 1.0], method="fuse")
