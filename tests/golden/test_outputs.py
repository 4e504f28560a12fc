"""Golden outputs: what twelve small runs of the command line wrote when the snapshot was last reviewed.

Each run uses tiny models whose weights are fixed to the bit (`inputs.py`). Each file that it writes, and the document
that it prints with `--json`, is compared with its digest in `outputs.json`; `digests.py` says how. Weights of merges
that scale, add or select entries must be the same bytes on every machine.

If a change of an output is intended:

    pytest tests/golden --update-golden

rewrites `outputs.json` and `help.txt`. Review the difference. Commit it together with the change that causes it, in a
commit of its own whose message says why the output changes. `-k merge-ties` rewrites one entry only.

A change that must not alter a single byte, such as a move of code, can be checked with

    pytest tests/golden --golden-bytes

which also compares whole files. The snapshot's bytes are valid for the machine and the versions that made it. On other
machines, run `--update-golden` before the change and `--golden-bytes` after it, and do not commit the snapshot.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..cli.test_commands import run
from .digests import Weights, differences, digest, document, dumps, exact, measured, products, whole
from .inputs import write_inputs

SNAPSHOT = Path(__file__).with_name("outputs.json")
OUT = "out"

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A call of the command line.

    Args:
        line: Command and options.
        base: The base model's folder.
        weights: Digest of the weight files that it writes.
        needs: Package without which the run is skipped.
    """

    line: str
    base: str = "causal"
    weights: Weights = exact
    needs: str | None = None


_CPU = "--device cpu --dtype float32"
# Without dropout, since torch draws other numbers on Intel CPUs than on others.
_TRAIN = f"--steps 2 --batch-size 8 --rank 4 --dropout 0 --learning-rate 0.01 {_CPU}"
_CLASSIFY = "--task classify"

RUNS = {
    "train-task": Run(
        line=f"train-task --base encoder {_CLASSIFY} --train train.en.csv --dev dev.en.csv --evaluate-every 1 {_TRAIN}",
        base="encoder",
        weights=measured,
    ),
    "train-align": Run(
        line=f"train-align --base causal --pairs de-en.tsv --dev-pairs held.de-en.tsv --evaluate-every 1 {_TRAIN}",
        weights=measured,
    ),
    "train-joint": Run(
        line=f"train-joint --base causal {_CLASSIFY} --train train.en.csv --pairs de-en.tsv {_TRAIN}",
        weights=measured,
    ),
    "train-fusion": Run(
        line=f"train-fusion --base encoder {_CLASSIFY} --train train.jv.csv --source train.en.csv {_TRAIN}",
        base="encoder",
        weights=measured,
    ),
    "merge-linear": Run(line="merge one two --weights 0.5,0.5"),
    "merge-layer-swap": Run(line="merge one two --weights 1,1 --method layer-swap --set bottom=1 top=0"),
    "merge-ties": Run(
        line="merge one two --weights 1,1 --method ties --set density=0.5 --rank 16 --max-residual 1",
        weights=products,
    ),
    "merge-dense": Run(line="merge one two --weights 0.5,0.25 --form dense --base causal"),
    "search": Run(
        line=f"search task align --base encoder {_CLASSIFY} --dev dev.de.csv dev.en.csv --grid 0.25,0.5,0.75 {_CPU}",
        base="encoder",
    ),
    "bake": Run(
        line="bake --base causal --adapter one --quantize nf4 --strategy requantize --keep-at-least 0 --device cpu",
        needs="bitsandbytes",
    ),
    "extract": Run(line="extract --base causal --tuned tuned --rank 3 --device cpu", weights=products),
    "evaluate": Run(
        line=f"evaluate --base encoder --adapter task {_CLASSIFY} --data dev.de.csv dev.en.csv {_CPU}", base="encoder"
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}
    return found


def outputs_of(name: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a command in the folder of the inputs, and return digests of its output."""
    own = RUNS[name]
    out = Path(OUT)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    where = ["--predictions", out / "answers.jsonl"] if name == "evaluate" else ["--out", out / name]
    code, printed, said = run(capsys, *own.line.split(), *where, "--json")
    assert code == 0, said
    found = {"command": own.line, "printed": document(json.loads(printed), inputs)}
    root = out / name if (out / name).is_dir() else out
    paths = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    files = {
        file: digest(path, weights=own.weights, folder=inputs, base=inputs / own.base) for file, path in paths.items()
    }
    return found | {"files": files, "bytes": whole(paths)}


@pytest.mark.parametrize("name", RUNS)
def test_the_output_is_that_of_the_snapshot(
    name: str,
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if needs := RUNS[name].needs:
        pytest.importorskip(needs, reason=f"this run needs {needs}")
    monkeypatch.chdir(inputs)
    found = outputs_of(name, inputs, capsys)
    before = kept()
    if request.config.getoption("--update-golden"):
        together = {own: found if own == name else before.get(own) for own in RUNS if own == name or own in before}
        SNAPSHOT.write_text(dumps(together) + "\n", encoding="utf-8")
        return
    assert name in before, "not in the snapshot yet: pytest tests/golden --update-golden"
    if not request.config.getoption("--golden-bytes"):
        found["bytes"] = before[name]["bytes"]
    lines = list(differences(before[name], found))
    shown = "\n".join(line[:400] for line in lines[:40])
    assert not lines, f"{len(lines)} differences (if intended: pytest tests/golden --update-golden):\n{shown}"


def test_the_snapshot_has_these_outputs_and_no_others() -> None:
    assert list(kept()) == list(RUNS)
