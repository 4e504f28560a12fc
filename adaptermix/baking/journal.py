"""The store of finished modules, from which an interrupted bake resumes: one file per module."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..algebra import LowRank
from ..checkpoints.writing import DTYPES
from ..io.disk import sync
from ..io.files import locked_output, real_path, write_whole
from ..io.safetensors_writer import write_tensors
from ..io.temporary import when_written
from ..progress import Watcher
from .fidelity import Fidelity
from .report import BakedModule

_PLAN = "bake.json"
_SHIFT, _A, _B = ":shift", ":a", ":b"
"""Reserved keys next to tensor names (no tensor name starts with ":")."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """One module of a quantised result.

    Args:
        tensors: Stored tensors, by name.
        module: Its report.
        is_whole: Whether it stays in 16 bits.
        shift: Change of its bias.
        lora: Its residual LoRA.
        lora_dtype: Storage dtype of the LoRA's factors.
    """

    tensors: Mapping[str, Tensor]
    module: BakedModule
    is_whole: bool = False
    shift: Tensor | None = None
    lora: LowRank | None = None
    lora_dtype: torch.dtype = torch.float32


class Journal:
    """Stores finished modules in a folder, or discards them."""

    def __init__(self, folder: Path | None) -> None:
        """Open a journal.

        Args:
            folder: An existing folder; None discards modules.
        """
        self._folder = folder

    def _file(self, folder: Path, name: str) -> Path:
        return folder / f"{zlib.crc32(name.encode()):08x}-{len(name)}.safetensors"

    def read(self, name: str) -> Finished | None:
        """Return a module that was finished before, or None."""
        if self._folder is None or not (path := self._file(self._folder, name)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads(file.metadata()["module"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            if document["name"] != name:
                return None
            module = document["module"]
            compared = {name: (Fidelity(**fidelity), size) for name, (fidelity, size) in module["compared"].items()}
            shift, a, b = (tensors.pop(key, None) for key in (_SHIFT, _A, _B))
            return Finished(
                tensors=tensors,
                module=BakedModule(
                    **{**module, "fidelity": Fidelity(**module["fidelity"]), "compared": compared},
                ),
                is_whole=bool(document["is_whole"]),
                shift=shift,
                lora=None if a is None or b is None else LowRank(b=b, a=a),
                lora_dtype=DTYPES[document["lora_dtype"]],
            )
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # the file is incomplete or was edited

    def write(self, name: str, finished: Finished) -> None:
        """Store a finished module."""
        if self._folder is None:
            return
        tensors = dict(finished.tensors)
        if finished.shift is not None:
            tensors[_SHIFT] = finished.shift
        if finished.lora is not None:
            tensors[_A], tensors[_B] = finished.lora.a * finished.lora.scale, finished.lora.b
        document = {
            "name": name,
            "module": asdict(finished.module),
            "is_whole": finished.is_whole,
            "lora_dtype": str(finished.lora_dtype).removeprefix("torch."),
        }
        path = self._file(self._folder, name)
        # Incomplete files have another name.
        write_tensors(path.with_suffix(".part"), tensors, {"module": json.dumps(document)})
        sync(path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


@contextmanager
def journal(out: Path, identity: Mapping[str, object], watch: Watcher) -> Iterator[Journal]:
    """Yield the journal of a bake, with the modules that an interrupted bake of the same identity finished.

    The journal is removed once the block has written the output.

    Args:
        out: The output.
        identity: Plain data: the settings and inputs that the result depends on.
        watch: Receives a note if finished modules cannot be used.

    Raises:
        OutputError: another process works on the same output.
    """
    out = out.absolute()
    folder = out.parent / f".{out.name}.bake"  # training into the same output uses another folder
    with locked_output(folder, out):
        plan = json.dumps(identity, sort_keys=True, indent=1).encode()
        done = folder / "modules"
        before = (folder / _PLAN).read_bytes() if (folder / _PLAN).is_file() else plan
        if before != plan:
            watch.note(f"note: finished modules of other settings or files are removed ({folder}).")
            shutil.rmtree(done, ignore_errors=True)
        write_whole(folder / _PLAN, plan)
        done.mkdir(exist_ok=True)

        def remove() -> None:
            shutil.rmtree(done)
            (folder / _PLAN).unlink()

        with when_written(real_path(out), remove):
            yield Journal(done)
