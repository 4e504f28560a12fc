"""What the demo trains and tests on: its own data, or xSID and Tatoeba."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.source import canonical_language
from ..errors import DataError
from .corpus import LANGUAGES, write
from .inputs import ALIGN_LANGUAGES, TASK_LANGUAGES

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
        """Return plain data, to tell whether an earlier run was the same."""
        names = ("train", "pairs", "dev", "test", "retrieval")
        return {name: [*getattr(self, name)[0], getattr(self, name)[1]] for name in names}


def own_data(folder: Path) -> DemoPlan:
    """Write the demo's own parallel commands and return the plan for them."""
    write(
        folder,
        train=260,
        dev=8,
        test=20,
        pairs=150,
        task_languages=TASK_LANGUAGES,
        align_languages=ALIGN_LANGUAGES,
    )
    held_out = folder / "held-out"
    held_out.mkdir(exist_ok=True)
    _write_retrieval(folder, held_out)
    others = [language for language in LANGUAGES if language != "en"]
    return DemoPlan(
        train=([str(folder / f"train.{language}.jsonl") for language in TASK_LANGUAGES], ":"),
        pairs=([str(folder / f"pairs.{language}-en.tsv") for language in ALIGN_LANGUAGES], ":"),
        dev=([str(folder / f"dev.{language}.jsonl") for language in LANGUAGES], ":"),
        test=([str(folder / f"test.{language}.jsonl") for language in LANGUAGES], ":"),
        retrieval=([str(held_out / f"{language}-en.tsv") for language in others], ":"),
        note=f"own commands in {len(LANGUAGES)} languages, slot values in English; "
        f"task: {', '.join(TASK_LANGUAGES)}; alignment with English: {', '.join(ALIGN_LANGUAGES)}",
    )


def _write_retrieval(folder: Path, held_out: Path) -> None:
    """Pair the test sentences of every language with English ones: seen by neither training."""
    from ..data import read_slots

    english, _ = read_slots([str(folder / "test.en.jsonl")])
    for language in LANGUAGES[1:]:
        rows, _ = read_slots([str(folder / f"test.{language}.jsonl")])
        lines = [f"{row.text}\t{other.text}\n" for row, other in zip(rows, english, strict=True)]
        (held_out / f"{language}-en.tsv").write_text("".join(lines), encoding="utf-8")


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
        raise DataError(f"--data must hold xsid/ and tatoeba/ as published; missing: {', '.join(missing)}.")
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
