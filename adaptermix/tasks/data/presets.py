"""Known data sets of the Hub by name: `preset:NAME[:LANGUAGE,LANGUAGE...][:SPLIT]`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean
from ...io.json_types import JsonObject, JsonValue
from ...models.languages import canonical_language
from .files import OPENERS, DataFile
from .hub import HubData
from .language_names import code_of_name
from .languages import split_pair

_FORM = re.compile(r"preset:(?P<name>[\w-]+)(:(?P<languages>[\w.,-]+))?(:(?P<split>[\w-]+))?")
_CODE = r"(?P<code>[a-z]{2,3})"
_FLORES_CODE = r"(?P<code>[a-z]{3}_[A-Z][a-z]{3})"
PAIRS = "translate"
"""Task that reads parallel pairs, as `--pairs` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A data set of the Hub.

    Args:
        hub: Hub id, with `@REVISION` where the data exist in a converted form only.
        tasks: Tasks that its rows suit.
        split: Split that is read by default, the one for tests.
        configs: Pattern of the configurations; its group `code` is the language. None if there is one for all.
        config: The one configuration, if it has a name.
        columns: The column of each field whose name differs.
        joined: Column by which two configurations of one language each are joined to pairs.
        tags: Names of the tags of tokens, where the data have their numbers only.
    """

    hub: str
    tasks: tuple[str, ...]
    split: str = "test"
    configs: str | None = _CODE
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    joined: str | None = None
    tags: tuple[str, ...] = ()


_MULTINERD = ("PER", "ORG", "LOC", "ANIM", "BIO", "CEL", "DIS", "EVE")
_MULTINERD_MORE = ("FOOD", "INST", "MEDIA", "MYTH", "PLANT", "TIME", "VEHI")
_CONVERTED = "@refs/convert/parquet"
PRESETS = {
    "afrisenti": Preset(
        hub=f"shmuhammad/AfriSenti-twitter-sentiment{_CONVERTED}", tasks=("classify",), columns={"text": "tweet"}
    ),
    "americasnli": Preset(hub="nala-cub/americas_nli", tasks=("nli",)),
    "belebele": Preset(hub="facebook/belebele", tasks=("choice",), configs=_FLORES_CODE),
    "flores": Preset(
        hub="openlanguagedata/flores_plus", tasks=(PAIRS,), split="devtest", configs=_FLORES_CODE, joined="id"
    ),
    "massive": Preset(
        hub=f"AmazonScience/massive{_CONVERTED}",
        tasks=("slots", "classify"),
        configs=r"(?P<code>[a-z]{2}-[A-Z]{2})",
        columns={"text": "utt", "label": "intent"},
    ),
    "multinerd": Preset(
        hub="Babelscape/multinerd",
        tasks=("ner-json",),
        configs=None,
        tags=("O", *(f"{mark}-{kind}" for kind in (*_MULTINERD, *_MULTINERD_MORE) for mark in "BI")),
    ),
    "ntrex": Preset(hub="mteb/NTREX", tasks=(PAIRS,), configs=None),
    "nusax": Preset(hub="mteb/NusaX-senti", tasks=("classify",)),
    "sib200": Preset(hub="Davlan/sib200", tasks=("classify",), configs=_FLORES_CODE, columns={"label": "category"}),
    "tydiqa-goldp": Preset(
        hub="google-research-datasets/tydiqa", tasks=("qa",), split="validation", configs=None, config="secondary_task"
    ),
    "uner": Preset(
        hub=f"universalner/universal_ner{_CONVERTED}", tasks=("ner-json",), configs=r"(?P<code>[a-z]{2,3})_[a-z]+"
    ),
    "wikiann": Preset(hub="unimelb-nlp/wikiann", tasks=("ner-json",)),
    "xcopa": Preset(hub="cambridgeltl/xcopa", tasks=("choice",)),
    "xnli": Preset(hub="facebook/xnli", tasks=("nli",)),
    "xquad": Preset(hub="google/xquad", tasks=("qa",), split="validation", configs=r"xquad\.(?P<code>[a-z]{2})"),
}
"""Data sets by name; docs/reference/data_sets.md shows them as a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedData(HubData):
    """Pairs of two configurations, whose rows have one key.

    Args:
        other: The configuration of the second language.
        key: Column that both have in common.
    """

    other: str
    key: str

    def _rows(self) -> Iterator[JsonObject]:
        translations = {row[self.key]: row["text"] for row in self._rows_of(self.other)}
        for row in self._rows_of(self.config):
            if row[self.key] not in translations:
                raise DataError(
                    f"{self.path}: both languages must have the same rows, and {self.key} {row[self.key]!r} is missing "
                    f"in {self.other}.",
                    code="preset.rows",
                )
            yield {"source": row["text"], "target": translations[row[self.key]]}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfAll(HubData):
    """Rows of one configuration for all languages, or those of one language.

    The language of a row is in its column `lang`, as in MultiNERD, or its id starts with the name, as in TyDiQA.

    Args:
        tags: Names of the tags in `ner_tags`, if these are numbers without names.
    """

    tags: tuple[str, ...] = ()

    def _rows(self) -> Iterator[JsonObject]:
        for row in self._rows_of(self.config):
            code = row["lang"] if "lang" in row else code_of_name(str(row.get("id")).partition("-")[0])
            if self.language is None or canonical_language(str(code)) == self.language:
                yield row | ({"ner_tags": self._named_tags(row)} if self.tags else {})

    def _named_tags(self, row: JsonObject) -> list[JsonValue]:
        """Return the tags of a row by their names."""
        numbers = row.get("ner_tags")
        if not isinstance(numbers, list) or not all(
            isinstance(number, int) and 0 <= number < len(self.tags) for number in numbers
        ):
            raise DataError(
                f"{self.path}: ner_tags must be numbers from 0 to {len(self.tags) - 1}, found {str(numbers)[:60]}.",
                code="preset.tags",
            )
        return [self.tags[number] for number in numbers if isinstance(number, int)]


def configurations(preset: Preset) -> dict[str, str]:
    """Return the configuration of each language of a preset.

    A language with several scripts or treebanks has a key for each, which is the configuration's name.

    Raises:
        DataError: the data set cannot be reached.
    """
    from datasets import get_dataset_config_names

    name, _, revision = preset.hub.partition("@")
    try:
        names = get_dataset_config_names(name, revision=revision or None)
    except Exception as error:  # of many kinds, as when it is loaded
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name} must be a data set that can be reached: {reason}", code="hub-data.unreachable"
        ) from error
    by_code: dict[str, list[str]] = {}
    for config in names:
        match = re.fullmatch(preset.configs or "", config)
        if match and (code := canonical_language(match["code"])):
            by_code.setdefault(code, []).append(config)
    return {
        key: config
        for code, listed in by_code.items()
        for key, config in ([(code, listed[0])] if len(listed) == 1 else [(each, each) for each in listed])
    }


def _chosen(argument: str, known: Mapping[str, str], requested: str) -> tuple[str, str]:
    """Return the code and the configuration of a language; of several scripts the code keeps the script (`hi-Latn`)."""
    config = known.get(requested) or known.get(canonical_language(requested) or "")
    config = config or (requested if requested in known.values() else None)
    if config is None:
        raise DataError(
            f"{argument}: a language must be one that the data set has, found {requested!r}. Its languages are "
            f"{', '.join(sorted(known))}.",
            code="preset.language",
        )
    code = next(key for key, each in known.items() if each == config)
    base, _, mark = config.partition("_")
    if code != config or not mark:
        return code, config
    # two scripts are two test sets, two treebanks are not two languages
    shortest = canonical_language(base) or base
    return (f"{shortest}-{mark}" if mark.istitle() else shortest), config


def open_preset(argument: str, languages: tuple[str, ...]) -> list[DataFile]:
    """Return the data of a preset: one for each language or pair of languages.

    Raises:
        DataError: the argument has another form, or the preset or a language is unknown.
    """
    match = _FORM.fullmatch(argument)
    if match is None or match["name"] not in PRESETS:
        name = argument.split(":")[1]
        raise DataError(
            f"a preset must be preset:NAME[:LANGUAGE,LANGUAGE...][:SPLIT] with a NAME of {', '.join(PRESETS)}, got "
            f"{argument!r}.{did_you_mean(name, list(PRESETS))}",
            code="preset.name",
        )
    preset = PRESETS[match["name"]]
    requested = match["languages"].split(",") if match["languages"] else ["-".join(languages)] if languages else []
    split = match["split"] or preset.split
    name = match["name"]
    if preset.configs is None:
        return [_unconfigured(name, preset, each, split) for each in requested or [""]]
    known = configurations(preset)
    if preset.joined:
        return [_joined(name, preset, known, each, split) for each in requested or [""]]
    return [
        HubData(**_common(name, preset, config, split), config=config, languages=(code,), is_given=True)
        for code, config in (_chosen(argument, known, each) for each in requested or known)
    ]


def _common(name: str, preset: Preset, language: str, split: str) -> dict[str, Any]:
    """Return the fields that all files of a preset share; its path is an argument that names this file alone."""
    hub, _, revision = preset.hub.partition("@")
    return {
        "path": Path(f"preset:{name}:{language}:{split}" if language else f"preset:{name}:{split}"),
        "name": hub,
        "revision": revision or None,
        "split": split,
        "columns": preset.columns,
        "tasks": preset.tasks,
    }


def _pair_in(name: str, text: str) -> tuple[str, str]:
    """Return the two languages of a text such as `de-en` or `hin_Latn-en`."""
    pair = tuple(split_pair(text))
    if len(pair) != 2:
        raise DataError(
            f"preset:{name} needs pairs of languages, such as preset:{name}:de-en,tr-en, got {text!r}.",
            code="preset.pair",
        )
    return pair


def _joined(name: str, preset: Preset, known: Mapping[str, str], text: str, split: str) -> HubData:
    (first, config), (second, other) = (_chosen(f"preset:{name}", known, each) for each in _pair_in(name, text))
    return JoinedData(
        **_common(name, preset, text, split),
        config=config,
        languages=(first, second),
        is_given=True,
        other=other,
        key=preset.joined or "id",
    )


def _unconfigured(name: str, preset: Preset, text: str, split: str) -> HubData:
    common = _common(name, preset, text, split)
    if PAIRS in preset.tasks:
        pair = _pair_in(name, text)
        return HubData(**common, languages=tuple(canonical_language(each) or each for each in pair), is_given=True)
    codes = (canonical_language(text) or text,) if text else ()
    return RowsOfAll(**common, config=preset.config, languages=codes, is_given=bool(codes), tags=preset.tags)


OPENERS["preset"] = open_preset
