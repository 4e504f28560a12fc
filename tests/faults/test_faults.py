"""A few trials of scripts/faults: commands that are killed, stopped or out of disk space, and damaged inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import bench_of, write_all
from .hostile import HostileInputs
from .processes import Fault, preload
from .trials import Bench

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        preload(patch.setenv)
        path = tmp_path_factory.mktemp("faults")
        write_all(path)
        yield path


@pytest.fixture(scope="module")
def merge(folder: Path) -> Bench:
    return bench_of("merge", folder)


def test_a_table_that_was_killed_before_its_rename_leaves_nothing_for_ever(folder: Path) -> None:
    bench = bench_of("spectrum", folder)
    for fault in (Fault(deed="kill", call=bench.calls), Fault(deed="full", call=1), Fault(deed="terminate", call=1)):
        assert bench.trial(fault) == [], fault


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(deed=deed, call=call) for deed, call in (("kill", 9), ("interrupt", 7), ("terminate", 13))),
        *(Fault(deed="full", call=8), Fault(deed="files", size=12), Fault(deed="read-only"), Fault(deed="two")),
    ],
    ids=lambda fault: fault.deed,
)
def test_a_merge_is_whole_or_absent_after_a_fault(fault: Fault, merge: Bench) -> None:
    assert merge.trial(fault) == []


def test_verify_removes_the_temporary_files_of_a_killed_verify(folder: Path) -> None:
    bench = bench_of("verify", folder)
    assert bench.calls
    assert bench.trial(Fault(deed="kill", call=bench.calls)) == []


@pytest.mark.parametrize(("name", "seed"), [("journal", 1), ("tokenizer config", 3), ("tokenizer config", 10)])
def test_damaged_inputs_end_in_one_sentence_and_leave_nothing(name: str, seed: int, folder: Path) -> None:
    assert HostileInputs(folder).trial(name, seed) == []
