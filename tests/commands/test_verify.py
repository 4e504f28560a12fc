"""`adaptermix verify` rebuilds what it says, and names what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adaptermix import Verification, merge, verify
from adaptermix.commands.request import inputs_of
from adaptermix.options import StatisticsSettings

from ..cli.test_commands import run
from ..factories import CONFIG, WEIGHTS, key, write_lora
from ..golden.inputs import write_inputs
from ..refusals import refuses

MANIFEST, CARD = "adaptermix.json", "README.md"
PATHS = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of two adapters, `task` and `align`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, dict.fromkeys(PATHS, (6, 4, 2)), seed=seed)
    merge(["task", "align"], weights=[0.5, 0.25], out="merged")
    return tmp_path / "merged"


def flip(path: Path, position: int = -1) -> None:
    """Change the lowest bit of a byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(folder: Path, **entries: object) -> None:
    """Replace entries of a manifest."""
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(document | entries))


def files_of(result: Verification) -> set[str]:
    return {each.file for each in result.differences}


def test_an_output_that_nobody_touched_is_the_same(merged: Path) -> None:
    before = {path: path.read_bytes() for path in merged.parent.rglob("*") if path.is_file()}
    result = verify("merged")
    assert result.is_same
    assert result.is_rebuilt
    assert result.command == "merge"
    assert before == {path: path.read_bytes() for path in merged.parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("adapter", "file"), [(a, f) for a in ("task", "align") for f in (WEIGHTS, CONFIG)])
def test_a_changed_input_is_named_and_nothing_is_rebuilt(merged: Path, adapter: str, file: str) -> None:
    flip(merged.parent / adapter / file)
    result = verify("merged")
    assert [(each.option, each.path, each.text) for each in result.inputs] == [("adapters", adapter, "changed")]
    assert not result.is_rebuilt
    assert not result.is_same


def test_a_missing_input_is_named_and_can_have_moved(merged: Path) -> None:
    (merged.parent / "old").mkdir()
    (merged.parent / "align").rename(merged.parent / "old" / "align")
    assert [(each.path, each.text) for each in verify("merged").inputs] == [("align", "missing")]
    assert verify("merged", moved={"align": "old/align"}).is_same


def test_folders_of_inputs_can_have_moved(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = merged.parent
    merge([root / "task", root / "align"], weights=[1.0, 1.0], out="absolute")
    new = root.rename(root.with_name(f"{root.name}-new"))
    monkeypatch.chdir(new)
    assert {each.text for each in verify("absolute").inputs} == {"missing"}
    assert verify("absolute", moved={str(root): str(new)}).is_same


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, CARD])
def test_a_changed_byte_of_the_output_is_named(merged: Path, file: str) -> None:
    # In the config a letter of "LORA": the number of a rank would make another adapter.
    flip(merged / file, (merged / file).read_bytes().index(b"LORA") if file == CONFIG else -1)
    result = verify("merged")
    assert files_of(result) == {file}
    assert result.is_rebuilt
    assert not result.is_same


def test_a_changed_entry_of_the_manifest_is_named(merged: Path) -> None:
    edit(merged, plan={"method": "ties"})
    found = verify("merged").differences
    assert {each.file for each in found} == {MANIFEST}
    assert "plan.method" in {each.entry for each in found}


def test_a_file_that_is_missing_in_the_output_is_named(merged: Path) -> None:
    (merged / WEIGHTS).unlink()
    assert files_of(verify("merged")) == {WEIGHTS}


def test_the_module_and_the_largest_difference_are_named(merged: Path) -> None:
    tensors = load_file(merged / WEIGHTS)
    name = key(PATHS[1], "B")
    tensors[name][2, 1] += 0.5
    tensors[name][0, 0] += 0.25
    save_file(tensors, merged / WEIGHTS, metadata={"format": "pt"})
    [found] = verify("merged").differences
    assert (found.file, found.entry) == (WEIGHTS, name)
    assert found.largest == pytest.approx(0.5, rel=1e-6)


def test_with_a_tolerance_deltas_are_compared_and_not_factors(merged: Path) -> None:
    """2 B and A/2 have the same delta as B and A; a further 1 % of one module is a relative difference of 0.01."""
    tensors = load_file(merged / WEIGHTS)
    for path, factor in zip(PATHS, (2.0, 2.02), strict=True):
        tensors[key(path, "B")] *= factor
        tensors[key(path, "A")] /= 2
    save_file(tensors, merged / WEIGHTS, metadata={"format": "pt"})
    assert len(verify("merged").differences) == 4
    [found] = verify("merged", tolerance=1e-4).differences
    # The relative difference is that of the smaller delta, in the rebuilt copy, to the output's.
    assert found.entry == PATHS[1]
    assert found.largest == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert verify("merged", tolerance=0.011).is_same


def test_a_changed_version_is_named_and_is_no_difference(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    versions = json.loads((merged / MANIFEST).read_text())["versions"]
    edit(merged, versions=versions | {"torch": "0.1"})
    code, out, err = run(capsys, "verify", "merged", "--json")
    assert code == 0
    assert json.loads(out)["versions"] == {"torch": {"output": "0.1", "now": versions["torch"]}}
    flip(merged / WEIGHTS)
    code, _, err = run(capsys, "verify", "merged")
    lines = err.splitlines()
    assert code == 1
    assert "torch" in lines[0]
    assert WEIGHTS in lines[1]
    assert "cause" in lines[-1]


def test_exit_codes_and_the_json_document(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", "merged", "--json", "--quiet")
    assert (code, json.loads(out)["same"], json.loads(out)["rebuilt"]) == (0, True, True)
    flip(merged.parent / "task" / WEIGHTS)
    code, out, _ = run(capsys, "verify", "merged", "--inputs", "--json")
    document = json.loads(out)
    assert (code, document["same"], document["rebuilt"]) == (1, False, False)
    assert document["inputs"] == [{"option": "adapters", "path": "task", "text": "changed"}]


def test_a_rebuild_that_fails_says_why(merged: Path) -> None:
    request = json.loads((merged / MANIFEST).read_text())["request"]
    request["settings"] |= {"rank": 1, "max_residual": 0.0}
    edit(merged, request=request)
    result = verify("merged")
    assert result.failure
    assert "residual" in result.failure
    assert not result.is_same


def test_calls_in_python_record_what_the_command_line_records(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = (merged / MANIFEST).read_bytes()
    assert run(capsys, "merge", "task", "align", "--weights", "0.5,0.25", "--out", "merged", "--overwrite")[0] == 0
    assert (merged / MANIFEST).read_bytes() == first
    merge(["task", "align"], weights=0.5, out="half")  # a number for two adapters
    assert verify("half").is_same


def test_a_further_file_of_a_glob_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = StatisticsSettings(adapter="none", base="org/base", data=["de=*.txt"], out="o")
    (tmp_path / "a.txt").write_text("a")
    before = inputs_of(settings)
    (tmp_path / "b.txt").write_text("b")
    assert [each for each in inputs_of(settings) if each not in before] == [
        # echo -n b | sha256sum
        {
            "option": "data",
            "path": "b.txt",
            "sha256": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d",
        }
    ]
    assert {"option": "base", "model": "org/base"} in before


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (None, "verify.no-request"),
        ({"command": "nothing", "settings": {}, "inputs": []}, "verify.no-request"),
        ({"command": "push", "settings": {"folder": "x", "repo": "a/b"}, "inputs": []}, "verify.request"),
        ({"command": "merge", "settings": {"adapters": ["task"]}, "inputs": []}, "verify.request"),
        (
            {"command": "merge", "settings": {"adapters": ["task"], "weights": [1], "out": "x"}, "inputs": []},
            "verify.request",
        ),
    ],
)
def test_other_requests_are_refused(merged: Path, request_: object, code: str) -> None:
    edit(merged, request=request_)
    with refuses(code):
        verify("merged")
    assert not (merged.parent / "x").exists()


def test_what_has_no_manifest_is_refused(merged: Path) -> None:
    for name in ("task", "nowhere", "task/adapter_config.json"):
        with refuses("verify.no-manifest"):
            verify(name)


_CPU = "--device cpu --dtype float32"
_TRAIN = f"--steps 2 --batch-size 8 --rank 4 {_CPU}"
_CLASSIFY = "--task classify"
RUNS: Mapping[str, str] = {
    "task": f"train-task --base encoder {_CLASSIFY} --train train.en.csv --dev dev.en.csv --evaluate-every 1 "
    f"--keep-looks {_TRAIN}",
    "align": f"train-align --base causal --pairs de-en.tsv {_TRAIN}",
    "fit": f"train-align --base causal --pairs de-en.tsv --fit least-squares --rank 4 {_CPU}",
    "joint": f"train-joint --base causal {_CLASSIFY} --train train.en.csv --pairs de-en.tsv {_TRAIN}",
    "fused": f"train-fusion --base encoder {_CLASSIFY} --train train.jv.csv --source train.en.csv {_TRAIN}",
    "stack": f"train-stack --encoder encoder --base causal --texts texts.txt {_TRAIN}",
    "merged-stack": "merge stack stack --weights 0.5,0.25",
    "baked-stack": "bake --base stack --device cpu",
    "ties": "merge one two --weights 1,1 --method ties --set density=0.5 --rank 16 --max-residual 1",
    "full": "merge one two --weights 0.5,0.25 --form dense --base causal",
    "checkpoint": "merge tuned tuned --base causal --weights 0.5,0.25",
    "gates": f"merge given-task given-align --weights 1,1 --method fuse --base encoder {_CLASSIFY} "
    "--train train.en.csv --set steps=2 --device cpu",
    "found": f"search given-task given-align --base encoder {_CLASSIFY} --dev dev.de.csv --grid 0.5 {_CPU}",
    "baked": "bake --base causal --adapter one --device cpu",
    "baked-int4": "bake --base causal --adapter one --quantize int4 --strategy requantize --keep-at-least 0 "
    "--device cpu",
    "extracted": "extract --base causal --tuned tuned --rank 3 --device cpu",
    "statistics.safetensors": f"statistics one --base causal --data texts.txt {_CPU}",
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_inputs(folder)
    for name in ("task", "align"):
        (folder / name).rename(folder / f"given-{name}")
    return folder


def weights_in(path: Path) -> Path:
    """Return the file itself, or the largest file of a folder: its weights."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return max(files, key=lambda each: each.stat().st_size)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_each_command_makes_the_same_again_and_names_each_changed_input(
    name: str, golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden)
    words = RUNS[name].split()
    for earlier in RUNS:  # another process may have run it
        if earlier != name and earlier in words and not (golden / earlier).exists():
            assert run(capsys, *RUNS[earlier].split(), "--out", earlier, "--quiet")[0] == 0
    inputs = {word for word in words if (golden / word).exists()}
    code, _, said = run(capsys, *words, "--out", name, "--quiet")
    assert code == 0, said
    result = verify(name)
    assert result.is_same, result.document()
    assert result.is_rebuilt
    for path in inputs:
        file = weights_in(golden / path)
        content = file.read_bytes()
        flip(file, len(content) // 2)
        found = verify(name, inputs=True)
        file.write_bytes(content)
        assert {each.path for each in found.inputs} == {path}
        assert not found.is_rebuilt
