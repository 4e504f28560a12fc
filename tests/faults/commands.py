"""The commands that write, on tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.golden.inputs import write_inputs

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
COMMANDS = {
    "train-task": f"train-task --base encoder {_ROWS} --dev dev.en.csv --evaluate-every 2 {_TRAIN} --out out",
    "train-align": f"train-align --base causal --pairs de-en.tsv {_TRAIN} --out out",
    "train-align-closed": f"train-align --base causal --pairs de-en.tsv --fit least-squares --rank 4 {_CPU} --out out",
    "train-joint": f"train-joint --base causal {_ROWS} --pairs de-en.tsv {_TRAIN} --out out",
    "train-fusion": f"train-fusion --base encoder --task classify --train train.jv.csv --source train.en.csv {_TRAIN} "
    "--out out",
    "train-stack": f"train-stack --encoder encoder --base causal --texts texts.txt {_TRAIN} --out out",
    "merge": "merge one two --weights 0.5,0.5 --out out",
    "merge-ties": "merge one two --weights 1,1 --method ties --set density=0.5 --rank 8 --max-residual 1 --out out",
    "merge-checkpoint": "merge one two --weights 0.5,0.25 --form dense --base causal --out out",
    "extract": "extract --base causal --tuned tuned --rank 3 --device cpu --out out",
    "statistics": f"statistics one --base causal --data texts.txt {_CPU} --out out.safetensors",
    "search": f"search task align --base encoder --task classify --dev dev.de.csv dev.en.csv --grid 0.25,0.5,0.75 "
    f"{_CPU} --out out",
    "search-trials": f"search task align --base encoder --task classify --dev dev.de.csv --trials 4 --storage j/t.log "
    f"{_CPU} --out out",
    "bake": "bake --base causal --adapter one --device cpu --out out",
    "bake-nf4": "bake --base causal --adapter one --quantize nf4 --strategy requantize --keep-at-least 0 --device cpu "
    "--out out",
    "tune": "tune tune.yaml --vary train-task.learning_rate=0.01,0.02 --out out",
    "run": "run recipe.yaml out=out",
    "evaluate": f"evaluate --base encoder --adapter task --task classify --data dev.de.csv {_CPU} --predictions out",
    "spectrum": "spectrum causal tuned --csv out.csv --device cpu",
    "inspect": "inspect one two --plot out.png",
}
"""Each command that writes, by a name."""


def write_all(folder: Path) -> None:
    """Write the inputs of all commands."""
    write_inputs(folder)
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "tune.yaml").write_text(_TUNED)
