"""A small parallel corpus of voice-assistant commands.

A *meaning* is a template with English slot values; all languages share it, so their rows are parallel.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from itertools import product, zip_longest
from pathlib import Path
from typing import Literal, TypeAlias

LANGUAGES: tuple[str, ...] = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da")
"""Codes of the languages of the corpus; English is first because its templates order the slots."""

LEXICONS: tuple[str, ...] = (*LANGUAGES, "ht", "lb", "oc", "pap")
"""Codes of all languages that have a lexicon: those of the corpus, and those that the demo of intents aligns."""

Split: TypeAlias = Literal["train", "dev", "test"]
"""One of the three disjoint parts of the corpus."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sentence with the slots that an assistant should read out of it.

    Attributes:
        key: Name of the meaning; equal in all languages.
        language: Code of the language of the text.
        text: The sentence.
        slots: Pairs of slot type and English value, in the order of the English sentence.
    """

    key: str
    language: str
    text: str
    slots: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The name of a template with an English value for each of its slots."""

    template: str
    slots: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """The template with its slot values, equal for translations of one command."""
        return "/".join((self.template, *(value for _, value in self.slots)))


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The sentences of a language by the name of their template, and its slot values by their English value.

    Attributes:
        language: Its code.
        templates: The commands of the corpus; ht, lb, oc and pap have only those that the demo of intents uses.
        values: For each type of slot the values.
        commands: Further commands, for dev and test of intents; the languages of that demo.
        training: Further commands, to train the recognition of intents; English and the languages that are aligned.
        pairs: Further sentences, for pairs; English and the languages that are aligned.
    """

    language: str
    templates: dict[str, str]
    values: dict[str, dict[str, str]]
    commands: dict[str, str]
    training: dict[str, str]
    pairs: dict[str, str]


def commands(split: Split, language: str, count: int, *, seed: int = 0) -> list[Command]:
    """Draw distinct commands of a split.

    The order depends on the split and the seed only: it is the same for every language, and a smaller count
    gives a prefix of a larger one.

    Args:
        split: Which of the disjoint parts to draw from.
        language: One of `LANGUAGES`.
        count: How many commands to draw.
        seed: Chooses another order.

    Raises:
        ValueError: The split has fewer commands, or the split or the language is unknown.
    """
    lexicon = _lexicon_of_corpus(language)
    return [render(meaning, lexicon, lexicon.templates) for meaning in _draw(split, count, f"commands {seed}")]


def pairs(language: str, count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Draw pairs of a sentence and its English translation from the train split, for alignment.

    Args:
        language: One of `LANGUAGES`, but not English.
        count: How many pairs to draw.
        seed: Chooses another order.

    Raises:
        ValueError: There are fewer pairs, or the language is unknown or English.
    """
    if language == "en":
        raise ValueError("English cannot be paired with itself.")
    lexicon, english = _lexicon_of_corpus(language), lexicon_of("en")
    # Another order, so that the pairs are not the first rows of the task data again.
    meanings = _draw("train", count, f"pairs {seed}")
    sides = (lexicon, english)
    return [(first, second) for first, second in ([render(m, s, s.templates).text for s in sides] for m in meanings)]


def write(
    folder: Path,
    *,
    train: int,
    dev: int,
    test: int,
    pairs: int,
    task_languages: Sequence[str],
    align_languages: Sequence[str],
    seed: int = 0,
) -> None:
    """Write the corpus as files for training, evaluation and alignment.

    Args:
        folder: Where the files go; it is made if needed.
        train: Rows in each `train.{language}.jsonl`.
        dev: Rows in each `dev.{language}.jsonl`, one file for every language.
        test: Rows in each `test.{language}.jsonl`, one file for every language.
        pairs: Rows in each `pairs.{language}-en.tsv`.
        task_languages: Languages that get a train file.
        align_languages: Languages that get a pairs file.
        seed: Chooses another order.

    Raises:
        ValueError: more rows are requested than exist, or a language is unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for language in task_languages:
        _write_commands(folder / f"train.{language}.jsonl", commands("train", language, train, seed=seed))
    for language in LANGUAGES:
        _write_commands(folder / f"dev.{language}.jsonl", commands("dev", language, dev, seed=seed))
        _write_commands(folder / f"test.{language}.jsonl", commands("test", language, test, seed=seed))
    for language in align_languages:
        rows = _draw_pairs(language, pairs, seed=seed)
        write_lines(folder / f"pairs.{language}-en.tsv", ["\t".join(row) for row in rows])


# In `write` the number of pairs hides the function of the same name.
_draw_pairs = pairs


def _write_commands(path: Path, rows: Sequence[Command]) -> None:
    records = (
        {
            "id": row.key,
            "text": row.text,
            "slots": [{"type": kind, "value": value} for kind, value in row.slots],
            "language": row.language,
        }
        for row in rows
    )
    write_lines(path, [json.dumps(record, ensure_ascii=False) for record in records])


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write lines into a file."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _draw(split: Split, count: int, order: str) -> list[Meaning]:
    groups = _meanings(split)
    available = sum(len(group) for group in groups)
    if not 0 <= count <= available:
        raise ValueError(f"The {split} split has {available} commands, but {count} were requested.")
    return take_turns(groups, count, f"{split} {order}")


def take_turns(groups: Sequence[Sequence[Meaning]], count: int, order: str) -> list[Meaning]:
    """Draw meanings from groups that take turns, so that templates with three slots do not crowd out those with one.

    Args:
        groups: Meanings of each template.
        count: How many to draw; all if there are fewer.
        order: Names a random order.
    """
    rng = random.Random(order)  # noqa: S311 - a reproducible order, not a secret
    shuffled = [rng.sample(group, len(group)) for group in rng.sample(groups, len(groups))]
    turns = [meaning for turn in zip_longest(*shuffled) for meaning in turn if meaning is not None]
    return turns[:count]


@cache
def _meanings(split: Split) -> tuple[tuple[Meaning, ...], ...]:
    if split not in ("train", "dev", "test"):
        raise ValueError(f"There is no {split!r} split; choose train, dev or test.")
    templates = lexicon_of("en").templates
    groups = (meanings_of(name, template) for name, template in templates.items())
    parts = (tuple(meaning for meaning in group if split_of(meaning) == split) for group in groups)
    return tuple(part for part in parts if part)


def meanings_of(name: str, template: str) -> list[Meaning]:
    """Return a meaning for each choice of values for the slots of an English template."""
    kinds = _PLACEHOLDER.findall(template)
    choices = product(*(lexicon_of("en").values[kind] for kind in kinds))
    return [Meaning(name, tuple(zip(kinds, values, strict=True))) for values in choices]


def split_of(meaning: Meaning) -> Split:
    """Return the split that a meaning belongs to."""
    if not meaning.slots:
        return "train"
    percent = int(sha256(meaning.key.encode()).hexdigest(), 16) % 100
    return "train" if percent < 70 else "dev" if percent < 85 else "test"


def render(meaning: Meaning, lexicon: Lexicon, templates: Mapping[str, str]) -> Command:
    """Say a meaning in a language, with one of the sets of templates that its lexicon has."""
    words = {kind: lexicon.values[kind][value] for kind, value in meaning.slots}
    text = templates[meaning.template].format(**words)
    # Some sentences start with a value.
    return Command(key=meaning.key, language=lexicon.language, text=text[0].upper() + text[1:], slots=meaning.slots)


def _lexicon_of_corpus(language: str) -> Lexicon:
    if language not in LANGUAGES:
        raise ValueError(f"The corpus has no language {language!r}; it has {', '.join(LANGUAGES)}.")
    return lexicon_of(language)


@cache
def lexicon_of(language: str) -> Lexicon:
    """Return the lexicon of a language.

    Raises:
        ValueError: there is no such lexicon.
    """
    if language not in LEXICONS:
        raise ValueError(f"There is no lexicon of {language!r}; choose one of {', '.join(LEXICONS)}.")
    source = files("adaptermix.demo").joinpath("languages", f"{language}.json")
    data = json.loads(source.read_text(encoding="utf-8"))
    further = (data.get(name, {}) for name in ("commands", "training", "pairs"))
    return Lexicon(language, data["templates"], data["values"], *further)
