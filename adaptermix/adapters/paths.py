"""One path per module, for adapters that were trained on one base model in different classes.

The module `encoder.layer.0.dense` of an encoder is `bert.encoder.layer.0.dense` in the class with a classification
head, and `model.layers.0.mlp` of a language model is `model.language_model.layers.0.mlp` in the vision-language class.
Adapters that are used together get the paths of the largest of these classes; on a live model they get the paths of
that model. Everything with a path is renamed: factors, fully trained tensors, and the settings that select modules.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import AdapterFormatError
from ..io.weight_files import Renamed
from .keys import PREFIX, TOKENS
from .source import AdapterSource, open_adapter
from .state import TargetSpec

Rename = Callable[[str], str]

_ENCODERS = (
    *("albert", "bert", "bros", "camembert", "canine", "convbert", "data2vec_text", "ernie", "esm", "fnet", "gte"),
    *("ibert", "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mobilebert", "mpnet", "mra"),
    *("new", "nezha", "nomic_bert", "nystromformer", "rembert", "roberta", "roberta_prelayernorm", "roc_bert"),
    *("roformer", "splinter", "squeezebert", "tapas", "xlm_roberta", "yoso"),
)
_SPEECH = ("data2vec_audio", "hubert", "sew", "sew_d", "unispeech", "unispeech_sat", "wav2vec2", "wavlm")
# A class with a head has the model without the head as a submodule. Key: name of this submodule (transformers'
# `base_model_prefix`). Value: names of the modules in it.
_INSIDE: dict[str, frozenset[str]] = {
    **dict.fromkeys(_ENCODERS, frozenset({"embeddings", "embeddings_project", "encoder", "pooler"})),
    # The pooler of these two is not inside this submodule.
    **dict.fromkeys(("deberta", "electra"), frozenset({"embeddings", "embeddings_project", "encoder"})),
    **dict.fromkeys(_SPEECH, frozenset({"encoder", "feature_extractor", "feature_projection"})),
    "backbone": frozenset({"embeddings", "layers", "norm_f"}),
    "distilbert": frozenset({"embeddings", "transformer"}),
    "funnel": frozenset({"decoder", "embeddings", "encoder"}),
    "gpt_neox": frozenset({"embed_in", "final_layer_norm", "layers"}),
    "model": frozenset(
        {"decoder", "embed_tokens", "embeddings", "encoder", "final_norm", "language_model", "layers", "norm", "shared"}
    ),
    "transformer": frozenset(
        {
            *("blocks", "decoder", "encoder", "h", "layer", "ln_f", "shared", "word_embeddings", "wpe", "wte"),
            *("attentions", "ffns", "layer_norm1", "layer_norm2", "layer_norm_emb", "position_embeddings"),
        }
    ),
}
_HEADS = frozenset(
    {
        "classification_head",
        "classifier",
        "cls",
        "embed_out",
        "head",
        "lm_head",
        "pre_classifier",
        "qa_outputs",
        "score",
    }
)
# Names that vision-language classes give their text part, and names of its submodules.
_TEXT = frozenset({"language_model", "text_model"})
_TEXT_PARTS = frozenset({"embed_tokens", "layers", "norm"})
_CLASSES = _INSIDE.keys() | _TEXT | {"0", "auto_model"}  # the last two are names of sentence-transformers
_BLOCKS = re.compile(r"(?:^|\.)[A-Za-z_][^.]*\.(?=\d+(?:\.|$))")


def _blocks(path: str) -> str | None:
    """Return the path of the block list that contains a module, with a final dot; None outside the blocks."""
    match = _BLOCKS.search(path)
    return None if match is None else path[: match.end()]


def _tails(path: str) -> Iterator[tuple[str, str]]:
    """Yield a path cut in two at each dot: the start with its dot, and the rest; the whole path first."""
    start = 0
    while True:
        yield path[:start], path[start:]
        start = path.find(".", start) + 1
        if not start:
            return


def _cut(path: str, names: Collection[str]) -> tuple[str, str]:
    """Cut a path after its leading parts that are among the names: ("model.", "layers.0.mlp")."""
    pieces = path.split(".")
    count = next((n for n, piece in enumerate(pieces) if piece not in names), len(pieces))
    return "".join(f"{piece}." for piece in pieces[:count]), ".".join(pieces[count:])


def _text_parts(path: str) -> tuple[str, str]:
    return _cut(path, _TEXT | {"model"})


def same_text(one: str, other: str) -> bool:
    """Return whether two paths (or weight names) mean the same module of a language model, in two model classes.

    Example:
        >>> same_text("model.language_model.layers.0.mlp", "language_model.model.layers.0.mlp")
        True
    """
    (stem, rest), (other_stem, other_rest) = _text_parts(one), _text_parts(other)
    is_text = any(name in stem or name in other_stem for name in _TEXT)
    return is_text and rest == other_rest and rest.partition(".")[0] in _TEXT_PARTS | _HEADS


def _best(votes: Mapping[str, int]) -> str | None:
    """Return the prefix with the most votes. On a tie return the only one that names a text part, or None."""
    most = [prefix for prefix, count in votes.items() if count == max(votes.values())]
    if len(most) > 1:
        most = [prefix for prefix in most if _TEXT & set(prefix.split("."))]
    return most[0] if len(most) == 1 else None


def _before(inside: Iterable[str], outside: Iterable[str]) -> Counter[str]:
    """Count for each prefix how many paths of `inside` occur with it in `outside`."""
    ends: dict[str, list[str]] = defaultdict(list)
    for path in outside:
        for before, rest in _tails(path):
            if before:
                ends[rest].append(before)
    return Counter(before for path in inside for before in ends.get(path, ()))


def prefix_between(inner: Iterable[str], outer: Iterable[str]) -> str | None:
    """Return the prefix that the paths of one adapter have in another adapter, or None.

    First the paths of all modules are compared. If no path of one is a path of the other with a prefix, the paths of
    the block lists are compared, and if these do not match either, the names that classes with a head use.

    Args:
        inner: Paths without a prefix.
        outer: Paths that may have one.

    Example:
        >>> prefix_between(["encoder.layer.0.dense"], ["bert.encoder.layer.1.key"])
        'bert.'
    """
    inside, outside = ({path for path in paths if path.partition(".")[0] not in _HEADS} for paths in (inner, outer))
    if not inside or not outside or inside & outside:
        return None
    votes = _before(inside, outside)
    if not votes:
        lists, others = ({blocks for path in paths if (blocks := _blocks(path))} for paths in (inside, outside))
        votes = Counter() if lists & others else _before(lists, others)
    if votes:
        return _best(votes)
    firsts = {path.partition(".")[0] for path in outside}
    name = firsts.pop() if len(firsts) == 1 else ""
    fits = {path.partition(".")[0] for path in inside} <= _INSIDE.get(name, frozenset())
    return f"{name}." if fits else None


def two_roots(paths: Iterable[str]) -> tuple[str, str] | None:
    """Return two paths that cannot be in one model, since only one of them is of a class with a head; None if all can.

    Example:
        >>> two_roots(["bert.encoder.layer.0.dense", "encoder.layer.0.key"])
        ('bert.encoder.layer.0.dense', 'encoder.layer.0.key')
    """
    firsts: dict[str, str] = {}
    lists: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(paths):
        first, _, rest = path.partition(".")
        # A single layer of this name is an output head, not an encoder or decoder.
        if first not in ("decoder", "encoder") or rest not in ("", "bias", "weight"):
            firsts.setdefault(first, path)
        blocks = _blocks(path)
        if blocks:
            stem, rest = _cut(blocks, _CLASSES)
            lists[rest].setdefault(stem, path)
    for name, path in firsts.items():
        for inner in sorted(_INSIDE.get(name, frozenset()) & firsts.keys()):
            return path, firsts[inner]
    for stems in lists.values():
        if len(stems) > 1:
            one, other, *_ = stems.values()
            return one, other
    return None


def check_stored_names(source: AdapterSource) -> None:
    """Refuse an adapter folder that this package can read and merge, but that PEFT alone would load only in part.

    Raises:
        AdapterFormatError: its tensor names contain wrapper modules, or its modules belong to two model classes.
    """
    clash = two_roots(source.modules)
    if isinstance(source.file, Renamed) or clash is not None:
        what = f"belong to two model classes ('{clash[0]}', '{clash[1]}')" if clash else "have names of wrapper modules"
        rewrite = f" Rewrite it: adaptermix merge {source.path} --weights 1 --out NEW." if clash is None else ""
        raise AdapterFormatError(
            f"{source.path} must have the tensor names that PEFT writes, but its tensors {what}, so PEFT would not "
            f"load all of them.{rewrite}",
            code="adapter-file.stored-names",
        )


def _entry(name: str, rename: Rename) -> str:
    """Return the new form of an entry of `modules_to_save`: a path is renamed, unless it is still a suffix."""
    new = rename(name)
    return name if "." not in name or new.endswith(f".{name}") else new


def _renamed(
    source: AdapterSource, rename: Rename, rename_whole: Rename | None = None, *, keeps_old: bool = False
) -> AdapterSource:
    """Return an adapter with renamed paths; the same adapter if no path changes, or if two would become equal.

    Args:
        source: The adapter.
        rename: New path of a module.
        rename_whole: New name of a whole tensor, without PEFT's prefix; default as a module.
        keeps_old: Whether the target modules list the old paths too. PEFT can then build the LoRA on a model of the
            old class, and reports which keys are missing there.
    """
    whole = rename_whole or rename
    paths = {path: rename(path) for path in source.modules}
    saved = {key: PREFIX + whole(key.removeprefix(PREFIX)) for key in source.saved_headers}
    unchanged = all(old == new for names in (paths, saved) for old, new in names.items())
    if unchanged or len(set(paths.values())) < len(paths) or len(set(saved.values())) < len(saved):
        return source
    meta = replace(
        source.meta,
        # Full paths, since a suffix could also select modules in other parts of the new class.
        targets=TargetSpec(modules=tuple(sorted({*paths.values(), *(paths if keeps_old else ())}))),
        saved_modules=tuple(_entry(name, whole) for name in source.meta.saved_modules),
        trainable_tokens={_entry(name, whole): ids for name, ids in source.meta.trainable_tokens.items()},
    )
    kept = {key: key for parts in source.parts.values() for key in parts.values()}
    return replace(
        source,
        settings=replace(source.settings, meta=meta),
        modules={paths[path]: header for path, header in source.modules.items()},
        parts={paths[path]: parts for path, parts in source.parts.items()},
        file=Renamed(source.file, kept | {new: old for old, new in saved.items()}),
        saved_headers={saved[key]: header for key, header in source.saved_headers.items()},
        was_moved=True,
    )


def _under(prefix: str) -> Rename:
    """Return a function that puts a prefix before paths, but not before paths of a head."""
    return lambda path: path if path.partition(".")[0] in _HEADS else prefix + path


def _without_data_parallel(source: AdapterSource, known: Set[str]) -> AdapterSource:
    """Return an adapter without `module` (DataParallel) in its paths, if more of them are then known paths."""
    plain = _renamed(source, lambda path: path.replace(".module.", "."))
    return plain if plain is not source and known & plain.modules.keys() > known & source.modules.keys() else source


def _swap(path: str, old: str, new: str) -> str:
    return new + path.removeprefix(old) if path.startswith(old) else path


def _is_class_part(prefix: str) -> bool:
    """Whether every part of a prefix is a name that classes give to the model without the head."""
    return all(name in _CLASSES for name in prefix.split(".")[:-1])


def _swap_into(paths: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """Return the prefix to replace and its replacement that make most paths equal to those of a model, or None."""
    cuts: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        inside = len((_blocks(path) or path).removesuffix(".").rpartition(".")[0])
        for before, rest in _tails(path):
            if len(before) <= inside + 1:
                cuts[rest].append(before)
    votes: Counter[tuple[str, str]] = Counter()
    for path in known:
        for before, rest in _tails(path):
            for old in cuts.get(rest, ()):
                if old != before and (not old or not before or (_is_class_part(old) and _is_class_part(before))):
                    votes[old, before] += 1
    if not votes:
        return None
    best = max(votes, key=lambda swap: (votes[swap], bool(_TEXT & set(swap[1].split("."))), -len("".join(swap)), swap))
    return best if votes[best] > len(set(paths).intersection(known)) else None


def in_model(paths: Collection[str], modules: Iterable[str]) -> dict[str, str]:
    """Return the path of each module in a model; an unchanged path if no change of prefix helps.

    Args:
        paths: Paths of modules, such as those in a checkpoint's files.
        modules: Paths of all modules of the model.
    """
    known = set(modules)
    swap = None if known.issuperset(paths) else _swap_into(paths, known)
    return {path: path if swap is None or path in known else _swap(path, *swap) for path in paths}


def fitted(source: AdapterSource, modules: Iterable[str]) -> AdapterSource:
    """Return an adapter with the paths of a model; unchanged if its paths are already there, or if no change helps.

    Args:
        source: The adapter.
        modules: Paths of all modules of the model.
    """
    known = set(modules)
    source = _without_data_parallel(source, known)
    if source.modules.keys() <= known:
        return source
    swap = _swap_into(source.modules.keys(), known)
    if swap is None:
        return source

    def whole(name: str) -> str:
        module = name.removesuffix(f".{TOKENS}") if name.endswith(TOKENS) else name.rpartition(".")[0]
        there = module.removesuffix(".base_layer") in known
        return name if there or (not swap[0] and name.partition(".")[0] in _HEADS) else _swap(name, *swap)

    return _renamed(source, lambda path: path if path in known else _swap(path, *swap), whole)


def open_adapters(paths: Sequence[str | Path], *, allow_pickle: bool = False) -> tuple[AdapterSource, ...]:
    """Open adapters that are used together, with one path per module of the base model; see `aligned`.

    Raises:
        AdapterFormatError: as `open_adapter`.
    """
    return aligned(list(map(partial(open_adapter, allow_pickle=allow_pickle), paths)))


def aligned(sources: Sequence[AdapterSource]) -> tuple[AdapterSource, ...]:
    """Return adapters with the paths of one model class: the largest one that an adapter was trained in.

    Encoders get the prefix that a class with a head gives them, and language models the prefix of the text part of a
    vision-language class.
    """
    result = list(sources)
    for at, source in enumerate(result):
        paths = {path for number, other in enumerate(result) if number != at for path in other.modules}
        result[at] = _without_data_parallel(source, paths)
    result = _in_one_text_class(result)
    for _ in result:
        for at, source in enumerate(result):
            others = [other for number, other in enumerate(result) if number != at]
            prefixes = {prefix_between(source.modules, other.modules) for other in others} - {None}
            if prefixes:
                result[at] = _renamed(source, _under(max(prefixes, key=lambda prefix: len(prefix or "")) or ""))
    return tuple(result)


def _in_one_text_class(sources: Sequence[AdapterSource]) -> list[AdapterSource]:
    """Return adapters with the paths of one class, if one was trained in a vision-language class; else unchanged."""
    stems = {
        stem
        for source in sources
        for stem, rest in map(_text_parts, source.modules)
        if rest.partition(".")[0] in _TEXT_PARTS and _TEXT & set(stem.split("."))
    }
    if not stems:
        return list(sources)
    # transformers 5 puts `model.` first; older files have `language_model.model.`
    chosen = max(stems, key=lambda stem: (stem.startswith("model."), len(stem), stem))

    def rename(path: str) -> str:
        rest = _text_parts(path)[1]
        first = rest.partition(".")[0]
        if first in _TEXT_PARTS:
            return chosen + rest
        if first in _HEADS:
            return rest if chosen.startswith("model.") else f"{chosen.partition('.')[0]}.{rest}"
        return path

    return [_renamed(source, rename, keeps_old=True) for source in sources]
