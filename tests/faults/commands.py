"""The commands that write, on tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.golden.inputs import write_inputs

from .processes import run
from .trials import Bench

_CPU = "--device cpu --dtype float32"
_TRAIN = f"--steps 4 --batch-size 8 --rank 4 --learning-rate 0.01 --checkpoint-every 1 {_CPU}"
_ROWS = "--task classify --train train.en.csv"
_RECIPE = """
version: 1
variables: {out: unset}
steps:
  - train-align: {base: causal, pairs: [de-en.tsv], out: "${out}/align", steps: 2, batch_size: 8, device: cpu}
  - merge: {adapters: [one, "${out}/align"], weights: [0.5, 0.5], out: "${out}/merged"}
"""
_TUNED = """
version: 1
variables: {out: unset}
steps:
  - train-task: {base: encoder, task: classify, head: classes, train: [train.en.csv], out: "${out}/task", steps: 2,
      batch_size: 8, device: cpu, dtype: float32}
  - evaluate: {base: encoder, adapter: "${out}/task", task: classify, data: [dev.en.csv], device: cpu, dtype: float32}
"""
_CLASSIFY = "--task classify"
_EVALUATE = f"evaluate --base encoder --adapter task {_CLASSIFY} --data dev.de.csv {_CPU}"
_BAKE = "bake --base causal --adapter one --device cpu --out out"
_FIRST = (
    "merge one two --weights 0.5,0.5 --out made",
    f"train-stack --encoder encoder --base causal --texts texts.txt {_TRAIN} --out stack",
    f"train-task --base causal {_ROWS} --head classes --head-pooling mean {_TRAIN} --out teacher",
    f"{_EVALUATE} --predictions answers.de.jsonl",
)
"""Commands that make inputs of the others."""
COMMANDS = {
    "train-task": f"train-task --base encoder {_ROWS} --dev dev.en.csv --evaluate-every 2 {_TRAIN} --out out",
    "train-align": f"train-align --base causal --pairs de-en.tsv {_TRAIN} --out out",
    "train-align-closed": f"train-align --base causal --pairs de-en.tsv --fit least-squares --rank 4 {_CPU} --out out",
    "train-joint": f"train-joint --base causal {_ROWS} --pairs de-en.tsv {_TRAIN} --out out",
    "train-fusion": f"train-fusion --base encoder {_CLASSIFY} --train train.jv.csv --source train.en.csv {_TRAIN} "
    "--out out",
    "train-stack": f"train-stack --encoder encoder --base causal --texts texts.txt {_TRAIN} --out out",
    "train-stack-task": f"train-stack --base stack --teacher teacher {_ROWS} {_TRAIN} --out out",
    "merge": "merge one two --weights 0.5,0.5 --out out",
    "merge-ties": "merge one two --weights 1,1 --method ties --set density=0.5 --rank 8 --max-residual 1 --out out",
    "merge-dense": "merge one two --weights 0.5,0.25 --form dense --base causal --out out",
    "merge-checkpoints": "merge causal tuned --base causal --weights 0.5,0.5 --out out",
    "merge-fuse": f"merge task align --method fuse --base encoder {_CLASSIFY} --train train.en.csv --set steps=4 "
    "--weights 0.5,0.5 --device cpu --out out",
    "extract": "extract --base causal --tuned tuned --rank 3 --device cpu --out out",
    "statistics": f"statistics one --base causal --data texts.txt {_CPU} --out out.safetensors",
    "search": f"search task align --base encoder {_CLASSIFY} --dev dev.de.csv dev.en.csv --grid 0.25,0.5,0.75 "
    f"{_CPU} --out out",
    "search-trials": f"search task align --base encoder {_CLASSIFY} --dev dev.de.csv --trials 4 --storage j/t.log "
    f"{_CPU} --out out",
    "bake": _BAKE,
    "bake-nf4": f"{_BAKE} --quantize nf4 --strategy requantize --keep-at-least 0",
    "bake-calibrated": f"{_BAKE} --quantize nf4 --strategy calibrated --calibration texts.txt --keep-at-least 0",
    "tune": "tune tune.yaml --vary train-task.learning_rate=0.01,0.02 --out out",
    "run": "run recipe.yaml out=out",
    "evaluate": f"{_EVALUATE} --predictions out",
    "retrieve": f"retrieve --base causal --data de-en.tsv {_CPU} --plot out.png",
    "compare": f"compare task=answers.de.jsonl base=answers.de.jsonl {_CLASSIFY} --data dev.de.csv --markdown out.md "
    "--document out.json",
    "spectrum": "spectrum causal tuned --csv out.csv --device cpu",
    "inspect": "inspect one two --plot out.png",
    "export": "export one --for vllm --out out",
    "verify": "verify made",
    "push": "push made me/made --base-id me/base --dry-run",
}
"""Each command that writes, by a name."""
OUTPUTS: dict[str, tuple[str, ...]] = {
    "run": ("out/align", "out/merged"),
    "tune": ("out/trials/1/task", "out/trials/2/task"),
    "verify": (),
    "push": (),
}
"""The outputs of a command that appear whole or not at all, where it is not `out` alone."""
VARYING = ("search-trials",)
"""Commands whose proposals depend on the name of the process, which is another in each run."""


def write_all(folder: Path) -> None:
    """Write the inputs of all commands."""
    write_inputs(folder)
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "tune.yaml").write_text(_TUNED)
    for command in _FIRST:
        ended = run(command.split(), folder)
        assert ended.code == 0, ended.text


def bench_of(name: str, folder: Path) -> Bench:
    """Return the bench of a command in the folder of the inputs."""
    return Bench(folder, COMMANDS[name].split(), outputs=OUTPUTS.get(name, ("out",)), varies=name in VARYING)
