"""Arguments of Python calls that are objects in memory: rows of data, and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options.roles import ADAPTER, Reads, marks_of

if TYPE_CHECKING:
    from ..options import Settings

ROWS = "rows"
"""Name of the files of rows in memory, without their endings."""


@contextmanager
def stored(schema: type[Settings], fields: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Yield the fields of a call; objects in memory are files and folders in them until the context ends.

    Rows of data are a list of mappings (the fields of a JSONL row), a `datasets.Dataset`, or a mapping of languages
    (or pairs such as "de-en") to these. Adapters are those of `adaptermix.merging.in_memory.folders_of`.

    Args:
        schema: The options of the command.
        fields: The arguments by name.

    Raises:
        UsageError: rows have no JSON form, or a list has no rows.
        PlanError: an adapter is of another kind.
    """
    marks = marks_of(schema, Reads)
    with ExitStack() as stack:
        plain = dict(fields)
        for name, mark in marks.items():
            value = fields.get(name)
            if mark.is_data and _are_rows(value):
                plain[name] = _files_of(value, name, stack)
            elif mark.use == ADAPTER and value is not None:
                plain[name] = _folders_of(value, stack)
        yield plain


def _are_rows(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(row, Mapping) for row in value)
    return isinstance(value, Mapping) or hasattr(value, "to_parquet")


def _files_of(value: Any, option: str, stack: ExitStack) -> list[str]:
    from ..io.temporary import temporary_folder

    folder = stack.enter_context(temporary_folder())
    if not isinstance(value, Mapping):
        return [str(_file_of(value, option, folder))]
    files: list[str] = []
    for language, rows in value.items():
        inner = folder / str(len(files))
        inner.mkdir()
        files.append(f"{language}={_file_of(rows, option, inner)}")
    return files


def _file_of(rows: Any, option: str, folder: Path) -> Path:
    if hasattr(rows, "to_parquet"):
        path = folder / f"{ROWS}.parquet"
        rows.to_parquet(str(path))
        return path
    if not _are_rows(rows) or isinstance(rows, Mapping):
        raise UsageError(
            f"{option} must be paths, a list of at least one mapping, a datasets.Dataset, or a mapping of languages to "
            f"one of these, found {type(rows).__name__}.",
            code="call.rows",
        )
    path = folder / f"{ROWS}.jsonl"
    try:
        text = "\n".join(json.dumps(dict(row), ensure_ascii=True) for row in rows)
    except (TypeError, ValueError) as error:
        raise UsageError(f"rows of {option} must have a JSON form: {error}.", code="call.rows-json") from error
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _folders_of(value: Any, stack: ExitStack) -> Any:
    """Return the folders of adapters, in the form of the argument: one, or a list."""
    from ..merging.in_memory import folders_of, is_in_memory

    adapters: Sequence[Any] = value if isinstance(value, list) else [value]
    if not any(map(is_in_memory, adapters)):
        return value
    folders = stack.enter_context(folders_of(adapters))
    return folders if isinstance(value, list) else folders[0]
