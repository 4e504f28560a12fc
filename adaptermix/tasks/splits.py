"""Test data stay test data: rows that were evaluated as such are not chosen or trained on, and the other way round.

Rows are recognised by their texts, in any file, order and format; see `adaptermix.provenance.row_hashes`. Where
only the hash of a file is known, as in older records, the file counts as a whole: by its text, whatever its name, its
compression and its line ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from ..errors import PlanError
from ..io.files import ROWS_FILE
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
    "told_trained",
]

_ROWS_LOOKED_AT = 2**17
"""Of two choices of rows of one file so many are compared."""


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
class Found(Generic[K]):
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
        """The verb for it."""
        return "were" if self.rows.total else "was"

    @property
    def verb_now(self) -> str:
        """The verb for it in the present."""
        return "are" if self.rows.total else "is"

    @property
    def by_chance(self) -> str:
        """A remark for rows that are too few to be refused."""
        return "" if self.rows.matters else " (so few may be the same by chance)"


def overlap_of(file: DataFile, known: Sequence[K]) -> Found[K] | None:
    """Return which rows of a file are known, None if none is.

    Args:
        file: The file, read or not; of one that is not only the whole text is compared.
        known: Files that are known.
    """
    if not known:
        return None
    listed = file.used.listed if file.used else None
    sets = {one.hashes.key: one.hashes for one in known if one.hashes is not None}
    rows = listed.overlap(list(sets.values())) if listed else Overlap(same=0, total=0, matters=False)
    own = set(file.hashes().values())
    whole = [one for one in known if not own.isdisjoint(one.file_hashes) and _meets(file, one)]
    if whole:
        # of a file of the same text whose rows are not known every row counts
        every = listed is None or any(one.hashes is None for one in whole)
        rows = Overlap(same=rows.total if every else rows.same, total=rows.total, matters=True)
    if not rows.matters and not rows.same:
        return None
    having = (one for one in known if one.hashes is not None and listed and listed.overlap([one.hashes]).same)
    return Found(file=file, rows=rows, first=whole[0] if whole else next(having))


def overlaps_of(files: Sequence[DataFile], known: Sequence[K]) -> list[Found[K]]:
    """Return which rows of some files are known, by file.

    Where there is no file of which they are more than chance they may be so of all files together, as when rows are
    spread over many files. Then all are returned as one.

    Args:
        files: The files.
        known: Files that are known.
    """
    found = [one for file in files if (one := overlap_of(file, known))]
    if len(found) < 2 or any(one.rows.matters for one in found):
        return found
    sets = {one.hashes.key: one.hashes for one in known if one.hashes is not None}
    rows = ListedRows.joined([file.used.listed for file in files if file.used]).overlap(list(sets.values()))
    return [replace(found[0], rows=rows, others=len(files) - 1)] if rows.matters else found


def _meets(file: DataFile, known: Known) -> bool:
    """Whether rows of a file that were used are among those that are used here, or which they were is not known."""
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
) -> list[dict[str, Any]]:
    """Refuse rows that were evaluated as test data, or return what a manifest says of them where they are allowed.

    Args:
        uses: Files by what they are to be, such as `DEV`.
        allowed: Whether to accept them.
        instead: What the user can do instead of giving other data.
        watch: Receives faults of the record, and the count of test rows where it may be chance.

    Raises:
        PlanError: a file holds rows that were evaluated as test data, and this is not allowed.
    """
    record = read_record()
    record.announce(watch)
    entries = []
    for use, found in ((use, found) for use, files in uses.items() for found in overlaps_of(files, record.entries)):
        if not found.rows.matters:
            watch.note(f"warning: {found} were evaluated as test data before{found.by_chance}; they are used.")
            continue
        if not allowed:
            raise PlanError(f"{fault_of_tested(use, found)}. Give other data or other --rows, or {instead}.")
        more = {"tested_rows": found.rows.same} if found.rows.total else {}
        # rows that are spread over all files count with the first of them
        entries.append(found.file.entry() | more)
    return entries


def fault_of_tested(use: str, found: Found[Evaluated]) -> str:
    """Return in words that rows were evaluated as test data, without what to do.

    Args:
        use: What they are to be, such as `DEV`.
        found: The rows.
    """
    entry = found.first
    then = "" if str(found.file.path).endswith(entry.name) else f", then named {entry.name}"
    return (
        f"{use} must not be test data, and {found} {found.verb} evaluated as test on {entry.date} "
        f"(task '{entry.task}', adapter '{entry.adapter}'{then})"
    )


def check_split(files: Sequence[DataFile], origins: Sequence[Origin], *, split: str | None, watch: Watcher) -> None:
    """Check what the files of an evaluation are for, against the record and what adapters and models have seen.

    Args:
        files: The files.
        origins: Folders of the adapters and of the base model.
        split: What they are for: dev, test, or not given; then a warning takes the place of a refusal.
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
    for found in overlaps_of(files, known):
        what = f"{found} {found.verb} seen before: an adapter or model was trained or chosen on {found.first.name}"
        if split == "test" and found.rows.matters:
            raise PlanError(
                f"test data must be new to the adapter, and {what}. Give other data or other --rows, or drop --split "
                "test."
            )
        watch.note(f"warning: {what}{found.by_chance}; scores on them say little.")


def told_trained(
    files: Sequence[DataFile], origins: Sequence[Origin], *, names: Sequence[str] = ("data",)
) -> list[str]:
    """Return warnings about rows of dev files that adapters were trained on.

    Args:
        files: The files.
        origins: Folders of the adapters.
        names: Entries of their manifests to look at.
    """
    return warn_of_seen(files, seen_files(origins, names), "an adapter was trained on")


def warn_of_seen(files: Sequence[DataFile], known: Sequence[SeenFile], who: str) -> list[str]:
    """Return warnings about rows of dev files that are known.

    Args:
        files: The files.
        known: Files that were seen.
        who: What was done with their rows, before the name of the file.
    """
    return [
        f"warning: {found} {found.verb} seen before: {who} {found.first.name}{found.by_chance}; the choice favours "
        "what it has learned."
        for found in overlaps_of(files, known)
    ]
