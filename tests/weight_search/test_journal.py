"""Journals that are cut off, damaged, forged, or locked by a process that is gone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptermix.errors import OutputError
from adaptermix.weight_search.ask_tell import SequentialTrials
from adaptermix.weight_search.liveness import works
from adaptermix.weight_search.parameters import Choice, Interval
from adaptermix.weight_search.space import Candidate, CandidateList, Space
from adaptermix.weight_search.storage import hidden, open_study, without_password
from adaptermix.weight_search.trial_store import TrialStore
from adaptermix.weight_search.trials import pack, unpack

from ..refusals import refuses

LISTED = CandidateList([Candidate(weights=(weight,)) for weight in (0.1, 0.5, 0.9)])
SPACE = Space(count=2, simplex=False, reach=(0.0, 1.0), options={})


def store(place: Path, searched: Any = LISTED, **given: Any) -> TrialStore:
    return TrialStore((place, "s"), searched=searched, settings={"a": 1}, limit=3, rows=2, **given)


def run(found: TrialStore, most: int = 9) -> int:
    """Run the trials that are left and return how many."""
    count = 0
    found.save_answers(["x", "y"])
    while count < most and (asked := found.ask()):
        found.tell(replace(asked, answers=("x", None), seconds=1.0), 0.5)
        count += 1
    return count


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal of a search with two of three trials done."""
    assert run(store(tmp_path / "log"), most=2) == 2
    return tmp_path / "log"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refuses("storage.unreachable: it is not a file"):
        open_study((tmp_path / "pipe", "study"))


@pytest.mark.parametrize("lost", [1, 2, 10, 60])
def test_a_last_line_that_was_cut_off_is_removed(journal: Path, lost: int) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-lost])
    found = store(journal)
    assert run(found) in (1, 2)
    assert len(found.trials()) == 3
    for line in journal.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("tail", [b'{"op_code":4,"wor', b"\0" * 700, b"\xff\xfe", b"x" * 2**20 + b"y"])
def test_what_a_crash_appended_is_removed(journal: Path, tail: bytes) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    assert run(store(journal)) == 1
    assert journal.read_bytes().startswith(whole + b"{")


def test_a_line_that_is_cut_off_while_a_search_runs_does_not_stop_it(journal: Path) -> None:
    found, other = store(journal), store(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"trial_id":0,"user_at')
    assert run(found) == 1
    assert len(other.trials()) == 3


def test_a_journal_that_was_cut_off_in_its_first_line_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"op_code":0,"worker_id":"x')
    assert run(store(tmp_path / "log")) == 3


@pytest.mark.parametrize("text", ["dear diary", "dear diary\n", "[1]\n", "null\n", '{"a": 1}\n', "\xff\xfe\n"])
def test_a_file_of_something_else_is_refused_and_not_changed(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    with refuses("storage.unreachable"):
        store(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "null", "{}", '{"op_code": 99}', '{"op_code": 4}', '{"op_code": 6}']
)
def test_a_line_of_another_form_in_the_middle_is_told(journal: Path, line: str) -> None:
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    with refuses("storage.unreachable"):
        store(journal)


def _forged(journal: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change every note of a name in a journal."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    count = 0
    for line in lines:
        for key in ("user_attr",):
            if name in line.get(key, {}):
                line[key][name] = change(line[key][name])
                count += 1
    assert count
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


BOMB = base64.b85encode(zlib.compress(b"[" + b" " * 2**29 + b"]", 9)).decode()


@pytest.mark.parametrize("name", ["answers", "baseline"])
@pytest.mark.parametrize(
    "value",
    [
        *(None, 1, [], "", "?", "no base85 ~", pack([]), pack(["x"]), pack(["x", "y", "z"])),
        base64.b85encode(b"no zlib").decode(),
        base64.b85encode(zlib.compress(b'["x", 1]')).decode(),
        base64.b85encode(zlib.compress(b"[" * 99999)).decode(),
        base64.b85encode(zlib.compress(b'["x", "y"]')[:-3]).decode(),
        BOMB,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_answers_of_another_form_are_told(journal: Path, name: str, value: object) -> None:
    _forged(journal, name, lambda _: value)
    if name == "baseline" and value is None:  # as if there were none
        assert store(journal).saved_answers() is None
        return
    with refuses("storage.damaged: log"):
        store(journal)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("candidate", value) for value in (3, -1, True, "0", None, [0], 1.0, 2**80)),
        *(("seconds", value) for value in ("1", None, float("nan"), float("inf"), [1.0], True)),
    ],
)
def test_notes_of_another_form_are_told(journal: Path, name: str, value: object) -> None:
    _forged(journal, name, lambda _: value)
    with pytest.raises(OutputError, match=r"trial 1 in it is damaged: |--storage must be a journal file"):
        store(journal)


@pytest.mark.parametrize("settings", [None, [], "x", 1, {"a": 2}, {}])
def test_settings_of_another_form_are_others(journal: Path, settings: object) -> None:
    _forged(journal, "settings", lambda _: settings)
    if settings is None:  # of a study that had none yet
        assert len(store(journal).trials()) == 2
        return
    with refuses("study.other-settings: a"):
        store(journal)


@pytest.mark.parametrize("value", [2.0, -1.0, "x", None, True])
def test_a_parameter_outside_its_range_is_told(tmp_path: Path, value: object) -> None:
    assert run(store(tmp_path / "log", SPACE), most=1) == 1
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line in lines:
        if "param_value_internal" in line:
            line["param_value_internal"] = value
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OutputError, match=r"is damaged|--storage must be a journal file"):
        store(tmp_path / "log", SPACE)


@pytest.mark.parametrize("worker", [None, 1, "x", [], ["h"], [1, 2, 3], ["h", "p", "t"], [None, None, None], {}])
def test_a_running_trial_of_nobody_is_given_again(
    tmp_path: Path, worker: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    found = store(tmp_path / "log")
    asked = found.ask()
    assert asked
    found._open[asked.number].set_user_attr("worker", worker)
    (trial,) = found._study.get_trials(deepcopy=False)
    start = time.time()
    trial.datetime_start = datetime.fromtimestamp(start)
    for seconds, lives in ((0, True), (4, True), (6, False)):
        monkeypatch.setattr(time, "time", lambda now=start + seconds: now)
        assert works(trial) is lives


def test_a_reused_process_number_is_another_worker(tmp_path: Path) -> None:
    import socket

    import psutil

    found = store(tmp_path / "log")
    found.ask()
    (trial,) = found._study.get_trials(deepcopy=False)
    started = psutil.Process(os.getppid()).create_time()
    for start, lives in ((started, True), (started - 1000, False), (started + 1000, False)):
        trial.user_attrs["worker"] = [socket.gethostname(), os.getppid(), "another", start]
        assert works(trial) is lives


def test_an_interrupt_between_a_trial_and_its_note_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.weight_search import trial_store as module

    found = store(tmp_path / "log")

    def interrupted(process: int) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "started", interrupted)
        with pytest.raises(KeyboardInterrupt):
            found.ask()
    other = store(tmp_path / "log")
    assert run(other) == 3
    assert not other.is_busy()


KILLED_INSIDE = """
import os, signal, sys
from pathlib import Path
from adaptermix.weight_search import journal
from tests.weight_search.test_journal import store
found = store(Path(sys.argv[1]))
journal._cut = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
found.ask()
"""


@pytest.mark.parametrize("place", ["log", "sub/t.log"])
def test_a_process_that_is_killed_inside_the_lock_leaves_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", KILLED_INSIDE, place]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    monkeypatch.chdir(tmp_path)
    with open(place, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    assert run(store(Path(place))) == 3


def test_proposals_of_another_form_are_told(tmp_path: Path) -> None:
    parameters = {"x": Interval(0.0, 1.0), "y": Choice((1, 2))}
    found = SequentialTrials(tmp_path / "log", parameters, sampler="random", seed=0)
    found.point(0)
    found.tell(0.5, "note")
    text = (tmp_path / "log").read_text()
    for name, forged in (
        ("value", text.replace("0.5", '"x"')),
        ("parameter", re.sub(r'"param_value_internal":[^,]*', '"param_value_internal":99', text)),
    ):
        assert forged != text, name
        (tmp_path / "log").write_text(forged)
        with pytest.raises(OutputError, match="must be a journal"):
            SequentialTrials(tmp_path / "log", parameters, sampler="random", seed=0)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se@cr@et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:sec/ret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://secret@host", "rediss://***@host"),
        ("grpc://me:secret@host:13000", "grpc://me:***@host:13000"),
        ("grpc://secret@host:13000", "grpc://***@host:13000"),
        ("grpc://host?token=secret", "grpc://host?token=***"),
        ("redis://host?x=1&api_key=secret#y", "redis://host?x=1&api_key=***#y"),
        ("mysql://host?ssl_key_password=secret", "mysql://host?ssl_key_password=***"),
        ("postgresql://host?pass%77ord=secret", "postgresql://host?pass%77ord=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret%3B", "mssql+pyodbc:///?odbc_connect=***"),
        ("sqlite:////data/a@b/t.db", "sqlite:////data/a@b/t.db"),
        ("mysql+pymysql://me@host/db?PASSWD=secret", "mysql+pymysql://me@host/db?PASSWD=***"),
        ("sqlite:///folder/file.db", "sqlite:///folder/file.db"),
        ("folder/t.log", "folder/t.log"),
    ],
)
def test_passwords_of_storages_are_hidden(place: str, shown: str) -> None:
    assert without_password(place) == shown
    assert "secret" not in hidden(place, f"cannot connect with {place!r}")


def test_answers_are_packed_and_unpacked() -> None:
    assert unpack(pack(["ä", None]), 2) == ["ä", None]
