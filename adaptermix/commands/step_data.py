"""The data files of a step of a recipe, each with its use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..errors import AdapterMixError, Coded, DataError
from ..io.files import real_path
from ..options import Settings
from ..options.roles import Form, data_options
from ..provenance.row_hashes import RowHashes
from ..tasks.data import DataFile, find_files, read_pairs
from ..tasks.data.files import UsedRows
from ..tasks.data.parallel import read_parallel


class NamedFile(DataFile):
    """A file of which only the name is known: a step has yet to make it, or it is on the Hub."""

    def hashes(self) -> dict[str, str]:
        """Return the name instead of the hashes."""
        return {"text": str(self.path)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TestFile:
    """A file that a step evaluates as test data; see `adaptermix.tasks.splits.Known`.

    Args:
        step: Number of the step.
        file: The file.
    """

    __test__ = False  # pytest

    step: int
    file: DataFile

    @property
    def name(self) -> str:
        """The file's name."""
        return self.file.path.name

    @property
    def file_hashes(self) -> set[str]:
        """Hashes of the file as a whole."""
        return set(self.file.hashes().values())

    @property
    def picked(self) -> str | None:
        """The rows that are used, as `START:STOP[:STEP]`; None for all."""
        return self.file.used.picked if self.file.used else None

    @property
    def hashes(self) -> RowHashes | None:
        """The rows; None where they cannot be read yet."""
        return self.file.row_hashes()


class Request(NamedTuple):
    """How the rows of a step are read.

    Args:
        task: Name of its task, if it has one.
        columns: The column of each field whose name differs.
    """

    task: str | None
    columns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, settings: Settings) -> Request:
        """Return it for the settings of a step."""
        task, columns = getattr(settings, "task", None), getattr(settings, "columns", {})
        return cls(None if task is None else str(task), tuple(columns.items()))


def data_files(settings: Settings) -> list[tuple[str, DataFile]]:
    """Return the data files of a step, each after its use, with the selected rows.

    Files that cannot be read have no rows; the step itself will say why.
    """
    used = []
    for name, mark in data_options(settings).items():
        arguments: Sequence[str] = getattr(settings, name)
        rows = getattr(settings, mark.rows) if mark.rows else None
        there = []
        for argument in arguments:
            files = _named(argument, rows)
            used += [(mark.use, file) for file in files]
            there += [] if files else [argument]
        used += [(mark.use, file) for file in _read(mark.form, Request.of(settings), there, rows)]
    return used


def _named(argument: str, rows: str | None) -> list[DataFile]:
    """Return the files that an argument names if they are not on this machine."""
    try:
        files = find_files([argument])
    except DataError:
        files = [DataFile(path=Path(argument.rpartition("=")[2]), languages=())]
    else:
        if all(type(file) is DataFile for file in files):
            return []
    return [NamedFile(path=file.path, languages=(), used=UsedRows(tuple, rows)) for file in files]


def _read(form: Form, request: Request, arguments: Sequence[str], rows: str | None) -> Sequence[DataFile]:
    if not arguments:
        return ()
    files = find_files(arguments)
    marks = tuple((file.path.absolute(), file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files)
    try:
        return _read_once(form, request, tuple(arguments), rows, marks)
    except AdapterMixError:
        return files


@lru_cache(maxsize=64)
def _read_once(
    form: Form, request: Request, arguments: tuple[str, ...], rows: str | None, _marks: object
) -> Sequence[DataFile]:
    """Read files; the candidates of a search over settings have them in common."""
    return _READERS[form](request, arguments, rows)


def _of_task(request: Request, arguments: Sequence[str], rows: str | None) -> Sequence[DataFile]:
    if request.task is None:  # of `statistics`, whose data are then texts
        return _texts(request, arguments, rows)
    from ..tasks import get_task

    return get_task(request.task, dict(request.columns)).read(arguments, rows=rows)[1]


def _texts(_request: Request, arguments: Sequence[str], rows: str | None) -> Sequence[DataFile]:
    from ..tasks.data.texts import texts_of

    return texts_of(arguments, rows=rows)[1]


def faults_of_data(settings: Settings, made: Collection[Path]) -> list[tuple[str, Coded]]:
    """Return the faults of the data files of a step, each after the option that names the file.

    Files are read as the step will read them: they must be there, have the form of the task, rows in the requested
    range, and known languages. Data sets of the Hub are not read.

    Args:
        settings: The settings of the step.
        made: Outputs of earlier steps. Files of these names, or inside them, need not be there yet.
    """
    faults: list[tuple[str, Coded]] = []
    request = Request.of(settings)
    for name, mark in data_options(type(settings)).items():
        arguments = [argument for argument in getattr(settings, name) if not _is_made(argument, made)]
        files: list[DataFile] = []
        for argument in arguments:
            try:
                files += find_files([argument])
            except AdapterMixError as error:
                faults.append((name, error))
        here = [_argument_of(file) for file in files if type(file) is DataFile]
        if mark.form == "parallel" and len(here) < len(getattr(settings, name)):
            continue  # one text per language: they can only be read together
        rows = getattr(settings, mark.rows) if mark.rows else None
        faults += [(name, fault) for fault in _faults_of_files(mark.form, request, here, rows)]
    return faults


def _is_made(argument: str, made: Collection[Path]) -> bool:
    """Return whether an argument names outputs of earlier steps, or files inside them."""
    for text in (argument, argument.partition("=")[2]):
        path = real_path(Path(text)) if text else None
        if path and any(path.is_relative_to(other) or fnmatch(str(other), str(path)) for other in made):
            return True
    return False


def _argument_of(file: DataFile) -> str:
    return f"{'-'.join(file.languages)}={file.path}" if file.is_given else str(file.path)


def _faults_of_files(form: Form, request: Request, arguments: Sequence[str], rows: str | None) -> list[Coded]:
    """Read files together; if that fails, read them one by one, so that each fault is found."""
    if not arguments:
        return []
    try:
        files = _READERS[form](request, arguments, rows)
    except Coded as error:
        single = [] if form == "parallel" or len(arguments) == 1 else arguments
        faults = [fault for argument in single for fault in _faults_of_files(form, request, [argument], rows)]
        # Files that belong together, such as the two sides of translations, fail alone for another reason.
        return faults if str(error) in map(str, faults) else [error]
    return [
        DataError(
            f"{file.path} must have rows in the requested range ({rows or 'all'}), and has no text there.",
            code="data.none-in-rows",
        )
        for file in files
        if file.used and len(file.used.listed.whole) == 0
    ]


_READERS: Mapping[Form, Callable[[Request, Sequence[str], str | None], Sequence[DataFile]]] = {
    "task": _of_task,
    "pairs": lambda _request, arguments, rows: read_pairs(arguments, rows=rows)[1],
    "parallel": lambda _request, arguments, rows: read_parallel(arguments, rows=rows).files,
    "texts": _texts,
}
