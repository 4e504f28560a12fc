"""Commands whose intent is to be recognised, and pairs for alignment.

Task training has English commands only. Pairs are translations of such commands, without labels, and further sentences
on the same subjects. Dev and test commands exist in all languages; their templates are in no training data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

from .corpus import Command, Lexicon, Meaning, lexicon_of, meanings_of, render, split_of, take_turns, write_lines

Part: TypeAlias = Literal["train", "pairs", "dev", "test"]
"""One of the parts of the data; dev and test have separate templates."""

INTENTS: tuple[str, ...] = ("alarm", "calendar", "food", "home", "music", "reminder", "travel", "weather")
"""What a command can be about: the first word of its template's name."""

ALIGN_LANGUAGES: tuple[str, ...] = ("ht", "lb", "oc", "pap")
"""Haitian Creole, Luxembourgish, Occitan and Papiamento: multilingual encoders were hardly trained on them."""
LANGUAGES: tuple[str, ...] = ("en", *ALIGN_LANGUAGES, "de", "es", "fr")
"""English, the languages of the pairs, and relatives of theirs that are in no training data."""

_AMBIGUOUS = frozenset({"travel_6"})
"""Templates that are left out: asking for the time in a city is ambiguous."""
_DEV = ("_2", "_12")
"""Ends of the names of dev's templates: two of each intent."""


def intent_of(template: str) -> str:
    """Return the intent of the commands of a template, such as `alarm` of `alarm_3`."""
    return template.partition("_")[0]


def templates(part: Part, lexicon: Lexicon) -> Mapping[str, str]:
    """Return the templates of a part in a language, by name; empty if it lacks them.

    Raises:
        ValueError: There is no such part.
    """
    if part == "train":
        return lexicon.training
    if part == "pairs":
        return lexicon.pairs | {f"{name}_command": text for name, text in lexicon.training.items()}
    if part not in ("dev", "test"):
        raise ValueError(f"There is no part {part!r}; choose train, pairs, dev or test.")
    return {
        name: text
        for name, text in (lexicon.templates | lexicon.commands).items()
        if intent_of(name) in INTENTS and name not in _AMBIGUOUS and name.endswith(_DEV) == (part == "dev")
    }


def sentences(part: Part, language: str, count: int, *, seed: int = 0) -> list[Command]:
    """Draw distinct sentences of a part; row i has the same meaning in every language.

    Args:
        part: Which part to draw from.
        language: One of `LANGUAGES` that the part has.
        count: How many to draw.
        seed: Chooses another order.

    Raises:
        ValueError: The part has fewer sentences, or not this language, or there is no such part or language.
    """
    lexicon = lexicon_of(language)
    by_name = templates(part, lexicon)
    if not by_name:
        raise ValueError(f"The part {part!r} has no sentences in {language!r}.")
    groups = _meanings(part)
    available = sum(map(len, groups))
    if not 0 <= count <= available:
        raise ValueError(f"The {part} part has {available} sentences, but {count} were requested.")
    return [render(meaning, lexicon, by_name) for meaning in take_turns(groups, count, f"intents {part} {seed}")]


@cache
def _meanings(part: Part) -> tuple[tuple[Meaning, ...], ...]:
    """Return the meanings of a part, one group per template.

    Of templates that the corpus of slots has too, test keeps to its test split and dev to the rest: no demo trains or
    chooses on what another has tested.
    """
    by_name = templates(part, lexicon_of("en"))
    groups = (meanings_of(name, text) for name, text in by_name.items())
    if part in ("dev", "test"):
        groups = ([m for m in group if (split_of(m) == "test") == (part == "test")] for group in groups)
    return tuple(tuple(group) for group in groups if group)


def write_intents(folder: Path, *, train: int, dev: int, test: int, pairs: int, seed: int = 0) -> None:
    """Write `train.en.jsonl`, and by language `dev.*.jsonl`, `test.*.jsonl` and `pairs.*-en.tsv`.

    Rows of one template are one cluster, so that intervals count templates and not rows.

    Args:
        folder: Where the files go; it is made if needed.
        train: Training commands, in English.
        dev: Dev commands in each language.
        test: Test commands in each language.
        pairs: Pairs with English of each language of `ALIGN_LANGUAGES`.
        seed: Chooses another order.

    Raises:
        ValueError: more rows are requested than exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.en.jsonl", sentences("train", "en", train, seed=seed))
    for language in LANGUAGES:
        _write(folder / f"dev.{language}.jsonl", sentences("dev", language, dev, seed=seed))
        _write(folder / f"test.{language}.jsonl", sentences("test", language, test, seed=seed))
    english = sentences("pairs", "en", pairs, seed=seed)
    for language in ALIGN_LANGUAGES:
        rows = zip(sentences("pairs", language, pairs, seed=seed), english, strict=True)
        write_lines(folder / f"pairs.{language}-en.tsv", [f"{one.text}\t{two.text}" for one, two in rows])


def _write(path: Path, rows: Sequence[Command]) -> None:
    write_lines(path, [json.dumps(_record(row), ensure_ascii=False) for row in rows])


def _record(row: Command) -> dict[str, str]:
    template = row.key.partition("/")[0]
    return {
        "id": row.key,
        "text": row.text,
        "label": intent_of(template),
        "language": row.language,
        "cluster": template,
    }
