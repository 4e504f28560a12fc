"""Adapter folders with changed or missing bytes are refused, or read as something sound."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from adaptermix.adapters import open_adapter
from adaptermix.errors import AdapterMixError

from ..factories import CONFIG, WEIGHTS
from .test_hostile import WRONG, bounded, check_line, sound, twice


def outcome(folder: Path) -> str:
    with bounded():
        try:
            state = open_adapter(folder).read()
        except AdapterMixError as error:
            check_line(error)
            return "refused"
    assert state.updates
    return "read"


@pytest.mark.parametrize("seed", range(80))
def test_a_header_with_changed_bytes_is_refused_or_read(tmp_path: Path, seed: int) -> None:
    """Any other exception fails the test."""
    rng = random.Random(seed)
    folder = sound(tmp_path)
    data = bytearray((folder / WEIGHTS).read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(20):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(0 if rng.random() < 0.2 else 8, end)
            changed[at] = rng.choice([rng.randrange(256), ord(rng.choice('"{}[]:,0123456789-eF.'))])
        (folder / WEIGHTS).write_bytes(changed)
        outcome(folder)


@pytest.mark.parametrize("seed", range(40))
def test_settings_with_changed_bytes_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(1000 + seed)
    folder = sound(tmp_path)
    data = (folder / CONFIG).read_bytes()
    for _ in range(20):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(len(data))] = rng.choice(
                [rng.randrange(256), ord(rng.choice('"{}[]:,0123456789-e.'))]
            )
        (folder / CONFIG).write_bytes(changed)
        outcome(folder)


@pytest.mark.parametrize("seed", range(40))
def test_settings_of_wrong_types_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(2000 + seed)
    folder = sound(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(20):
        changed = config | {name: rng.choice(WRONG) for name in rng.sample(sorted(config), rng.randint(1, 3))}
        (folder / CONFIG).write_text(json.dumps(changed))
        outcome(folder)


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    for at in range(0, len(data), 11):
        (folder / WEIGHTS).write_bytes(data[:at])
        assert outcome(folder) == "refused"


def test_the_same_name_twice_is_refused_or_read_as_one(tmp_path: Path) -> None:
    twice(sound(tmp_path))
    outcome(tmp_path)
