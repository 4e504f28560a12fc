"""Extractive question answering: SQuAD JSON, as XQuAD and MLQA have it too, and JSONL with one question a line.

The answer is a part of the text, generated or found by a head.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError
from ..io.json_types import JsonValue
from .base import BaseTask, task
from .data.files import DataFile, sound
from .data.language_names import code_of_name
from .data.tables import LANGUAGE_NAMES, Row, row_cluster, row_language
from .metrics import Metric, mean, mean_ends
from .prompts import Template, table

UNANSWERABLE = "unanswerable"
_WORD = 24
"""Characters of the longest word that is left out whole where a text is cut."""
# The articles of MLQA's scorer.
_ARTICLES = {
    "ar": re.compile("ال"),  # part of the word; MLQA removes these letters wherever they occur
    "de": re.compile(r"\b(?:das|dem|den|der|des|die|eine?|einem|einen|einer|eines)\b"),
    "en": re.compile(r"\b(?:an?|the)\b"),
    "es": re.compile(r"\b(?:el|las?|los|una?|unas|unos)\b"),
    "vi": re.compile(r"\b(?:chiếc|cái|của|là|những)\b"),
}
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Languages that are split into characters. MLQA has no Japanese, so kana are our addition.
_CHARACTERS = {
    "ja": re.compile(f"([{_IDEOGRAPHS}\u3040-\u30ff\u31f0-\u31ff])"),
    "zh": re.compile(f"([{_IDEOGRAPHS}])"),
    "zh-Hant": re.compile(f"([{_IDEOGRAPHS}])"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QaRow(Row):
    """A question on a text.

    Args:
        question: The question.
        context: The text.
        answers: All right answers as they occur in the text; none if the text does not answer.
        id: The question's name in its data set, which is the same in all languages of XQuAD; may be empty.
        spans: Start and end of each answer in the text, in characters; None if it does not occur.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    id: str = ""
    spans: tuple[tuple[int, int] | None, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.question, self.context


def _answers(where: str, row: Mapping[str, JsonValue]) -> dict[str, object]:
    """Return the answers with their starts, if the data give them.

    Accepts a list of texts or of {"text": ...}, one text, or {"text": [...]} as the Hub's export of SQuAD has it.
    """
    if row.get("is_impossible") is True:
        return {}  # further "answers" are plausible ones only
    value = row.get("answers", row.get("answer"))
    listed = value.get("text") if isinstance(value, dict) else value
    items = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else [None]
    values = [item.get("text") if isinstance(item, dict) else item for item in items]
    texts = [text for text in values if isinstance(text, str)]
    if len(texts) < len(items):
        raise DataError(
            f'{where}: a question must have "answers", a list of texts or of {{"text": ...}}, empty without an '
            f"answer, found {str(value)[:60]!r}.",
            code="qa.answers",
        )
    starts = [item.get("answer_start") if isinstance(item, dict) else None for item in items]
    shared = value.get("answer_start") if isinstance(value, dict) else None
    if isinstance(shared, list) and len(shared) == len(items):
        starts = shared
    answers: dict[str, object] = {}
    for text, start in zip(texts, starts, strict=True):
        if text.strip():
            answers.setdefault(" ".join(text.split()), start)  # annotators often agree on one spelling
    return answers


def _span(context: str, answer: str, start: object) -> tuple[int, int] | None:
    """Return the characters of an answer: the occurrence nearest to its stated start, else the first one."""
    near = start if isinstance(start, int) else 0
    pattern = r"\s+".join(map(re.escape, answer.split()))
    spans = [match.span() for match in re.finditer(pattern, context)]
    return min(spans, key=lambda span: abs(span[0] - near), default=None)


def _row(file: DataFile, where: str, row: Mapping[str, JsonValue], context: object) -> QaRow | None:
    """Return a question; None if question or text is empty."""
    question = row.get("question")
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: a row must have its {name!r} as text, found {str(value)[:60]!r}.", code="qa.not-text"
            )
    if not str(question).strip() or not str(context).strip():
        return None
    named = next((str(row[name]) for name in LANGUAGE_NAMES if row.get(name)), None)
    if named is None and file.language is None:  # TyDiQA's ids start with the language: "swahili-123-0"
        named = code_of_name(str(row.get("id", "")).partition("-")[0])
    answers = _answers(where, row)
    whole = str(context).rstrip()
    blank = len(whole) - len(whole.lstrip())
    spans = [_span(whole, answer, start) for answer, start in answers.items()]
    return QaRow(
        question=str(question).strip(),
        context=whole.strip(),
        answers=tuple(answers),
        language=row_language(file, named),
        id="" if row.get("id") is None else str(row["id"]),
        cluster=row_cluster(row),
        spans=tuple(span and (span[0] - blank, span[1] - blank) for span in spans),
    )


def _items(where: str, value: object, name: str) -> list[tuple[str, Mapping[str, JsonValue]]]:
    """Return the objects in a field that is a list of them, each with its location."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(
            f"{where}: {name!r} must be a list of objects, as in SQuAD, found {str(value)[:60]!r}.", code="qa.not-list"
        )
    return [(f"{name}[{number}]", item) for number, item in enumerate(value)]


def _squad(file: DataFile, text: str) -> Iterator[QaRow | None]:
    try:
        document = sound(json.loads(text))
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1 :][:1]
        raise DataError(
            f"{file.path}:{error.lineno}: question data must be SQuAD JSON, or JSONL with one question a line, found "
            f"{''.join(line).strip()[:60]!r}.",
            code="qa.format",
        ) from error
    except (RecursionError, ValueError) as error:  # nesting, or numbers of thousands of digits
        raise DataError(
            f"{file.path}:1: question data must be SQuAD JSON, and this is nested too deep, or holds a number of "
            "thousands of digits.",
            code="qa.too-deep",
        ) from error
    if not isinstance(document, dict) or "data" not in document:
        raise DataError(
            f"{file.path}:1: SQuAD JSON must be an object with 'data', found {text.strip()[:60]!r}.", code="qa.no-data"
        )
    for article, value in _items(str(file.path), document["data"], "data"):
        for paragraph, block in _items(f"{file.path}: {article}", value.get("paragraphs"), "paragraphs"):
            where = f"{file.path}: {article}.{paragraph}"
            for name, question in _items(where, block.get("qas"), "qas"):
                yield _row(file, f"{where}.{name}", question, block.get("context"))


def _has_rows(file: DataFile) -> bool:
    """Return whether a file is JSONL, not SQuAD JSON, which may be one line too."""
    if ".jsonl" in file.suffixes:
        return True
    first = next((line for _, line in file.lines() if line.strip()), "")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "data" not in row


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def answer_tokens(text: str, language: str) -> list[str]:
    """Return the words of an answer that are scored: in lower case, without punctuation and articles.

    As in MLQA's scorer (Lewis et al., MLQA, ACL 2020, arXiv 1910.07475), which for English equals SQuAD's except
    for punctuation of all scripts. Chinese and Japanese are split into characters; words of other scripts in them stay
    whole. Languages that MLQA lacks have no articles here.

    Example:
        >>> answer_tokens("The (old) house!", "en"), answer_tokens("2008年 Beijing", "zh")
        (['old', 'house'], ['2008', '年', 'beijing'])
    """
    bare = "".join(character for character in text.lower() if not _is_punctuation(character))
    if language in _ARTICLES:
        bare = _ARTICLES[language].sub(" ", bare)
    if language in _CHARACTERS:
        bare = _CHARACTERS[language].sub(r" \1 ", bare)
    return bare.split()


def squad_tokens(text: str, _: str = "") -> list[str]:
    """Return the words of an answer that SQuAD's script scores, which treats every language as English.

    Lower case, without ASCII punctuation and English articles, split at blanks (Rajpurkar et al., EMNLP 2016; XQuAD,
    Artetxe et al., ACL 2020, is published with this script).

    Example:
        >>> squad_tokens("The (old) house!"), squad_tokens("2008年。")
        (['old', 'house'], ['2008年。'])
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def token_f1(gold: Sequence[str], answer: Sequence[str]) -> float:
    """Return F1 over bags of tokens; if either is empty, 1 if both are, else 0, as SQuAD 2.0 does."""
    if not gold or not answer:
        return float(not gold and not answer)
    hit = (Counter(gold) & Counter(answer)).total()
    return 2 * hit / (len(gold) + len(answer))


def _same(gold: Sequence[str], answer: Sequence[str]) -> float:
    return float(list(gold) == list(answer))


def _counts(
    tokens: Callable[[str, str], Sequence[str]], score: Callable[[Sequence[str], Sequence[str]], float]
) -> Callable[[QaRow, str], Sequence[float]]:
    """Return the counter of a metric: an answer's best score over the right answers, and 1 for the row."""

    def count(row: QaRow, answer: str) -> Sequence[float]:
        # Tokens of a full stop and a line break let a model write past the end of its line.
        words = tokens(answer.strip().split("\n", maxsplit=1)[0], row.language)
        if not row.answers:
            return float(not words or words == [UNANSWERABLE]), 1
        return max(score(tokens(gold, row.language), words) for gold in row.answers), 1

    return count


_SCORERS: dict[str, Callable[[str, str], list[str]]] = {"mlqa": answer_tokens, "squad": squad_tokens}


@task
class Qa(BaseTask[QaRow]):
    """Question answering, scored by F1 over words and by exact match, each the mean over questions in [0, 1].

    The best score over all right answers counts, as in SQuAD (Rajpurkar et al., EMNLP 2016, arXiv 1606.05250). The
    right answer to a question that the text does not answer (SQuAD 2.0, arXiv 1806.03822) is `unanswerable`, or
    nothing. Only the first line of an answer is scored. Words are those of MLQA's script (`answer_tokens`), or of
    SQuAD's (`squad_tokens`).

    Files are SQuAD JSON of version 1.1 or 2.0, or JSONL with `question`, `context` and `answers`. Where MLQA has texts
    and questions in two languages, give the language of the texts, which the answers have too.
    """

    name = "qa"
    blank = {"answers": []}
    no_answer = UNANSWERABLE
    scorers = tuple(_SCORERS)
    templates = table(
        Template(name="plain", prompt="Context: {context}\nQuestion: {question}\nAnswer:", lead=" "),
        Template(
            name="chat",
            prompt="Context: {context}\nQuestion: {question}",
            chat=True,
            system=(
                "Answer the question with the shortest part of the context that answers it, copied word for word, or "
                f"with '{UNANSWERABLE}' if the context does not answer it."
            ),
        ),
    )

    def rows_of(self, file: DataFile) -> Iterator[QaRow | None]:
        if not _has_rows(file):
            yield from _squad(file, "\n".join(line for _, line in file.lines()))
            return
        for number, row in file.json_rows():
            is_null = any(name in row and row[name] is None for name in ("question", "context"))
            yield None if is_null else _row(file, f"{file.path}:{number}", row, row.get("context"))

    def fields(self, row: QaRow) -> Mapping[str, str]:
        return {"context": row.context, "question": row.question}

    def question_and_context(self, row: QaRow) -> tuple[str, str]:
        return row.question, row.context

    def span(self, row: QaRow) -> tuple[int, int] | None:
        return next(filter(None, row.spans), None)

    def lacks_its_answer(self, row: QaRow) -> bool:
        return bool(row.answers) and self.span(row) is None

    def excerpt(self, row: QaRow, size: int) -> QaRow:
        """Return the row with its right answer and `size` characters of the text around it, or fewer at whole words.

        Without a right answer it is the start of the text.
        """
        start, stop = self.span(row) or (0, 0)
        before = min(start, max(size // 2, size - (len(row.context) - stop)))
        first, last = start - before, min(len(row.context), stop + size - before)
        # Half a word is another word, but long runs without a blank have to be cut.
        if first and not row.context[first - 1].isspace():
            first = next((at for at in range(first, min(start, first + _WORD)) if row.context[at].isspace()), first)
        if last < len(row.context) and not row.context[last].isspace():
            last = next((at for at in range(last, max(stop, last - _WORD), -1) if row.context[at - 1].isspace()), last)
        part = row.context[first:last]
        first += len(part) - len(part.lstrip())
        spans = [span and (span[0] - first, span[1] - first) for span in row.spans]
        inside = tuple(span if span and span[0] >= 0 and span[1] <= len(part.strip()) else None for span in spans)
        return replace(row, context=part.strip(), spans=inside)

    def answer_at(self, row: QaRow, span: tuple[int, int] | None) -> str:
        return " ".join(row.context[slice(*span)].split()) if span else UNANSWERABLE

    def with_source(self, row: QaRow, source: QaRow) -> QaRow:
        before = f"{source.context}\n"
        spans = tuple(span and (span[0] + len(before), span[1] + len(before)) for span in row.spans)
        question = f"{source.question} {row.question}"
        return replace(row, question=question, context=before + row.context, spans=spans)

    def answer(self, row: QaRow) -> str:
        """Return the first right answer that occurs in the text, else the first one, else `unanswerable`."""
        occurring = (answer for answer, span in zip(row.answers, row.spans, strict=False) if span)
        return next(occurring, row.answers[0] if row.answers else UNANSWERABLE)

    def evidence(self, row: QaRow) -> tuple[str, ...]:
        return (self.answer(row),) if row.answers else ()

    def cluster(self, row: QaRow) -> str:
        """Return the text: questions on one text are easy or hard together."""
        return row.context

    def metrics(self, rows: Sequence[QaRow], scorer: str = "mlqa") -> tuple[Metric, ...]:
        tokens = _SCORERS[scorer]
        return (
            Metric(name="f1", count=_counts(tokens, token_f1), value=mean, ends=mean_ends),
            Metric(name="exact_match", count=_counts(tokens, _same), value=mean, ends=mean_ends),
        )
