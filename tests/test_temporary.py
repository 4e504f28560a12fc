"""Temporary folders, and the removal of unfinished work at the moment an output gets its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptermix.io.files import hidden_path, whole_folder
from adaptermix.io.temporary import temporary_folder, when_written

_KILLED = """
import os, signal
from adaptermix.io.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_folder_is_removed_with_its_lock(parent: Path) -> None:
    with temporary_folder() as folder:
        (folder / "x").write_text("x")
        assert len(list(parent.iterdir())) == 2
    assert list(parent.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(parent: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", _KILLED], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = {path.name for path in parent.iterdir()}
    assert len(left) == 2
    with temporary_folder():
        assert left.isdisjoint(path.name for path in parent.iterdir())


def test_the_folder_of_a_running_process_and_other_files_stay(parent: Path) -> None:
    (parent / "adaptermix-notes").mkdir()
    (parent / "adaptermix-notes.lock").write_text("")
    with temporary_folder() as first, temporary_folder() as second:
        assert first.is_dir()
        assert second.is_dir()
    assert {path.name for path in parent.iterdir()} == {"adaptermix-notes", "adaptermix-notes.lock"}


def test_unfinished_work_is_removed_before_a_signal_ends_the_process(tmp_path: Path) -> None:
    partial, out = tmp_path / "partial", tmp_path / "out"
    partial.write_text("x")

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        partial.unlink()

    with pytest.raises(KeyboardInterrupt), when_written(out, interrupted), whole_folder(out) as folder:
        (folder / "x").write_text("x")
    assert not partial.exists()
    assert (out / "x").read_text() == "x"
    assert not hidden_path(out, "lock").exists()


def test_unfinished_work_of_an_output_that_failed_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    removed: list[Path] = []
    with pytest.raises(ValueError, match="no"), when_written(out, lambda: removed.append(out)), whole_folder(out):
        raise ValueError("no")
    assert removed == []
