"""Small training files."""

from __future__ import annotations

import json
from pathlib import Path

from adaptermix.progress import Silent

COLOURS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß", "black": "schwarz", "grey": "grau"}


def write_pairs(folder: Path) -> list[str]:
    """Two pair files: twelve de-en pairs and three fr-en pairs."""
    de = [f"{pre} {b}\t{pr} {a}\n" for pre, pr in (("das", "the"), ("ein", "a")) for a, b in COLOURS.items()]
    fr = [f"le {word}\tthe {word}\n" for word in ("un", "deux", "trois")]
    (folder / "de-en.tsv").write_text("".join(de), encoding="utf-8")
    (folder / "fr-en.tsv").write_text("".join(fr), encoding="utf-8")
    return [str(folder / "de-en.tsv"), str(folder / "fr-en.tsv")]


def write_slots(folder: Path, name: str = "train.en.jsonl") -> str:
    """Six commands with one slot each."""
    rows = [{"text": f"go {colour}", "slots": [{"type": "c", "value": colour[0]}]} for colour in COLOURS]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


class Notes(Silent):
    """Keeps what a person is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)
