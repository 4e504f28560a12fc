"""The data of a demo: its own, or xSID and Tatoeba."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..models.languages import canonical_language
from . import corpus, intents
from .corpus import Command, write_lines

TASK_LANGUAGES = ("en", "fr")
ALIGN_LANGUAGES = ("de", "es", "it", "nl")
"""Data of the slots demo."""
_XSID = ("en", "de", "nl", "it", "da", "id", "tr", "sr")
_TATOEBA = ("deu", "nld", "ita", "ind")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """Files and sizes of one demo.

    Args:
        train: Task training files, with the rows to use of each.
        pairs: Alignment files, with the rows to use of each.
        dev: Dev files, for the weight.
        test: Test files, read once at the end.
        retrieval: Pair files for retrieval, not seen in training.
        note: One line about the data.
    """

    train: tuple[list[str], str]
    pairs: tuple[list[str], str]
    dev: tuple[list[str], str]
    test: tuple[list[str], str]
    retrieval: tuple[list[str], str]
    note: str

    def entry(self) -> dict[str, object]:
        """Return the files and rows of each use, as the report stores them."""
        names = ("train", "pairs", "dev", "test", "retrieval")
        return {name: [*getattr(self, name)[0], getattr(self, name)[1]] for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows of a demo's own data.

    Args:
        train: Training rows in each language of the task.
        dev: Dev rows in each language.
        test: Test rows in each language.
        pairs: Pairs of each aligned language.
    """

    train: int
    dev: int
    test: int
    pairs: int


def slots_data(folder: Path, sizes: Sizes, *, seed: int) -> DemoPlan:
    """Write parallel commands with their slots and return the plan for them."""
    corpus.write(
        folder,
        train=sizes.train,
        dev=sizes.dev,
        test=sizes.test,
        pairs=sizes.pairs,
        task_languages=TASK_LANGUAGES,
        align_languages=ALIGN_LANGUAGES,
        seed=seed,
    )
    tests = {language: corpus.commands("test", language, sizes.test, seed=seed) for language in corpus.LANGUAGES}
    note = (
        f"own commands in {len(tests)} languages, slot values in English; "
        f"task: {', '.join(TASK_LANGUAGES)}; alignment with English: {', '.join(ALIGN_LANGUAGES)}"
    )
    return _generated(folder, TASK_LANGUAGES, ALIGN_LANGUAGES, tests, note)


def intents_data(folder: Path, sizes: Sizes, *, seed: int) -> DemoPlan:
    """Write parallel commands with their intents and return the plan for them."""
    intents.write_intents(folder, train=sizes.train, dev=sizes.dev, test=sizes.test, pairs=sizes.pairs, seed=seed)
    tests = {language: intents.sentences("test", language, sizes.test, seed=seed) for language in intents.LANGUAGES}
    note = (
        f"own commands in {len(tests)} languages, to be sorted by intent; task: en, {sizes.train} commands; "
        f"alignment with English: {', '.join(intents.ALIGN_LANGUAGES)}, {sizes.pairs} pairs each. "
        "Dev and test share subjects and words with the training data, but no sentence pattern."
    )
    return _generated(folder, ("en",), intents.ALIGN_LANGUAGES, tests, note)


def _generated(
    folder: Path,
    task_languages: Sequence[str],
    align_languages: Sequence[str],
    tests: dict[str, list[Command]],
    note: str,
) -> DemoPlan:
    """Return the plan for data in a folder; test sentences, paired with English, are for retrieval."""
    held_out = folder / "held-out"
    held_out.mkdir(exist_ok=True)
    others = [language for language in tests if language != "en"]
    for language in others:
        rows = zip(tests[language], tests["en"], strict=True)
        write_lines(held_out / f"{language}-en.tsv", [f"{one.text}\t{two.text}" for one, two in rows])
    return DemoPlan(
        train=([str(folder / f"train.{language}.jsonl") for language in task_languages], ":"),
        pairs=([str(folder / f"pairs.{language}-en.tsv") for language in align_languages], ":"),
        dev=([str(folder / f"dev.{language}.jsonl") for language in tests], ":"),
        test=([str(folder / f"test.{language}.jsonl") for language in tests], ":"),
        retrieval=([str(held_out / f"{language}-en.tsv") for language in others], ":"),
        note=note,
    )


def real_data(folder: Path) -> DemoPlan:
    """Return the plan for xSID slots and Tatoeba pairs.

    Raises:
        DataError: the folder does not hold them.
    """
    xsid, tatoeba = folder / "xsid", folder / "tatoeba"
    needed = [xsid / "en.train.tsv.gz", *(tatoeba / f"{code}-eng.tsv.gz" for code in _TATOEBA)]
    for part in ("valid", "test"):
        needed += [xsid / f"{language}.{part}.conll.gz" for language in _XSID]
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise DataError(
            f"--data must hold xsid/ and tatoeba/ as published; missing: {', '.join(missing)}.", code="demo.data"
        )
    pair_files = [str(tatoeba / f"{code}-eng.tsv.gz") for code in _TATOEBA]
    return DemoPlan(
        train=([str(xsid / "en.train.tsv.gz")], ":520"),
        pairs=(pair_files, ":150"),
        dev=([str(xsid / f"{language}.valid.conll.gz") for language in _XSID], ":8"),
        test=([str(xsid / f"{language}.test.conll.gz") for language in _XSID], ":20"),
        retrieval=(pair_files, "800:860"),
        note=f"xSID in {len(_XSID)} languages, slot values copied; task: en; "
        f"alignment on Tatoeba with English: {', '.join(canonical_language(code) or code for code in _TATOEBA)}",
    )
