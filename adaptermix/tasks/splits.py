"""Test data stay test data: rows that were evaluated as such are not chosen or trained on, and the other way round.

Rows are recognised by their texts, in any file, order and format; see `adaptermix.provenance.row_hashes`. Where
only the hash of a file is known, as in older records, the file counts as a whole: by its text, regardless of name,
compression and line ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from ..errors import PlanError
from ..io.files import ROWS_FILE
from ..io.json_types import JsonObject
from ..options.roles import CALIBRATION, DEV, TEST, TRAINING
from ..progress import SILENT, Watcher
from ..provenance.manifest import Origin, SeenFile, seen_files
from ..provenance.row_hashes import ListedRows, Overlap, RowHashes
from .data.files import DataFile, parse_rows
from .test_record import Evaluated, add_to_record, read_record, state_folder

__all__ = [
    "CALIBRATION",
    "DEV",
    "TEST",
    "TRAINING",
    "Evaluated",
    "add_to_record",
    "check_split",
    "overlap_of",
    "overlaps_of",
    "read_record",
    "refuse_tested",
    "state_folder",
    "trained_warnings",
]

_ROWS_LOOKED_AT = 2**17
"""Most row numbers to compare for two choices of rows of one file."""


class Known(Protocol):
    """A data file that was used before, see `SeenFile` and `Evaluated`."""

    @property
    def name(self) -> str:
        """Its name then."""

    @property
    def file_hashes(self) -> set[str]:
        """Hashes of the file as a whole."""

    @property
    def picked(self) -> str | None:
        """The rows that were used, as `START:STOP[:STEP]`; None for all."""

    @property
    def hashes(self) -> RowHashes | None:
        """Their hashes; None where only the file is known."""


K = TypeVar("K", bound=Known)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRows(Generic[K]):
    """Rows of a file that are known.

    Args:
        file: The file.
        rows: How many they are, and whether they are more than chance.
        first: The first file that has some of them.
        others: Count of further files whose rows are counted together with these.
    """

    file: DataFile
    rows: Overlap
    first: K
    others: int = 0

    def __str__(self) -> str:
        """Return `n of m rows of FILE`."""
        count = f"{self.rows.same} of {self.rows.total} rows of " if self.rows.total else ""
        more = f" and {self.others} other file{'s' * (self.others > 1)}" if self.others else ""
        return f"{count}{self.file.path}{more}"

    @property
    def verb(self) -> str:
        """The verb for the rows in the past."""
        return "were" if self.rows.total else "was"

    @property
    def verb_now(self) -> str:
        """The verb for the rows in the present."""
        return "are" if self.rows.total else "is"

    @property
    def by_chance(self) -> str:
        """A remark for rows that are too few to be refused."""
        return "" if self.rows.matters else " (so few may be the same by chance)"


def overlap_of(file: DataFile, known: Sequence[K]) -> SeenRows[K] | None:
    """Return the rows of a file that are known, None without any.

    Args:
        file: The file. If no reader has read it, only the whole text is compared.
        known: Files that are known.
    """
    if not known:
        return None
    listed = file.used.listed if file.used else None
    sets = {one.hashes.key: one.hashes for one in known if one.hashes is not None}
    rows = listed.overlap(list(sets.values())) if listed else Overlap(same=0, total=0, matters=False)
    hashes = set(file.hashes().values())
    whole = [one for one in known if not hashes.isdisjoint(one.file_hashes) and _meets(file, one)]
    if whole:
        # Every row counts in a file of the same text whose rows are not known.
        every = listed is None or any(one.hashes is None for one in whole)
        rows = Overlap(same=rows.total if every else rows.same, total=rows.total, matters=True)
    if not rows.matters and not rows.same:
        return None
    having = (one for one in known if one.hashes is not None and listed and listed.overlap([one.hashes]).same)
    return SeenRows(file=file, rows=rows, first=whole[0] if whole else next(having))


def overlaps_of(files: Sequence[DataFile], known: Sequence[K]) -> list[SeenRows[K]]:
    """Return which rows of some files are known, by file.

    Rows that are spread over many files may be few enough in each to be chance, but too many in all files. Then
    all files are returned as one.

    Args:
        files: The files.
        known: Files that are known.
    """
    seen = [one for file in files if (one := overlap_of(file, known))]
    if len(seen) < 2 or any(one.rows.matters for one in seen):
        return seen
    sets = {one.hashes.key: one.hashes for one in known if one.hashes is not None}
    rows = ListedRows.joined([file.used.listed for file in files if file.used]).overlap(list(sets.values()))
    return [replace(seen[0], rows=rows, others=len(files) - 1)] if rows.matters else seen


def _meets(file: DataFile, known: Known) -> bool:
    """Return whether rows of a known file are used here too, or are not known."""
    return file.used is None or known.hashes is None or _meet(known.picked, file.used.picked)


def _meet(one: str | None, other: str | None) -> bool:
    """Whether two choices of rows of a file have a row in common.

    Example:
        >>> _meet(":30", "30:"), _meet(":30", "29:"), _meet("::2", "1::2"), _meet(None, "5:")
        (False, True, False, True)
    """
    first, second = (range(*parse_rows(rows).indices(_ROWS_LOOKED_AT)) for rows in (one, other))
    return any(row in second for row in first)


def refuse_tested(
    uses: Mapping[str, Sequence[DataFile]],
    *,
    allowed: bool,
    instead: str = "pass --allow-tested to take it all the same",
    watch: Watcher = SILENT,
) -> list[JsonObject]:
    """Refuse rows that were evaluated as test data; if they are allowed, return their entries for the manifest.

    Args:
        uses: Files by their use, such as `DEV`.
        allowed: Whether to accept them.
        instead: What the user can do instead of giving other data.
        watch: Receives faults of the record, and counts of test rows that may be chance.

    Raises:
        PlanError: a file has rows that were evaluated as test data, and this is not allowed.
    """
    record = read_record()
    record.announce(watch)
    entries = []
    for use, seen in ((use, seen) for use, files in uses.items() for seen in overlaps_of(files, record.entries)):
        if not seen.rows.matters:
            watch.note(f"warning: {seen} were evaluated as test data before{seen.by_chance}; they are used.")
            continue
        if not allowed:
            raise PlanError(
                f"{fault_of_tested(use, seen)}. Give other data or other --rows, or {instead}.", code="split.tested"
            )
        more = {"tested_rows": seen.rows.same} if seen.rows.total else {}
        # Rows that are spread over all files are recorded with the first one.
        entries.append(seen.file.entry() | more)
    return entries


def fault_of_tested(use: str, seen: SeenRows[Evaluated]) -> str:
    """Return the first part of a message: rows were evaluated as test data.

    Args:
        use: Their use, such as `DEV`.
        seen: The rows.
    """
    entry = seen.first
    then = "" if str(seen.file.path).endswith(entry.name) else f", then named {entry.name}"
    return (
        f"{use} must not be test data, and {seen} {seen.verb} evaluated as test on {entry.date} "
        f"(task '{entry.task}', adapter '{entry.adapter}'{then})"
    )


def check_split(files: Sequence[DataFile], origins: Sequence[Origin], *, split: str | None, watch: Watcher) -> None:
    """Check the split of an evaluation's files against the record and the data that adapters and models have seen.

    Args:
        files: The files.
        origins: Folders of the adapters and of the base model.
        split: `dev` or `test`; for None rows are not refused, only reported.
        watch: Receives which files an adapter was trained or chosen on.

    Raises:
        PlanError: dev data were evaluated as test data before, or an adapter was trained or chosen on test data.
    """
    if split == "dev":
        refuse_tested({DEV: files}, allowed=False, instead="drop --split dev", watch=watch)
    known = seen_files(origins)
    if lost := sorted({one.name for one in known if one.hashes is None and "row_hashes" in one.entry}):
        watch.note(
            f"warning: {ROWS_FILE} of an adapter or model is missing or damaged: rows of {', '.join(lost)}, which it "
            "was trained or chosen on, are recognised only where a whole file is the same."
        )
    for seen in overlaps_of(files, known):
        what = f"{seen} {seen.verb} seen before: an adapter or model was trained or chosen on {seen.first.name}"
        if split == "test" and seen.rows.matters:
            raise PlanError(
                f"test data must be new to the adapter, and {what}. Give other data or other --rows, or drop --split "
                "test.",
                code="split.known",
            )
        watch.note(f"warning: {what}{seen.by_chance}; scores on them say little.")


def trained_warnings(
    files: Sequence[DataFile], origins: Sequence[Origin], *, names: Sequence[str] = ("data",)
) -> list[str]:
    """Return warnings about rows of dev files that adapters were trained on.

    Args:
        files: The files.
        origins: Folders of the adapters.
        names: Entries of their manifests to look at.
    """
    return warn_of_seen(files, seen_files(origins, names), "an adapter was trained on")


def warn_of_seen(files: Sequence[DataFile], known: Sequence[SeenFile], user: str) -> list[str]:
    """Return warnings about rows of dev files that are known.

    Args:
        files: The files.
        known: Files that were seen.
        user: Start of the sentence that ends with the name of the known file.
    """
    return [
        f"warning: {seen} {seen.verb} seen before: {user} {seen.first.name}{seen.by_chance}; the choice favours "
        "what it has learned."
        for seen in overlaps_of(files, known)
    ]
