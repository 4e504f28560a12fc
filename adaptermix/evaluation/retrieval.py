"""Margin-based translation retrieval (xsim), per layer and direction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters import AdapterSource, open_adapter
from ..analysis.figures import check_png
from ..errors import DataError, InvalidValueError, PlanError, UsageError
from ..io.temporary import temporary_folder
from ..merging.on_model import acting
from ..models.base import BaseModel, backbone, load_base, model_origins, note_other_base, reading
from ..models.pooling import Pooler, Standards, require_pooling
from ..models.positions import readable
from ..options import RetrieveSettings
from ..options.paths import holds_output
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..tasks.data import DataFile
from ..tasks.heads.base import cut_languages, cut_warning
from ..tasks.splits import add_to_record, check_split
from .margin import hits
from .retrieval_data import Candidates, directions_of, groups_of, language_of, open_candidates, sides_of
from .retrieval_figures import draw
from .retrieval_report import Hits, Retrieval
from .transfer import correlate, read_scores

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
    languages = [language_of(name)] * len(texts)
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


@contextmanager
def _room(shape: tuple[int, ...]) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that allocates the vectors of a language: on disk if all of them would not fit in memory."""
    with temporary_folder() as folder:
        count = itertools.count()

        def make() -> Tensor:
            number = next(count)
            if (number + 1) * math.prod(shape) * 4 <= _MEMORY:
                return torch.empty(shape)
            path = str(folder / str(number))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """The sentence vectors of one system.

    Args:
        by_text: Vectors of each list of sentences, by its key in `ParallelText`. [n+1 sentences width].
        standardize: How they are standardised before they are compared.
    """

    by_text: Mapping[str, Tensor]
    standardize: str


def _embedded(
    base: BaseModel,
    texts: Mapping[str, Sequence[str]],
    settings: RetrieveSettings,
    *,
    pool: Pooler | None,
    rooms: ExitStack,
    watch: Watcher,
) -> Vectors:
    """Return the vectors of every text, each embedded once; they may lie on disk until `rooms` are closed."""
    max_length = readable(base.model, settings.max_length)
    width = base.model.config.get_text_config().hidden_size
    make = rooms.enter_context(_room((base.layers + 1, max(map(len, texts.values())), width)))
    vectors = {
        key: embed(
            base,
            rows,
            batch_size=settings.batch_size,
            max_length=max_length,
            pool=pool,
            into=make(),
            watch=watch,
            name=key,
        )
        for key, rows in texts.items()
    }
    return Vectors(by_text=vectors, standardize=pool.standardize if pool else "none")


def retrieve_with(
    base: BaseModel,
    settings: RetrieveSettings,
    *,
    pool: Pooler | None = None,
    candidates: Vectors | None = None,
    watch: Watcher = SILENT,
) -> Retrieval:
    """Measure retrieval with a loaded model and its attached adapters.

    Every text is embedded once, and both directions of a pair are searched together.

    Args:
        base: The model.
        settings: The request.
        pool: Computes the vectors; default the mean over tokens.
        candidates: Vectors of the candidates from another system; default those of this one.
        watch: Receives progress.
    """
    parallel = directions_of(settings)
    counts = {name: len(parallel.texts[one]) for name, one, _ in parallel.directions}
    texts = sides_of(parallel, 1) if candidates else sides_of(parallel, 1, 2)
    with ExitStack() as rooms:
        queries = _embedded(base, texts, settings, pool=pool, rooms=rooms, watch=watch)
        layers = _compare(base, queries, candidates or queries, parallel.directions, k=settings.neighbours, watch=watch)
    return Retrieval(
        hits=layers,
        n=counts,
        groups=groups_of(settings, parallel),
        candidates_from=settings.candidates_from if candidates else None,
        seed=settings.seed,
    )


def _by_language(vectors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the vectors of each language over all files: a language is measured once, as in training."""
    result: dict[str, list[Tensor]] = {}
    for key, rows in vectors.items():
        result.setdefault(language_of(key), []).append(rows)
    return result


def _compare(
    base: BaseModel,
    queries: Vectors,
    candidates: Vectors,
    directions: Sequence[tuple[str, str, str]],
    *,
    k: int,
    watch: Watcher,
) -> tuple[dict[str, Hits], ...]:
    """Return for each layer and direction whether each sentence's translation was retrieved."""
    names = {(one, two): name for name, one, two in directions}
    layers = []
    with watch.track("search", base.layers + 1) as advance:
        for layer in range(base.layers + 1):
            by_direction: dict[str, Hits] = {}
            of_queries = _layer(queries, layer)
            of_candidates = of_queries if candidates is queries else _layer(candidates, layer)
            for (one, two), name in names.items():
                if name in by_direction:
                    continue
                x, y = of_queries(one).to(base.device), of_candidates(two).to(base.device)
                by_direction[name], back = (tuple(right.double().tolist()) for right in hits(x, y, k=k))
                if (two, one) in names and candidates is queries:
                    by_direction[names[two, one]] = back
            layers.append({name: by_direction[name] for name in names.values()})
            advance(1, f"layer {layer}")
    return tuple(layers)


def _layer(vectors: Vectors, layer: int) -> Callable[[str], Tensor]:
    """Return the function from the key of a text to its vectors at a layer, standardised as requested."""
    by_text = {key: rows[layer] for key, rows in vectors.by_text.items()}
    scores = Standards(vectors.standardize, _by_language(by_text))
    return lambda key: scores[language_of(key)](by_text[key]) if scores else by_text[key]


def _check_sentences(settings: RetrieveSettings, watch: Watcher) -> Sequence[DataFile]:
    """Refuse bad data before a model is loaded, and return the files."""
    parallel = directions_of(settings)
    groups_of(settings, parallel)
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


def _candidates(
    base: BaseModel, settings: RetrieveSettings, other: Candidates, rooms: ExitStack, watch: Watcher
) -> Vectors:
    """Return the vectors of the candidates, embedded by a model with the adapters of `other`."""
    texts = sides_of(directions_of(settings), 2)
    with acting(base, other.sources, heads=False):
        pool = pooler_of(base, settings, other.sources)
        return _embedded(base, texts, settings, pool=pool, rooms=rooms, watch=watch)


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
    other = open_candidates(settings)
    scores = read_scores(Path(settings.transfer)) if settings.transfer else None
    files = _check_sentences(settings, watch)
    origins = [*map(manifest.origin, sources), *model_origins(settings.base), *other.origins()]
    check_split(files, origins, split=settings.split, watch=watch)
    with ExitStack() as rooms:
        candidates = None
        if other.model:  # it leaves the memory before the base model is loaded
            candidates = _candidates(load_base(other.model, **settings.load_options()), settings, other, rooms, watch)
        base = load_base(settings.base, **settings.load_options())
        note_other_base(base, [*sources, *other.sources], watch)
        if settings.candidates_from and candidates is None:
            candidates = _candidates(base, settings, other, rooms, watch)
        result = _measured(base, settings, sources, candidates, watch)
    if settings.split == "test":
        add_to_record(files, task="retrieve", adapter=sources[0].name if sources else "base", watch=watch)
    if scores is not None:
        result = replace(result, correlation=correlate(result.by_language(), scores))
    if settings.plot:
        draw(result, Path(settings.plot))
    return result


def _measured(
    base: BaseModel,
    settings: RetrieveSettings,
    sources: Sequence[AdapterSource],
    candidates: Vectors | None,
    watch: Watcher,
) -> Retrieval:
    """Measure the base model with its adapters, and without them if requested."""
    if any(source.meta.fusion for source in sources):
        watch.note("warning: a fused adapter is measured as a plain LoRA: texts of pairs have no sources.")
    pool = pooler_of(base, settings, sources)
    measure = partial(retrieve_with, base, settings, pool=pool, candidates=candidates, watch=watch)
    with acting(base, sources, heads=False):
        result = replace(measure(), split=settings.split)
    return replace(result, base=measure()) if sources and settings.compare else result
