"""The entries of a report page: output folders by their manifests, and JSON documents of commands."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from ..errors import ConfigError
from ..io.files import MANIFEST
from ..options.roles import Argument, marks_of
from ..pictures import Picture, pictures_of
from ..pictures.charts import Point
from ..pictures.documents import (
    Document,
    kind_of,
    list_of,
    loss_picture,
    mapping_of,
    modules_heatmap,
    number_of,
    point_of,
    points_of,
    vector_of,
)
from .table import COMMANDS

_DEPTH = 4
"""Levels of folders below a named one that are read, and levels of a JSON document."""
_LARGEST = 2**26
"""Largest JSON file to read, in bytes."""
_SETTINGS = ("adapter", "source", "data", "dev", "split", "rows", "method", "seed")
_FIDELITY = ("strategy", "rank", "norm", "residual", "sign_conflict", "kept", "error", "bytes")
_USES = {"data": "training", "dev": "dev", "calibration": "calibration", "tested": "evaluated before as test data"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one system.

    Args:
        system: Its name.
        measure: The task, the metric and the use of the rows; systems of one measure share a table.
        points: Score per language.
        overall: The mean over languages.
    """

    system: str
    measure: str
    points: Mapping[str, Point]
    overall: Point | None = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """One output, or one JSON document.

    Args:
        name: Its name on the page.
        facts: Names and values, such as the command and the base model.
        inputs: Name, weight and kind of each adapter that was merged.
        data: Name, use, number of rows and languages of each data file.
        scores: Its scores.
        pictures: Its pictures.
    """

    name: str
    facts: list[tuple[str, object]] = field(default_factory=list)
    inputs: list[list[object]] = field(default_factory=list)
    data: list[list[object]] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Return the entries of folders and of JSON files, each with a name that no other entry has.

    Args:
        paths: Outputs of commands, folders of several outputs, and files with a document of `--json`.

    Raises:
        ConfigError: a path does not exist, or has neither an output nor a document.
    """
    entries: list[Entry] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"a folder of the report must exist, and {path} does not. Check the path.", code="report.no-folder"
            )
        more = list(_entries(path, _name_of(path), _DEPTH))
        if len(paths) == 1:
            prefix = f"{_name_of(path)}/"
            for entry in more:
                _rename(entry, entry.name.removeprefix(prefix))
        if not more:
            raise ConfigError(
                f"{path} must be an output of adaptermix, a folder of outputs, or a file with a document of --json, "
                "and has no such content. Name another folder.",
                code="report.no-output",
            )
        entries += more
    used: dict[str, int] = {}
    for entry in entries:
        used[entry.name] = used.get(entry.name, 0) + 1
        if used[entry.name] > 1:
            _rename(entry, f"{entry.name}#{used[entry.name]}")
    return entries


def _rename(entry: Entry, name: str) -> None:
    old = entry.name
    entry.name = name
    entry.scores = [
        Scores(
            system=name if scores.system == old else scores.system,
            measure=scores.measure,
            points=scores.points,
            overall=scores.overall,
        )
        for scores in entry.scores
    ]


def _name_of(path: Path) -> str:
    return path.resolve().stem if path.is_file() else path.resolve().name or str(path)


def _entries(path: Path, name: str, depth: int) -> Iterator[Entry]:
    if path.is_file():
        yield from _of_file(path, name)
    elif (path / MANIFEST).is_file():
        yield _of_output(path, name)
    elif path.is_dir() and depth > 0:
        names: list[str] = []
        with suppress(OSError), os.scandir(path) as listed:
            names = sorted(item.name for item in listed if not item.name.startswith(".") and not item.is_symlink())
        for child in (path / part for part in names):
            if child.suffix == ".json" or child.is_dir():
                yield from _entries(child, f"{name}/{_name_of(child)}", depth - 1)


def _of_file(path: Path, name: str) -> Iterator[Entry]:
    for title, document, settings in _documents(_read(path), name, _DEPTH):
        out = document.get("out")
        if isinstance(out, str) and (path.parent / Path(out).name / MANIFEST).is_file():
            continue  # The manifest of that output is read.
        entry = Entry(name=title)
        entry.facts += [
            ("command", f"adaptermix {kind_of(document)}"),
            ("base", settings.get("base")),
            ("written", _time_of(path)),
            ("split", document.get("split")),
            *((key, _plain(settings.get(key))) for key in _SETTINGS if key != "split"),
        ]
        _add_document(entry, document)
        yield entry


def _read(path: Path) -> object:
    """Return a JSON document; None for a file that is too large, damaged, or not a regular file."""
    try:
        is_read = path.is_file() and path.stat().st_size <= _LARGEST
        return json.loads(path.read_text(encoding="utf-8")) if is_read else None
    except (OSError, ValueError, RecursionError):
        return None


def _documents(value: object, name: str, depth: int) -> Iterator[tuple[str, Document, Document]]:
    """Yield name, document and settings of each document of a command inside a JSON value."""
    content = mapping_of(value)
    if kind_of(value):
        yield name, content, {}
    elif "run" in content and "steps" in content:  # `run.json` in the folder of a recipe's run
        folder = name.rpartition("/")[0]
        for step in map(mapping_of, list_of(content["steps"])):
            if kind_of(step.get("document")):
                title = f"{folder}/{step.get('step')}" if folder else str(step.get("step"))
                yield title, mapping_of(step["document"]), mapping_of(step.get("settings"))
    elif depth > 0:
        items = ((str(n), item) for n, item in enumerate(list_of(value), start=1))
        for key, item in chain(((str(k), v) for k, v in content.items()), items):
            if isinstance(item, Mapping | list):
                yield from _documents(item, f"{name}/{key}", depth - 1)


def _time_of(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"


def _add_document(entry: Entry, document: Document) -> None:
    if kind_of(document) != "evaluate":  # The bars next to the table of scores show it.
        entry.pictures += pictures_of(document)
    entry.scores += list(_scores(document, entry.name))
    best, verdict = mapping_of(document.get("best")), mapping_of(document.get("verdict"))
    if weights := vector_of(best.get("weights")):
        entry.facts.append(("chosen weights", ", ".join(f"{weight:g}" for weight in weights)))
    if (chance := number_of(verdict.get("chance"))) is not None:
        entry.facts.append(("p-value of the gain", f"{chance:.3f}, corrected for the number of candidates"))


def _scores(document: Document, name: str) -> Iterator[Scores]:
    kind = kind_of(document)
    if kind == "evaluate":
        split = document.get("split")
        measure = f"{document['task']}, {document['metric']}" + (f" on {split} rows" if split else "")
        against = mapping_of(document.get("against"))
        if theirs := points_of(against.get("scores")):
            yield Scores(system=str(against.get("name")), measure=measure, points=theirs)
        if points := points_of(document["scores"]):
            yield Scores(system=name, measure=measure, points=points, overall=point_of(document.get("overall")))
    if kind == "retrieve":
        languages = mapping_of(document.get("languages")).items()
        means = {str(key): Point(value=v) for key, value in languages if (v := number_of(value)) is not None}
        measure = "translation retrieval, accuracy over even layers"
        yield Scores(system=name, measure=measure, points=means, overall=point_of(document.get("score")))


def _of_output(folder: Path, name: str) -> Entry:
    manifest = mapping_of(_read(folder / MANIFEST))
    entry = Entry(name=name)
    fidelity = mapping_of(manifest.get("fidelity"))
    entry.facts += [
        ("command", _command(manifest, folder.name)),
        ("base", _base(mapping_of(manifest.get("base")))),
        ("written", _time_of(folder / MANIFEST)),
        ("task", mapping_of(manifest.get("task")).get("name")),
        ("languages", _roles(mapping_of(manifest.get("languages")))),
        *((key.replace("_", " "), _plain(fidelity.get(key))) for key in _FIDELITY),
        ("versions", _roles(mapping_of(manifest.get("versions")))),
    ]
    for row in map(mapping_of, list_of(manifest.get("inputs"))):
        entry.inputs.append([row.get("name"), _plain(row.get("weight")), row.get("kind") or "adapter"])
    for use, title in _USES.items():
        for row in map(mapping_of, list_of(manifest.get(use))):
            languages = ", ".join(map(str, list_of(row.get("languages"))))
            entry.data.append([row.get("name"), title, _plain(row.get("rows")), languages])
    document = _read(folder / "results.json")
    if kind_of(document) == "search":
        _add_document(entry, mapping_of(document))
    scores = mapping_of(manifest.get("scores"))
    if kind_of(scores) == "evaluate":
        entry.scores += list(_scores(scores, name))
    conflict = modules_heatmap("share of sign conflicts", mapping_of(fidelity.get("modules")), "sign_conflict")
    if conflict and number_of(fidelity.get("sign_conflict")):
        entry.pictures.append(Picture(title="interference", charts=[conflict]))
    if loss := loss_picture(_history(folder / "history.jsonl")):
        entry.pictures.append(loss)
    return entry


def _history(path: Path) -> list[Document]:
    """Return the lines of a training log; none of a damaged or a very large file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.stat().st_size <= _LARGEST else []
        return [mapping_of(json.loads(line)) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []


def _command(manifest: Document, out: str) -> str:
    """Return the command line of a manifest; the kind of output if the manifest does not record its command."""
    request = mapping_of(manifest.get("request"))
    name, settings = str(request.get("command") or manifest.get("kind") or ""), mapping_of(request.get("settings"))
    command = COMMANDS.get(name)
    positional = list(marks_of(command.schema(), Argument)) if command and settings else []
    words = ["adaptermix", name, *chain.from_iterable(_words(settings.get(key)) for key in positional)]
    for key, value in settings.items():
        if key not in positional and value is not False:
            words += [f"--{str(key).replace('_', '-')}", *([] if value is True else _words(value))]
    return shlex.join([*words, "--out", out] if settings else words)


def _words(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key}={item}" for key, item in value.items()]
    return [str(item) for item in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _base(base: Document) -> str:
    revision = base.get("revision")
    return f"{base.get('id') or ''}" + (f"@{revision}" if revision else "")


def _roles(roles: Document) -> str:
    """Return names with their values in a line, such as `supervised: en; aligned: de, tr`."""
    values = {
        key: value if isinstance(value, str) else ", ".join(map(str, list_of(value))) for key, value in roles.items()
    }
    return "; ".join(
        f"{key}: {value}" if ", " in value or not value[:1].isdigit() else f"{key} {value}"
        for key, value in values.items()
    )


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)
