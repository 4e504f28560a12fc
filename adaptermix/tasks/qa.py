"""Extractive question answering: the answer is a part of the text, generated or pointed at."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .data import DataFile, QaRow, read_qa
from .metrics import Metric, mean, mean_ends
from .prompts import Template, table

UNANSWERABLE = "unanswerable"
_WORD = 24
"""Characters of the longest word that is left out whole where a text is cut."""
# those of MLQA's scorer
_ARTICLES = {
    "ar": re.compile("ال"),  # the article is part of the word; MLQA takes these letters out wherever they stand
    "de": re.compile(r"\b(?:das|dem|den|der|des|die|eine?|einem|einen|einer|eines)\b"),
    "en": re.compile(r"\b(?:an?|the)\b"),
    "es": re.compile(r"\b(?:el|las?|los|una?|unas|unos)\b"),
    "vi": re.compile(r"\b(?:chiếc|cái|của|là|những)\b"),
}
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# by character where words are not separated; kana are not in MLQA, which has no Japanese
_CHARACTERS = {
    "ja": re.compile(f"([{_IDEOGRAPHS}\u3040-\u30ff\u31f0-\u31ff])"),
    "zh": re.compile(f"([{_IDEOGRAPHS}])"),
    "zh-Hant": re.compile(f"([{_IDEOGRAPHS}])"),
}


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def answer_tokens(text: str, language: str) -> list[str]:
    """Return the words of an answer that count: in lower case, without punctuation and articles.

    As in MLQA's scorer (Lewis et al., MLQA, ACL 2020, arXiv 1910.07475), which for English is that of SQuAD but for
    punctuation of all scripts. Chinese and Japanese are split into characters, words of other scripts in them stay
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
    """Return the words of an answer that count in SQuAD's script, which treats every language as English.

    Lower case, without ASCII punctuation and English articles, split at blanks (Rajpurkar et al., EMNLP 2016; XQuAD,
    Artetxe et al., ACL 2020, is published with this script).

    Example:
        >>> squad_tokens("The (old) house!"), squad_tokens("2008年。")
        (['old', 'house'], ['2008年。'])
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def token_f1(gold: Sequence[str], answer: Sequence[str]) -> float:
    """Return F1 over bags of tokens; where one has none, whether the other has none either, as SQuAD 2.0 does."""
    if not gold or not answer:
        return float(not gold and not answer)
    hit = (Counter(gold) & Counter(answer)).total()
    return 2 * hit / (len(gold) + len(answer))


def _same(gold: Sequence[str], answer: Sequence[str]) -> float:
    return float(list(gold) == list(answer))


def _counts(
    tokens: Callable[[str, str], Sequence[str]], score: Callable[[Sequence[str], Sequence[str]], float]
) -> Callable[[QaRow, str], Sequence[float]]:
    """Return what counts an answer: its best score over the right answers, and 1 for the row."""

    def count(row: QaRow, answer: str) -> Sequence[float]:
        # tokens that hold a full stop and a line break let a model run past the end of its line
        found = tokens(answer.strip().split("\n", maxsplit=1)[0], row.language)
        if not row.answers:
            return float(not found or found == [UNANSWERABLE]), 1
        return max(score(tokens(gold, row.language), found) for gold in row.answers), 1

    return count


_SCORERS: dict[str, Callable[[str, str], list[str]]] = {"mlqa": answer_tokens, "squad": squad_tokens}


class Qa:
    """Question answering, scored by F1 over words and by exact match, each the mean over questions in [0, 1].

    The best score over all right answers counts, as in SQuAD (Rajpurkar et al., EMNLP 2016, arXiv 1606.05250). What
    the text does not answer (SQuAD 2.0, arXiv 1806.03822) is answered by `unanswerable`, or by nothing. Only the first
    line of an answer counts. Words are those of MLQA's script (`answer_tokens`), or of SQuAD's (`squad_tokens`).
    """

    name = "qa"
    scorers = tuple(_SCORERS)
    one_line = True
    is_open = False
    templates: Mapping[str, Template] = table(
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

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[QaRow], list[DataFile]]:
        """Read questions on texts; see `adaptermix.tasks.data.qa`."""
        return read_qa(arguments, rows=rows)

    def fields(self, row: QaRow) -> Mapping[str, str]:
        """Return the text and the question."""
        return {"context": row.context, "question": row.question}

    def asked(self, row: QaRow) -> tuple[str, str]:
        """Return question and text."""
        return row.question, row.context

    def span(self, row: QaRow) -> tuple[int, int] | None:
        """Return the place of the first right answer that stands in the text."""
        return next(filter(None, row.places), None)

    def is_astray(self, row: QaRow) -> bool:
        """Whether there are answers, and none of them stands in the text."""
        return bool(row.answers) and self.span(row) is None

    def around(self, row: QaRow, size: int) -> QaRow:
        """Return the row with its right answer and `size` characters of the text around it, or less at whole words.

        Without a right answer it is the beginning of the text.
        """
        start, stop = self.span(row) or (0, 0)
        before = min(start, max(size // 2, size - (len(row.context) - stop)))
        first, last = start - before, min(len(row.context), stop + size - before)
        # a word that is cut is another word; long runs without a blank have to be cut
        if first and not row.context[first - 1].isspace():
            first = next((at for at in range(first, min(start, first + _WORD)) if row.context[at].isspace()), first)
        if last < len(row.context) and not row.context[last].isspace():
            last = next((at for at in range(last, max(stop, last - _WORD), -1) if row.context[at - 1].isspace()), last)
        part = row.context[first:last]
        first += len(part) - len(part.lstrip())
        places = tuple(place and (place[0] - first, place[1] - first) for place in row.places)
        inside = tuple(place if place and place[0] >= 0 and place[1] <= len(part.strip()) else None for place in places)
        return replace(row, context=part.strip(), places=inside)

    def pointed(self, row: QaRow, span: tuple[int, int] | None) -> str:
        """Return a part of the text in one line, or that there is no answer."""
        return " ".join(row.context[slice(*span)].split()) if span else UNANSWERABLE

    def joined(self, row: QaRow, source: QaRow) -> QaRow:
        """Return a row whose question and text begin with those of its source; the answers stand in its own text."""
        before = f"{source.context}\n"
        places = tuple(place and (place[0] + len(before), place[1] + len(before)) for place in row.places)
        question = f"{source.question} {row.question}"
        return replace(row, question=question, context=before + row.context, places=places)

    def texts(self, row: QaRow) -> tuple[str, ...]:
        """Return question and text."""
        return (row.question, row.context)

    def answer(self, row: QaRow) -> str:
        """Return the first right answer that stands in the text, else the first one, or that there is none."""
        standing = (answer for answer, place in zip(row.answers, row.places, strict=False) if place)
        return next(standing, row.answers[0] if row.answers else UNANSWERABLE)

    def evidence(self, row: QaRow) -> tuple[str, ...]:
        """Return the right answer."""
        return (self.answer(row),) if row.answers else ()

    def language(self, row: QaRow) -> str:
        """Return the answers' language."""
        return row.language

    def cluster(self, row: QaRow) -> str:
        """Return the text: questions on one text are easy or hard together."""
        return row.context

    def metrics(self, rows: Sequence[QaRow], scorer: str = "mlqa") -> tuple[Metric, ...]:  # noqa: ARG002
        """Return F1 and exact match."""
        tokens = _SCORERS[scorer]
        return (
            Metric(name="f1", count=_counts(tokens, token_f1), value=mean, ends=mean_ends),
            Metric(name="exact_match", count=_counts(tokens, _same), value=mean, ends=mean_ends),
        )
