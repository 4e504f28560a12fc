"""Margin-based translation retrieval (xsim), per layer and direction."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters import AdapterSource, open_adapter
from ..analysis.figures import check_png
from ..errors import DataError, InvalidValueError, PlanError, UsageError
from ..io.json_types import JsonObject
from ..merging.on_model import acting
from ..models.base import BaseModel, backbone, load_base, model_origins, note_other_base, reading
from ..models.pooling import Pooler, Standards, require_pooling
from ..models.positions import readable
from ..options import RetrieveSettings
from ..options.paths import holds_output
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks import Metric
from ..tasks.data import DataFile, read_parallel
from ..tasks.data.languages import split_pair
from ..tasks.heads.base import cut_languages, cut_warning
from ..tasks.metrics import mean, mean_ends
from ..tasks.splits import add_to_record, check_split
from .margin import hits
from .retrieval_figures import draw
from .score import Score, documents, draws, hedged_interval, mean_score
from .transfer import Correlation, correlate, read_scores

_MEMORY = 2 * 2**30
"""Bytes of vectors that stay in memory; the rest goes to disk."""


@torch.inference_mode()
def embed(
    base: BaseModel,
    texts: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
    pool: Pooler | None = None,
    into: Tensor | None = None,
    watch: Watcher = SILENT,
    name: str = "",
) -> Float[Tensor, "layers n d"]:
    """Return one vector per sentence for every layer's hidden states, in float32 on the CPU.

    Layers are numbered as hidden states: 0 is the embeddings, n the last block (after the model's final norm).

    Args:
        base: The model.
        texts: Sentences.
        batch_size: Sentences per batch.
        max_length: Longest sentence in tokens.
        pool: Computes the vectors; default the mean over tokens.
        into: Output tensor with room for at least all sentences; default a new one.
        watch: Receives progress.
        name: Name of the texts in the progress bar, which ends with their language after a colon; see `ParallelText`.

    Shapes: [n+1 sentences width].
    """
    languages = [_language(name)] * len(texts)
    rows_of = base.encode(texts, languages, truncation=True, max_length=max_length)
    encoded = [row["input_ids"] for row in rows_of]
    if cut := cut_languages(base, texts, languages, rows_of, max_length):
        watch.note(cut_warning(cut, len(texts), max_length, "their ends", "sentences"))
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
    pooled = None if into is None else into[:, : len(texts)]
    body, pool = backbone(base), pool or Pooler(base.tokenizer)
    with watch.track(f"embed {name}".rstrip(), len(texts)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = base.tokenizer.pad(
                {"input_ids": [encoded[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(base.device)
            states = body(**batch, output_hidden_states=True, **reading(base)).hidden_states
            mask = pool.counted([encoded[row] for row in rows], batch["attention_mask"])
            means = torch.stack([pool(state, mask) for state in states]).cpu()
            if pooled is None:
                pooled = torch.empty(len(states), len(texts), means.shape[-1])
            pooled[:, rows] = means
            advance(len(rows), "")
    if pooled is None:
        raise InvalidValueError("at least one text is needed", code="retrieve.no-text")
    return pooled


Hits = tuple[float, ...]
"""For each sentence 1 if its translation was retrieved, else 0."""
_ACCURACY = Metric(name="accuracy", count=lambda _, answer: (float(answer == "right"), 1.0), value=mean, ends=mean_ends)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Retrieval accuracy per layer and direction.

    Args:
        hits: For each layer (0 is the embeddings) and direction, such as `de-en`, whether each sentence's translation
            was retrieved.
        n: Sentences per direction.
        base: Results of the base model alone, if requested.
        correlation: Correlation of retrieval with task scores, if these were passed.
        seed: Seed of the resampling for the intervals.
        split: Use of the sentences, dev or test, if stated.
    """

    hits: tuple[Mapping[str, Hits], ...]
    n: Mapping[str, int]
    base: Retrieval | None = None
    correlation: Correlation | None = None
    seed: int = 0
    split: str | None = None

    @cached_property
    def layers(self) -> tuple[Mapping[str, float], ...]:
        """Return for each layer the accuracy per direction."""
        return tuple({name: sum(right) / len(right) for name, right in layer.items()} for layer in self.hits)

    def mean(self, layer: int) -> float:
        """Return the mean over directions at a layer."""
        values = self.layers[layer].values()
        return sum(values) / len(values)

    def _even(self) -> range:
        """Even layers, embeddings left out, as in the mid-align paper."""
        return range(2, len(self.layers), 2) if len(self.layers) > 2 else range(1, len(self.layers))

    def headline(self) -> float:
        """Return the mean over directions and even layers."""
        even = self._even()
        return sum(self.mean(layer) for layer in even) / len(even)

    def by_language(self) -> dict[str, float]:
        """Return for each language the mean over even layers and over the directions from and to it."""
        accuracies: dict[str, list[float]] = {}
        for layer in self._even():
            for direction, value in self.layers[layer].items():
                for language in split_pair(direction):
                    accuracies.setdefault(language, []).append(value)
        return {language: sum(values) / len(values) for language, values in accuracies.items()}

    def direction_scores(self, layer: int) -> dict[str, Score]:
        """Return for each direction the accuracy at a layer, with its interval over sentences."""
        return {name: mean_score(_ACCURACY, [_rows(right)], seed=self.seed) for name, right in self.hits[layer].items()}

    def score(self, layers: Sequence[int] | None = None) -> Score:
        """Return the mean over directions and layers, with its interval over sentences; default even layers.

        All directions and layers with the same number of sentences share their resamples; see `draws`.
        """
        shares = self._shares(self._even() if layers is None else layers)
        return mean_score(_ACCURACY, list(shares.values()), seed=self.seed)

    @property
    def counts(self) -> dict[str, list[tuple[float, float]]]:
        """For each direction the statistics of the headline score, sentence by sentence."""
        return self._shares(self._even())

    @property
    def resamples(self) -> list[float]:
        """The headline score on the sentences, then on resamples of them; results with one seed share resamples."""
        each = [draws(_ACCURACY, [rows], self.seed)[0] for rows in self.counts.values()]
        resamples: list[float] = np.mean(each, axis=0).tolist()
        return resamples

    def above_base(self) -> Score | None:
        """Return the gain of the mean over even layers over the base model, paired by sentence."""
        if self.base is None:
            return None
        ours, theirs = self.counts, self.base.counts
        both = [draws(_ACCURACY, [theirs[name], ours[name]], self.seed, hedge="pair") for name in self.n]
        gains = np.mean([adapted - base for base, adapted in both], axis=0)
        return hedged_interval(_ACCURACY, gains, n=sum(self.n.values()), least=-1.0)

    def _shares(self, layers: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
        """Return for each direction and sentence the share of layers in which its translation was retrieved, as rows.

        The mean over layers equals the mean of these shares over sentences.
        """
        return {name: _rows(np.mean([self.hits[layer][name] for layer in layers], axis=0).tolist()) for name in self.n}

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix retrieve`."""
        layers = {
            str(number): {
                "mean": self.mean(number),
                "directions": dict(directions),
                "score": self.score([number]).document(),
                "scores": documents(self.direction_scores(number)),
            }
            for number, directions in enumerate(self.layers)
        }
        document: JsonObject = {
            "layers": layers,
            "headline": self.headline(),
            "score": self.score().document(),
            "languages": self.by_language(),
            "n": dict(self.n),
        }
        if self.base:
            document["base"] = self.base.document()
        if above := self.above_base():
            document["above_base"] = above.document()
        if self.correlation:
            document["correlation"] = asdict(self.correlation)
        if self.split:
            document["split"] = self.split
        return document


def _rows(right: Sequence[float]) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in right]


@contextmanager
def _room(shape: tuple[int, ...]) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that allocates the vectors of a language: on disk if all of them would not fit in memory."""
    with tempfile.TemporaryDirectory() as folder:
        count = itertools.count()

        def make() -> Tensor:
            number = next(count)
            if (number + 1) * math.prod(shape) * 4 <= _MEMORY:
                return torch.empty(shape)
            path = str(Path(folder) / str(number))
            return torch.from_file(path, shared=True, size=math.prod(shape)).reshape(shape)

        yield make


def pooler_of(base: BaseModel, settings: RetrieveSettings, sources: Sequence[AdapterSource]) -> Pooler:
    """Return the pooler: as requested, else as an adapter's alignment was trained, else the mean.

    Raises:
        PlanError: the first token is requested, and it is uninformative or excluded.
    """
    entries = [source.meta.manifest.get("vectors") for source in sources]
    # Users edit manifests, so malformed entries are skipped.
    trained = next((way for way in entries if isinstance(way, Mapping) and way.get("pooling") in ("mean", "bos")), {})
    if settings.pooling != "auto":
        trained = {**trained, "pooling": settings.pooling, "exclude_bos": False}
    pooling, exclude_bos = trained.get("pooling", "mean"), settings.exclude_bos or trained.get("exclude_bos") is True
    require_pooling(pooling, base.kind)
    if exclude_bos and pooling == "bos":
        raise PlanError(
            "--exclude-bos leaves out the token that the adapter was trained on (--pooling bos): drop the option.",
            code="pooling.exclude-bos",
        )
    way = trained.get("standardize") if settings.standardize == "auto" else settings.standardize
    return Pooler(
        base.tokenizer,
        pooling=pooling,
        exclude_bos=exclude_bos,
        standardize=way if way in ("all", "languages") else "none",
    )


def retrieve_with(
    base: BaseModel, settings: RetrieveSettings, *, pool: Pooler | None = None, watch: Watcher = SILENT
) -> Retrieval:
    """Measure retrieval with a loaded model and its attached adapters.

    Every text is embedded once, and both directions of a pair are searched together.
    """
    parallel = read_parallel(settings.data, rows=settings.rows)
    longest = max(map(len, parallel.texts.values()))
    max_length = readable(base.model, settings.max_length)
    width = base.model.config.get_text_config().hidden_size
    counts = {name: len(parallel.texts[one]) for name, one, _ in parallel.directions}
    with _room((base.layers + 1, longest, width)) as make:
        embedded = {
            key: embed(
                base,
                texts,
                batch_size=settings.batch_size,
                max_length=max_length,
                pool=pool,
                into=make(),
                watch=watch,
                name=key,
            )
            for key, texts in parallel.texts.items()
        }
        standardize = pool.standardize if pool else "none"
        layers = _compare(
            base, embedded, parallel.directions, k=settings.neighbours, standardize=standardize, watch=watch
        )
    return Retrieval(hits=layers, n=counts, seed=settings.seed)


def _language(key: str) -> str:
    """Return the language of a list of sentences; see `ParallelText`."""
    return key.rpartition(":")[2]


def _by_language(vectors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the vectors of each language over all files: a language is measured once, as in training."""
    result: dict[str, list[Tensor]] = {}
    for key, rows in vectors.items():
        result.setdefault(_language(key), []).append(rows)
    return result


def _compare(
    base: BaseModel,
    embedded: Mapping[str, Tensor],
    directions: Sequence[tuple[str, str, str]],
    *,
    k: int,
    standardize: str,
    watch: Watcher,
) -> tuple[dict[str, Hits], ...]:
    """Return for each layer and direction whether each sentence's translation was retrieved."""
    names = {(one, two): name for name, one, two in directions}
    layers = []
    with watch.track("search", base.layers + 1) as advance:
        for layer in range(base.layers + 1):
            by_direction: dict[str, Hits] = {}
            scores = Standards(standardize, _by_language({key: vectors[layer] for key, vectors in embedded.items()}))
            for (one, two), name in names.items():
                if name in by_direction:
                    continue
                x, y = (
                    (scores[_language(key)](embedded[key][layer]) if scores else embedded[key][layer]).to(base.device)
                    for key in (one, two)
                )
                by_direction[name], back = (tuple(right.double().tolist()) for right in hits(x, y, k=k))
                if (two, one) in names:
                    by_direction[names[two, one]] = back
            layers.append({name: by_direction[name] for name in names.values()})
            advance(1, f"layer {layer}")
    return tuple(layers)


def _check_sentences(settings: RetrieveSettings, watch: Watcher) -> Sequence[DataFile]:
    """Refuse bad data before a model is loaded, and return the files."""
    parallel = read_parallel(settings.data, rows=settings.rows)
    counts = {name: len(parallel.texts[key]) for name, key, _ in parallel.directions}
    name, least = min(counts.items(), key=lambda item: item[1])
    if least < 2:
        raise DataError(
            f"retrieval needs at least two sentences per direction, to choose among; {name} has {least}.",
            code="retrieve.too-few",
        )
    if least < settings.neighbours:
        watch.note(
            f"the margin looks at {settings.neighbours} neighbours, and {name} has {least} sentences: all of them."
        )
    return parallel.files


@holds_output
def retrieve(settings: RetrieveSettings, *, watch: Watcher = SILENT) -> Retrieval:
    """Measure translation retrieval of a base model, with an adapter or without.

    Raises:
        AdapterMixError: the model, the adapter, a data file or an output file is invalid.
    """
    if settings.compare and not settings.adapter:
        raise UsageError(
            "--compare measures the base model next to an adapter, and there is no adapter: add --adapter DIR.",
            code="retrieve.no-adapter",
        )
    if settings.plot:
        check_png(Path(settings.plot))
    sources = [open_adapter(Path(settings.adapter))] if settings.adapter else []
    scores = read_scores(Path(settings.transfer)) if settings.transfer else None
    files = _check_sentences(settings, watch)
    origins = [*map(manifest.origin, sources), *model_origins(settings.base)]
    check_split(files, origins, split=settings.split, watch=watch)
    base = load_base(settings.base, **settings.load_options())
    note_other_base(base, sources, watch)
    if any(source.meta.fusion for source in sources):
        watch.note("warning: a fused adapter is measured as a plain LoRA: texts of pairs have no sources.")
    pool = pooler_of(base, settings, sources)
    with acting(base, sources, heads=False):
        result = replace(retrieve_with(base, settings, pool=pool, watch=watch), split=settings.split)
    if settings.split == "test":
        name = sources[0].name if sources else "base"
        add_to_record(files, task="retrieve", adapter=name, watch=watch)
    if sources and settings.compare:
        result = replace(result, base=retrieve_with(base, settings, pool=pool, watch=watch))
    if scores is not None:
        result = replace(result, correlation=correlate(result.by_language(), scores))
    if settings.plot:
        draw(result.layers, Path(settings.plot), base=result.base.layers if result.base else None)
    return result
