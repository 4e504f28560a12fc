"""Slot filling, generated as `type: value; type: value` or `None`, or tagged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from .data import DataFile, SlotRow, read_slots
from .data.slots import iob2_tags, slots_in, split_tokens
from .metrics import Counts, Metric, f1_ends, micro_f1
from .prompts import Template, table
from .tagged import Tagged, require_tokens

NO_SLOTS = "None"


def format_slots(slots: Sequence[tuple[str, str]]) -> str:
    """Return the answer for these slots.

    Example:
        >>> format_slots([("time", "five am"), ("date", "this week")])
        'time: five am; date: this week'
    """
    return "; ".join(f"{kind}: {value}" for kind, value in slots) or NO_SLOTS


def parse_slots(answer: str) -> list[tuple[str, str]]:
    """Read an answer back; only its first line counts, and parts that are not `type: value` are dropped.

    As in MASSIVE's scorer a part must split on ": " into exactly two.

    Example:
        >>> parse_slots("time: five am; date this week; city: ")
        [('time', 'five am')]
    """
    lines = answer.strip().splitlines()
    if not lines or lines[0].strip().lower() == NO_SLOTS.lower():
        return []
    parts = [part.split(": ") for part in lines[0].split("; ")]
    return [(p[0].strip(), p[1].strip()) for p in parts if len(p) == 2 and p[0].strip() and p[1].strip()]


def count_pairs(gold: Sequence[tuple[str, str]], predicted: Sequence[tuple[str, str]]) -> Counts:
    """Compare bags of (type, value); case does not count."""
    want = Counter((kind, value.lower()) for kind, value in gold)
    have = Counter((kind, value.lower()) for kind, value in predicted)
    hit = sum((want & have).values())
    return Counts(hit, sum(have.values()) - hit, sum(want.values()) - hit)


def iob2_of(tokens: Sequence[str], slots: Sequence[tuple[str, str]], language: str) -> list[str]:
    """Return IOB2 tags of a command's tokens from predicted slots.

    Every occurrence of a value, without regard to case, is tagged; later slots overwrite earlier ones; values that do
    not occur are ignored.
    """
    lowered = [token.lower() for token in tokens]
    tags = ["O"] * len(tokens)
    for kind, value in slots:
        phrase = [piece.lower() for piece in split_tokens(value, language)]
        for start in range(len(lowered) - len(phrase) + 1):
            if phrase and lowered[start : start + len(phrase)] == phrase:
                tags[start : start + len(phrase)] = [f"B-{kind}", *[f"I-{kind}"] * (len(phrase) - 1)]
    return tags


def tag_tokens(tokens: Sequence[str], slots: Sequence[tuple[str, str]], language: str) -> list[str]:
    """Return the slot type of each token, or O, as MASSIVE's scorer does; see `iob2_of`."""
    return [tag if tag == "O" else tag[2:] for tag in iob2_of(tokens, slots, language)]


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, start, stop) of every run of one tag; equal neighbours are one span, as in MASSIVE's scorer."""
    found = set()
    start = 0
    for tag, run in groupby(tags):
        stop = start + len(list(run))
        if tag != "O":
            found.add((tag, start, stop))
        start = stop
    return found


def strict_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, start, stop) of every span of IOB2 tags: from a B to the last I of its type.

    As xSID is scored (van der Goot et al., NAACL 2021, arXiv 2105.07316), and as seqeval's strict mode; an I that
    continues nothing counts as nothing.

    Example:
        >>> sorted(strict_spans(["B-x", "I-x", "B-x", "O", "I-x"]))
        [('x', 0, 2), ('x', 2, 3)]
    """
    found = set()
    for start, tag in enumerate(tags):
        if tag[:2] == "B-":
            stop = start + 1
            while stop < len(tags) and tags[stop] == f"I-{tag[2:]}":
                stop += 1
            found.add((tag[2:], start, stop))
    return found


def count_strict(row: SlotRow, answer: str) -> Counts | None:
    """Compare strict spans; a generated value is a span wherever it occurs in the command. None without tokens."""
    if not row.tokens:
        return None
    gold = strict_spans(iob2_tags(row))
    if isinstance(answer, Tagged):
        guess = strict_spans(answer.tags)
    else:
        guess = strict_spans(iob2_of(row.tokens, parse_slots(answer), row.language))
    hit = len(gold & guess)
    return Counts(hit, len(guess) - hit, len(gold) - hit)


def count_spans(row: SlotRow, predicted: Sequence[tuple[str, str]]) -> Counts:
    """Compare the spans of the row's tags with those of the predicted slots."""
    return count_tags(row, tag_tokens(row.tokens, predicted, row.language))


def count_tags(row: SlotRow, predicted: Sequence[str]) -> Counts:
    """Compare the spans of the row's tags with those of predicted ones, one slot type per token."""
    gold, guess = spans(row.tags), spans(predicted)
    hit = len(gold & guess)
    return Counts(hit, len(guess) - hit, len(gold) - hit)


_SYSTEM = (
    "Given a command from the user, a voice assistant will extract entities essential for carry out the command. "
    "Your task is to extract the entities as words from the command if they fall under a predefined list of "
    "entity types."
)


def _pair_counts(row: SlotRow, answer: str) -> Counts:
    if isinstance(answer, Tagged):
        # spelled as the tags are, since Chinese and Japanese are annotated by word and tagged by character
        return count_pairs(slots_in(row.tokens, iob2_tags(row), row.text), answer.pairs)
    return count_pairs(row.slots, parse_slots(answer))


def _type_counts(row: SlotRow, answer: str) -> Counts:
    """Compare the slots' types alone."""
    found = answer.pairs if isinstance(answer, Tagged) else parse_slots(answer)
    return count_pairs([(kind, "") for kind, _ in row.slots], [(kind, "") for kind, _ in found])


def _span_counts(row: SlotRow, answer: str) -> Counts | None:
    if not row.tokens:
        return None
    if isinstance(answer, Tagged):
        return count_tags(row, [tag if tag == "O" else tag[2:] for tag in answer.tags])
    return count_spans(row, parse_slots(answer))


_SCORERS = {"merged": _span_counts, "strict": count_strict}
"""How spans are counted."""


class Slots:
    """Slot filling, scored by micro F1.

    `pair_f1` compares (type, value) pairs and works for values that do not occur in the command; `span_f1` compares
    token spans as MASSIVE's scorer does (FitzGerald et al., MASSIVE, ACL 2023, arXiv 2204.08582) and needs annotated
    tokens, or with `--scorer strict` as xSID does, where equal neighbours are two spans; `type_f1` compares the types
    alone, so it tells commands that were understood and answered in another language (`time: tomorrow` for
    `time: morgen`) from those that were not.
    """

    name = "slots"
    scorers = tuple(_SCORERS)
    one_line = True
    is_open = False
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="Command: {text}\nSlots:", lead=" "),
        # Appendix D.2 of Liu and Niehues (ACL 2025), after He and Garner (2023); the wording is theirs
        Template(name="mid-align", prompt="{text}", chat=True, system=_SYSTEM),
        # their released Llama adapters were trained with a line break after each turn
        Template(name="mid-align-eot", prompt="{text}", chat=True, system=_SYSTEM, broken_after="<|eot_id|>"),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[SlotRow], list[DataFile]]:
        """Read slot rows; see `adaptermix.tasks.data.slots`."""
        return read_slots(arguments, rows=rows)

    def fields(self, row: SlotRow) -> Mapping[str, str]:
        """Return the command."""
        return {"text": row.text}

    def texts(self, row: SlotRow) -> tuple[str, ...]:
        """Return the command."""
        return (row.text,)

    def answer(self, row: SlotRow) -> str:
        """Return the slots as text."""
        return format_slots(row.slots)

    def words(self, row: SlotRow) -> tuple[str, ...]:
        """Return the command's tokens."""
        return require_tokens(row.tokens, row.text)

    def tags(self, row: SlotRow) -> tuple[str, ...]:
        """Return the tokens' IOB2 tags."""
        self.words(row)
        return iob2_tags(row)

    def tagged(self, row: SlotRow, tags: Sequence[str]) -> Tagged:
        """Return the slots that are tagged, as text and by place."""
        slots = slots_in(row.tokens, tags, row.text)
        return Tagged(format_slots(slots), tags=tags, pairs=slots)

    def evidence(self, row: SlotRow) -> tuple[str, ...]:
        """Return the values, of which those that stand in the command must stay there."""
        return tuple(value for _, value in row.slots)

    def language(self, row: SlotRow) -> str:
        """Return the command's language."""
        return row.language

    def metrics(self, rows: Sequence[SlotRow], scorer: str = "merged") -> tuple[Metric, ...]:
        """Return pair F1, type F1 and, where a row has tokens, span F1."""
        counts: dict[str, Callable[[SlotRow, str], Sequence[float] | None]] = {
            "pair_f1": _pair_counts,
            "type_f1": _type_counts,
        }
        if any(row.tokens for row in rows):
            counts["span_f1"] = _SCORERS[scorer]
        return tuple(Metric(name=name, count=count, value=micro_f1, ends=f1_ends) for name, count in counts.items())

    def unlabelled(self, text: str, language: str) -> SlotRow:
        """Return a row without slots, its tokens split at blanks (Chinese and Japanese by character)."""
        tokens = split_tokens(text, language)
        return SlotRow(text=text, slots=(), language=language, tokens=tokens, tags=("O",) * len(tokens))

    def labelled(self, row: SlotRow, answer: str) -> SlotRow:
        """Return the row with the slots of an answer."""
        slots = answer.pairs if isinstance(answer, Tagged) else tuple(parse_slots(answer))
        return replace(row, slots=slots)

    def agreement(self, rows: Sequence[SlotRow]) -> tuple[Metric, ...]:  # noqa: ARG002
        """Return type F1: values are in the language of the command, or copied, so only their types compare."""
        return (Metric(name="type_f1", count=_type_counts, value=micro_f1, ends=f1_ends),)
