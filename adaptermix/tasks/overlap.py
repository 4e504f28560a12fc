"""BLEU and chrF as functions of sums over rows, equal to sacrebleu's corpus scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PlanError
from .metrics import Sums

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

_BLEU_ORDER, _CHRF_ORDER, _BETA = 4, 6, 2
_DEFAULT = "13a"
"""sacrebleu's default tokenizer, which takes a Chinese or Thai sentence for a word or two."""
_TOKENIZERS = {"ja": "ja-mecab", "ko": "ko-mecab"}
_CHINESE = {"Hani", "Hans", "Hant"}
# written without blanks between words
_UNSEPARATED = {"Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Talu", "Tale", "Tavt", "Java", "Bali", "Yiii"}
_UNSEPARATED |= {"Jpan", "Hira", "Kana", "Hrkt"}


@cache
def tokenizer_for(language: str) -> str:
    """Return the name of sacrebleu's tokenizer in which BLEU is counted.

    Chinese in all its varieties, Japanese and Korean have their own; other languages whose script puts no blanks
    between words are counted by character.

    Example:
        >>> [tokenizer_for(code) for code in ("de", "zh-Hant", "yue", "th", "dz", "ja")]
        ['13a', 'zh', 'zh', 'char', 'char', 'ja-mecab']
    """
    import langcodes
    from langcodes.tag_parser import LanguageTagError

    if language in _TOKENIZERS:
        return _TOKENIZERS[language]
    try:
        script = langcodes.Language.get(language).maximize().script
    except LanguageTagError:
        return _DEFAULT
    return "zh" if script in _CHINESE else "char" if script in _UNSEPARATED else _DEFAULT


@cache
def _bleu(language: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    try:
        # sacrebleu requires an effective order for single sentences; their counts stay the same
        return BLEU(tokenize=tokenizer_for(language), effective_order=True)
    except RuntimeError as error:
        raise PlanError(
            f"BLEU in '{language}' needs the tokenizer {tokenizer_for(language)}, which is not installed. "
            "Install adaptermix[mt].",
            code="task.bleu-tokenizer",
        ) from error


def has_own_tokenizer(language: str) -> bool:
    """Return whether a language needs another tokenizer than sacrebleu's default."""
    return tokenizer_for(language) != _DEFAULT


def require_tokenizers(languages: Sequence[str]) -> None:
    """Make sure that BLEU can be counted in these languages.

    Raises:
        PlanError: a tokenizer is not installed.
    """
    for language in languages:
        _bleu(language)


def bleu_counts(reference: str, answer: str, language: str) -> tuple[float, ...]:
    """Return a row's statistics for BLEU, in words of sacrebleu's tokenizer for the language.

    Shapes: [10], the lengths of answer and reference, then for n-grams of 1 to 4 words how many are right, then how
    many there are in the answer.

    Raises:
        PlanError: the tokenizer is not installed.
    """
    score = _bleu(language).sentence_score(answer, [reference])
    return (score.sys_len, score.ref_len, *score.counts, *score.totals)


def bleu(sums: Sums) -> Sums:
    """Return corpus BLEU in [0, 100] from sums of `bleu_counts`.

    Orders without a right n-gram are smoothed as NIST's script mteval-v13a does: the first counts half a right n-gram,
    each further one half of the previous one. Without any right word, or with an order that no answer is
    long enough for, it is 0.

    Shapes: [... 10] gives [...].

    Reference: Papineni et al., BLEU, ACL 2002; Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    right, total = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    smoothed = 0.5 ** np.cumsum(right == 0, axis=-1)
    precisions = np.where(right > 0, right, smoothed) / np.maximum(total, 1)
    shortness = np.minimum(0.0, 1 - reference_length / np.maximum(length, 1))
    values: Sums = 100 * np.exp(shortness + np.log(precisions).mean(-1))
    return np.where((right > 0).any(-1) & (total > 0).all(-1), values, 0.0)


def chrf_counts(reference: str, answer: str) -> tuple[float, ...]:
    """Return a row's statistics for chrF, without blanks.

    Shapes: [18], for n-grams of 1 to 6 characters how many are in the answer (0 where the reference is too short to
    have any), how many in the reference, and how many in both.
    """
    want, have = "".join(reference.split()), "".join(answer.split())
    counts: list[int] = []
    for order in range(1, _CHRF_ORDER + 1):
        gold, guess = (
            Counter(text[start : start + order] for start in range(len(text) - order + 1)) for text in (want, have)
        )
        counts += [guess.total() if gold else 0, gold.total(), (guess & gold).total()]
    return tuple(counts)


def chrf(sums: Sums) -> Sums:
    """Return corpus chrF2 in [0, 100] from sums of `chrf_counts`.

    Precision and recall are means over the orders that occur in answers and references; recall counts double (beta 2).

    Shapes: [... 18] gives [...].

    Reference: Popović, chrF, WMT 2015; the default of sacrebleu (character order 6, no words, no smoothing).
    """
    counts = sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3)
    have, want, both = counts[..., 0], counts[..., 1], counts[..., 2]
    occurs = (have > 0) & (want > 0)
    orders = np.maximum(occurs.sum(-1), 1)
    precision = np.where(occurs, both / np.maximum(have, 1), 0.0).sum(-1) / orders
    recall = np.where(occurs, both / np.maximum(want, 1), 0.0).sum(-1) / orders
    below = _BETA**2 * precision + recall
    values: Sums = 100 * (1 + _BETA**2) * precision * recall / np.where(below > 0, below, 1.0)
    return values
