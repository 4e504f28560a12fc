"""Files that options name are replaced only if they are what the option writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptermix.cli import main
from adaptermix.options.paths import check_replaceable

from ..factories import write_lora
from ..refusals import refuses

FORMS = {
    "predictions": b'{"language": "en", "expected": "a", "answer": "b"}\n',
    "markdown": b"| system | runs |\n",
    "document": b'{\n  "task": "nli",\n  "systems": {}\n}\n',
    "csv": b"module,layer,kind,norm\n",
}


def code(command: list[str]) -> object:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(command)
    return ended.value.code


@pytest.mark.parametrize("option", [*FORMS, "plot"])
def test_only_a_file_of_the_same_form_is_replaced(option: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    check_replaceable(path, option)
    others = {name: content for name, content in FORMS.items() if name != option}
    for content in (b"my notes\n", b"[1]\n", b"\xff\xfe", b"\x89PNG of a camera", *others.values()):
        path.write_bytes(content)
        with refuses(f"replace.other-content: --{option}"):
            check_replaceable(path, option)
        assert path.read_bytes() == content
    for content in (b"", FORMS.get(option, b"\x89PNG...Software\0adaptermix...")):
        path.write_bytes(content)
        check_replaceable(path, option)


def test_a_command_replaces_its_own_files_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "en.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(9))
    )
    answers = [json.dumps({"answer": "ab"[int(rng.integers(2))]}) + "\n" for _ in range(9)]
    (tmp_path / "one.jsonl").write_text("".join(answers))
    note = tmp_path / "note.md"
    command = ["compare", f"s={tmp_path / 'one.jsonl'}", "--task", "classify", "--data", str(tmp_path / "en.jsonl")]
    command += ["--markdown", str(note)]
    note.write_text("# my thesis\n")
    assert code(command) == 1
    assert note.read_text() == "# my thesis\n"
    assert "--markdown replaces only a table of `compare --markdown`" in capsys.readouterr().err
    note.unlink()
    assert code(command) == 0
    first = note.read_bytes()
    assert code(command) == 0
    assert note.read_bytes() == first


def test_pictures_know_where_they_are_from(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for seed, name in enumerate(("a", "b")):
        write_lora(tmp_path / name, {"layers.0.q": (12, 10, 3)}, seed=seed)
    command = ["inspect", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(tmp_path / "p.png")]
    assert code(command) == 0
    assert b"adaptermix" in (tmp_path / "p.png").read_bytes()[:2048]
    assert code(command) == 0
    (tmp_path / "p.png").write_bytes(b"\x89PNG of a camera")
    assert code(command) == 1
