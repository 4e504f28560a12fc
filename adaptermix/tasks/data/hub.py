"""Data sets of the Hub and Parquet files as data files.

`hf:owner/name[@REVISION][:config[:split]]`, `hf://datasets/owner/name[@REVISION][/path]`, and paths of `.parquet`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...io.json_types import JsonObject, JsonValue
from ...models.languages import canonical_language
from .files import OPENERS, DataFile
from .languages import languages_in, languages_of

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset

_FORM = re.compile(r"hf:(?P<name>[^:@]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[^/:@]+/[^/:@]+)(@(?P<revision>[^:@/]+|refs/[^/]+/[^/]+))?(/(?P<file>[^:]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubData(DataFile):
    """A split of a data set, read as one JSON object a line; class numbers are written as their names.

    Args:
        name: Hub id, or a folder that `datasets` can load.
        config: Configuration, if there are several; often a language.
        split: Split, such as `train`.
        revision: Pinned revision.
        file: One file of the data set, instead of a configuration.
        columns: The column of each field whose name differs; fields replace columns of the same name.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    file: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def suffixes(self) -> list[str]:
        return [".jsonl"]

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield numbered rows as JSON, from 1.

        Raises:
            DataError: the data set, the configuration or the split does not exist or cannot be reached, or `datasets`
                is not installed.
        """
        for number, row in enumerate(self._rows(), start=1):
            yield number, json.dumps(row, ensure_ascii=False, default=str)

    def _rows(self) -> Iterator[JsonObject]:
        yield from self._rows_of(self.config)

    def _rows_of(self, config: str | None) -> Iterator[JsonObject]:
        """Yield the rows of a configuration with named classes and columns, unfolded by language."""
        rows = _load(self.name, config, self.split, self.revision, self.file)
        if lacking := sorted(set(self.columns.values()) - set(rows.column_names)):
            raise DataError(
                f"{self.path} must have the columns {', '.join(sorted(self.columns.values()))}, and {lacking[0]!r} is "
                f"missing; its columns are {', '.join(rows.column_names)}.",
                code="hub-data.columns",
            )
        classes = {key: feature for key, kind in rows.features.items() if (feature := _class_of(kind))}
        for row in rows:
            named = row | {key: _named(kind, row[key]) for key, kind in classes.items()}
            yield from unfolded(named | {name: named[column] for name, column in self.columns.items()})

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


def unfolded(row: JsonObject) -> list[JsonObject]:
    """Return a row for each language where columns hold all languages, as in XNLI's `all_languages`.

    Such columns are a text per language, or lists of languages and of translations; others are repeated. A row without
    a pair of such lists is not changed, since OPUS has a text per language too.

    Example:
        >>> listed = {"language": ["de", "en"], "translation": ["ja", "yes"]}
        >>> unfolded({"premise": {"de": "so", "en": "thus"}, "hypothesis": listed, "label": 0})[0]
        {'premise': 'so', 'hypothesis': 'ja', 'label': 0, 'language': 'de'}
    """
    texts = {}
    listed = False
    for key, value in row.items():
        if (
            isinstance(value, dict)
            and set(value) == {"language", "translation"}
            and isinstance(value["language"], list)
        ):
            texts[key] = dict(zip(value["language"], value["translation"], strict=True))
            listed = True
        elif isinstance(value, dict) and value and all(isinstance(text, str) for text in value.values()):
            texts[key] = value
    if not listed:
        return [row]
    languages = [code for code in next(iter(texts.values())) if all(code in each for each in texts.values())]
    return [
        row | {key: each[language] for key, each in texts.items()} | {"language": language} for language in languages
    ]


@lru_cache(maxsize=16)
def _load(name: str, config: str | None, split: str, revision: str | None, file: str | None) -> Dataset:
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
        return load_dataset(name, config, data_files=file, split=split, revision=revision, trust_remote_code=False)
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
    if address := _ADDRESS.fullmatch(argument):
        file = address["file"]
        return HubData(
            path=Path(argument),
            languages=languages or (languages_of(Path(file)) if file else ()),
            is_given=bool(languages),
            name=address["name"],
            revision=address["revision"],
            file=file,
        )
    match = _FORM.fullmatch(argument)
    if match is None or argument.startswith("hf://"):
        raise DataError(
            f"a data set of the Hub must be hf:owner/name[@REVISION][:config[:split]] or "
            "hf://datasets/owner/name[@REVISION][/FILE], "
            f"got {argument!r}.",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetFile(HubData):
    """A Parquet file of this machine."""

    @property
    def title(self) -> str:
        return self.path.name

    def check(self) -> None:
        DataFile.check(self)


def open_parquet(argument: str, languages: tuple[str, ...]) -> ParquetFile:
    """Return a Parquet file; its language is the argument's, else its name's."""
    path = Path(argument)
    known = languages or languages_of(path)
    return ParquetFile(path=path, languages=known, is_given=bool(languages), name="parquet", file=argument)


OPENERS["hf"] = lambda argument, languages: [open_hub(argument, languages)]
OPENERS[".parquet"] = lambda argument, languages: [open_parquet(argument, languages)]
