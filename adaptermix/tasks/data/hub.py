"""Data sets of the Hub as data files: `hf:owner/name[@REVISION][:config[:split]]`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...io.json_types import JsonValue
from ...models.languages import canonical_language
from .files import OPENERS, DataFile
from .languages import languages_in

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset

_FORM = re.compile(r"hf:(?P<name>[^:@]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubData(DataFile):
    """A split of a data set, read as one JSON object a line; class numbers are written as their names.

    Args:
        name: Hub id, or a folder that `datasets` can load.
        config: Configuration, if there are several; often a language.
        split: Split, such as `train`.
        revision: Pinned revision.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def suffixes(self) -> list[str]:
        return [".jsonl"]

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield numbered rows as JSON, from 1.

        Raises:
            DataError: the data set, the configuration or the split does not exist or cannot be reached, or `datasets`
                is not installed.
        """
        rows = _load(self.name, self.config, self.split, self.revision)
        classes = {key: feature for key, kind in rows.features.items() if (feature := _class_of(kind))}
        for number, row in enumerate(rows, start=1):
            named = {key: _named(kind, row[key]) for key, kind in classes.items()}
            yield number, json.dumps(row | named, ensure_ascii=False, default=str)

    def check(self) -> None:
        """Accept the data set; its faults show when it is read."""

    @property
    def title(self) -> str:
        return str(self.path)

    def hashes(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for _, line in self.lines():
            digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
        return {"sha256": digest.hexdigest(), "text": digest.hexdigest()}


def _class_of(kind: object) -> ClassLabel | None:
    """Return the class feature of a column, or of each entry of a column of lists; None for other columns."""
    inner = getattr(kind, "feature", kind)
    return inner if hasattr(inner, "int2str") else None


def _named(kind: ClassLabel, value: int | list[int] | None) -> JsonValue:
    """Return class names for numbers; a row without a class has the number -1, or none."""
    if isinstance(value, list):
        return [_named(kind, entry) for entry in value]
    return None if value is None or value < 0 else kind.int2str(value)


@lru_cache(maxsize=16)
def _load(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise DataError(
            "data sets of the Hub need the package 'datasets', which is not installed. Run: pip install datasets",
            code="hub-data.no-library",
        ) from error
    disable_progress_bar()
    try:
        return load_dataset(name, config, split=split, revision=revision, trust_remote_code=False)
    except Exception as error:  # of many kinds, from the network's to pyarrow's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"hf:{name} must be a data set that can be reached, with configuration {config or 'default'} and split "
            f"{split}: {reason}",
            code="hub-data.unreachable",
        ) from error


def open_hub(argument: str, languages: tuple[str, ...]) -> HubData:
    """Return the data set that an argument names; its language is the argument's, else its configuration's name.

    Raises:
        DataError: the argument has another form.

    Example:
        >>> open_hub("hf:facebook/xnli:de:test", ()).languages
        ('de',)
    """
    match = _FORM.fullmatch(argument)
    if match is None:
        raise DataError(
            f"a data set of the Hub must be hf:owner/name[@REVISION][:config[:split]], got {argument!r}.",
            code="hub-data.name",
        )
    config = match["config"] or None
    code = config and canonical_language(config)
    known = languages or (config and languages_in(config)) or ((code,) if code else ())
    return HubData(
        path=Path(argument),
        languages=known,
        is_given=bool(languages),
        name=match["name"],
        config=config,
        split=match["split"] or "train",
        revision=match["revision"],
    )


OPENERS["hf"] = open_hub
