"""Margin retrieval against a double loop, and embeddings against one sentence at a time."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import AlignSettings, RetrieveSettings, merge, retrieve, train_align
from adaptermix.adapters import open_adapter
from adaptermix.evaluation import Retrieval, margin, retrieval
from adaptermix.evaluation.margin import hits, margin_neighbours
from adaptermix.evaluation.retrieval import embed, pooler_of, retrieve_with
from adaptermix.evaluation.transfer import correlate, read_scores
from adaptermix.models.base import backbone, load_base
from adaptermix.models.pooling import Pooler
from adaptermix.tasks.data import read_pairs
from adaptermix.training.layer_states import MiddleStates

from ..refusals import refuses
from ..training.data import write_pairs


def brute_force(x: torch.Tensor, y: torch.Tensor, k: int) -> list[int]:
    """Written from the formula: candidates are the k nearest of x, divided by both means of k nearest."""

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b) / (float(a.norm()) * float(b.norm()))

    def nearest(a: torch.Tensor, others: torch.Tensor) -> list[tuple[float, int]]:
        return sorted(((cos(a, other), -i) for i, other in enumerate(others)), reverse=True)[:k]

    found = []
    for a in x:
        forward = nearest(a, y)
        mean_forward = sum(value for value, _ in forward) / len(forward)
        best = (-math.inf, 0)
        for value, negative in forward:
            back = nearest(y[-negative], x)
            mean_back = sum(v for v, _ in back) / len(back)
            best = max(best, (value / ((mean_forward + mean_back) / 2), negative))
        found.append(-best[1])
    return found


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000))
def test_neighbours_equal_a_double_loop(n: int, m: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # positive entries, so that no mean of cosines is near zero
    x, y = (torch.rand(size, 6, generator=generator, dtype=torch.float64) + 0.05 for size in (n, m))
    there, back = margin_neighbours(x.float(), y.float(), k=k)
    assert there.tolist() == brute_force(x, y, k)
    assert back.tolist() == brute_force(y, x, k)


def test_equal_sets_retrieve_themselves() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert all(right.all() for right in hits(x, x.clone()))
    assert not any(right.any() for right in hits(x, x.roll(1, 0)))


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_embeddings_equal_hidden_states_of_one_sentence_at_a_time(kind: str, request: pytest.FixtureRequest) -> None:
    base = load_base(str(request.getfixturevalue(kind)), dtype="float32", device="cpu")
    texts = ["a longer sentence than the others", "ja", "Grüße"]
    found = embed(base, texts, batch_size=2, max_length=64)
    for row, text in enumerate(texts):
        batch = base.tokenizer(text, return_tensors="pt")
        states = backbone(base)(**batch, output_hidden_states=True).hidden_states
        expected = torch.stack([state[0].mean(0) for state in states])
        torch.testing.assert_close(found[:, row], expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (base.layers + 1, 3, 32)


def test_retrieve_gives_every_layer_and_both_directions(causal: Path, tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_text("".join(f"{word}\t{word}\n" for word in ("eins", "zwei", "drei", "vier", "fünf")))
    found = retrieve(RetrieveSettings(base=str(causal), data=[str(path)], dtype="float32", device="cpu"))
    document = found.document()
    assert list(document["layers"]) == ["0", "1", "2", "3", "4"]
    layer = document["layers"]["2"]
    assert {key: layer[key] for key in ("mean", "directions")} == {
        "mean": 1.0,
        "directions": {"de-en": 1.0, "en-de": 1.0},
    }
    # five of five leave doubt
    assert layer["scores"]["de-en"]["low"] < 0.7
    assert document["headline"] == 1.0


@pytest.mark.parametrize(
    ("pooling", "exclude", "standardize"),
    [("bos", False, "none"), ("mean", True, "none"), ("mean", False, "none"), ("mean", False, "all")],
)
def test_sentence_vectors_are_those_of_training(
    pooling: str, exclude: bool, standardize: str, encoder: Path, tmp_path: Path
) -> None:
    base = load_base(str(encoder), dtype="float32", device="cpu")
    texts = ["a longer sentence than the others", "ja", "Grüße"]
    encoded = [base.tokenizer(text)["input_ids"] for text in texts]
    assert encoded[0][0] in base.tokenizer.all_special_ids
    way: dict[str, Any] = {"pooling": pooling, "exclude_bos": exclude, "standardize": standardize}
    trained = MiddleStates(base, 2, **way).pooled(encoded)
    settings = {"base": str(encoder), "data": ["-"]}
    asked = RetrieveSettings(**way, **settings)  # type: ignore[arg-type]
    found = embed(base, texts, batch_size=3, max_length=64, pool=pooler_of(base, asked, []))
    torch.testing.assert_close(found[2], trained, rtol=1e-5, atol=1e-5)
    pairs = write_pairs(tmp_path)
    own = {"pairs": pairs, "steps": 1, "batch_size": 3} | way
    train_align(AlignSettings(base=str(encoder), out=str(tmp_path / "out"), device="cpu", dtype="float32", **own))
    merge([str(tmp_path / "out")] * 2, weights=[0.5, 0.5], out=tmp_path / "merged")
    for adapter in ("out", "merged"):
        pool = pooler_of(base, RetrieveSettings(**settings), [open_adapter(tmp_path / adapter)])  # type: ignore[arg-type]
        assert pool.standardize == standardize
        torch.testing.assert_close(embed(base, texts, batch_size=3, max_length=64, pool=pool), found)


def test_vectors_of_the_first_token_are_refused_where_they_say_nothing(
    causal: Path, encoder: Path, tmp_path: Path
) -> None:
    """A language model's first token sees no other; and a token cannot be taken and left out."""
    pairs, own = write_pairs(tmp_path), {"device": "cpu", "dtype": "float32"}
    with refuses("pooling.exclude-bos"):
        RetrieveSettings(base="x", data=["y"], pooling="bos", exclude_bos=True)
    with refuses("pooling.bos"):
        retrieve(RetrieveSettings(base=str(causal), data=pairs, pooling="bos", **own))  # type: ignore[arg-type]
    out = str(tmp_path / "out")
    train_align(AlignSettings(base=str(encoder), pairs=pairs, steps=1, batch_size=3, pooling="bos", out=out, **own))  # type: ignore[arg-type]
    with refuses("pooling.exclude-bos"):
        retrieve(RetrieveSettings(base=str(encoder), data=pairs, adapter=out, exclude_bos=True, **own))  # type: ignore[arg-type]


def test_standardised_retrieval_sees_past_a_dimension_that_all_sentences_share(causal: Path, tmp_path: Path) -> None:
    """Both sides are the same texts, so every direction must be found; the shared dimension is 1000 times as long."""
    rows = [f"{word} number {number}" for word in ("one", "tree", "house", "river", "stone") for number in range(6)]
    (tmp_path / "de-en.tsv").write_text("".join(f"{row}\t{row}!\n" for row in rows))
    base = load_base(str(causal), dtype="float32", device="cpu")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[:, 3] = 1000.0
    found: dict[str, float] = {}
    for standardize in ("none", "all", "languages"):
        settings = RetrieveSettings(base=str(causal), data=[str(tmp_path / "de-en.tsv")], standardize=standardize)  # type: ignore[arg-type]
        found[standardize] = retrieve_with(base, settings, pool=pooler_of(base, settings, [])).mean(0)
    assert found["all"] == found["languages"] == 1.0
    assert found["none"] < 1.0


def test_a_language_of_several_files_is_measured_once(causal: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("de-en.tsv", "fr-en.tsv")]
    for shift, file in enumerate(files):
        Path(file).write_text("".join(f"{n * n + shift} {n % 7}\t{n * n} is {shift + n % 7}\n" for n in range(20)))
    base = load_base(str(causal), dtype="float32", device="cpu")
    settings = RetrieveSettings(base=str(causal), data=files, standardize="languages", neighbours=2)
    found = retrieve_with(base, settings, pool=pooler_of(base, settings, [])).layers[1]
    own = {}
    for file in files:
        pairs = read_pairs([file])[0]
        for side, language in enumerate(pairs[0].languages):
            texts = [(pair.source, pair.target)[side] for pair in pairs]
            own[Path(file).name, language] = embed(
                base, texts, batch_size=4, max_length=256, pool=Pooler(base.tokenizer, standardize="languages")
            )[1]
    english = torch.cat([vectors for (_, language), vectors in own.items() if language == "en"])
    assert len(english) > len(next(iter(own.values())))
    for file in files:
        (one, x), (_, y) = [(language, vectors) for (name, language), vectors in own.items() if name == Path(file).name]
        x, y = ((side - like.mean(0)) / like.std(0, correction=0) for side, like in ((x, x), (y, english)))
        table = margins(x, y, 2)
        assert found[f"{one}-en"] == sum(int(row.argmax()) == i for i, row in enumerate(table)) / len(table)


def margins(x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """Every pair's ratio margin [n m], in float64; minus infinity outside of the k nearest of x."""
    cosine = torch.nn.functional.normalize(x.double(), dim=1) @ torch.nn.functional.normalize(y.double(), dim=1).T
    near = cosine.sort(1, descending=True).values[:, : min(k, len(y))]
    back = cosine.T.sort(1, descending=True).values[:, : min(k, len(x))].mean(1)
    ratio = cosine / ((near.mean(1, keepdim=True) + back) / 2)
    return ratio.masked_fill(cosine < near[:, -1:] - 1e-6, -math.inf)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12), st.integers(0, 10_000))
def test_among_ties_the_margin_is_still_the_largest(n: int, m: int, k: int, seed: int) -> None:
    """Rows drawn from three vectors: many cosines are equal, and k may exceed both sets."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.rand(3, 4, generator=generator) + 0.05
    x, y = (pool[torch.randint(0, 3, (size,), generator=generator)] for size in (n, m))
    found, _ = margin_neighbours(x, y, k=k)
    table = margins(x, y, k)
    assert found.shape == (n,)
    torch.testing.assert_close(table.gather(1, found[:, None])[:, 0], table.max(1).values, rtol=1e-5, atol=1e-5)


def test_only_the_nearest_forward_neighbours_are_candidates() -> None:
    """Candidate 2 is the third nearest of query 0, and would have its best margin.

    k = 2: cos(x0, y0) = cos(x0, y1) = 0.8, and both have a neighbour of their own: 0.8 / ((0.8 + 0.9) / 2) = 0.94.
    cos(x0, y2) = 0.70, and y2 is near nothing else: 0.70 / ((0.8 + 0.48) / 2) = 1.10, yet it is no candidate.
    k = 3 makes it one: 0.70 / ((0.77 + 0.41) / 2) = 1.19 against 0.8 / ((0.77 + 0.81) / 2) = 1.01.
    """
    y = torch.tensor([[0.8, 0.6, 0.0], [0.8, 0.0, 0.6], [0.7, -0.5, -0.5]])
    x = torch.stack([torch.tensor([1.0, 0.0, 0.0]), y[0], y[1]])
    assert int(margin_neighbours(x, y, k=2)[0][0]) in (0, 1)
    assert int(margin_neighbours(x, y, k=3)[0][0]) == 2


def test_more_rows_than_a_chunk_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(11, 4, generator=generator), torch.randn(9, 4, generator=generator)
    whole = margin_neighbours(x, y)
    monkeypatch.setattr(margin, "_CHUNK", 4)
    assert [found.tolist() for found in margin_neighbours(x, y)] == [found.tolist() for found in whole]


def test_rows_that_find_their_own_number_are_hits() -> None:
    x = torch.eye(4)
    assert [right.tolist() for right in hits(x, x[[0, 1, 3, 2]])] == [[True, True, False, False]] * 2


def measured(*layers: dict[str, float]) -> Retrieval:
    """A measurement of one sentence per direction, right to this degree."""
    return Retrieval(hits=tuple({name: (value,) for name, value in layer.items()} for layer in layers), n={})


@pytest.mark.parametrize(("layers", "expected"), [(5, 3.0), (4, 2.0), (3, 2.0), (2, 1.0)])
def test_the_headline_is_the_mean_of_even_layers_without_the_embeddings(layers: int, expected: float) -> None:
    """Layer i scores i: 2 and 4 of four blocks, 2 of three or two, and the only one of one."""
    found = measured(*({"de-en": float(i), "en-de": float(i)} for i in range(layers)))
    assert found.headline() == expected


def lines(folder: Path) -> list[str]:
    """Line-parallel texts of three languages."""
    texts = {
        "de": ["eins", "zwei", "drei", "vier"],
        "en": ["one", "two", "three", "four"],
        "fr": ["un", "de", "tr", "qu"],
    }
    for language, rows in texts.items():
        (folder / f"{language}.txt").write_text("\n".join(rows) + "\n")
    return [str(folder / f"{language}.txt") for language in texts]


def test_every_language_is_embedded_once_and_every_direction_found(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RetrieveSettings(base=str(causal), data=lines(tmp_path), dtype="float32", device="cpu")
    calls: list[str] = []
    original = retrieval.embed

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(more["name"])
        return original(*arguments, **more)

    monkeypatch.setattr(retrieval, "embed", counted)
    found = retrieve(settings)
    assert calls == ["de", "en", "fr"]
    base = load_base(str(causal), dtype="float32", device="cpu")
    texts = {name: Path(path).read_text().split() for name, path in zip(("de", "en", "fr"), settings.data, strict=True)}
    vectors = {name: original(base, rows, batch_size=4, max_length=9) for name, rows in texts.items()}
    for one, two in itertools.permutations(texts, 2):
        for layer in range(5):
            right = [i == n for n, i in enumerate(brute_force(vectors[one][layer], vectors[two][layer], 4))]
            assert found.layers[layer][f"{one}-{two}"] == sum(right) / 4
    # on disk instead of in memory
    monkeypatch.setattr(retrieval, "_MEMORY", 1)
    assert retrieve(settings) == found


def test_the_base_beside_the_adapter_and_a_picture(causal: Path, tmp_path: Path) -> None:
    from ..factories import peft_lora

    adapter = peft_lora(causal, tmp_path / "adapter", r=4, target_modules=["q_proj", "down_proj"])
    plain = RetrieveSettings(base=str(causal), data=lines(tmp_path), dtype="float32", device="cpu")
    asked = {"adapter": str(adapter), "compare": True, "plot": str(tmp_path / "p.png")}
    found = retrieve(plain.model_copy(update=asked))
    assert found.base == retrieve(plain)
    assert found.document()["base"]["headline"] == found.base.headline()
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with refuses("plot.not-png"):
        retrieve(plain.model_copy(update={"plot": str(tmp_path / "p.pdf")}))


def test_languages_are_averaged_over_their_directions() -> None:
    layers = ({"de-en": 0.1, "en-de": 0.1}, {"de-en": 0.2, "en-de": 0.2}, {"de-en": 0.5, "en-de": 0.7, "fr-en": 0.1})
    found = measured(*layers).by_language()
    assert found == {"de": pytest.approx(0.6), "en": pytest.approx((0.5 + 0.7 + 0.1) / 3), "fr": pytest.approx(0.1)}
    found = measured({}, {"zh-Hant-zh": 0.2, "zh-zh-Hant": 0.4, "en-zh-Hant": 0.6}).by_language()
    assert found == {"zh-Hant": pytest.approx(0.4), "zh": pytest.approx(0.3), "en": pytest.approx(0.6)}


def test_intervals_are_over_sentences_and_the_gain_is_paired() -> None:
    right = tuple(float(n % 10 < 7) for n in range(100))
    better = tuple(float(n % 10 < 8) for n in range(100))
    base = Retrieval(hits=({"de-en": right, "en-de": right},) * 3, n={"de-en": 100, "en-de": 100})
    found = Retrieval(hits=({"de-en": better, "en-de": better},) * 3, n=dict(base.n), base=base)
    score = found.direction_scores(2)["de-en"]
    # Agresti and Coull: 82 of 104 +- 1.96 sqrt(p (1 - p) / 104)
    assert (score.value, score.n) == (0.8, 100)
    assert (score.low, score.high) == pytest.approx((0.71, 0.867), abs=0.012)
    # both directions are of the same sentences, so their mean is no surer than one of them
    mean = found.score()
    assert (mean.low, mean.high) == pytest.approx((score.low, score.high), abs=1e-9)
    gain = found.above_base()
    assert gain is not None
    # ten of a hundred sentences are gained: a paired binomial
    assert gain.value == pytest.approx(0.1)
    assert (gain.low, gain.high) == pytest.approx((0.05, 0.16), abs=0.015)
    document = found.document()
    assert document["layers"]["2"]["scores"]["de-en"] == score.document()
    assert document["above_base"] == gain.document()
    assert document["score"]["value"] == pytest.approx(document["headline"])


def test_a_gain_of_few_sentences_is_not_certain() -> None:
    base = Retrieval(hits=({"de-en": (0.0,) * 9},) * 3, n={"de-en": 9})
    gain = Retrieval(hits=({"de-en": (1.0,) * 9},) * 3, n={"de-en": 9}, base=base).above_base()
    assert gain is not None
    assert (gain.value, gain.high) == (1.0, 1.0)
    # Agresti and Min: 9.5 gained and .5 lost of 11
    assert gain.low == pytest.approx(9 / 11 - 1.96 * (10 - 9**2 / 11) ** 0.5 / 11, abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9), st.integers(0, 5))
def test_correlations_equal_those_of_scipy(points: list[tuple[int, int]], shift: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = ({str(i): pair[side] / 10 for i, pair in enumerate(points)} for side in (0, 1))
    if len(set(x.values())) == 1 or len(set(y.values())) == 1:
        with refuses("transfer.constant"):
            correlate(x, y)
        return
    found = correlate(x | {"only here": shift / 10}, y)
    assert found.pearson == pytest.approx(stats.pearsonr(list(x.values()), list(y.values())).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(list(x.values()), list(y.values())).statistic)
    assert 0 < found.p <= 1
    assert found.languages == tuple(sorted(x))


def test_chance_and_law_are_told_apart() -> None:
    x = {str(i): i / 10 for i in range(8)}
    assert correlate(x, {name: 2 * value for name, value in x.items()}).p < 0.001
    assert correlate(x, {str(i): (i * 5 % 8) / 8 for i in range(8)}).p > 0.2
    with refuses("transfer.too-few"):
        correlate(x, {"1": 0.1, "2": 0.2})


def test_scores_are_those_of_transfer_languages(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    document = {"scores": {name: {"value": 0.5} for name in ("de", "en")}, "roles": {"supervised": ["en"]}}
    path.write_text(json.dumps(document))
    assert read_scores(path) == {"de": 0.5}
    path.write_text("[]")
    with refuses("transfer.not-scores: evaluate --json"):
        read_scores(path)
