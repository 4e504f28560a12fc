"""Counts of a set of rows: languages, repetitions, and rows that a held-out set has too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ...provenance.row_hashes import normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReport:
    """Counts of a set of rows.

    Args:
        languages: Rows per language.
        repeated: Rows that occur earlier in the set.
        repeated_normalised: The same, judged without case, width, accent marks' encoding, punctuation and blanks.
        held_out: Rows of a held-out set.
        overlap: Held-out rows that occur in this set.
        overlap_normalised: The same, judged as above.
        left_out: Rows that were read and left out, since they lack a side, a label or an answer.
    """

    languages: dict[str, int]
    repeated: int
    repeated_normalised: int
    held_out: int = 0
    overlap: int = 0
    overlap_normalised: int = 0
    left_out: int = 0

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.languages.values())

    def document(self) -> dict[str, object]:
        return asdict(self)

    def warnings(self, what: str = "rows") -> list[str]:
        """Return warnings on these rows; `what` is their name in the plural."""
        warnings = []
        if self.overlap_normalised:
            warnings.append(
                f"warning: {self.overlap} of {self.held_out} dev {what} are also in the training {what} "
                f"({self.overlap_normalised} but for case and punctuation); scores on them say little."
            )
        return warnings + left_out_warnings(self.left_out, self.total, what)


def left_out_warnings(left_out: int, kept: int, what: str = "rows") -> list[str]:
    """Return the warning about rows that are left out; an empty list without such rows."""
    if not left_out:
        return []
    return [f"{left_out} of {left_out + kept} {what} lack a side, a label or an answer and are left out."]


def by_language(languages: Sequence[str], total: int) -> str:
    """Return how many of `total` there are, by language.

    Example:
        >>> by_language(["zh", "de", "zh"], 9)
        '3 of 9 (de 1, zh 2)'
    """
    counts = ", ".join(f"{language} {count}" for language, count in sorted(Counter(languages).items()))
    return f"{len(languages)} of {total} ({counts})"


def describe(rows: Sequence[tuple[str, str]], held_out: Sequence[str] = (), *, left_out: int = 0) -> RowsReport:
    """Count rows.

    Args:
        rows: (language, text) of each row.
        held_out: Texts of a held-out set, such as dev rows.
        left_out: Rows that are not among them since they lack a side, a label or an answer.
    """
    texts = [text for _, text in rows]
    exact, loose = set(texts), {normalised(text) for text in texts}
    return RowsReport(
        languages=dict(sorted(Counter(language for language, _ in rows).items())),
        repeated=len(texts) - len(exact),
        repeated_normalised=len(texts) - len(loose),
        held_out=len(held_out),
        overlap=sum(text in exact for text in held_out),
        overlap_normalised=sum(normalised(text) in loose for text in held_out),
        left_out=left_out,
    )
