"""A task, a data file or an adapter that does not exist is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from adaptermix.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(stop.code, sorted({"torch", "transformers", "peft", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --base M --task clasify --data x.csv", "Did you mean 'classify'?"),
        ("evaluate --base M --task classify --data de=x.csv", "'x.csv' matches none"),
        ("train-task --base M --task nli --train *.tsv --out o", "'*.tsv' matches none"),
        ("train-align --base M --pairs de-en.tsv --out o", "'de-en.tsv' matches none"),
        ("merge a b --weights 0.9 --out o", "a is not a folder"),
        ("search org/name b --base M --task nli --dev x.tsv --out o", "hf download org/name"),
        ("inspect a", "a is not a folder"),
        ("predict text --base M --adapter a", "a is not a folder"),
    ],
)
def test_typos_are_answered_without_heavy_imports(line: str, message: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *line.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": root, "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() in ("1 []", "2 []"), done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
