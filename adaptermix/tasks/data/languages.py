"""Language codes in names of files."""

from __future__ import annotations

import re
from pathlib import Path

from ...models.languages import VARIETIES, canonical_language

# Words of file names that look like language codes.
_NOT_LANGUAGES = {"dev", "val", "tst", "src", "ref", "raw", "new", "all", "out", "mt", "nli", "qa", "ner", "set", "csv"}
_NOT_LANGUAGES |= {"bio", "nlu", "pos"}
_MARKS = {mark.lower(): mark for marks in VARIETIES.values() for mark in marks}
_MARKED = re.compile(rf"(?<![A-Za-z])([a-z]{{2,3}})((?:[-_](?i:{'|'.join(_MARKS)}))+)(?![A-Za-z])")
# A script or a region (sr-Latn, pt-BR, zho_Hant) is part of one language, not the other side of a pair.
_TAG = r"[a-z]{2,3}(?:[-_](?:[A-Z][a-z]{3}|[A-Z]{2}))*"
_PAIR = re.compile(rf"(?<![A-Za-z])({_TAG})-({_TAG})(?![A-Za-z])")
_SINGLE = re.compile(rf"(?<![^._-])({_TAG})(?![^._-])")
# Universal Dependencies: sk_snk-ud-test
_TREEBANK = re.compile(r"(?<![A-Za-z])([a-z]{2,3})_[a-z0-9]+-ud(?![A-Za-z])")


def split_pair(pair: str) -> list[str]:
    """Return the languages of a pair, whose scripts stay with them.

    Example:
        >>> split_pair("de-en"), split_pair("zh-Hant-en")
        (['de', 'en'], ['zh-Hant', 'en'])
    """
    return re.split(r"-(?![A-Z][a-z]{3}(?:-|$))", pair)


def languages_of(path: Path) -> tuple[str, ...]:
    """Return the language codes in a file's name; see `languages_in`.

    Example:
        >>> languages_of(Path("train.deu-eng.tsv.gz")), languages_of(Path("en.train.tsv")), languages_of(Path("x.txt"))
        (('de', 'en'), ('en',), ())
    """
    return languages_in(_stem(path))


def languages_in(name: str) -> tuple[str, ...]:
    """Return the language codes in a name: a pair (`deu-eng`), else the single one, else an empty tuple.

    If there are several single ones, the code of a treebank (`sk_snk-ud`) is returned, else the best by `_single`.

    Example:
        >>> languages_in("sk_snk-ud-test"), languages_in("de.nlu"), languages_in("zh-TW.test"), languages_in("de.fr")
        (('sk',), ('de',), ('zh-Hant',), ())
    """
    spelled = _spelled(name)
    for first, second in _PAIR.findall(spelled):
        pair = canonical_language(first), canonical_language(second)
        if pair[0] and pair[1]:
            return pair[0], pair[1]
    if (treebank := _TREEBANK.search(spelled)) and (code := canonical_language(treebank[1])):
        return (code,)
    codes = _single(spelled)
    return tuple(codes) if len(codes) == 1 else ()


def single_languages_of(path: Path) -> list[str]:
    """Return the codes of single languages in a file's name; several if the name is ambiguous."""
    return _single(_spelled(_stem(path)))


def given_languages(text: str) -> tuple[str, ...] | None:
    """Return the codes of a text such as `de` or `de-en`; None if it is not made of codes."""
    whole = _spelled(text)
    pair = _PAIR.fullmatch(whole)
    codes = [whole] if re.fullmatch(_TAG, whole) else list(pair.groups()) if pair else whole.split("-")
    if any("_" in code and not re.fullmatch(_TAG, code) for code in codes):
        return None
    return tuple(canonical_language(code) or code for code in codes)


def _stem(path: Path) -> str:
    return re.sub(r"(\.(tsv|csv|txt|parquet|jsonl?|conll|iob2|gz))+$", "", path.name)


def _spelled(name: str) -> str:
    """Spell scripts and regions of the varieties as their standard does: `zh-tw` is not a pair of Chinese and Twi."""

    def spell(match: re.Match[str]) -> str:
        if canonical_language(match[1]) not in VARIETIES:
            return match[0]
        return match[1] + re.sub(r"[A-Za-z]+", lambda mark: _MARKS[mark[0].lower()], match[2])

    return _MARKED.sub(spell, name)


def _single(name: str) -> list[str]:
    """Return the codes of the best kind that a name has, each once.

    Codes of two letters are better than codes of three letters. Among the latter, languages that also have a two-letter
    code are better, since few words of file names look like one. Then codes between dots are better than parts of words
    there.
    """
    kinds: dict[tuple[int, int, bool], dict[str, None]] = {}
    for match in _SINGLE.finditer(name):
        base = re.split("[-_]", match[1])[0]
        code = None if match[1] in _NOT_LANGUAGES else canonical_language(match[1]) or canonical_language(base)
        if code:
            around = {name[: match.start()][-1:], name[match.end() :][:1]}
            kinds.setdefault((len(base), len(code.split("-")[0]), not around <= {"", "."}), {})[code] = None
    return list(kinds[min(kinds)]) if kinds else []
