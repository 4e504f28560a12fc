"""Multiple choice: Belebele, XCOPA, and JSONL with a question and its choices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..io.json_types import JsonObject
from ..provenance.row_hashes import RowTexts
from .base import BaseTask, Marked, task
from .data.files import DataFile
from .data.tables import LANGUAGE_NAMES, Row, row_cluster, row_language, usable
from .labels import label_counts, label_reader, macro_f1
from .metrics import Metric, f1_ends, mean, mean_ends
from .prompts import Template, table

_QUESTIONS = {"cause": "What caused this?", "effect": "What happened as a result?"}
"""What XCOPA asks about a premise."""
# The words for XCOPA's languages are those of EleutherAI's lm-evaluation-harness.
_LINKS = {
    "en": ("because", "so"),
    "et": ("sest", "seetõttu"),
    "ht": ("poukisa", "donk sa"),
    "id": ("karena", "maka"),
    "it": ("perché", "quindi"),
    "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"),
    "ta": ("காரணமாக", "எனவே"),
    "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"),
    "vi": ("bởi vì", "vì vậy"),
    "zh": ("因为", "所以"),
}
"""Words between a premise and its cause, and between a premise and its effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow(Row):
    """A question with choices, one of which is right.

    Args:
        context: The text that the question is about; empty for questions without a text.
        question: The question; empty for XCOPA, which asks for the cause or the effect of its premise.
        choices: The choices.
        right: Index of the right choice.
        relation: `cause` or `effect` for XCOPA, else empty.
    """

    context: str
    question: str
    choices: tuple[str, ...]
    right: int
    relation: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.context, self.question)))

    @property
    def row_texts(self) -> RowTexts:
        """The texts by which the row is recognised in other files: choices distinguish questions on one premise."""
        return RowTexts((*self.texts, *self.choices))


def marked(row: ChoiceRow) -> Marked:
    r"""Return a row as one text, in which a model reads all choices together and finds each by its characters.

    Its form is that of MT-LLM (Schmidt et al., 2024, arXiv 2406.12739) for Belebele.

    Example:
        >>> marked(ChoiceRow(context="It rains.", question="Is it dry?", choices=("yes", "no"), right=1, language="en"))
        Marked(text='It rains. Is it dry?\n1 yes\n2 no', spans=((23, 26), (29, 31)), passage=(0, 9))
    """
    text = " ".join((*row.texts, *filter(None, [_QUESTIONS.get(row.relation)])))
    spans = []
    for number, choice in enumerate(row.choices, start=1):
        text += f"\n{number} "
        spans.append((len(text), len(text) + len(choice)))
        text += choice
    return Marked(text, tuple(spans), passage=(0, len(row.context or row.question)))


def _beginning(row: ChoiceRow) -> str:
    """Return the text that a choice continues: context and question, or a premise with a word for its relation."""
    if not row.relation:
        return "\n".join(row.texts)
    premise = row.context
    if unicodedata.category(premise[-1]) == "Po":
        premise = premise[:-1].rstrip()
    links = _LINKS.get(row.language, _LINKS["en"])
    return f"{premise} {links[row.relation == 'effect']}"


def _ending(row: ChoiceRow, choice: str) -> str:
    """Return a choice as it continues the text; after a word of relation it starts in lower case."""
    return choice[:1].lower() + choice[1:] if row.relation else choice


_LETTERS = tuple("ABCDEFGHI")
_DIGITS = "123456789"
_NUMBERED = (
    ("mc_answer", _DIGITS),  # Belebele
    ("choice", _DIGITS),  # XCOPA
    ("option_", "abcdefghi"),  # Global-MMLU
    ("sentence_quiz", _DIGITS),  # XStoryCloze
)
"""Names of the fields of choices: a word and the signs that follow it."""
_FROM_ONE = ("correct_answer_num", "answer_right_ending")
"""Fields that count the right choice from 1."""
_STORY = tuple(f"input_sentence_{number}" for number in range(1, 5))
"""Fields of the sentences before the choices of XStoryCloze."""
_SCORED = re.compile(r"\d+ \[(?P<scores>-?[\d.e+-]+/\d+(?: -?[\d.e+-]+/\d+)*)\]")
"""An answer with the likelihood of each choice: `2 [-3.5/4 -1.25/9]`."""


def format_scores(options: Sequence[str], scores: Sequence[float], lengths: Sequence[int]) -> str:
    """Return the option of the largest score, followed by the score and the length of each.

    Example:
        >>> format_scores(("1", "2"), (-3.5, -1.25), (4, 9))
        '2 [-3.5/4 -1.25/9]'
    """
    listed = " ".join(f"{score:.8g}/{length}" for score, length in zip(scores, lengths, strict=True))
    return f"{options[_best(scores)]} [{listed}]"


def parse_scores(answer: str) -> list[tuple[float, int]] | None:
    """Return score and length of each option from an answer of `format_scores`; None for any other answer."""
    match = _SCORED.fullmatch(answer)
    try:
        pairs = [pair.split("/") for pair in match["scores"].split()] if match else []
        return [(float(score), int(length)) for score, length in pairs] or None
    except ValueError:
        return None


def _best(scores: Sequence[float]) -> int:
    """Return the index of the largest score, of equal ones the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def _one_line(value: object) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _choices(row: JsonObject) -> tuple[str, ...]:
    """Return the choices of a row in any of the forms; empty for a row without choices."""
    listed = row.get("choices")
    if listed is None:
        listed = [row[name] for kind, marks in _NUMBERED for name in (f"{kind}{mark}" for mark in marks) if name in row]
    return tuple(map(_one_line, listed)) if isinstance(listed, list) else ()


def _right(row: JsonObject, choices: Sequence[str]) -> int | None:
    """Return the index of the right choice; None if the row names another answer."""
    value: object = next((row[name] for name in _FROM_ONE if row.get(name) is not None), None)
    if value is not None:  # counted from 1, as number or text
        number = int(value) - 1 if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else -1
        return number if 0 <= number < len(choices) else None
    value = next((row[name] for name in ("label", "answer") if row.get(name) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(choices) else None
    text = _one_line(value)
    if "option_a" in row and text in _LETTERS:  # Global-MMLU
        number = _LETTERS.index(text)
        return number if number < len(choices) else None
    return choices.index(text) if text in choices else None


def _is_unlabelled(row: JsonObject) -> bool:
    value = next((row[name] for name in (*_FROM_ONE, "label", "answer") if row.get(name) is not None), None)
    return value is None or value == -1


def _rows(file: DataFile) -> Iterator[ChoiceRow | DataError | None]:
    for number, row in file.json_rows():
        question = _one_line(row.get("question"))
        relation = question if question in _QUESTIONS and "premise" in row else ""
        context = next(
            (_one_line(row[name]) for name in ("flores_passage", "premise", "context", "passage") if name in row),
            " ".join(_one_line(row[name]) for name in _STORY if name in row),
        )
        choices = _choices(row)
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices) or not (context or question):
            yield DataError(
                f"{file.path}:{number}: a row must have a question or a premise and at least two different choices "
                "('choices', or numbered fields as in Belebele and XCOPA), all of them text.",
                code="choice.row",
            )
            continue
        if _is_unlabelled(row):
            yield None
            continue
        right = _right(row, choices)
        if right is None:
            yield DataError(
                f"{file.path}:{number}: the right answer must be one of the {len(choices)} choices: "
                "'correct_answer_num' from 1, 'label' or 'answer' from 0, or the text of a choice.",
                code="choice.answer",
            )
            continue
        named = next((row[name] for name in (*LANGUAGE_NAMES, "dialect") if row.get(name)), None)
        yield ChoiceRow(
            context=context,
            question="" if relation else question,
            choices=choices,
            right=right,
            relation=relation,
            language=row_language(file, named),
            cluster=row_cluster(row),
        )


@task
class Choice(BaseTask[ChoiceRow]):
    """Multiple choice, scored by accuracy.

    A language model compares the likelihoods of the choices and does not generate; a head (`--head choices`) scores the
    tokens of each choice. With likelihoods, `accuracy` takes the choice of the
    largest likelihood, `accuracy_norm` that of the largest logarithm of the likelihood per character, which does not
    favour short choices. For answers of one length, such as the numbers of the template `plain`, both are equal.

    The templates `plain` and `chat` show the numbered choices and ask for a number, as for Belebele (Bandarkar et al.,
    ACL 2024, arXiv 2308.16884). The template `continue` shows the text and compares how well the choices continue it,
    as is usual for XCOPA (Ponti et al., EMNLP 2020, arXiv 2005.00333); a word such as "because" in the row's language
    joins premise and choice.

    Files are JSONL as Belebele and XCOPA have it, or with `question`, `choices`, optionally `context`, and `answer`:
    the index from 0 or the text of the right choice. Questions on one text are resampled together.

    `macro_f1` is over the numbers of the right choices: a model that prefers one number scores low.
    """

    name = "choice"
    blank = {"answer": 0}
    templates = table(
        Template(name="plain", prompt="{text}\nAnswer:", lead=" "),
        Template(name="continue", prompt="{beginning}", lead=" ", answers="endings"),
        Template(name="chat", prompt="{text}", chat=True, system="Answer with the number of the right choice."),
    )

    def rows_of(self, file: DataFile) -> Iterator[ChoiceRow | None]:
        return usable(_rows(file))

    def fields(self, row: ChoiceRow) -> Mapping[str, object]:
        endings = {str(number): _ending(row, choice) for number, choice in enumerate(row.choices, start=1)}
        return {"text": marked(row).text, "beginning": _beginning(row), "endings": endings}

    def marked(self, row: ChoiceRow) -> Marked:
        """Return the row as one text; see `marked`."""
        return marked(row)

    def answer(self, row: ChoiceRow) -> str:
        return str(row.right + 1)

    def evidence(self, row: ChoiceRow) -> tuple[str, ...]:
        return (*row.choices, *filter(None, [row.question]))

    def options(self, row: ChoiceRow) -> tuple[str, ...]:
        """Return the numbers of the choices, from 1."""
        return tuple(str(number) for number in range(1, len(row.choices) + 1))

    def answer_from_scores(self, row: ChoiceRow, scores: Sequence[float], lengths: Sequence[int]) -> str:
        return format_scores(self.options(row), scores, lengths)

    def cluster(self, row: ChoiceRow) -> str:
        """Return the text that several questions may be about."""
        return row.context

    def metrics(self, rows: Sequence[ChoiceRow]) -> tuple[Metric, ...]:
        def chosen(row: ChoiceRow, answer: str, *, by_length: bool) -> str | None:
            options = self.options(row)
            pairs = parse_scores(answer)
            if pairs and len(pairs) == len(options):
                return options[_best([score / max(length, 1) if by_length else score for score, length in pairs])]
            return label_reader(options, dict(zip(row.choices, options, strict=True)))(answer)

        def right(row: ChoiceRow, answer: str) -> Sequence[float]:
            return chosen(row, answer, by_length=False) == self.answer(row), 1

        def right_by_length(row: ChoiceRow, answer: str) -> Sequence[float]:
            return chosen(row, answer, by_length=True) == self.answer(row), 1

        most = max((len(row.choices) for row in rows), default=0)
        offsets = {str(number): 3 * (number - 1) for number in range(1, most + 1)}

        def by_number(row: ChoiceRow, answer: str) -> Sequence[float]:
            return label_counts(offsets, self.answer(row), chosen(row, answer, by_length=False))

        return (
            Metric(name="accuracy", count=right, value=mean, ends=mean_ends),
            Metric(name="accuracy_norm", count=right_by_length, value=mean, ends=mean_ends),
            Metric(name="macro_f1", count=by_number, value=macro_f1, ends=f1_ends),
        )
