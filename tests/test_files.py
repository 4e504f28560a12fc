"""Outputs that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptermix.adapters import open_adapter
from adaptermix.errors import OutputError
from adaptermix.io import files
from adaptermix.io.disk import WriteBehind
from adaptermix.io.files import (
    listed_files,
    output_lock,
    partial_path,
    sha256,
    whole_folder,
    write_whole,
)
from adaptermix.options.paths import digest

from .factories import contents, write_lora
from .refusals import refuses


@pytest.fixture
def umask_022() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def adapter(folder: Path, text: str = "old") -> Path:
    """A folder that may be overwritten, with something nested in it that its manifest lists."""
    (folder / "nested").mkdir(parents=True)
    (folder / "adaptermix.json").write_text(json.dumps({"files": ["adapter_config.json", "nested/file"]}))
    (folder / "adapter_config.json").write_text(text)
    (folder / "nested" / "file").write_text(text)
    return folder


def fail_inside(out: Path, error: type[BaseException], *, overwrite: bool) -> None:
    with whole_folder(out, overwrite=overwrite) as folder:
        (folder / "file").write_text("half")
        raise error


class TestWholeFolder:
    def test_the_folder_appears_when_the_block_ends_and_not_before(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with whole_folder(out) as folder:
            (folder / "file").write_text("new")
            assert not out.exists()
            assert folder.parent == out.parent
        assert contents(tmp_path) == {"out": None, "out/file": b"new"}

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        with whole_folder(tmp_path / "a" / "b" / "out") as folder:
            (folder / "file").write_text("new")
        assert contents(tmp_path / "a" / "b") == {"out": None, "out/file": b"new"}

    def test_a_relative_path_is_of_the_folder_one_started_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        with whole_folder(Path("out")) as folder:
            (folder / "file").write_text("new")
            monkeypatch.chdir(tmp_path / "elsewhere")
        assert contents(tmp_path) == {"elsewhere": None, "out": None, "out/file": b"new"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_a_failure_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error):
            fail_inside(tmp_path / "out", error, overwrite=False)
        assert contents(tmp_path) == {}

    def test_overwriting_replaces_the_whole_folder(self, tmp_path: Path) -> None:
        out = adapter(tmp_path / "out")
        with whole_folder(out, overwrite=True) as folder:
            (folder / "file").write_text("new")
            assert (out / "nested" / "file").read_text() == "old"
        assert contents(tmp_path) == {"out": None, "out/file": b"new"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_failure_keeps_the_old_folder(self, tmp_path: Path, error: type[BaseException]) -> None:
        out = adapter(tmp_path / "out")
        before = contents(tmp_path)
        with pytest.raises(error):
            fail_inside(out, error, overwrite=True)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_the_old_folder_is_replaced_with_and_without_an_exchange_in_one_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
    ) -> None:
        if not can_exchange:
            monkeypatch.setattr(files, "exchange", lambda first, second: False)
        with whole_folder(adapter(tmp_path / "out"), overwrite=True) as folder:
            (folder / "file").write_text("new")
        assert contents(tmp_path) == {"out": None, "out/file": b"new"}

    def test_a_failure_of_the_last_rename_puts_the_old_folder_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = adapter(tmp_path / "out")
        before = contents(tmp_path)
        rename, calls = os.replace, []

        def second_fails(source: object, target: object) -> None:
            calls.append(target)
            if len(calls) == 2:
                raise OSError("no space left")
            rename(source, target)  # type: ignore[arg-type]

        monkeypatch.setattr(files, "exchange", lambda first, second: False)
        monkeypatch.setattr(os, "replace", second_fails)
        with pytest.raises(OSError, match="no space left"), whole_folder(out, overwrite=True):
            pass
        assert len(calls) == 3
        assert contents(tmp_path) == before

    def test_an_output_that_a_killed_process_had_moved_away_comes_back(self, tmp_path: Path) -> None:
        adapter(tmp_path / ".out.adaptermix-old")
        (tmp_path / ".out.adaptermix-new").mkdir()
        with refuses("output.exists"), whole_folder(tmp_path / "out"):
            pytest.fail("the block ran")
        assert sorted(contents(tmp_path)) == sorted(
            ["out", "out/adapter_config.json", "out/adaptermix.json", "out/nested", "out/nested/file"]
        )

    def test_what_appears_while_the_block_runs_is_kept(self, tmp_path: Path) -> None:
        def write() -> None:
            with whole_folder(tmp_path / "out") as folder:
                (folder / "file").write_text("new")
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "thesis.tex").write_text("years of work")

        with refuses("output.exists"):
            write()
        assert contents(tmp_path) == {"out": None, "out/thesis.tex": b"years of work"}

    def test_the_manifest_lists_the_files(self, tmp_path: Path) -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            for path in (folder / "adaptermix.json", folder / "inner" / "adaptermix.json"):
                path.write_text('{"kind": "merge"}')
            (folder / "inner" / "x").write_text("x")
        found = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert found == {"kind": "merge", "files": ["inner/adaptermix.json", "inner/x"]}
        inner = json.loads((tmp_path / "out" / "inner" / "adaptermix.json").read_text())
        assert inner == {"kind": "merge", "files": ["x"]}

    def test_an_existing_folder_is_refused_before_the_block(self, tmp_path: Path) -> None:
        out = adapter(tmp_path / "out")
        before = contents(tmp_path)
        with refuses("output.exists"), whole_folder(out):
            pytest.fail("the block ran")
        assert contents(tmp_path) == before

    def test_a_link_is_refused_and_not_replaced(self, tmp_path: Path) -> None:
        target = adapter(tmp_path / "target")
        (tmp_path / "out").symlink_to(target)
        before = contents(tmp_path)
        with refuses("output.is-link"), whole_folder(tmp_path / "out", overwrite=True):
            pytest.fail("the block ran")
        assert contents(tmp_path) == before

    @pytest.mark.usefixtures("umask_022")
    def test_others_may_read_what_was_written(self, tmp_path: Path) -> None:
        """Temporary files are private by default, and safetensors writes 0600; an output is an ordinary folder."""
        with whole_folder(tmp_path / "out") as folder:
            (folder / "nested").mkdir()
            for path in (folder / "file", folder / "nested" / "file"):
                path.write_text("new")
                path.chmod(0o600)
            write_whole(folder / "whole", b"new")
        modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
        assert modes == {
            "out": 0o755,
            "out/nested": 0o755,
            "out/file": 0o644,
            "out/nested/file": 0o644,
            "out/whole": 0o644,
        }


class TestOutputLock:
    def test_another_thread_is_refused_until_the_block_ends(self, tmp_path: Path) -> None:
        out = tmp_path / "a" / "b" / "out"
        errors: list[str] = []

        def other() -> None:
            try:
                with output_lock(out.parent / ".." / "b" / "out"):
                    errors.append("none")
            except OutputError as error:
                errors.append(str(error))

        def run_other() -> None:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        with output_lock(out), output_lock(out):
            run_other()
        run_other()
        assert errors[0].startswith("another process is working on")
        assert errors[1] == "none"
        assert contents(tmp_path) == {}

    def test_a_lock_file_of_a_killed_process_is_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / ".out.adaptermix-lock").write_text("")
        with output_lock(tmp_path / "out"):
            pass
        assert contents(tmp_path) == {}


class TestWriteWhole:
    def test_the_content_is_written(self, tmp_path: Path) -> None:
        write_whole(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": b"new"}

    def test_an_existing_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        write_whole(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": b"new"}

    def test_a_file_that_a_killed_process_left_is_reused(self, tmp_path: Path) -> None:
        (tmp_path / ".file.adaptermix-file").write_text("longer than the new content")
        write_whole(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": b"new"}

    @pytest.mark.skipif(sys.platform == "win32", reason="flock")
    def test_while_another_process_writes_the_same_file_each_has_its_own(self, tmp_path: Path) -> None:
        import fcntl

        with (tmp_path / ".file.adaptermix-file").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            other.write("half")
            other.flush()
            write_whole(tmp_path / "file", b"new")
            assert contents(tmp_path) == {".file.adaptermix-file": b"half", "file": b"new"}

    def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(source: object, target: object) -> None:
            raise OSError("no space left")

        (tmp_path / "file").write_text("old")
        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            write_whole(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": b"old"}

    def test_a_pipe_is_written_through_and_stays(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        write_whole(tmp_path / "pipe", b"new")
        assert os.read(reader, 9) == b"new"
        os.close(reader)
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    def test_a_link_stays_and_its_file_gets_the_content(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        (tmp_path / "link").symlink_to("file")
        write_whole(tmp_path / "link", b"new")
        assert os.readlink(tmp_path / "link") == "file"
        assert (tmp_path / "file").read_text() == "new"

    @pytest.mark.usefixtures("umask_022")
    def test_others_may_read_it(self, tmp_path: Path) -> None:
        write_whole(tmp_path / "file", b"new")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_list_that_somebody_edited_names_no_file_of_another_folder(tmp_path: Path) -> None:
    names = ["a", "b/c", "/etc/passwd", "../x", "b/../../x", "nul\0", 7, None, ["a"]]
    (tmp_path / "adaptermix.json").write_text(json.dumps({"files": names}))
    (tmp_path / "a").write_text("content")
    assert listed_files(tmp_path) == {"adaptermix.json", "a", "b/c"}
    assert len(digest(tmp_path)) == 64


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adaptermix.json")
    assert listed_files(tmp_path) is None
    write_lora(tmp_path, {"model.layers.0.q_proj": (4, 3, 2)})
    with refuses(r"manifest.not-file: adaptermix\.json"):
        open_adapter(tmp_path)


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_unfinished_work_lies_hidden_beside_the_output() -> None:
    assert partial_path(Path("a/out")) == Path("a/.out.partial")


class TestWriteBehind:
    def test_the_disk_begins_with_what_is_there_and_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, int]] = []
        busy = threading.Event()

        def hint(file: int, start: int, size: int, advice: int) -> None:
            told.append((start, size))
            busy.wait()

        monkeypatch.setattr(os, "posix_fadvise", hint, raising=False)
        monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
        step = WriteBehind._STEP
        with (tmp_path / "x").open("wb") as file, WriteBehind(file.fileno()) as behind:
            behind.reached(step - 1)
            assert told == []
            behind.reached(step)
            behind.reached(3 * step)  # while the disk is busy
            busy.set()
        assert told == [(0, step)]

    def test_systems_without_hints_are_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
        with (tmp_path / "x").open("wb") as file, WriteBehind(file.fileno()) as behind:
            behind.reached(WriteBehind._STEP * 9)


def test_a_file_system_without_locks_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"out": None, "out/file": b"new"}
