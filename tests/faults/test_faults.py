"""A few trials of scripts/faults: commands that are killed, stopped or out of disk space, and damaged inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import bench_of, write_all
from .hostile import HostileInputs
from .processes import Fault, preload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        preload(patch.setenv)
        path = tmp_path_factory.mktemp("faults")
        write_all(path)
        yield path


def test_a_table_that_was_killed_before_its_rename_leaves_nothing_for_ever(folder: Path) -> None:
    bench = bench_of("spectrum", folder)
    for fault in (Fault(deed="kill", call=bench.calls), Fault(deed="full", call=1), Fault(deed="terminate", call=1)):
        assert bench.trial(fault) == [], fault


@pytest.mark.parametrize(("name", "seed"), [("journal", 1), ("tokenizer config", 3), ("tokenizer config", 10)])
def test_damaged_inputs_end_in_one_sentence_and_leave_nothing(name: str, seed: int, folder: Path) -> None:
    assert HostileInputs(folder).trial(name, seed) == []
