"""Damaged and hostile inputs, drawn from a seed; each is read by a command, which must refuse or survive it."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adaptermix.errors import UNSAFE
from tests.factories import contents

from .processes import Fault, run

_CPU = "--device cpu --dtype float32"
_EVALUATE = f"evaluate --base encoder --adapter task --task classify --data dev.de.csv {_CPU} --json"
_ALIGN = f"train-align --base causal --pairs de-en.tsv --steps 2 --batch-size 8 --rank 4 --checkpoint-every 1 {_CPU}"
_STORED = (
    f"search task align --base encoder --task classify --dev dev.de.csv --trials 2 --storage j.log {_CPU} --out out"
)
_MOST_SECONDS, _MOST_BYTES = 120.0, 6 * 2**30
_MOST_TEXT = 4000


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file, and a command that reads it.

    Args:
        file: Its path in the folder of the inputs.
        command: The command.
        before: A command that makes the file.
    """

    file: str
    command: str
    before: str = ""


TARGETS = {
    "adapter config": Target(file="one/adapter_config.json", command="merge one two --weights 0.5,0.5 --out out"),
    "adapter weights": Target(file="one/adapter_model.safetensors", command="inspect one two"),
    "adapter manifest": Target(file="task/adaptermix.json", command=_EVALUATE),
    "base config": Target(file="encoder/config.json", command=_EVALUATE),
    "base config (bake)": Target(file="causal/config.json", command="bake --base causal --adapter one --out out"),
    "base weights": Target(file="causal/model.safetensors", command="spectrum causal tuned --device cpu"),
    "tokenizer": Target(file="encoder/tokenizer.json", command=_EVALUATE),
    "tokenizer config": Target(file="encoder/tokenizer_config.json", command=_EVALUATE),
    "rows": Target(file="dev.de.csv", command=_EVALUATE),
    "JSON rows": Target(file="rows.de.jsonl", command=_EVALUATE.replace("dev.de.csv", "rows.de.jsonl")),
    "pairs": Target(file="de-en.tsv", command=f"{_ALIGN} --dry-run --out out"),
    "recipe": Target(file="recipe.yaml", command="run recipe.yaml out=out --dry-run"),
    "output manifest": Target(
        file="made/adaptermix.json",
        command="merge one two --weights 0.4,0.6 --out made --overwrite",
    ),
    "published manifest": Target(
        file="made/adaptermix.json",
        command="push made me/made --base-id me/base --dry-run",
    ),
    "journal": Target(file="j.log", command=_STORED, before=_STORED.replace("--out out", "--out first")),
    "record of test data": Target(
        file="state/tested.jsonl", command=f"{_EVALUATE} --split test", before=f"{_EVALUATE} --split test"
    ),
}

_NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 2.5, 10**30, float("nan"), float("inf"), "", "x", [], {}, [None], {"a": 1}, [[[[]]]]),
    *("\x1b[31mred", "\u202etxt", "a\nb\r", "../../../etc/passwd", "/etc/passwd", "\x00", "x" * 20_000, "\ud800"),
    *(
        "${out}",
        "$HOME",
        "~",
        "<script>alert(1)</script>",
        "a|b",
        "{{ 7 * 7 }}",
        "!!python/object/apply:os.system [id]",
    ),
)


def _places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _change(document: Any, draw: random.Random) -> Any:
    """Put a nasty value, or another name, at a random place of a document."""
    place = draw.choice(_places(document))
    nasty = draw.choice(_NASTY)
    if not place:
        return nasty
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw.random() < 0.2:
        holder[draw.choice([name for name in _NASTY if isinstance(name, str)])] = holder.pop(place[-1])
    else:
        holder[place[-1]] = nasty
    return document


def _bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage bytes: cut, changed, repeated, or with others put in."""
    at = draw.randrange(len(content)) if content else 0
    odd = draw.choice([b"\x00", b"\xff\xfe", b"\x1b[2J", b"\xe2\x80\xae", b"\n", b'"', b"[" * 5000, b"9" * 5000, b"\r"])
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + odd + content[at:],
        lambda: content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        lambda: content + content,
        lambda: b"",
        lambda: content[at:],
    ]
    return draw.choice(ways)()


def mutate(path: Path, draw: random.Random) -> None:
    """Damage a file, by its structure if it has one that can be read."""
    content = path.read_bytes()
    if draw.random() < 0.25:
        path.write_bytes(_bytes(content, draw))
    elif path.suffix == ".json":
        path.write_text(json.dumps(_change(json.loads(content), draw)))
    elif path.suffix in (".jsonl", ".log"):
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(_change(json.loads(lines[at]), draw))
        path.write_text("".join(f"{line}\n" for line in lines))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(_change(yaml.safe_load(content), draw)))
    elif path.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(_change(json.loads(content[8 : 8 + size]), draw)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    else:
        path.write_bytes(_bytes(content, draw))


class HostileInputs:
    """Trials of damaged inputs in a folder.

    Args:
        folder: Folder with the inputs of all commands alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clean: dict[str, Path] = {}
        rows = [{"text": f"it is {n}", "label": ("negative", "positive")[n % 2]} for n in range(8)]
        (folder / "rows.de.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trial(self, name: str, seed: int) -> list[str]:
        """Damage the file of a target, run its command, and return what is wrong."""
        target = TARGETS[name]
        box = self._folder.with_name(f"{self._folder.name}-hostile")
        shutil.rmtree(box, ignore_errors=True)
        shutil.copytree(self._prepared(target), box)
        mutate(box / target.file, random.Random(f"{name} {seed}"))
        before = contents(box)
        ended = run(target.command.split(), box, Fault(deed="memory", size=_MOST_BYTES))
        wrong = []
        if ended.code not in (0, 1, 2):
            wrong.append(f"exit code {ended.code}")
        if "Traceback" in ended.text or (ended.code and len(ended.text.strip().splitlines()) > 3):
            wrong.append("no single sentence")
        if len(ended.text) > _MOST_TEXT + 30_000 * (ended.code == 0):
            wrong.append(f"printed {len(ended.text)} characters")
        if shown := set(UNSAFE.findall(re.sub("[\n\t]", "", ended.text))):
            wrong.append(f"printed {sorted(shown)!r}")
        if ended.seconds > _MOST_SECONDS:
            wrong.append(f"took {ended.seconds:.0f} s")
        if ended.code:
            after = contents(box)
            lost = [path for path in before if path not in after or before[path] != after[path]]
            more = [path for path in after if path not in before and not path.startswith(("state", "tmp"))]
            more += [path for path in after if path.startswith("tmp/adaptermix-")]
            if lost or more:
                wrong.append(f"changed {lost}, left {more}")
        return [f"{text}: {ended.text[-1200:]}" for text in wrong]

    def _prepared(self, target: Target) -> Path:
        if not target.before:
            return self._folder
        if target.before not in self._clean:
            made = self._folder.with_name(f"{self._folder.name}-made-{len(self._clean)}")
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(self._folder, made)
            ended = run(target.before.split(), made)
            assert ended.code == 0, ended.text
            self._clean[target.before] = made
        return self._clean[target.before]
