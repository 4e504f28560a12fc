"""BLEU and chrF from sums of counts are sacrebleu's corpus scores."""

from __future__ import annotations

from time import process_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from adaptermix.errors import PlanError
from adaptermix.evaluation.score import mean_score
from adaptermix.tasks import Metric, overlap
from adaptermix.tasks.overlap import bleu, bleu_counts, chrf, chrf_counts, require_tokenizers

TOKENIZERS = {"de": "13a", "zh": "zh", "zh-Hant": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
# few words, so that n-grams of four are right now and then
words = st.sampled_from(["a", "b", "the cat", "sat,", "on.", "3.5", "&amp;", "x-y"])
scripts = {
    "de": words,
    "zh": st.sampled_from(["我", "们", "今天", "。", "AI", " ", "去了"]),
    "zh-Hant": st.sampled_from(["臺北", "我們", "今天", "。", "AI", " ", "五點"]),
    "ja": st.sampled_from(["東京", "に", "行く", "。", "カメラ", " ", "AI"]),
    "ko": st.sampled_from(["나는", " ", "학교에", "간다", ".", "집"]),
}
anything = st.text(max_size=20)


def texts(language: str) -> st.SearchStrategy[str]:
    return st.lists(scripts[language], max_size=12).map((" " if language == "de" else "").join) | anything


def corpora(language: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Rows of (reference, answer), some of them equal."""
    row = st.tuples(texts(language), texts(language)) | texts(language).map(lambda text: (text, text))
    return st.lists(row, min_size=1, max_size=6)


def sums_of(counts: list[tuple[float, ...]]) -> np.ndarray:
    return np.array(counts, dtype=np.float64).sum(0)


@pytest.mark.parametrize("language", TOKENIZERS)
@given(data=st.data())
def test_bleu_is_that_of_sacrebleu(language: str, data: st.DataObject) -> None:
    rows = data.draw(corpora(language))
    references, answers = [row[0] for row in rows], [row[1] for row in rows]
    expected = BLEU(tokenize=TOKENIZERS[language]).corpus_score(answers, [references]).score
    found = bleu(sums_of([bleu_counts(*row, language) for row in rows]))
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("language", TOKENIZERS)
@given(data=st.data())
def test_chrf_is_that_of_sacrebleu(language: str, data: st.DataObject) -> None:
    rows = data.draw(corpora(language))
    references, answers = [row[0] for row in rows], [row[1] for row in rows]
    expected = CHRF().corpus_score(answers, [references]).score
    assert chrf(sums_of([chrf_counts(*row) for row in rows])) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 30])
def test_long_and_random_corpora_score_as_in_sacrebleu(length: int) -> None:
    rng = np.random.default_rng(length)
    vocabulary = np.array([*"abcdef", "gh", "ij."])
    for share in (0.0, 0.3, 0.9, 1.0):
        rows = []
        for _ in range(20):
            reference = rng.choice(vocabulary, length)
            kept = np.where(rng.random(length) < share, reference, rng.choice(vocabulary, length))
            rows.append((" ".join(reference), " ".join(kept[: rng.integers(0, length + 1)])))
        references, answers = [row[0] for row in rows], [row[1] for row in rows]
        assert bleu(sums_of([bleu_counts(*row, "en") for row in rows])) == pytest.approx(
            BLEU().corpus_score(answers, [references]).score, abs=1e-9
        )
        assert chrf(sums_of([chrf_counts(*row) for row in rows])) == pytest.approx(
            CHRF().corpus_score(answers, [references]).score, abs=1e-9
        )


@pytest.mark.parametrize(
    ("reference", "answer", "of_bleu", "of_chrf"),
    [
        ("one two three four five", "one two three four five", 100, 100),
        ("one two three four five", "", 0, 0),
        ("", "one two three four five", 0, 0),
        ("", "", 0, 0),
        ("one two three", "one two three", 0, 100),  # no n-gram of four words
    ],
)
def test_edges(reference: str, answer: str, of_bleu: float, of_chrf: float) -> None:
    assert bleu(sums_of([bleu_counts(reference, answer, "en")])) == pytest.approx(of_bleu)
    assert chrf(sums_of([chrf_counts(reference, answer)])) == pytest.approx(of_chrf)


def test_counts_worked_by_hand() -> None:
    """Of "the cat sat" 3 words, 2 pairs and 1 triple; right are "the", "cat" and "the cat"; the reference has 4."""
    assert bleu_counts("the cat is here", "the cat sat", "en") == (3, 4, 2, 1, 0, 0, 3, 2, 1, 0)
    # "ab c" has 3 characters, 2 pairs, 1 triple; "abd" as many; both have "a", "b" and "ab"
    assert chrf_counts("ab c", "abd") == (3, 3, 2, 2, 2, 1, 1, 1, 0, *[0] * 9)


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        # all of 4 words, in an answer of 4 for 5: exp(1 - 5 / 4)
        ((4, 5, 4, 3, 2, 1, 4, 3, 2, 1), 77.880078),
        ((5, 4, 5, 4, 3, 2, 5, 4, 3, 2), 100),  # too long costs nothing here
        # 3/4, 1/3, and no triple of 2 and no four of 1: as if half and a quarter were right, so 1/4 and 1/4
        ((4, 4, 3, 1, 0, 0, 4, 3, 2, 1), 100 * (1 / 64) ** 0.25),
    ],
)
def test_bleu_worked_by_hand(counts: tuple[int, ...], value: float) -> None:
    assert float(bleu(np.array(counts, dtype=np.float64))) == pytest.approx(value)


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        # of "ab c" and "abd": 2/3, 1/2 and 0 are right, both ways
        ((3, 3, 2, 2, 2, 1, 1, 1, 0, *[0] * 9), 100 * 7 / 18),
        # half of the answer is right, which is all of the reference: 5 * 1/2 * 1 / (4 * 1/2 + 1)
        ((4, 2, 2, *[0] * 15), 100 * 5 / 6),
        ((2, 4, 2, *[0] * 15), 100 * 2.5 / 4.5),
    ],
)
def test_chrf_worked_by_hand(counts: tuple[int, ...], value: float) -> None:
    assert float(chrf(np.array(counts, dtype=np.float64))) == pytest.approx(value)


@given(st.lists(st.lists(st.integers(0, 9), min_size=10, max_size=10), min_size=1, max_size=4))
def test_values_of_many_sums_are_those_of_each(tables: list[list[int]]) -> None:
    sums = np.array(tables, dtype=np.float64)
    assert bleu(sums).shape == (len(tables),)
    assert bleu(sums).tolist() == [float(bleu(row)) for row in sums]
    wide = np.hstack([sums, sums[:, :8]])
    assert chrf(wide).tolist() == [float(chrf(row)) for row in wide]
    assert chrf(np.stack([wide, wide])).shape == (2, len(tables))


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_bootstrap_is_fast_and_its_interval_holds_the_value(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(list("abcd"), 20)), " ".join(rng.choice(list("abcd"), 20))) for _ in range(300)]
    metric = {
        "bleu": Metric(name="bleu", count=lambda row, answer: bleu_counts(row, answer, "en"), value=bleu),
        "chrf": Metric(name="chrf", count=chrf_counts, value=chrf),
    }[name]
    counts = [count for row in rows if (count := metric.count(*row)) is not None]
    start = process_time()
    score = mean_score(metric, [counts])
    # CPU time, which other processes do not lengthen: 0.02 s, and minutes if each resample counted n-grams
    assert process_time() - start < 5
    assert 0 < score.low < score.value < score.high < 100


@pytest.mark.parametrize(("language", "module"), [("ja", "tokenizer_ja_mecab"), ("ko", "tokenizer_ko_mecab")])
def test_a_missing_tokenizer_is_named_with_its_extra(
    language: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"sacrebleu.tokenizers.{module}.MeCab", None)
    overlap._bleu.cache_clear()
    require_tokenizers(["de", "zh"])
    with pytest.raises(PlanError, match=rf"BLEU in '{language}' needs .* Install adaptermix\[mt\]\.$") as caught:
        require_tokenizers(["de", language])
    assert "\n" not in str(caught.value)


UNSEPARATED = {
    "th": "ฉันชอบกินข้าวผัดกับไก่ทอดทุกวัน",
    "km": "ខ្ញុំចូលចិត្តញ៉ាំបាយឆាជាមួយសាច់មាន់",
    "lo": "ຂ້ອຍມັກກິນເຂົ້າຜັດທຸກມື້",
    "my": "ကျွန်တော်ထမင်းကြော်ကြိုက်တယ်",
    "bo": "ང་ལ་བཟོས་པའི་འབྲས་ཡག་པོ་བྱུང་",
    "dz": "ང་ལ་བཟོས་པའི་འབྲས་ཡག་པོ་བྱུང་",
}


@pytest.mark.parametrize("language", UNSEPARATED)
def test_languages_without_blanks_are_counted_by_character(language: str) -> None:
    right = UNSEPARATED[language]
    near = right[:-2] + right[-1]
    found = float(bleu(np.array(bleu_counts(right, near, language), dtype=float)))
    assert found == pytest.approx(BLEU(tokenize="char").corpus_score([near], [[right]]).score)
    assert found > 80
    assert BLEU(tokenize="13a").corpus_score([near], [[right]]).score == 0


@pytest.mark.parametrize("language", ["zh", "zh-Hant", "yue", "wuu", "lzh", "nan", "gan", "hak", "hsn"])
def test_all_varieties_of_chinese_have_its_tokenizer(language: str) -> None:
    right, near = "我们明天一起去看电影好不好 AI", "我们明天一起去看电影好好 AI"
    found = float(bleu(np.array(bleu_counts(right, near, language), dtype=float)))
    assert found == pytest.approx(BLEU(tokenize="zh").corpus_score([near], [[right]]).score)
