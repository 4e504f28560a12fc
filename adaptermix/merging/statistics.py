"""Files of statistics, which fisher and regmean merge by: what their headers say, and whether they fit a merge."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

from ..adapters import AdapterSource
from ..errors import IncompatibleAdapters, PlanError
from ..io.checkpoint_files import Checkpoint
from ..io.json_types import JsonObject
from ..provenance.row_hashes import pack, remember, remembered, unpack

_DOCUMENT, _ROWS = "adaptermix", "adaptermix.rows"
KIND = "statistics"


def metadata_of(document: Mapping[str, object]) -> dict[str, str]:
    """Return the `__metadata__` of a file of statistics: its manifest, and the hashes of the rows that this names.

    Args:
        document: The manifest.
    """
    files = [entry for role in ("calibration", "tested") for entry in _entries(document.get(role))]
    by_key = {hashes.key: hashes for entry in files if (hashes := remembered(entry.get("row_hashes"))) is not None}
    return {
        "format": "pt",
        _DOCUMENT: json.dumps(document, sort_keys=True, ensure_ascii=False),
        _ROWS: base64.b85encode(pack(by_key)).decode(),
    }


def document_of(file: Checkpoint) -> JsonObject:
    """Return the manifest of a file of statistics; empty if another program made the file.

    Also loads the row hashes that it names, like those of an adapter's folder.

    Args:
        file: What `open_tensors` returned.
    """
    try:
        document = json.loads(file.metadata[_DOCUMENT])
        for hashes in unpack(base64.b85decode(file.metadata.get(_ROWS, ""))).values():
            remember(hashes)
    except (KeyError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) and document.get("kind") == KIND else {}


def check_statistics(
    files: Sequence[Checkpoint],
    names: Sequence[str],
    sources: Sequence[AdapterSource],
    method: str,
    *,
    allow_base_mismatch: bool,
) -> None:
    """Refuse statistics whose manifest names another method, adapter or base model.

    Args:
        files: One per adapter.
        names: Names of the files, for messages.
        sources: The adapters.
        method: Name of the merge method.
        allow_base_mismatch: Whether base models may differ.

    Raises:
        PlanError: a file was made for another method, or with another adapter.
        IncompatibleAdapters: it was made on another base model.
    """
    for file, name, source in zip(files, names, sources, strict=True):
        document = document_of(file)
        made_for = document.get("method", method)
        if made_for != method:
            raise PlanError(
                f"--statistics must be made for method '{method}', and {name} is for '{made_for}'. Run: adaptermix "
                f"statistics --method {method}",
                code="statistics.method",
            )
        adapter, base = (_mapping(document.get(entry)) for entry in ("adapter", "base"))
        if adapter.get("digest") not in (None, source.digest):
            raise PlanError(
                f"--statistics are given in the order of the adapters, but {name}, listed for '{source.name}', was "
                f"made with adapter '{adapter.get('name')}' or another version of it. Change the order.",
                code="statistics.order",
            )
        trained, measured = source.meta.base_fingerprint, base.get("fingerprint")
        if trained and measured and trained != measured and not allow_base_mismatch:
            raise IncompatibleAdapters(
                f"--statistics must be made on the base model of their adapter, and {name} was made on "
                f"'{base.get('id')}', whose weight files differ from those of '{source.meta.base}'. Make it again on "
                "that, or pass --allow-base-mismatch.",
                code="statistics.base",
            )


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def files_behind(files: Sequence[Checkpoint]) -> dict[str, list[Mapping[str, object]]]:
    """Return the entries of a manifest that name the data files behind statistics, by role."""
    documents = [document_of(file) for file in files]
    return {
        role: [entry for document in documents for entry in _entries(document.get(role)) if "sha256" in entry]
        for role in ("calibration", "tested")
    }


def _entries(value: object) -> list[Mapping[str, object]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
