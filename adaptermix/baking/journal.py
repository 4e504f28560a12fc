"""What an interrupted bake goes on from: a file per finished module."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..algebra import LowRank
from ..checkpoints.writing import DTYPES
from ..io.disk import sync
from ..io.files import held, write_whole
from ..io.safetensors_writer import write_tensors
from ..progress import Watcher
from .fidelity import Fidelity
from .report import BakedModule

if TYPE_CHECKING:
    from .tensor_writer import Finished

_PLAN = "bake.json"
_SHIFT, _A, _B = ":shift", ":a", ":b"
"""Beside the names of tensors, which do not begin so."""


class Journal:
    """Keeps finished modules in a folder, or nowhere."""

    def __init__(self, folder: Path | None) -> None:
        """Open a journal.

        Args:
            folder: An existing folder; None keeps nothing.
        """
        self._folder = folder

    def _file(self, folder: Path, name: str) -> Path:
        return folder / f"{zlib.crc32(name.encode()):08x}-{len(name)}.safetensors"

    def read(self, name: str) -> Finished | None:
        """Return a module that was finished before, if it was."""
        from .tensor_writer import Finished

        if self._folder is None or not (path := self._file(self._folder, name)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads(file.metadata()["module"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            if document["name"] != name:
                return None
            shift, a, b = (tensors.pop(key, None) for key in (_SHIFT, _A, _B))
            return Finished(
                tensors=tensors,
                module=_module(document["module"]),
                is_whole=bool(document["is_whole"]),
                shift=shift,
                beside=None if a is None or b is None else LowRank(b=b, a=a),
                beside_dtype=DTYPES[document["beside_dtype"]],
            )
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # it was being written, or somebody has changed it

    def write(self, name: str, finished: Finished) -> None:
        """Keep a finished module."""
        if self._folder is None:
            return
        tensors = dict(finished.tensors)
        if finished.shift is not None:
            tensors[_SHIFT] = finished.shift
        if finished.beside is not None:
            tensors[_A], tensors[_B] = finished.beside.a * finished.beside.scale, finished.beside.b
        document = {
            "name": name,
            "module": asdict(finished.module),
            "is_whole": finished.is_whole,
            "beside_dtype": str(finished.beside_dtype).removeprefix("torch."),
        }
        path = self._file(self._folder, name)
        # a half-written file has another name
        write_tensors(path.with_suffix(".part"), tensors, {"module": json.dumps(document)})
        sync(path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def _module(document: Mapping[str, Any]) -> BakedModule:
    compared = {name: (Fidelity(**found), size) for name, (found, size) in document["compared"].items()}
    return BakedModule(**{**document, "fidelity": Fidelity(**document["fidelity"]), "compared": compared})


@contextmanager
def journal(out: Path, identity: Mapping[str, Any], watch: Watcher) -> Iterator[Journal]:
    """Yield the journal of a bake, with what an interrupted one of the same identity has finished.

    It vanishes when the block ends well.

    Args:
        out: The output.
        identity: Plain data: what the result depends on.
        watch: Is told where finished modules cannot be used.

    Raises:
        OutputError: another process works on the same output.
    """
    out = out.absolute()
    folder = out.parent / f".{out.name}.bake"  # not where training into the same output keeps its own
    with held(folder, out):
        plan = json.dumps(identity, sort_keys=True, indent=1).encode()
        done = folder / "modules"
        before = (folder / _PLAN).read_bytes() if (folder / _PLAN).is_file() else plan
        if before != plan:
            watch.note(f"note: modules that were finished for other settings or files are dropped ({folder}).")
            shutil.rmtree(done, ignore_errors=True)
        write_whole(folder / _PLAN, plan)
        done.mkdir(exist_ok=True)
        yield Journal(done)
        shutil.rmtree(done)
        (folder / _PLAN).unlink()
    with suppress(OSError):  # another process may have begun there
        folder.rmdir()
